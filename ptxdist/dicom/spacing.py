"""Size of a radiograph's pixels in mm, where the header can be trusted.

Owns: the rule from spacing tags to mm (PS3.3 10.7.1, C.8.11.4). A spacing that cannot be trusted has a reason instead.

Imager Pixel Spacing holds in the plane of the detector, on which the patient appears magnified, by a few per cent in a
chest; the Estimated Radiographic Magnification Factor divides this out. Pixel Spacing holds in the patient only with a
calibration type; if it equals Imager Pixel Spacing, it holds on the detector; alone, its plane is unknown. Secondary
captures, such as the challenge's, are often resized and keep the spacing of the original.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from io import BytesIO

import pydicom
from pydicom.uid import SecondaryCaptureImageStorage

from ptxdist.dicom.png import SIGNATURE
from ptxdist.dicom.tags import with_preamble

_CHEST_MM = (80.0, 600.0)  # from a detector for newborns to beyond the largest one (430 mm, tilted or stitched)


@dataclass(frozen=True)
class Spacing:
    """Size of a pixel in mm down a column and along a row, and its plane: "patient" or "detector".

    `reason` says why the size is unknown; then the other fields are None and "".
    """

    row_mm: float | None = None
    column_mm: float | None = None
    plane: str = ""
    reason: str = ""

    def area_mm2(self, area_px: int) -> float | None:
        """Area of `area_px` pixels in mm²; None where the size of a pixel is unknown."""
        return None if self.row_mm is None or self.column_mm is None else area_px * self.row_mm * self.column_mm


def read_spacing(content: bytes) -> Spacing:
    """Spacing of a file that was read as a radiograph (DICOM or PNG); never raises."""
    if content.startswith(SIGNATURE):
        return Spacing(reason="a PNG does not say how large its pixels are")
    try:
        with warnings.catch_warnings(action="ignore"):
            return spacing_of(pydicom.dcmread(BytesIO(with_preamble(content)), stop_before_pixels=True, force=True))
    except Exception:  # pydicom raises almost anything on damaged files
        return Spacing(reason="the header's spacing cannot be read")


def spacing_of(header: pydicom.Dataset) -> Spacing:
    """Spacing from a header, by the rule at the top of this module."""
    if str(header.get("SOPClassUID", "")).startswith(str(SecondaryCaptureImageStorage)):
        return Spacing(reason="a Secondary Capture may have been resized, and its spacing then belongs to another size")
    pixel, detector = _pair(header, "PixelSpacing"), _pair(header, "ImagerPixelSpacing")
    calibrated = str(header.get("PixelSpacingCalibrationType", "") or "") in ("GEOMETRY", "FIDUCIAL")
    if calibrated and pixel:
        return _plausible(header, pixel, "patient")
    if detector is None:
        return Spacing(
            reason="Pixel Spacing without a calibration does not say in which plane it holds" if pixel else "no spacing"
        )
    if pixel and not all(math.isclose(*both, rel_tol=1e-3) for both in zip(pixel, detector, strict=True)):
        return Spacing(reason="Pixel Spacing and Imager Pixel Spacing differ, and nothing says why")
    factor = _number(header.get("EstimatedRadiographicMagnificationFactor"))
    if factor is not None and factor >= 1:
        return _plausible(header, (detector[0] / factor, detector[1] / factor), "patient")
    return _plausible(header, detector, "detector")


def _plausible(header: pydicom.Dataset, spacing: tuple[float, float], plane: str) -> Spacing:
    height, width = header.Rows * spacing[0], header.Columns * spacing[1]
    if not (_CHEST_MM[0] <= height <= _CHEST_MM[1] and _CHEST_MM[0] <= width <= _CHEST_MM[1]):
        return Spacing(reason=f"by its spacing the image would show {width:.0f} x {height:.0f} mm, which is no chest")
    return Spacing(spacing[0], spacing[1], plane)


def _pair(header: pydicom.Dataset, name: str) -> tuple[float, float] | None:
    value = header.get(name)
    if value is None or isinstance(value, str) or len(value) != 2:
        return None
    numbers = [_number(item) for item in value]
    return None if None in numbers else (numbers[0] or 0.0, numbers[1] or 0.0)


def _number(value: object) -> float | None:
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if math.isfinite(number) and number > 0 else None
