"""One DICOM file -> Radiograph: 8-bit pixels and the header fields ptxdist uses.

Owns: DICOM tags, the choice of the decoder, and the rule from stored values to grey levels. Refuses: everything that is
not one single-frame grayscale image, with a reason that ends up in rejects.csv. Called by: `catalog` (headers),
`preprocess` and `learn.predict` (pixels).

From stored values to uint8 (PS3.3 C.11.1, C.11.2, C.7.6.3.1.2), in this order:
1. 8-bit unsigned values without rescale, window or LUT are taken as they are.
2. Otherwise: modality LUT or rescale; then the first window becomes 0..255, or, with a VOI LUT, which is applied
   instead of a window, or with neither, the range of values in the image does.
3. MONOCHROME1, or Presentation LUT Shape INVERSE, is inverted, so that air is dark in every Radiograph.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.encaps import get_frame
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_modality_lut, apply_voi
from pydicom.uid import JPEGBaseline8Bit

from ptxdist.errors import DicomError

MAX_PIXELS = 64 * 1024 * 1024  # a radiograph of 8k x 8k; anything above is refused before it is decoded

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Header:
    """What ptxdist keeps of a DICOM header; `patient` is a salted hash, never an identifier."""

    case_id: str
    patient: str
    rows: int
    columns: int
    view: str
    sex: str
    age: int | None


@dataclass(frozen=True)
class Radiograph:
    """One chest X-ray: `pixels` is uint8 (rows, columns), air dark, bone bright."""

    header: Header
    pixels: Pixels


def read_bytes(path: Path) -> bytes:
    """Content of a file; DicomError when it cannot be read or is empty."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DicomError(f"cannot be read: {error.strerror}") from error
    if not content:
        raise DicomError("is empty (0 bytes)")
    return content


def read_header(content: bytes, salt: bytes) -> Header:
    """Header of a file's content, its pixels left alone; `salt` keys the hash of the PatientID.

    Raises DicomError when the content is not DICOM, has no image, or has one that ptxdist does not take.
    """
    return _header(_dataset(content, stop_before_pixels=True), salt)


def read_radiograph(content: bytes, salt: bytes = b"") -> Radiograph:
    """Decode a file's content by the rule at the top of this module.

    Raises DicomError with a reason for people: not DICOM, several frames, colour, no pixel data, truncated or damaged.
    """
    dataset = _dataset(content, stop_before_pixels=False)
    header = _header(dataset, salt)
    if "PixelData" not in dataset:
        raise DicomError("has no pixel data")
    stored = _decode(dataset, header)
    try:
        pixels = _to_uint8(dataset, stored)
    except Exception as error:  # a window, rescale or look-up table that is malformed
        reason = type(error).__name__
        raise DicomError(f"has a window, rescale or look-up table that cannot be applied ({reason})") from error
    return Radiograph(header, pixels)


def _dataset(content: bytes, *, stop_before_pixels: bool) -> pydicom.Dataset:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd values (ages, UIDs) are common and harmless here
            dataset = pydicom.dcmread(BytesIO(content), stop_before_pixels=stop_before_pixels)
    except InvalidDicomError:
        raise DicomError("is not a DICOM file (no DICM prefix)") from None
    except Exception as error:  # pydicom raises almost anything on damaged files
        raise DicomError(f"is a damaged DICOM file ({type(error).__name__})") from error
    if not len(dataset):  # where the file ends inside a value, pydicom drops all of them
        raise DicomError("is cut off: the file ends in the midst of its data")
    return dataset


def _header(dataset: pydicom.Dataset, salt: bytes) -> Header:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _checked_header(dataset, salt)
    except DicomError:
        raise
    except Exception as error:
        raise DicomError(f"has a header that cannot be read ({type(error).__name__})") from error


def _checked_header(dataset: pydicom.Dataset, salt: bytes) -> Header:
    rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    frames = int(dataset.get("NumberOfFrames") or 1)
    samples = int(dataset.get("SamplesPerPixel") or 1)
    photometric = str(dataset.get("PhotometricInterpretation") or "")
    case_id = str(dataset.get("SOPInstanceUID") or "")
    if not case_id:
        raise DicomError("has no SOPInstanceUID")
    if rows < 1 or columns < 1:
        raise DicomError("holds no image (Rows or Columns missing)")
    if rows * columns > MAX_PIXELS:
        raise DicomError(f"claims {columns}x{rows} px, more than the {MAX_PIXELS:,} px that are accepted")
    if frames != 1:
        raise DicomError(f"has {frames} frames; only single images are accepted")
    if samples != 1 or not photometric.startswith("MONOCHROME"):
        raise DicomError(f"is not grayscale ({samples} samples per px, {photometric or 'no photometric value'})")
    patient = str(dataset.get("PatientID") or "")
    return Header(
        case_id=case_id,
        patient=hashlib.blake2b(patient.encode(), key=salt[:64], digest_size=8).hexdigest() if patient else "",
        rows=rows,
        columns=columns,
        view=_word(dataset.get("ViewPosition")),
        sex=_word(dataset.get("PatientSex")),
        age=_age(dataset.get("PatientAge")),
    )


