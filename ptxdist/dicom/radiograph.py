"""Reading one DICOM or PNG file as a `Radiograph`: 8-bit pixels and the header fields that ptxdist uses.

Owns: what counts as a radiograph, and which header fields are kept. Refuses: everything but one single-frame grayscale
image, with a reason that is written to rejects.csv. `tags` parses the file, `decoding` decodes it, `codestream` checks
compressed images, `pixels` computes the grey levels, and `png` reads PNG files.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ptxdist.dicom import tags
from ptxdist.dicom.kind import is_image_class
from ptxdist.dicom.parsing import read_tags
from ptxdist.dicom.pixels import Pixels, to_uint8
from ptxdist.dicom.png import DECODER, SIGNATURE, check_size, decode_png, read_png_header, refuse_not_square
from ptxdist.dicom.spacing import PNG, Spacing, pair, spacing_of
from ptxdist.dicom.syntax import decoder_of
from ptxdist.dicom.synthetic import is_phantom
from ptxdist.dicom.tags import Tags
from ptxdist.errors import DicomError, raise_limit

# Sizes of a pixel, down a column and along a row (PS3.3 10.7.1.3 and C.7.6.3.1.7).
_SIZES = {
    "Pixel Aspect Ratio": tags.ASPECT,
    "Pixel Spacing": tags.PIXEL_SPACING,
    "Imager Pixel Spacing": tags.DETECTOR_SPACING,
    "Nominal Scanned Pixel Spacing": tags.SCANNED_SPACING,
}
MAX_BYTES = tags.MAX_INFLATED
_MOST_ID_BYTES = 200  # of a PNG's name; other files are named by it
CASE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")  # valid as a file name everywhere; every UID matches


@dataclass(frozen=True)
class Header:
    """What ptxdist keeps of a file's header. `patient` is a salted hash, never an identifier; "" without a PatientID.

    `age` is in years. `decoder` is the name and version of the package that decodes the pixels. The `case_id` of a PNG
    is the stem of its file name; the fields that a PNG does not have are "" or None. `orientation` are the directions
    of the patient along a row and down a column, such as "LF" (left, feet). `synthetic` marks a phantom.
    """

    case_id: str
    patient: str
    rows: int
    columns: int
    view: str
    sex: str
    age: int | None
    decoder: str
    orientation: str = ""
    synthetic: bool = False


@dataclass(frozen=True)
class Radiograph:
    """One chest X-ray: `pixels` is uint8 (rows, columns), air dark, bone bright; `spacing` the size of a pixel."""

    header: Header
    pixels: Pixels
    spacing: Spacing


def read_bytes(path: Path) -> bytes:
    """Content of a regular file; never waits for a pipe or a device.

    Raises DicomError when it cannot be read, is not a regular file, is empty, or has more than `MAX_BYTES` bytes.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DicomError("is not a regular file")
            if status.st_size > MAX_BYTES:
                raise DicomError(f"has {status.st_size:,} bytes; at most {MAX_BYTES:,} are accepted")
            content = file.read(status.st_size + 1)
    except OSError as error:
        raise DicomError(f"cannot be read: {error.strerror}") from error
    if not content:
        raise DicomError("is empty (0 bytes)")
    if len(content) != status.st_size:
        raise DicomError("was changed while it was being read")
    return content


def read_start(path: Path, size: int) -> bytes | None:
    """Up to `size` first bytes of a regular file, b"" of anything else; None when it cannot be read."""
    try:
        with open(path, "rb", buffering=0, opener=_open_at_once) as file:
            return file.read(size)
    except DicomError:
        return b""
    except OSError as error:
        raise_limit(error)
        return None


def _open_at_once(path: str, flags: int) -> int:
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a device can have effects
        raise DicomError("is not a regular file")
    return os.open(path, flags | os.O_NONBLOCK)


# Raised when the rules from stored values to grey levels change: shards with files of more than 8 bits are rewritten.
_READING = ", reading 2"


def read_header(content: bytes, salt: bytes, name: str = "") -> Header:
    """Header of a file's content; the pixels are not decoded. `salt` keys the hash of the PatientID.

    `name` is the file's name, which a PNG needs. Raises DicomError when the content is neither DICOM nor PNG, has no
    image, or has one that ptxdist does not accept, and for a PNG whose name cannot be an image id.
    """
    if content.startswith(SIGNATURE):
        if not is_file_id(Path(name).stem):
            raise DicomError(
                "is a PNG whose name cannot be an image id: rename it to readable characters, at most 200 bytes of "
                "UTF-8, or set a locale with UTF-8 (LC_ALL=C.UTF-8)"
            )
        return _png_header(content, name)
    return _header(read_tags(content, pixels=False), salt)


def is_file_id(stem: str) -> bool:
    """Whether a file's name without its suffix can be an image id, in tables and in the names of other files."""
    is_text = stem.isprintable() and stem == stem.strip() and "\\" not in stem  # surrogates are not printable
    return is_text and len(stem.encode()) <= _MOST_ID_BYTES


