"""Parsing of a DICOM file into `Tags`: the few values that ptxdist uses, as bytes.

Owns: how to find tags in a file (PS3.5 and PS3.10): file meta information, explicit and implicit encoding, both byte
orders, the deflated syntax. Refuses: content that is not DICOM, ends too early, inflates to more than `MAX_INFLATED`
bytes, or has so many elements or bytes that parsing them would take minutes.

There are two parsers. Nearly every radiograph is explicit little endian with plain values up to its pixels; `_walk`
finds the wanted ones among them in a thirtieth of pydicom's time. It returns None for any other file, which pydicom
then reads.
"""

from __future__ import annotations

import logging
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from typing import TYPE_CHECKING

from ptxdist.dicom.luts import Lut, has_table, read_lut
from ptxdist.dicom.syntax import BIG_ENDIAN, DEFLATED, EXPLICIT, IMPLICIT
from ptxdist.dicom.tags import (
    ALWAYS,
    BITS_ALLOCATED,
    BITS_STORED,
    CUT_OFF,
    FRAME_GROUPS,
    IN_GROUPS,
    INTERCEPT,
    ITEM,
    MACROS,
    MAX_ELEMENTS,
    MAX_FRAGMENTS,
    MAX_HEADER,
    MAX_INFLATED,
    MAX_VALUE,
    MODALITY_LUTS,
    PIXEL_DATA,
    SEQUENCES,
    SHARED_GROUPS,
    SIGNED,
    SLOPE,
    SOP_CLASS,
    SOP_INSTANCE,
    TOO_MANY,
    TRANSFER_SYNTAX,
    VOI_LUTS,
    WANTED,
    Tags,
)
from ptxdist.errors import DicomError

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.dataelem import DataElement, RawDataElement

_UNDEFINED = 0xFFFFFFFF
# Value representations with four bytes of length, and with two (PS3.5 7.1.2).
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_SHORT_VRS = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_META_VRS = (b"UL", b"OB", b"UI", b"SH")
_element = struct.Struct("<HH2sH").unpack_from
_long = struct.Struct("<L").unpack_from

# pydicom logs a traceback for each image that it cannot decode; ptxdist reports the reason in one line.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)

_NO_DICOM = "is not a DICOM file (no DICM prefix)"
_TOO_LONG = f"has more than {MAX_HEADER:,} bytes before its pixel data"


def read_tags(content: bytes, *, pixels: bool) -> Tags:
    """Parse a file's content; with `pixels`, also its pixel data and the tags of their grey levels.

    Elements may be out of order: where one that valid files have is missing, the whole data set is read.
    Raises DicomError when the content is empty, not DICOM, ends too early, or is above one of the limits.
    """
    if not content:
        raise DicomError("is empty (0 bytes)")
    syntax, start = _file_meta(content)
    if syntax == DEFLATED:
        content, start = _inflate(content[start:]), 0
    last = PIXEL_DATA if pixels else SIGNED
    plain = syntax not in (IMPLICIT, BIG_ENDIAN)
    tags = _walk(content, start, last, syntax) if plain else None
    tags = _by_pydicom(content, start, last, syntax) if tags is None else tags
    if not tags.values.keys() >= (ALWAYS | {PIXEL_DATA} if pixels else ALWAYS):
        with suppress(DicomError):
            return _by_pydicom(content, start, _UNDEFINED, syntax)
    return tags


def with_preamble(content: bytes) -> bytes:
    """The content as pydicom reads it: some writers leave out the 128 bytes before DICM."""
    return bytes(128) + content if content.startswith(b"DICM") else content


def read_dataset(content: bytes, reads: Iterator[int]) -> tuple[Tags, Dataset]:
    """A whole file as `Tags` and as pydicom's data set, whose sequences `items` reads with what is left of `reads`.

    Raises DicomError as `read_tags`, and when the `reads` are used up: about three for an element.
    """
    syntax, start = _file_meta(content)
    if syntax == DEFLATED:
        content, start = _inflate(content[start:]), 0
    return _read_dataset(content, start, _UNDEFINED, syntax, reads)


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
        if position > MAX_VALUE:
            raise DicomError("is damaged: its file meta information has no end")
        found = _explicit(content, position)
        if found is None:
            raise DicomError("is damaged: its file meta information cannot be read")
        tag, _, length, position = found
        if length > len(content) - position:
            raise DicomError(CUT_OFF)
        if tag == TRANSFER_SYNTAX:
            syntax = content[position : position + length].decode("latin-1").strip(" \0")
        position += length
    if not syntax:
        raise DicomError("does not say how it is encoded (it has no Transfer Syntax UID)")
    return syntax, position