def _word(value: object) -> str:
    # Only short code strings are kept: free text could identify somebody.
    text = str(value or "").strip().upper()
    return text if len(text) <= 4 and text.isalpha() else ""


def _age(value: object) -> int | None:
    """Years from an age string: `062Y` as the standard has it, or the `62` of the challenge; None if neither."""
    text = str(value or "").strip().upper()
    if text.endswith(("D", "W", "M")) and text[:-1].isdigit():
        return int(text[:-1]) // {"D": 365, "W": 52, "M": 12}[text[-1]]
    text = text.removesuffix("Y")
    return int(text) if text.isdigit() and int(text) <= 120 else None


def _decode(dataset: pydicom.Dataset, header: Header) -> npt.NDArray[Any]:
    try:
        if dataset.file_meta.TransferSyntaxUID == JPEGBaseline8Bit:
            # cv2 gives the same pixels as Pillow, pydicom's reference here, several times faster than pydicom's
            # default plugin, and None for a truncated stream instead of a half-grey image.
            frame = np.frombuffer(get_frame(dataset.PixelData, 0, number_of_frames=1), np.uint8)
            pixels = cv2.imdecode(frame, cv2.IMREAD_UNCHANGED)
            if pixels is None:
                raise DicomError("has truncated or damaged JPEG data")
        else:
            pixels = dataset.pixel_array
    except DicomError:
        raise
    except Exception as error:  # each decoder plugin has errors of its own
        syntax = getattr(dataset.file_meta.get("TransferSyntaxUID"), "name", "unknown transfer syntax")
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise DicomError(f"has pixel data that cannot be decoded ({syntax}: {reason})") from error
    if pixels.shape != (header.rows, header.columns):
        raise DicomError(f"decodes to {pixels.shape}, but its header says {(header.rows, header.columns)}")
    return np.asarray(pixels)


def _to_uint8(dataset: pydicom.Dataset, stored: npt.NDArray[Any]) -> Pixels:
    rescaled = bool(dataset.get("ModalityLUTSequence")) or (
        float(dataset.get("RescaleSlope") or 1) != 1 or float(dataset.get("RescaleIntercept") or 0) != 0
    )
    has_lut, has_window = bool(dataset.get("VOILUTSequence")), bool(dataset.get("WindowWidth"))
    if stored.dtype == np.uint8 and not (rescaled or has_lut or has_window):
        pixels = stored
    else:
        values = np.asarray(apply_modality_lut(stored, dataset))
        if has_lut:
            values, has_window = np.asarray(apply_voi(values, dataset)), False
        unit = _window(dataset, values) if has_window else _full_range(values)
        pixels = np.rint(unit * 255).astype(np.uint8)
    inverse = str(dataset.get("PresentationLUTShape") or "") == "INVERSE"
    if (dataset.PhotometricInterpretation == "MONOCHROME1") or inverse:
        pixels = 255 - pixels
    return np.ascontiguousarray(pixels, dtype=np.uint8)


def _full_range(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    low, high = float(values.min()), float(values.max())
    return (values.astype(np.float64) - low) / max(high - low, 1.0)


def _window(dataset: pydicom.Dataset, values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Values 0..1 through the first window (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    center, width = (
        float(value[0] if isinstance(value, pydicom.multival.MultiValue) else value)
        for value in (dataset.WindowCenter, dataset.WindowWidth)
    )
    x = values.astype(np.float64)
    match str(dataset.get("VOILUTFunction") or "LINEAR"):
        case "SIGMOID":
            return np.asarray(1.0 / (1.0 + np.exp(-4.0 * (x - center) / width)))
        case "LINEAR_EXACT":
            return np.asarray(np.clip((x - center) / width + 0.5, 0.0, 1.0))
        case _:
            return np.asarray(np.clip((x - (center - 0.5)) / max(width - 1.0, 1.0) + 0.5, 0.0, 1.0))
