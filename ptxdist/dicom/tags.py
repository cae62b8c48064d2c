"""Parsing of a DICOM file into `Tags`: the few values that ptxdist uses, as bytes.

Owns: the numbers of DICOM tags and how to find them in a file (PS3.5 and PS3.10): file meta information, explicit and
implicit encoding, both byte orders, the deflated syntax, the fragments of a compressed image. Refuses: content that is
not DICOM, ends too early, or inflates to more than `MAX_INFLATED` bytes.

There are two parsers. Nearly every radiograph is explicit little endian with plain values up to its pixels; `_walk`
finds the wanted ones among them in a thirtieth of pydicom's time. It returns None for any other file, which pydicom
then reads. No value is ever part of an error message: any of them may be a patient's name.
"""

from __future__ import annotations

import logging
import re
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from io import BytesIO
from math import isfinite
from typing import TYPE_CHECKING

from ptxdist.dicom.luts import Lut, has_table, read_lut
from ptxdist.dicom.syntax import BIG_ENDIAN, DEFLATED, EXPLICIT, IMPLICIT
from ptxdist.errors import DicomError

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.dataelem import DataElement, RawDataElement

TRANSFER_SYNTAX = 0x00020010
SOP_CLASS, SOP_INSTANCE = 0x00080016, 0x00080018
MODALITY, BODY_PART = 0x00080060, 0x00180015
DETECTOR_SPACING, SCANNED_SPACING, PIXEL_SPACING, ASPECT = 0x00181164, 0x00182010, 0x00280030, 0x00280034
PATIENT_ID, SEX, AGE, VIEW = 0x00100020, 0x00100040, 0x00101010, 0x00185101
SAMPLES, PHOTOMETRIC, FRAMES, ROWS, COLUMNS = 0x00280002, 0x00280004, 0x00280008, 0x00280010, 0x00280011
BITS_ALLOCATED, BITS_STORED, HIGH_BIT, SIGNED = 0x00280100, 0x00280101, 0x00280102, 0x00280103
PADDING, PADDING_LIMIT = 0x00280120, 0x00280121
WINDOW_CENTER, WINDOW_WIDTH, WINDOW_FUNCTION = 0x00281050, 0x00281051, 0x00281056
INTERCEPT, SLOPE = 0x00281052, 0x00281053
MODALITY_LUTS, VOI_LUTS = 0x00283000, 0x00283010
LUT_SHAPE, OVERLAY_BIT, PIXEL_DATA = 0x20500020, 0x60000102, 0x7FE00010
SHARED_GROUPS, FRAME_GROUPS = 0x52009229, 0x52009230
# Sequences within functional groups: pixel measures, frame VOI LUT, pixel value transformation, frame pixel data.
_MACROS = (0x00289110, 0x00289132, 0x00289145, 0x00289443)
_IN_GROUPS = (DETECTOR_SPACING, PIXEL_SPACING, WINDOW_CENTER, WINDOW_WIDTH, WINDOW_FUNCTION, INTERCEPT, SLOPE)
_SEQUENCES = frozenset((MODALITY_LUTS, VOI_LUTS, SHARED_GROUPS, FRAME_GROUPS))

_WANTED = frozenset(
    {SOP_CLASS, SOP_INSTANCE, PATIENT_ID, SEX, AGE, VIEW, SAMPLES, PHOTOMETRIC, FRAMES, ROWS, COLUMNS, BITS_ALLOCATED}
    | {BITS_STORED, SIGNED, PADDING, PADDING_LIMIT, WINDOW_CENTER, WINDOW_WIDTH, WINDOW_FUNCTION, INTERCEPT, SLOPE}
    | {LUT_SHAPE, PIXEL_DATA, MODALITY, BODY_PART, HIGH_BIT, OVERLAY_BIT}
    | {DETECTOR_SPACING, SCANNED_SPACING, PIXEL_SPACING, ASPECT}
)
# Valid files have these. Where one is missing, elements may be out of order, against PS3.5 7.1.
_ALWAYS = frozenset(
    {SOP_INSTANCE, PATIENT_ID, SAMPLES, PHOTOMETRIC, ROWS, COLUMNS, BITS_ALLOCATED, BITS_STORED, SIGNED}
)
MAX_INFLATED = 160 * 1024 * 1024  # 64 million pixels of 16 bits, and a header

_UNDEFINED = 0xFFFFFFFF
# Value representations with four bytes of length, and with two (PS3.5 7.1.2).
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_SHORT_VRS = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_META_VRS = (b"UL", b"OB", b"UI", b"SH")
_element = struct.Struct("<HH2sH").unpack_from
_long = struct.Struct("<L").unpack_from
_item = {True: struct.Struct("<HHL").unpack_from, False: struct.Struct(">HHL").unpack_from}

# pydicom logs a traceback for each image that it cannot decode; ptxdist reports the reason in one line.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)

_CUT_OFF = "is cut off or damaged: the file ends within a value"


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
            group, element, length = _item[True](data, position)
            position += 8
            if (group, element) == (0xFFFE, 0xE0DD):
                break
            if (group, element) != (0xFFFE, 0xE000):
                raise DicomError("has damaged pixel data (a fragment has no item tag)")
            if length > len(data) - position:
                raise DicomError(_CUT_OFF)
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


