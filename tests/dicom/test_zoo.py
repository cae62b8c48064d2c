"""pydicom's test files against an independent reading: equal grey levels, or refused with the reason that is expected.

Independent are pydicom's own decoding (any plugin), its modality LUT and its VOI LUT.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from pydicom import Dataset, dcmread
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from ptxdist.dicom.decoding import decode
from ptxdist.dicom.parsing import read_tags
from ptxdist.dicom.radiograph import read_header, read_radiograph
from ptxdist.errors import DicomError

FILES = sorted((Path(pydicom.__file__).parent / "data" / "test_files").rglob("*.dcm"))
# The same pixels of two files of pydicom: the exact inverse DCT of their coefficients, rounded.
EXTENDED = np.array([
    [1, 1, 1, 1, 1, 1], [1, 1, 33, 56, 1, 1], [1, 45, 31, 51, 68, 15], [15, 46, 31, 54, 30, 15],
    [3, 21, 58, 52, 25, 14], [0, 34, 19, 15, 37, 1], [1, 56, 13, 41, 19, 1], [1, 20, 1, 25, 1, 1],
    [1, 5, 23, 35, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1],
])  # fmt: skip
# Why files are refused, by a part of the sentence; every other reason is a surprise.
REASONS = (
    "frames", "not grayscale", "contains no image", "bits per pixel", "no pixel data", "cut off", "damaged",
    "not DICOM", "no SOPInstanceUID", "invalid SOPInstanceUID", "not square", "single grey level", "contradicts itself",
    "is encoded as", "no DICOM file", "does not read",
    "not a DICOM file", "but its header says", "invalid number", "does not say how it is encoded",
    "no image by its SOP class",
)  # fmt: skip


def decoded(path: Path) -> npt.NDArray[np.generic]:
    content = path.read_bytes()
    header = read_header(content, b"")
    return decode(read_tags(content, pixels=True), header.rows, header.columns)


def independent(file: Dataset) -> npt.NDArray[np.float64]:
    """Grey levels 0..255, air dark, by pydicom's functions."""
    stored = file.pixel_array
    values = np.asarray(apply_modality_lut(stored, file), np.float64)
    if "VOILUTSequence" in file and len(file.VOILUTSequence):
        bits = int(file.VOILUTSequence[0].LUTDescriptor[2])
        unit = np.asarray(apply_voi_lut(values.astype(np.int64), file, prefer_lut=True), np.float64) / (2**bits - 1)
    elif file.get("WindowWidth") not in (None, ""):
        shown = np.asarray(apply_voi_lut(values, file, prefer_lut=False), np.float64)
        # pydicom maps the window to the range that the stored bits can have.
        low, high = (0, 2**file.BitsStored - 1) if not file.PixelRepresentation else (
            -(2 ** (file.BitsStored - 1)), 2 ** (file.BitsStored - 1) - 1
        )  # fmt: skip
        slope, intercept = float(file.get("RescaleSlope", 1) or 1), float(file.get("RescaleIntercept", 0) or 0)
        low, high = low * slope + intercept, high * slope + intercept
        unit = (shown - low) / (high - low)
    elif stored.dtype == np.uint8 and file.BitsStored == 8 and np.array_equal(values, stored):
        unit = values / 255
    else:
        unit = (values - values.min()) / max(1e-9, values.max() - values.min())
    grey = np.clip(unit, 0, 1) * 255
    return 255 - grey if file.PhotometricInterpretation == "MONOCHROME1" else grey


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_of_pydicom_is_read_as_pydicom_reads_it_or_refused(path: Path) -> None:
    found, reason = None, ""
    try:
        found = read_radiograph(path.read_bytes(), name=path.name).pixels
    except DicomError as error:
        reason = str(error)
    if found is None:
        assert any(part in reason for part in REASONS), reason
        assert len(reason) < 300
        return
    with warnings.catch_warnings(action="ignore"):
        file = dcmread(path, force=True)
        if "PixelPaddingValue" in file:
            pytest.skip("padding is made black, which pydicom does not do")
        if path.stem in ("JPEG-lossy", "JPGExtended"):  # no plugin of pydicom decodes them here
            assert np.abs(decoded(path)[::101, 40::37].astype(int) - EXTENDED).max() <= 1
            return
        expected = independent(file)
    assert np.abs(found - expected).max() <= 1


def test_the_zoo_is_large() -> None:
    assert len(FILES) > 50