def _guess_syntax(content: bytes) -> str:
    """Transfer syntax of a file without a header, as old devices write it; it must have SOP class and instance UIDs."""
    if content.startswith(b"\xff\xd8\xff"):
        raise DicomError("is a JPEG image; convert it to PNG (ImageMagick: `mogrify -format png *.jpg`)")
    if len(content) < 256 or content[:2] != b"\10\0" or content[3] != 0:
        raise DicomError(_NO_DICOM)
    explicit = content[4:6] in _SHORT_VRS
    syntax = EXPLICIT if explicit else IMPLICIT
    try:
        tags = _by_pydicom(content, 0, SIGNED, syntax)
    except DicomError:
        raise DicomError(_NO_DICOM) from None
    if not all(re.fullmatch(r"[0-9.]{5,64}", tags.text(tag)) for tag in (SOP_CLASS, SOP_INSTANCE)):
        raise DicomError(_NO_DICOM)
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
        raise DicomError(CUT_OFF)
    return inflated


def _explicit(content: bytes, position: int) -> tuple[int, bytes, int, int] | None:
    """Tag, VR, length and position of the value of an explicit little endian element; None for an unknown VR."""
    group, element, vr, length = _element(content, position)
    position += 8
    if vr in _LONG_VRS:
        if position + 4 > len(content):
            raise DicomError(CUT_OFF)
        length = _long(content, position)[0]
        position += 4
    elif vr not in _SHORT_VRS:
        return None
    return group << 16 | element, vr, length, position


def _walk(content: bytes, position: int, last: int, syntax: str) -> Tags | None:
    """Tags up to and including `last` of an explicit little endian data set; None when pydicom has to read it."""
    values: dict[int, bytes | memoryview] = {}
    begin, end, former = position, len(content), 0x0002FFFF
    for _ in range(MAX_ELEMENTS):
        if position >= end:
            return Tags(syntax, values)
        if end - position < 8:
            raise DicomError(CUT_OFF)
        found = _explicit(content, position)
        if found is None or found[0] <= former:
            return None
        tag, vr, length, position = found
        if tag > last:
            return Tags(syntax, values)
        if position - begin > MAX_HEADER:
            raise DicomError(_TOO_LONG)
        if tag == PIXEL_DATA:
            return _with_pixels(Tags(syntax, values, pixel_vr=vr.decode()), content, position, length)
        if length == _UNDEFINED or tag in SEQUENCES:
            return None
        if length > end - position:
            raise DicomError(CUT_OFF)
        if tag in WANTED:
            values[tag] = _bounded(tag, content[position : position + length])
        position, former = position + length, tag
    raise DicomError(TOO_MANY)


def _with_pixels(tags: Tags, content: bytes, position: int, length: int) -> Tags | None:
    """Tags with the pixel data at a position; None when pydicom has to read what follows them."""
    if _goes_on(content, position, length):
        return None
    encapsulated = length == _UNDEFINED
    if not encapsulated and length > len(content) - position:
        raise DicomError(CUT_OFF)
    data = memoryview(content)[position : None if encapsulated else position + length]
    pixel_vr = Tags.pixel_vr if encapsulated else tags.pixel_vr
    return replace(tags, values={**tags.values, PIXEL_DATA: data}, encapsulated=encapsulated, pixel_vr=pixel_vr)


def _bounded(tag: int, value: bytes) -> bytes:
    if len(value) > MAX_VALUE and tag != PIXEL_DATA:
        raise DicomError(f"has a value of {len(value):,} bytes in ({tag >> 16:04X},{tag & 0xFFFF:04X})")
    return value


def _goes_on(content: bytes, position: int, length: int) -> bool:
    """Whether an element follows the pixel data that belongs before them, such as a window."""
    size = 0 if length == _UNDEFINED else length
    for _ in range(MAX_FRAGMENTS if length == _UNDEFINED else 0):
        if position + size + 8 > len(content):
            break
        position += size + 8
        group, element, size = ITEM.unpack_from(content, position - 8)
        if group != 0xFFFE or element == 0xE0DD:
            break
    position += size
    found = _explicit(content, position) if position + 12 <= len(content) else None
    return found is not None and SOP_CLASS < found[0] < PIXEL_DATA


class _Stream(BytesIO):
    """Content for pydicom, which reads at least once for an element, an item or a fragment, whatever contains it.

    `reads` are shared by the streams of one file. DicomError when they are used up.
    """

    def __init__(self, content: bytes, reads: Iterator[int]) -> None:
        super().__init__(content)
        self._reads = reads

    def read(self, size: int | None = -1, /) -> bytes:
        if next(self._reads, None) is None:
            raise DicomError(TOO_MANY)
        return super().read(size)


def _by_pydicom(content: bytes, start: int, last: int, syntax: str) -> Tags:
    reads = iter(range(3 * MAX_ELEMENTS))  # of tag, length and value
    tags, dataset = _read_dataset(content, start, last, syntax, reads)
    if last < VOI_LUTS:
        return tags
    try:
        with warnings.catch_warnings(action="ignore"):
            groups = _group_items(dataset, reads)
            return _with_luts(_with_groups(tags, groups), [dataset, *groups], reads)
    except DicomError:
        raise
    except Exception as error:
        raise DicomError("has a sequence that cannot be read") from error