def read_radiograph(
    content: bytes, salt: bytes = b"", name: str = "", check: Callable[[Tags | None], None] = lambda file: None
) -> Radiograph:
    """Decode a file's content by the rule at the top of `pixels`; the range of a 16-bit PNG's values becomes 0..255.

    `check` is called with the parsed header, None for a PNG, before anything is decoded, and may refuse the file.
    Raises DicomError as `read_header`, and when pixel data are missing, truncated, damaged or of another size.
    """
    if content.startswith(SIGNATURE):
        check(None)
        header = _png_header(content, name)
        return Radiograph(header, to_uint8(decode_png(content), Tags("")), PNG)
    from ptxdist.dicom.decoding import decode  # late: headers need no decoder

    file = read_tags(content, pixels=True)
    header = _header(file, salt)
    check(file)
    return Radiograph(header, to_uint8(decode(file, header.rows, header.columns), file), spacing_of(file))


def _png_header(content: bytes, name: str) -> Header:
    if not Path(name).stem:
        raise DicomError("is a PNG, which contains no id, and its file name is not known")
    png = read_png_header(content)
    return Header(Path(name).stem, "", png.rows, png.columns, "", "", None, DECODER)


def _header(file: Tags, salt: bytes) -> Header:
    rows, columns = file.whole(tags.ROWS, 0), file.whole(tags.COLUMNS, 0)
    if rows < 1 or columns < 1:
        raise DicomError("contains no image (Rows or Columns is missing)")
    check_size(rows, columns)
    _refuse_other_images(file)
    case_id = file.text(tags.SOP_INSTANCE)
    if not case_id:
        raise DicomError("has no SOPInstanceUID")
    if not CASE_ID.fullmatch(case_id):
        raise DicomError("has an invalid SOPInstanceUID")
    patient = file.text(tags.PATIENT_ID)
    return Header(
        case_id=case_id,
        patient=hash_text(patient, salt) if patient else "",
        rows=rows,
        columns=columns,
        view=_word(file.text(tags.VIEW)),
        sex=_word(file.text(tags.SEX)),
        age=_age(file.text(tags.AGE)),
        decoder=decoder_of(file.syntax) + (_READING if file.whole(tags.BITS_ALLOCATED, 8) > 8 else ""),
        orientation=_orientation(file.text(tags.ORIENTATION)),
        synthetic=is_phantom(file.text(tags.STUDY), file.text(tags.SERIES)),
    )


def hash_text(text: str, salt: bytes) -> str:
    """Salted hash of a patient id, 16 hex digits: equal for the same patient, and no way back to the id."""
    return hashlib.blake2b(text.encode(), key=salt[:64], digest_size=8).hexdigest()


def _refuse_other_images(file: Tags) -> None:
    """Raise DicomError for everything but one grayscale image of 8 or 16 bits with square pixels."""
    if not is_image_class(file.text(tags.SOP_CLASS)):
        raise DicomError("is no image by its SOP class, but a segmentation, a dose or the like")
    frames = file.decimal(tags.FRAMES)
    if frames not in (None, 0, 1):  # 0 is invalid and written by some for one
        raise DicomError(f"has {frames:g} frames; only single images are accepted")
    samples, photometric = file.whole(tags.SAMPLES, 1), file.text(tags.PHOTOMETRIC)
    if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        # A damaged value may contain anything, and this sentence is written to a table.
        shown = photometric if re.fullmatch(r"[A-Z0-9_ ]{1,16}", photometric) else "unknown photometric interpretation"
        raise DicomError(f"is not grayscale ({samples} samples per pixel, {shown})")
    allocated = file.whole(tags.BITS_ALLOCATED, 0)
    stored = file.whole(tags.BITS_STORED, allocated)
    if allocated not in (8, 16):
        raise DicomError(f"has {allocated} bits per pixel; only images of 8 or 16 are accepted")
    if not 1 <= stored <= allocated or file.whole(tags.SIGNED, 0) > 1:
        raise DicomError(f"contradicts itself ({stored} of {allocated} bits per pixel stored, or unclear sign)")
    high = file.whole(tags.HIGH_BIT, stored - 1)
    if not stored - 1 <= high < allocated:
        raise DicomError(f"contradicts itself ({stored} bits stored of {allocated} with High Bit {high}); correct it")
    for name, tag in _SIZES.items():
        if file.values.get(tag) and (size := pair(file.text(tag))) is not None:
            refuse_not_square(name, *size)


def _word(text: str) -> str:
    # Only short code strings are kept: free text could identify somebody.
    return text.upper() if len(text) <= 4 and text.isalpha() and text.isascii() else ""


def _orientation(text: str) -> str:
    """The main direction of each of two values (PS3.3 C.7.6.1.1.1), two letters of LRAPHF; "" for anything else."""
    found = re.fullmatch(r"([LRAPHF])[LRAPHF]{0,2} *\\ *([LRAPHF])[LRAPHF]{0,2}", text)
    return "".join(found.groups()) if found else ""


def _age(text: str) -> int | None:
    """Years from an age string: `062Y` as in the standard or `62` as in the challenge; None if neither."""
    text = text.upper()
    found = re.fullmatch(r"0*(\d{1,4})([DWMY]?)", text, re.ASCII)
    if found is None:
        return None
    years = int(found[1]) // {"D": 365, "W": 52, "M": 12}.get(found[2], 1)
    return years if years <= 120 else None