def read_tags(content: bytes, *, pixels: bool) -> Tags:
    """Parse a file's content; with `pixels`, also its pixel data and the tags of their grey levels.

    Elements may be out of order: where one that valid files have is missing, the whole data set is read.
    Raises DicomError when the content is not DICOM, ends too early, or inflates to more than `MAX_INFLATED` bytes.
    """
    syntax, start = _file_meta(content)
    if syntax == DEFLATED:
        content, start = _inflate(content[start:]), 0
    last = PIXEL_DATA if pixels else SIGNED
    plain = syntax not in (IMPLICIT, BIG_ENDIAN)
    tags = _walk(content, start, last, syntax) if plain else None
    tags = _by_pydicom(content, start, last, syntax) if tags is None else tags
    if not tags.values.keys() >= (_ALWAYS | {PIXEL_DATA} if pixels else _ALWAYS):
        with suppress(DicomError):
            return _by_pydicom(content, start, _UNDEFINED, syntax)
    return tags


def with_preamble(content: bytes) -> bytes:
    """The content as pydicom reads it: some writers leave out the 128 bytes before DICM."""
    return bytes(128) + content if content.startswith(b"DICM") else content


def for_pydicom(content: bytes) -> bytes:
    """The content with its preamble; DicomError for what is no DICOM, or inflates to more than `MAX_INFLATED` bytes."""
    syntax, start = _file_meta(content)
    if syntax == DEFLATED:
        _inflate(content[start:])
    return with_preamble(content)


def _meta_start(content: bytes) -> int | None:
    """Position of the file meta information, which may lack its preamble and DICM; None where there is none."""
    if content[128:132] == b"DICM":
        return 132
    start = 4 if content.startswith(b"DICM") else 0
    return start if content[start : start + 2] == b"\2\0" and content[start + 4 : start + 6] in _META_VRS else None


def _file_meta(content: bytes) -> tuple[str, int]:
    """Transfer syntax, and the position of the data set."""
    start = _meta_start(content)
    if start is None:
        return _guess_syntax(content), 0
    position, syntax = start, None
    while content[position : position + 2] == b"\2\0" and position + 8 <= len(content):
        found = _explicit(content, position)
        if found is None:
            raise DicomError("is damaged: its file meta information cannot be read")
        tag, _, length, position = found
        if length > len(content) - position:
            raise DicomError(_CUT_OFF)
        if tag == TRANSFER_SYNTAX:
            syntax = content[position : position + length].decode("latin-1").strip(" \0")
        position += length
    if not syntax:
        raise DicomError("does not say how it is encoded (it has no Transfer Syntax UID)")
    return syntax, position


def _guess_syntax(content: bytes) -> str:
    """Transfer syntax of a file without a header, as old devices write it; it must have SOP class and instance UIDs."""
    refusal = DicomError("is not a DICOM file (no DICM prefix)")
    if len(content) < 256 or content[:2] != b"\10\0" or content[3] != 0:
        raise refusal
    explicit = content[4:6] in _SHORT_VRS
    syntax = EXPLICIT if explicit else IMPLICIT
    try:
        tags = _by_pydicom(content, 0, SIGNED, syntax)
    except DicomError:
        raise refusal from None
    if not all(re.fullmatch(r"[0-9.]{5,64}", tags.text(tag)) for tag in (SOP_CLASS, SOP_INSTANCE)):
        raise refusal
    return syntax


def _inflate(deflated: bytes) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(deflated, MAX_INFLATED)
    except zlib.error:
        raise DicomError("is damaged: its deflated data set cannot be inflated") from None
    if inflater.unconsumed_tail:
        raise DicomError(f"inflates to more than the limit of {MAX_INFLATED:,} bytes")
    if not inflater.eof:
        raise DicomError(_CUT_OFF)
    return inflated


def _explicit(content: bytes, position: int) -> tuple[int, bytes, int, int] | None:
    """Tag, VR, length and position of the value of an explicit little endian element; None for an unknown VR."""
    group, element, vr, length = _element(content, position)
    position += 8
    if vr in _LONG_VRS:
        if position + 4 > len(content):
            raise DicomError(_CUT_OFF)
        length = _long(content, position)[0]
        position += 4
    elif vr not in _SHORT_VRS:
        return None
    return group << 16 | element, vr, length, position


def _walk(content: bytes, position: int, last: int, syntax: str) -> Tags | None:
    """Tags up to and including `last` of an explicit little endian data set; None when pydicom has to read it."""
    values: dict[int, bytes | memoryview] = {}
    end, former = len(content), 0x0002FFFF
    while position < end:
        if end - position < 8:
            raise DicomError(_CUT_OFF)
        found = _explicit(content, position)
        if found is None or found[0] <= former:
            return None
        tag, vr, length, position = found
        if tag > last:
            break
        if tag == PIXEL_DATA and _goes_on(content, position, length):
            return None
        if tag == PIXEL_DATA and length == _UNDEFINED:
            return Tags(syntax, values | {tag: memoryview(content)[position:]}, encapsulated=True)
        if length == _UNDEFINED or tag in _SEQUENCES:
            return None
        if length > end - position:
            raise DicomError(_CUT_OFF)
        if tag == PIXEL_DATA:
            return Tags(syntax, values | {tag: memoryview(content)[position : position + length]}, pixel_vr=vr.decode())
        if tag in _WANTED:
            values[tag] = content[position : position + length]
        position, former = position + length, tag
    return Tags(syntax, values)


