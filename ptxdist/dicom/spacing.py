"""Size of a radiograph's pixels in mm, where the header can be trusted.

Owns: the rule from spacing tags to mm (PS3.3 10.7.1, C.8.11.4). A spacing that cannot be trusted has a reason instead.

Imager Pixel Spacing holds in the plane of the detector, on which the patient appears magnified, by a few per cent in a
chest; the Estimated Radiographic Magnification Factor divides this out. Pixel Spacing holds in the patient only with a
calibration type; if it equals Imager Pixel Spacing, it holds on the detector; alone, its plane is unknown. Secondary
captures, such as the challenge's, are often resized and keep the spacing of the original.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ptxdist.dicom import tags
from ptxdist.dicom.tags import Tags

_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
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


PNG = Spacing(reason="a PNG does not say how large its pixels are")


def spacing_of(file: Tags) -> Spacing:
    """Spacing of a file that was read with its pixels, by the rule at the top of this module; never raises."""
    if file.text(tags.SOP_CLASS).startswith(_SECONDARY_CAPTURE):
        return Spacing(reason="a Secondary Capture may have been resized, and its spacing then belongs to another size")
    pixel, detector = pair(file.text(tags.PIXEL_SPACING)), pair(file.text(tags.DETECTOR_SPACING))
    if pixel and file.text(tags.CALIBRATION) in ("GEOMETRY", "FIDUCIAL"):
        return _plausible(file, pixel, "patient")
    if detector is None:
        return Spacing(
            reason="Pixel Spacing without a calibration does not say in which plane it holds" if pixel else "no spacing"
        )
    if pixel and not all(math.isclose(*both, rel_tol=1e-3) for both in zip(pixel, detector, strict=True)):
        return Spacing(reason="Pixel Spacing and Imager Pixel Spacing differ, and nothing says why")
    factor, _ = pair(file.text(tags.MAGNIFICATION) + "\\1") or (0.0, 1.0)
    if factor >= 1:
        return _plausible(file, (detector[0] / factor, detector[1] / factor), "patient")
    return _plausible(file, detector, "detector")


def _plausible(file: Tags, spacing: tuple[float, float], plane: str) -> Spacing:
    height, width = file.whole(tags.ROWS, 0) * spacing[0], file.whole(tags.COLUMNS, 0) * spacing[1]
    if not (_CHEST_MM[0] <= height <= _CHEST_MM[1] and _CHEST_MM[0] <= width <= _CHEST_MM[1]):
        return Spacing(reason=f"by its spacing the image would show {width:.0f} x {height:.0f} mm, which is no chest")
    return Spacing(spacing[0], spacing[1], plane)


def pair(text: str) -> tuple[float, float] | None:
    """Two sizes; None when they are missing or are no sizes, as a spacing of 0 is."""
    try:
        height, width = map(float, text.split("\\"))
    except ValueError:
        return None
    return (height, width) if min(height, width) > 0 and math.isfinite(height + width) else None
