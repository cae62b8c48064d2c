"""Checks of a compressed image before and after it is decoded.

Owns: the markers of JPEG (ITU-T T.81), JPEG-LS (T.87) and JPEG 2000 (T.800) that give size, bit depth and end.
Refuses: streams without a start or an end.

Decoders allocate the size that the stream claims, whatever the DICOM header says, and the decoder of JPEG Lossless and
Extended accepts truncated and damaged streams. Therefore this module follows the Huffman codes: those of the whole
image must fill the stream to its last byte. In JPEG Lossless their lengths follow from the decoded values, which numpy
computes quickly. JPEG Extended is rare and has to be read code by code, which takes about a second for a large image.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ptxdist.errors import DicomError

SOF_SEQUENTIAL = frozenset((0xC0, 0xC1))  # baseline and extended
SOF_PROGRESSIVE, SOF_LOSSLESS, SOF_JPEG_LS = 0xC2, 0xC3, 0xF7
_SOF = {*range(0xC0, 0xD0), SOF_JPEG_LS} - {0xC4, 0xC8, 0xCC}
_DHT, _DRI, _SOS = 0xC4, 0xDD, 0xDA
_JPEG_2000 = b"\xff\x4f\xff\x51"  # start of codestream, and the size segment that must follow it
Codes = tuple[tuple[int, int], ...]

_BLOCK_ROWS = 256
_MOST_ZEROS = 4
# Start of a tile and of its data; bytes of a coding style, and of a component's, before its levels.
_SOT, _SOD, _SKIPPED = b"\xff\x90", b"\xff\x93", {b"\xff\x52": 5, b"\xff\x53": 2}
_MOST_HEAD_BYTES = 2**20  # before the first scan
MAX_TILES = 45_000  # the decoder takes 10 kB for each; T.800 allows 65,535
_MOST_TILE_PARTS = 500_000
# The decoder takes 0.42 kB for each and 0.15 kB for a precinct: 0.44 GB for 64 million pixels in blocks of 8x8.
MAX_BLOCKS = 1_100_000
MAX_SCANS = 100  # progressive encoders write about six for a component


@dataclass(frozen=True)
class Stream:
    """Size and bit depth of a compressed image; the fields after `signed` are set for JPEG only.

    `process` is the frame marker (0 for JPEG 2000). `tiles` is the number of tiles of JPEG 2000, and `signed` says
    whether its values have a sign; other streams do not say so. `scan` and `end` are the byte range of the
    entropy-coded data; of JPEG 2000, `scan` is the start of the stream. `dc` and `ac` are the Huffman codes (length,
    symbol) in their order, `shift` is the point transform (number of lowest bits left out), `interval` the restart
    interval in pixels or blocks, or 0.
    """

    rows: int
    columns: int
    components: int
    bits: int
    process: int = 0
    tiles: int = 1
    signed: bool = False
    scan: int = 0
    end: int = 0
    dc: Codes = ()
    ac: Codes = ()
    predictor: int = 1
    shift: int = 0
    interval: int = 0


def read_jpeg(frame: bytes) -> Stream:
    """Read the markers of a JPEG or JPEG-LS stream up to its first scan, and find its end mark.

    Raises DicomError when the start or the end mark is missing, or a marker before the scan is damaged.
    """
    if frame[:2] != b"\xff\xd8":
        raise DicomError("has damaged pixel data (there is no JPEG stream at its start)")
    size: tuple[int, int, int, int, int] | None = None
    tables: dict[int, Codes] = {}
    position, interval = 2, 0
    head = frame[:_MOST_HEAD_BYTES]
    while True:
        marker, start, after = _segment(head, position)
        segment = frame[start:after]
        if marker in _SOF:
            if len(segment) < 6 or size is not None:
                raise DicomError("has damaged JPEG data (it states its size more than once)")
            rows, columns = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
            size = (rows, columns, segment[5], segment[0], marker)
        elif marker == _DHT:
            tables |= _codes(segment)
        elif marker == _DRI:
            interval = int.from_bytes(segment, "big")
        elif marker == _SOS:
            break
        position = after
    if size is None or len(segment) < 6:
        raise DicomError("has damaged JPEG data (its size is missing)")
    if not size[0]:
        raise DicomError("has JPEG data that state the number of rows after the image (DNL), which is not supported")
    if frame.count(b"\xff\xda") > MAX_SCANS:  # each takes the time of an image, whatever its length
        raise DicomError(f"has damaged JPEG data (more than {MAX_SCANS} scans)")
    end = frame.rfind(b"\xff\xd9", after)
    if end < 0:
        raise DicomError("has JPEG data that are cut off (the end mark is missing)")
    dc, ac = tables.get(segment[2] >> 4, ()), tables.get(0x10 | segment[2] & 15, ())
    return Stream(*size, 1, False, after, end, dc, ac, segment[-3], segment[-1] & 15, interval)


def with_regular_scan(frame: bytes, stream: Stream) -> bytes:
    """The stream with those parameters of its scan that have one valid value and no meaning (T.81 B.2.3, T.87 C.2.3).

    A sequential scan has 0, 63, 0. Some encoders write others, at which decoders fail or give wrong values.
    """
    first, middle, last = frame[stream.scan - 3 : stream.scan]
    if stream.process in SOF_SEQUENTIAL:
        first, middle, last = 0, 63, 0
    elif stream.process in (SOF_LOSSLESS, SOF_JPEG_LS):
        middle, last = 0, last & 15
    regular = bytes((first, middle, last))
    if frame[stream.scan - 3 : stream.scan] == regular:
        return frame
    return frame[: stream.scan - 3] + regular + frame[stream.scan :]


def without_zeros(frame: bytes, stream: Stream) -> list[bytes]:
    """The stream with fewer of the zero bytes that are before its end mark; a few of them may belong to the codes.

    Some encoders write such bytes, at which a decoder of JPEG-LS fails (team-charls/charls#365).
    """
    codes = frame[stream.scan : stream.end]
    data = codes.rstrip(b"\0")
    kept = range(min(len(codes) - len(data), _MOST_ZEROS))
    return [frame[: stream.scan] + data + bytes(zeros) + frame[stream.end :] for zeros in kept]


def _segment(frame: bytes, position: int) -> tuple[int, int, int]:
    """Marker code at a position, and start and end of its segment's content."""
    start = position
    while frame[start : start + 2] == b"\xff\xff":  # fill bytes
        start += 1
    length = int.from_bytes(frame[start + 2 : start + 4], "big")
    if frame[start : start + 1] != b"\xff" or length < 2 or start + 2 + length > len(frame):
        raise DicomError("has damaged JPEG data (its header cannot be read)")
    return frame[start + 1], start + 4, start + 2 + length


def _codes(segment: bytes) -> dict[int, Codes]:
    """Huffman codes by table number, plus 16 for AC tables."""
    tables = {}
    while len(segment) >= 17:
        counts = segment[1:17]
        lengths = [length for length, count in enumerate(counts, start=1) for _ in range(count)]
        tables[segment[0]] = tuple(zip(lengths, segment[17:], strict=False))
        segment = segment[17 + sum(counts) :]
    return tables


def read_jpeg_2000(frame: bytes) -> Stream:
    """Read the size of a JPEG 2000 stream, raw or in a JP2 file. Raises DicomError when there is no valid one."""
    start = frame.find(_JPEG_2000, 0, 4096)
    size = frame[start + 8 : start + 45]
    if start < 0 or len(size) < 37:
        raise DicomError("has damaged pixel data (there is no JPEG 2000 stream at its start)")
    right, bottom, left, top, tile_width, tile_height = (
        int.from_bytes(size[i : i + 4], "big") for i in range(0, 24, 4)
    )
    if not (tile_width and tile_height and right > left and bottom > top) or size[35:] != b"\1\1":
        raise DicomError("has damaged JPEG 2000 data (its size is invalid)")
    if frame.find(b"\xff\xd9", start) < 0:
        raise DicomError("has JPEG 2000 data that are cut off (the end mark is missing)")
    width, height = min(right - left, tile_width), min(bottom - top, tile_height)
    styles, found = _coding_styles(frame, start + 2)
    for style in styles:
        if _code_blocks(width, height, style) > MAX_BLOCKS:
            raise DicomError(f"has JPEG 2000 data of more than {MAX_BLOCKS:,} code blocks, which take too much memory")
    tile_left, tile_top = int.from_bytes(size[24:28], "big"), int.from_bytes(size[28:32], "big")
    tiles = -((tile_left - right) // tile_width) * -((tile_top - bottom) // tile_height)
    if found < tiles <= MAX_TILES:
        raise DicomError(f"has JPEG 2000 data that are cut off ({found:,} of {tiles:,} tiles)")
    components, bits, signed = int.from_bytes(size[32:34], "big"), (size[34] & 127) + 1, size[34] > 127
    return Stream(bottom - top, right - left, components, bits, tiles=tiles, signed=signed, scan=start)


def _coding_styles(frame: bytes, position: int) -> tuple[list[bytes], int]:
    """Levels, sizes of code blocks and of precincts of the main header and of those of the tiles (T.800 A.6.1, A.6.2).

    Also the number of tiles that are there. Raises DicomError when a header cannot be read.
    """
    found: list[bytes] = []
    tiles = set[bytes]()
    for _ in range(_MOST_TILE_PARTS):
        begin, size = position, 0
        while (marker := frame[position : position + 2]) not in (_SOD, b"\xff\xd9"):
            length = int.from_bytes(frame[position + 2 : position + 4], "big")
            if marker[:1] != b"\xff" or length < 2 or position + 2 + length > len(frame):
                raise DicomError("has damaged JPEG 2000 data (its header cannot be read)")
            segment = frame[position + 4 : position + 2 + length]
            if marker == _SOT:
                begin, size = position, int.from_bytes(segment[2:6], "big")
                tiles.add(segment[:2])
            elif marker in _SKIPPED:
                found.append(segment[_SKIPPED[marker] :])
            position += 2 + length
        position = begin + size
        if not size or frame[position : position + 2] != _SOT:
            break
    return found, len(tiles)


def _code_blocks(width: int, height: int, style: bytes) -> int:
    """Number of code blocks of a tile, of one component, and a third of that of its precincts (T.800 B.6 and B.7)."""
    total = 0
    levels = style[0] if style else 0
    for level in range(levels + 1):
        precinct = style[5 + level] if len(style) > 5 + level else 0xFF
        bands, below = (1, levels) if level == 0 else (3, levels - level + 1)
        blocks, precincts = bands, bands
        for size, block, most in ((width, style[1] & 15, precinct & 15), (height, style[2] & 15, precinct >> 4)):
            side = max(0, most - (level > 0))
            blocks *= _halved(_halved(size, below), min(block + 2, side))
            precincts *= _halved(_halved(size, below), side)
        total += blocks + precincts // 3
    return total


def _halved(size: int, times: int) -> int:
    return -(-size >> times)


def lossless_is_whole(frame: bytes, stream: Stream, pixels: npt.NDArray[np.unsignedinteger]) -> bool:
    """Whether decoded values (rows, columns) account for every bit of their JPEG Lossless stream (T.81 H.1).

    A flipped bit in the code of a value nearly always changes how many bits follow. A flip in the bits after a code is
    not detected: it alters a value and leaves all lengths as they are.
    """
    interval = stream.interval or stream.rows * stream.columns
    if interval % stream.columns:
        return True  # T.81 does not allow it; not checked
    parts = _parts(frame, stream, -(-stream.rows * stream.columns // interval))
    restart_rows = interval // stream.columns
    bits = np.add.reduceat(_bits(stream, pixels, restart_rows), np.arange(0, stream.rows, restart_rows))
    return all(map(_filled, parts, bits.tolist())) and len(parts) == len(bits)


def sequential_is_whole(frame: bytes, stream: Stream) -> bool:
    """Whether a sequential JPEG stream of one component contains all its blocks and nothing else (T.81 F.2.2)."""
    blocks = -(-stream.rows // 8) * -(-stream.columns // 8)
    interval = stream.interval or blocks
    parts = _parts(frame, stream, -(-blocks // interval))
    dc, ac = _by_bits(stream.dc), _by_bits(stream.ac)
    for number, part in enumerate(parts):
        bits = _bits_of_blocks(part, max(0, min(interval, blocks - number * interval)), dc, ac)
        if bits is None or not _filled(part, bits):
            return False
    return len(parts) == -(-blocks // interval)


@lru_cache(maxsize=16)
def _by_bits(codes: Codes) -> list[int]:
    """Table from 16 bits to the code that they start with (length * 256 + symbol); 0 where there is none."""
    table = [length << 8 | symbol for length, symbol in codes for _ in range(1 << (16 - length))]
    return (table + [0] * 0x10000)[:0x10000]


def _bits_of_blocks(part: bytes, blocks: int, dc: list[int], ac: list[int]) -> int | None:
    """Number of bits that `blocks` blocks take; None when a code is unknown or the data end too early."""
    data = part.replace(b"\xff\0", b"\xff")
    end, position = 8 * len(data), 0
    data += b"\0\0\0"
    for _ in range(blocks):
        table, coefficient = dc, 0
        while coefficient < 64:
            if position > end:
                return None
            byte = position >> 3
            bits = (data[byte] << 16 | data[byte + 1] << 8 | data[byte + 2]) >> (8 - (position & 7)) & 0xFFFF
            code = table[bits]
            symbol = code & 255
            position += (code >> 8) + (symbol & 15)
            if not code or (table is ac and symbol & 15 == 0 and symbol not in (0, 0xF0)):
                return None
            if table is ac and symbol == 0:  # the rest of the block is 0
                break
            coefficient += (symbol >> 4) + 1 if table is ac else 1
            table = ac
        else:
            if coefficient > 64:
                return None
    return position if position <= end else None


def _parts(frame: bytes, stream: Stream, most: int) -> list[bytes]:
    """The entropy-coded data, split at the restart markers; one more than `most` where there are more."""
    return re.split(rb"\xff+[\xd0-\xd7]", frame[stream.scan : stream.end].rstrip(b"\xff"), maxsplit=most)


def _filled(part: bytes, bits: int) -> bool:
    """Whether `bits` bits and padding fill a part of the scan to its end, and no marker is in it.

    Zero bytes may follow, which some encoders write.
    """
    if re.search(rb"\xff[^\0]", part):
        return False
    size, padding = -(-bits // 8), -bits % 8
    excess = len(part) - part.count(b"\xff\0") - size
    if excess < 0 or part[len(part) - excess :].strip(b"\0"):
        return False
    part = part[: len(part) - excess]
    rest = (part.removesuffix(b"\0") if part.endswith(b"\xff\0") else part)[-1:]
    ones = (1 << padding) - 1
    # T.81 pads with ones; zeros are accepted.
    return bool(rest) and rest[0] & ones in (0, ones)


def _bits(stream: Stream, pixels: npt.NDArray[np.unsignedinteger], restart_rows: int) -> npt.NDArray[np.int64]:
    """Number of bits that the values of each row take, (rows,)."""
    difference = np.arange(0x10000, dtype=np.uint16).view(np.int16).astype(np.int32)
    category = np.frexp(np.abs(difference))[1]  # bits of the absolute difference; 16 means 32768, without further bits
    lengths = {symbol: length for length, symbol in stream.dc}
    code = np.array([lengths.get(symbol, 0) for symbol in range(17)], np.uint8)
    bits_of = (code[category] + np.where(category == 16, 0, category)).astype(np.uint8)
    taken = np.empty(stream.rows, np.int64)
    mask = (1 << stream.bits) - 1
    for start in range(0, stream.rows, _BLOCK_ROWS):
        first = max(start - 1, 0)
        block = pixels[first : start + _BLOCK_ROWS].astype(np.int32) & mask
        expected = _predicted(block, first, stream, restart_rows)
        bits = bits_of[((block - expected) & 0xFFFF)[start - first :]]
        taken[start : start + _BLOCK_ROWS] = bits.sum(1, dtype=np.int64)
    return taken


def _predicted(block: npt.NDArray[np.int32], first: int, stream: Stream, restart_rows: int) -> npt.NDArray[np.int32]:
    """Prediction of each value of a block from its neighbours (T.81 table H.1); the block starts at row `first`."""
    left, above, corner = block[1:, :-1], block[:-1, 1:], block[:-1, :-1]
    expected = np.empty_like(block)
    expected[1:, 0] = block[:-1, 0]
    match stream.predictor:
        case 1:
            expected[1:, 1:] = left
        case 2:
            expected[1:, 1:] = above
        case 3:
            expected[1:, 1:] = corner
        case 4:
            expected[1:, 1:] = left + above - corner
        case 5:
            expected[1:, 1:] = left + ((above - corner) >> 1)
        case 6:
            expected[1:, 1:] = above + ((left - corner) >> 1)
        case _:
            expected[1:, 1:] = (left + above) >> 1
    restarts = [row - first for row in range(first, first + len(block)) if row % restart_rows == 0]
    expected[restarts, 1:] = block[restarts, :-1]
    expected[restarts, 0] = 1 << (stream.bits - 1)
    return expected
