"""The numbers of DICOM tags, and the values of one file by tag.

Owns: which tags ptxdist uses, what a value means as text or as a number, the fragments of a compressed image (PS3.5
A.4), and how much a file may contain. `parsing` finds the values. No value is ever part of an error message: any of
them may be a patient's name.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite

from ptxdist.dicom.luts import Lut
from ptxdist.errors import DicomError

TRANSFER_SYNTAX = 0x00020010
SOP_CLASS, SOP_INSTANCE = 0x00080016, 0x00080018
STUDY, SERIES, ORIENTATION = 0x0020000D, 0x0020000E, 0x00200020
MODALITY, BODY_PART = 0x00080060, 0x00180015
DETECTOR_SPACING, SCANNED_SPACING, PIXEL_SPACING, ASPECT = 0x00181164, 0x00182010, 0x00280030, 0x00280034
PATIENT_ID, SEX, AGE, VIEW = 0x00100020, 0x00100040, 0x00101010, 0x00185101
SAMPLES, PHOTOMETRIC, FRAMES, ROWS, COLUMNS = 0x00280002, 0x00280004, 0x00280008, 0x00280010, 0x00280011
BITS_ALLOCATED, BITS_STORED, HIGH_BIT, SIGNED = 0x00280100, 0x00280101, 0x00280102, 0x00280103
PADDING, PADDING_LIMIT = 0x00280120, 0x00280121
WINDOW_CENTER, WINDOW_WIDTH, WINDOW_FUNCTION = 0x00281050, 0x00281051, 0x00281056
INTERCEPT, SLOPE = 0x00281052, 0x00281053
MODALITY_LUTS, VOI_LUTS = 0x00283000, 0x00283010
CALIBRATION, MAGNIFICATION = 0x00280A02, 0x00181114
LUT_SHAPE, OVERLAY_BIT, PIXEL_DATA = 0x20500020, 0x60000102, 0x7FE00010
SHARED_GROUPS, FRAME_GROUPS = 0x52009229, 0x52009230

# Sequences within functional groups: pixel measures, frame VOI LUT, pixel value transformation, frame pixel data.
MACROS = (0x00289110, 0x00289132, 0x00289145, 0x00289443)
IN_GROUPS = (DETECTOR_SPACING, PIXEL_SPACING, WINDOW_CENTER, WINDOW_WIDTH, WINDOW_FUNCTION, INTERCEPT, SLOPE)
SEQUENCES = frozenset((MODALITY_LUTS, VOI_LUTS, SHARED_GROUPS, FRAME_GROUPS))

WANTED = frozenset(
    {SOP_CLASS, SOP_INSTANCE, PATIENT_ID, SEX, AGE, VIEW, SAMPLES, PHOTOMETRIC, FRAMES, ROWS, COLUMNS, BITS_ALLOCATED}
    | {BITS_STORED, SIGNED, PADDING, PADDING_LIMIT, WINDOW_CENTER, WINDOW_WIDTH, WINDOW_FUNCTION, INTERCEPT, SLOPE}
    | {LUT_SHAPE, PIXEL_DATA, MODALITY, BODY_PART, HIGH_BIT, OVERLAY_BIT, STUDY, SERIES, ORIENTATION}
    | {DETECTOR_SPACING, SCANNED_SPACING, PIXEL_SPACING, ASPECT, CALIBRATION, MAGNIFICATION}
)
# Valid files have these. Where one is missing, elements may be out of order, against PS3.5 7.1.
ALWAYS = frozenset({SOP_INSTANCE, PATIENT_ID, SAMPLES, PHOTOMETRIC, ROWS, COLUMNS, BITS_ALLOCATED, BITS_STORED, SIGNED})
MAX_INFLATED = 160 * 1024 * 1024  # 64 million pixels of 16 bits, and a header
# Valid files have a few hundred elements, and rarely more than a MB (overlays, icons) before their pixels.
MAX_ELEMENTS, MAX_FRAGMENTS, MAX_HEADER, MAX_VALUE = 100_000, 100_000, 32 * 1024 * 1024, 64 * 1024

CUT_OFF = "is cut off or damaged: the file ends within a value"
TOO_MANY = f"has more than {MAX_ELEMENTS:,} elements, or more than {MAX_FRAGMENTS:,} fragments of an image"
ITEM = struct.Struct("<HHL")  # group, element and length of an item or a fragment, little endian


@dataclass(frozen=True)
class Tags:
    """Values of one file by tag, as bytes; `syntax` is the UID of its transfer syntax.

    When read without pixels, only the values up to (0028,0103) are certain to be included. `encapsulated` says that
    the pixel data are fragments of a compressed image; `pixel_vr` is their value representation. The methods that
    return a number raise DicomError for an invalid one.
    """

    syntax: str
    values: Mapping[int, bytes | memoryview] = field(default_factory=dict)
    little_endian: bool = True
    encapsulated: bool = False
    pixel_vr: str = "OW"
    modality_lut: Lut | None = None
    voi_lut: Lut | None = None

    def bits_stored(self) -> int:
        """Number of bits of a stored value."""
        return self.whole(BITS_STORED, self.whole(BITS_ALLOCATED, 0))

    def text(self, tag: int) -> str:
        """Value as text, stripped of blanks and zero bytes; "" when it is missing."""
        return bytes(self.values.get(tag, b"")).decode("latin-1").strip(" \0")

    def whole(self, tag: int, default: int) -> int:
        """Value of a binary integer (US or SS, read as unsigned), or `default` when it is missing or empty."""
        value = bytes(self.values.get(tag, b""))
        if len(value) not in (0, 2, 4):
            raise DicomError(f"has an invalid number in ({tag >> 16:04X},{tag & 0xFFFF:04X})")
        return int.from_bytes(value, "little" if self.little_endian else "big") if value else default

    def decimal(self, tag: int) -> float | None:
        """First value of a decimal string (DS or IS), or None when it is missing or empty."""
        text = self.text(tag).split("\\")[0].strip()
        try:
            value = float(text) if text else 0.0
        except ValueError:
            value = float("nan")
        if not isfinite(value):
            raise DicomError(f"has an invalid number in ({tag >> 16:04X},{tag & 0xFFFF:04X})")
        return value if text else None

    def frame(self) -> bytes:
        """The compressed image: its fragments, joined (PS3.5 A.4). Raises DicomError unless there is exactly one."""
        data = memoryview(self.values[PIXEL_DATA])
        position, fragments = 0, list[memoryview]()
        while position + 8 <= len(data):
            group, element, length = ITEM.unpack_from(data, position)
            position += 8
            if (group, element) == (0xFFFE, 0xE0DD):
                break
            if len(fragments) > MAX_FRAGMENTS:
                raise DicomError(TOO_MANY)
            if (group, element) != (0xFFFE, 0xE000):
                raise DicomError("has damaged pixel data (a fragment has no item tag)")
            if length > len(data) - position:
                raise DicomError(CUT_OFF)
            fragments.append(data[position : position + length])
            position += length
        if fragments and bytes(fragments[0][:2]) in (
            b"\xff\xd8",
            b"\xff\x4f",
        ):  # some writers leave out the offset table
            fragments.insert(0, memoryview(b""))
        if len(fragments) < 2 or not any(map(len, fragments[1:])):
            raise DicomError("has no pixel data")
        # An offset table of several entries, or another fragment that starts like the first one.
        if len(fragments[0]) > 4 or any(fragment[:4] == fragments[1][:4] for fragment in fragments[2:]):
            raise DicomError("has several frames; only single images are accepted")
        return b"".join(fragments[1:])