def _read_dataset(content: bytes, start: int, last: int, syntax: str, reads: Iterator[int]) -> tuple[Tags, Dataset]:
    from pydicom.filereader import read_dataset  # late: few files need it, and its import takes long

    implicit, little = syntax == IMPLICIT, syntax != BIG_ENDIAN
    stream = _Stream(content, reads)
    stream.seek(start)
    in_header = True

    def is_after(tag: int, vr: str | None, length: int) -> bool:
        nonlocal in_header
        if in_header and stream.tell() - start > MAX_HEADER:
            raise DicomError(_TOO_LONG)
        in_header = in_header and tag < PIXEL_DATA
        return tag > last

    try:
        with warnings.catch_warnings(action="ignore"):  # invalid values are common and harmless
            dataset = read_dataset(stream, implicit, little, stop_when=is_after)
        values = {tag: _raw_value(dataset.get_item(tag)) for tag in WANTED if tag in dataset}
        tags = Tags(syntax, values, little)
        if PIXEL_DATA in values:
            element = dataset.get_item(PIXEL_DATA)
            tags = replace(tags, encapsulated=element.length == _UNDEFINED, pixel_vr=element.VR or "OW")
    except DicomError:
        raise
    except Exception as error:  # pydicom raises almost anything on damaged files
        reason = "is a damaged DICOM file: its elements cannot be read" if next(reads, None) is not None else TOO_MANY
        raise DicomError(reason) from error
    if not len(dataset):  # pydicom drops all values when the file ends within one
        raise DicomError(CUT_OFF)
    return tags, dataset


def _raw_value(element: RawDataElement | DataElement | None) -> bytes:
    from pydicom.dataelem import RawDataElement

    if not isinstance(element, RawDataElement):  # a text that pydicom has already converted
        value = (element and element.value) or ""
        if isinstance(value, list):  # a sequence in its place
            raise DicomError("has a sequence that cannot be read")
        return str(value).encode()
    value = element.value or b""
    if element.length not in (len(value), _UNDEFINED):
        raise DicomError(CUT_OFF)
    return _bounded(element.tag, value)


def items(dataset: Dataset, tag: int, reads: Iterator[int]) -> Sequence[Dataset]:
    """The items of a sequence, which pydicom itself would read without a limit; none when it is missing."""
    from pydicom.dataelem import RawDataElement
    from pydicom.filereader import read_sequence

    element = dataset.get_item(tag) if tag in dataset else None
    if not isinstance(element, RawDataElement):
        return (element and element.value) or ()
    content = element.value or b""
    stream = _Stream(content, reads)
    try:
        found: Sequence[Dataset] = read_sequence(
            stream, element.is_implicit_VR, element.is_little_endian, len(content), dataset.original_character_set
        )
    except Exception as error:  # pydicom raises another one in the place of ours
        if next(reads, None) is None:
            raise DicomError(TOO_MANY) from error
        raise
    return found


def _group_items(dataset: Dataset, reads: Iterator[int]) -> list[Dataset]:
    """Items within the functional groups that say how grey levels and pixels of a frame are meant (PS3.3 C.7.6.16)."""
    groups = [group for tag in (SHARED_GROUPS, FRAME_GROUPS) for group in items(dataset, tag, reads)]
    return [item for group in groups for macro in MACROS for item in items(group, macro, reads)]


def _with_groups(tags: Tags, groups: Sequence[Dataset]) -> Tags:
    """Tags with the values of the items, which stand for those at the top; DicomError where two values differ."""
    values = dict(tags.values)
    for item in groups:
        for tag in IN_GROUPS:
            value = _raw_value(item.get_item(tag)) if tag in item else b""
            if value and bytes(values.setdefault(tag, value)).strip(b" \0") != value.strip(b" \0"):
                raise DicomError(
                    f"contradicts itself: ({tag >> 16:04X},{tag & 0xFFFF:04X}) has several values in its functional "
                    "groups; only single images are accepted"
                )
    return replace(tags, values=values)


def _with_luts(tags: Tags, datasets: Sequence[Dataset], reads: Iterator[int]) -> Tags:
    """Tags with the first table of each kind."""
    bits = min(max(tags.whole(BITS_STORED, tags.whole(BITS_ALLOCATED, 16)), 1), 16)
    signed = tags.whole(SIGNED, 0) == 1
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    slope, intercept = tags.decimal(SLOPE), tags.decimal(INTERCEPT) or 0.0
    signed = signed or intercept < 0

    def first(tag: int, inputs: tuple[float, float]) -> Lut | None:
        found = (item for source in datasets for item in items(source, tag, reads))
        item = next(filter(has_table, found), None)
        return None if item is None else read_lut(item, inputs, signed=signed, little=tags.little_endian)

    modality = first(MODALITY_LUTS, (low, high))
    if modality is not None:
        low, high = int(modality.entries.min()), int(modality.entries.max())
        slope, intercept = None, 0.0
    ends = sorted(end * (1.0 if slope is None else slope) + intercept for end in (low, high))
    return replace(tags, modality_lut=modality, voi_lut=first(VOI_LUTS, (ends[0], ends[1])))