def _goes_on(content: bytes, position: int, length: int) -> bool:
    """Whether an element follows the pixel data that belongs before them, such as a window."""
    size = 0 if length == _UNDEFINED else length
    while length == _UNDEFINED and position + size + 8 <= len(content):
        position += size + 8
        group, element, size = _item[True](content, position - 8)
        if group != 0xFFFE or element == 0xE0DD:
            break
    position += size
    found = _explicit(content, position) if position + 12 <= len(content) else None
    return found is not None and SOP_CLASS < found[0] < PIXEL_DATA


def _by_pydicom(content: bytes, start: int, last: int, syntax: str) -> Tags:
    from pydicom.filereader import read_dataset  # late: few files need it, and its import takes long

    implicit, little = syntax == IMPLICIT, syntax != BIG_ENDIAN
    stream = BytesIO(content)
    stream.seek(start)
    try:
        with warnings.catch_warnings(action="ignore"):  # invalid values are common and harmless
            dataset = read_dataset(stream, implicit, little, stop_when=lambda tag, vr, length: tag > last)
        values = {tag: _raw_value(dataset.get_item(tag)) for tag in _WANTED if tag in dataset}
        tags = Tags(syntax, values, little)
        if PIXEL_DATA in values:
            element = dataset.get_item(PIXEL_DATA)
            tags = replace(tags, encapsulated=element.length == _UNDEFINED, pixel_vr=element.VR or "OW")
    except DicomError:
        raise
    except Exception as error:  # pydicom raises almost anything on damaged files
        raise DicomError("is a damaged DICOM file: its elements cannot be read") from error
    if not len(dataset):  # pydicom drops all values when the file ends within one
        raise DicomError(_CUT_OFF)
    if last < VOI_LUTS:
        return tags
    try:
        with warnings.catch_warnings(action="ignore"):
            items = _group_items(dataset)
            return _with_luts(_with_groups(tags, items), [dataset, *items])
    except DicomError:
        raise
    except Exception as error:
        raise DicomError("has a sequence that cannot be read") from error


def _raw_value(element: RawDataElement | DataElement | None) -> bytes:
    from pydicom.dataelem import RawDataElement

    if not isinstance(element, RawDataElement):  # a text that pydicom has already converted
        return str((element and element.value) or "").encode()
    value = element.value or b""
    if element.length not in (len(value), _UNDEFINED):
        raise DicomError(_CUT_OFF)
    return value


def _group_items(dataset: Dataset) -> list[Dataset]:
    """Items within the functional groups that say how grey levels and pixels of a frame are meant (PS3.3 C.7.6.16)."""
    groups = [group for tag in (SHARED_GROUPS, FRAME_GROUPS) if tag in dataset for group in dataset[tag].value or ()]
    return [item for group in groups for macro in _MACROS if macro in group for item in group[macro].value or ()]


def _with_groups(tags: Tags, items: Sequence[Dataset]) -> Tags:
    """Tags with the values of the items, which stand for those at the top; DicomError where two values differ."""
    values = dict(tags.values)
    for item in items:
        for tag in _IN_GROUPS:
            value = _raw_value(item.get_item(tag)) if tag in item else b""
            if value and bytes(values.setdefault(tag, value)).strip(b" \0") != value.strip(b" \0"):
                raise DicomError(
                    f"contradicts itself: ({tag >> 16:04X},{tag & 0xFFFF:04X}) has several values in its functional "
                    "groups; only single images are accepted"
                )
    return replace(tags, values=values)


def _with_luts(tags: Tags, datasets: Sequence[Dataset]) -> Tags:
    """Tags with the first table of each kind."""
    bits = min(max(tags.whole(BITS_STORED, tags.whole(BITS_ALLOCATED, 16)), 1), 16)
    signed = tags.whole(SIGNED, 0) == 1
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    slope, intercept = tags.decimal(SLOPE), tags.decimal(INTERCEPT) or 0.0
    signed = signed or intercept < 0

    def first(tag: int, inputs: tuple[float, float]) -> Lut | None:
        found = (item for source in datasets if tag in source for item in source[tag].value or ())
        item = next(filter(has_table, found), None)
        return None if item is None else read_lut(item, inputs, signed=signed, little=tags.little_endian)

    modality = first(MODALITY_LUTS, (low, high))
    if modality is not None:
        low, high = int(modality.entries.min()), int(modality.entries.max())
        slope, intercept = None, 0.0
    ends = sorted(end * (1.0 if slope is None else slope) + intercept for end in (low, high))
    return replace(tags, modality_lut=modality, voi_lut=first(VOI_LUTS, (ends[0], ends[1])))
