"""Decoding of pixel data to stored values.

Owns: how the pixel data of each transfer syntax are decoded and checked. Refuses: pixel data that are detectably
damaged or truncated, and images of another size than the header says.

Stored values are the Bits Stored below High Bit (PS3.5 8.1.1); what lies above and below, such as overlays, is cleared.

The decoders are fixed and not left to pydicom. Of those with a permissive licence that never crashed or hung on damaged
streams, the ones chosen detected the most damage: gdcm aborts the process, pylibjpeg-rle panics, imagecodecs ignores
libjpeg's warnings. Therefore simplejpeg decodes JPEG Baseline, and `codestream` checks the other JPEG streams.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import suppress
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg

from ptxdist.dicom import codestream, syntax, tags
from ptxdist.dicom.codestream import Stream
from ptxdist.dicom.pixels import Stored
from ptxdist.dicom.tags import Tags
from ptxdist.errors import DicomError, raise_limit

if TYPE_CHECKING:
    from pydicom.pixels.decoders.base import Decoder

# Accepted frame markers. Progressive images occur as Baseline, and its decoder is strict with them as well.
_PROCESSES = {
    syntax.BASELINE: {*codestream.SOF_SEQUENTIAL, codestream.SOF_PROGRESSIVE},
    syntax.EXTENDED: codestream.SOF_SEQUENTIAL,
    **dict.fromkeys((syntax.LOSSLESS, syntax.LOSSLESS_SV1), frozenset((codestream.SOF_LOSSLESS,))),
    **dict.fromkeys(syntax.JPEG_LS, frozenset((codestream.SOF_JPEG_LS,))),
}
# An image read with a wrong sign has twice the differences between neighbours, with too few bits one and a half times;
# 853 radiographs, and those of pydicom, would not be smoother in another reading (at most by 2 %).
_FOLDED = 0.8
_ENOUGH = 1000  # pairs of neighbours
_FLAT = 0.03  # of the pixels have the value of padding or saturation
# Letters that are burned into a dark image jump as far: so many pixels, and as many times those of the next value, have
# theirs; where JPEG has blurred them, they are in few rows.
_LETTERS, _TIMES, _ROWS = 0.001, 8, 0.1


def decode(file: Tags, rows: int, columns: int) -> Stored:
    """Stored values (rows, columns) of a single-frame grayscale image: uint8, int8, uint16 or int16.

    Raises DicomError when the pixel data are missing, cut off, damaged, or of another size, and when they are evidently
    of another sign or of more bits than the header says.
    """
    if not len(file.values.get(tags.PIXEL_DATA, b"")):
        raise DicomError("has no pixel data")
    if file.encapsulated == (file.syntax in syntax.NATIVE):
        found = "compressed" if file.encapsulated else "not compressed"
        raise DicomError(f"contradicts itself: its pixel data are {found}, its transfer syntax says otherwise")
    try:
        with warnings.catch_warnings(action="ignore"):
            warnings.filterwarnings("error", "The decoded RLE segment")  # … is not of the expected length
            stored = _compressed(file, rows, columns) if file.encapsulated else _native(file, rows, columns)
            _refuse_other_sign(stored, file.bits_stored())
            return stored
    except DicomError:
        raise
    except Exception as error:  # each decoder raises errors of its own
        reason = shorten((str(error).splitlines() or ["no reason given"])[-1], 200, placeholder=" …")
        raise DicomError(
            f"has pixel data that cannot be decoded ({syntax.name_of(file.syntax)}: {reason}): they are damaged, or "
            f"of a kind that {syntax.DECODERS[file.syntax]} does not read"
        ) from error


def _native(file: Tags, rows: int, columns: int) -> Stored:
    row_bytes = columns * file.whole(tags.BITS_ALLOCATED, 0) // 8
    there, expected = len(file.values[tags.PIXEL_DATA]), rows * row_bytes
    if there < expected:
        raise DicomError(f"is cut off: it has {there:,} of {expected:,} bytes of pixel data")
    excess = bytes(file.values[tags.PIXEL_DATA][expected + expected % 2 : 2 * expected])
    # Padding is to be accepted (PS3.5 8.1.1, note): any up to a row, more if it is one value. Else the size is wrong.
    if there >= 2 * expected or (len(excess) > row_bytes and excess[2:] != excess[:-2]):
        raise DicomError(f"has {there:,} bytes of pixel data, but {columns}x{rows} pixels take {expected:,}")
    return _words(file, bytes(file.values[tags.PIXEL_DATA][: expected + expected % 2]), rows, columns)


def _words(file: Tags, data: bytes, rows: int, columns: int) -> Stored:
    """Stored values of an image that is kept in words of Bits Allocated."""
    allocated, bits = file.whole(tags.BITS_ALLOCATED, 0), file.bits_stored()
    below = _bits_below(file)
    decoder, options = _pydicom(file, rows, columns, 1, allocated)
    words = _native_order(decoder.as_array(data, **options)[0])
    if bits == allocated:
        return words
    plain = _field(words, 0, bits)
    unsigned = words.view(f"u{words.dtype.itemsize}")
    if not below:
        # Overlays or noise above the stated bits make an image rougher, bits of its values smoother.
        if unsigned.max() >= 2**bits and _is_folded(plain, unsigned):
            raise DicomError(f"contradicts itself: its header says {bits} bits, its values have more; correct it")
        return plain
    # Some devices state a High Bit of 15 for values in the lower bits. Then all words fit these, and use the lowest.
    fits = np.array_equal(plain, words) or unsigned.max() < 2**bits
    return plain if fits and (unsigned & (2**below - 1)).any() else _field(words, below, bits)


def _field(words: Stored, below: int, bits: int) -> Stored:
    """The `bits` bits of each word above the `below` lowest ones; with their sign where words are signed."""
    size = 8 * words.dtype.itemsize
    return np.asarray((words << (size - below - bits)) >> (size - bits))


def _bits_below(file: Tags) -> int:
    """Number of bits of a word below its stored value (PS3.5 8.1.1)."""
    bits = file.bits_stored()
    return file.whole(tags.HIGH_BIT, bits - 1) + 1 - bits


def _compressed(file: Tags, rows: int, columns: int) -> Stored:
    if file.syntax == syntax.RLE:
        return _run_lengths(file, rows, columns)
    frame = file.frame()
    stream = codestream.read_jpeg_2000(frame) if file.syntax in syntax.JPEG_2000 else codestream.read_jpeg(frame)
    _check(stream, file, rows, columns)
    if file.syntax in syntax.JPEG_2000:
        return _decoded(file, frame, stream, rows, columns)
    regular = codestream.with_regular_scan(frame, stream)
    try:
        return _decoded(file, frame if file.syntax == syntax.BASELINE else regular, stream, rows, columns)
    except Exception:  # each decoder raises errors of its own
        # That of 12 bits takes half a minute for the largest image, and reads zeros.
        others = [] if file.syntax == syntax.EXTENDED else codestream.without_zeros(regular, stream)
        for other in [regular] * (regular != frame) + others:
            with suppress(Exception):
                return _decoded(file, other, codestream.read_jpeg(other), rows, columns)
        raise


def _run_lengths(file: Tags, rows: int, columns: int) -> Stored:
    """Stored values of an RLE image, which more zeros may follow than the one that makes its length even."""
    from pydicom.encaps import encapsulate

    frame, reasons = file.frame(), list[Exception]()
    refuse_long_runs(frame, rows * columns, file.whole(tags.BITS_ALLOCATED, 0))
    endings = (None, b"", bytes(1)) if frame.endswith(b"\0") else (None, bytes(1))  # the image may end with a zero
    del frame  # pydicom makes two copies
    for ending in endings:
        try:
            return _words(file, encapsulate([_ending(file.frame(), ending)], has_bot=False), rows, columns)
        except Exception as error:  # whose traceback keeps the copies
            raise_limit(error)
            if isinstance(error, MemoryError):
                raise
            kind = DicomError if isinstance(error, DicomError) else ValueError
            reasons.append(kind(str(error)))
    raise reasons[0]


def _ending(frame: bytes, ending: bytes | None) -> bytes:
    return frame if ending is None else frame.rstrip(b"\0") + ending


def refuse_long_runs(frame: bytes, pixels: int, allocated: int) -> None:
    """Raise DicomError for RLE data of more `pixels` of `allocated` bits than an image has.

    pydicom unpacks all runs before it counts. A valid stream is at most twice as long as its content.
    """
    segments = _rle_segments(frame.rstrip(b"\0"), allocated // 8)
    if len(frame) > 2 * pixels * allocated // 8 + 64 or not all(_unpacks_to(part, pixels + 1) for part in segments):
        raise DicomError("has more run-length data than its size allows")


def _rle_segments(frame: bytes, most: int) -> list[bytes]:
    """The segments of an RLE image (PS3.5 G.3.1), one for each byte of a pixel: pydicom refuses more."""
    starts = [int.from_bytes(frame[4 * i : 4 * i + 4], "little") for i in range(1, 1 + min(most, *frame[:1]))]
    return [frame[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]


def _unpacks_to(segment: bytes, most: int) -> bool:
    """Whether the runs of an RLE segment have at most so many bytes (PS3.5 G.3.2)."""
    position, total = 0, 0
    while position < len(segment) and total <= most:
        head = segment[position]
        if head < 128:
            total, position = total + head + 1, position + head + 2
        else:
            total, position = total + (257 - head) * (head > 128), position + 1 + (head > 128)
    return total <= most


def _decoded(file: Tags, frame: bytes, stream: Stream, rows: int, columns: int) -> Stored:
    """Stored values of a compressed image that has been checked; each decoder raises errors of its own."""
    if file.syntax == syntax.BASELINE:
        # strict: what libjpeg only warns about (too few or too many bytes, unknown codes) is an error.
        pixels = simplejpeg.decode_jpeg(frame, colorspace="GRAY", strict=True)[:, :, 0]
        return _as_stated(np.asarray(pixels.view(np.int8) if file.whole(tags.SIGNED, 0) == 1 else pixels), stream, file)
    words = _by_imagecodecs(file, frame[stream.scan :] if file.syntax in syntax.JPEG_2000 else frame)
    if words.shape != (rows, columns):
        raise DicomError("has damaged pixel data (they decode to another size)")
    whole = True
    if stream.process == codestream.SOF_LOSSLESS:
        whole = codestream.lossless_is_whole(frame, stream, words)
    elif stream.process in codestream.SOF_SEQUENTIAL:
        whole = codestream.sequential_is_whole(frame, stream)
    if not whole:
        raise DicomError("has damaged JPEG data (its codes do not fill its length)")
    # How values are stored follows from the stream, since headers are often wrong about it.
    if file.whole(tags.SIGNED, 0) == 1:
        words = _field(words.view(f"i{words.dtype.itemsize}"), 0, stream.bits)
    elif stream.signed:
        words = words & words.dtype.type(2**stream.bits - 1)
    return _as_stated(words, stream, file)


def _by_imagecodecs(file: Tags, frame: bytes) -> Stored:
    """Unsigned words (rows, columns) of a compressed image, those of signed values with all their upper bits set."""
    import imagecodecs

    if file.syntax in syntax.JPEG_2000:
        values = imagecodecs.jpeg2k_decode(frame)
    else:
        values = imagecodecs.jpegls_decode(frame) if file.syntax in syntax.JPEG_LS else imagecodecs.jpeg8_decode(frame)
    return np.asarray(values.view(f"u{values.dtype.itemsize}"))


def _as_stated(pixels: Stored, stream: Stream, file: Tags) -> Stored:
    """Decoded values as the header means them, where the stream has another number of bits than Bits Stored.

    Only JPEG 2000 keeps the sign of its values. Those of other streams were sign-extended from the highest bit of the
    stream, which is not the sign when the stream is deeper. Raises DicomError where header and stream cannot both be
    true.
    """
    bits, below, signed = file.bits_stored(), _bits_below(file), file.whole(tags.SIGNED, 0) == 1
    overlay = file.whole(tags.OVERLAY_BIT, 0) >= bits
    if stream.bits > bits and not below:
        overlay = overlay or _is_folded(pixels, _field(pixels, 0, bits), rows=0)  # it may be a few letters
    # Equal bits leave one doubt: values that are signed in the stream only.
    if not (stream.signed and not signed) and (stream.bits == bits or not (below or signed or overlay)):
        return pixels
    words = pixels.view(f"u{pixels.dtype.itemsize}")
    if below and stream.bits > bits:
        clear = stream.bits == below + bits
    elif stream.signed:
        sign = words.dtype.type(2 ** (stream.bits - 1))
        # Some encoders mark unsigned words as signed.
        meant = stream.bits == bits and not _is_folded(words, words ^ sign)
        clear = signed or words.max() < sign or meant
    else:
        clear = stream.bits > bits or not signed or pixels.min() >= 0
    if not clear:
        raise DicomError(
            f"contradicts itself: its header says {'signed' if signed else 'unsigned'} values of {bits} bits with High "
            f"Bit {below + bits - 1}, its compressed image has {'signed ' * stream.signed}values of {stream.bits} bits"
        )
    # Values that all fit the stated bits have their sign there; bits above these are overlays, if any are stated.
    inside = signed and not stream.signed and words.max() < 2**bits
    if stream.bits > bits and (below or inside or overlay):
        return _field(pixels, below, bits)
    return pixels


def _refuse_other_sign(stored: Stored, bits: int) -> None:
    """Raise DicomError for an image that is far smoother with the other sign: it jumps in the middle of its range."""
    signed, bits = stored.dtype.kind == "i", min(bits, 8 * stored.dtype.itemsize)
    words = stored.view(f"u{stored.dtype.itemsize}") & (2**bits - 1)
    if _is_folded(stored, words if signed else words ^ (2 ** (bits - 1))):
        stated = "signed" if signed else "unsigned"
        raise DicomError(f"contradicts itself: its header says {stated} values, its pixels do not; correct it")


def _is_folded(stored: Stored, other: Stored, rows: float = _ROWS) -> bool:
    """Whether an image is far smoother in another reading, without the edges of padding, saturation and letters."""
    stored, other = (values[:: max(1, len(values) // 64)].astype(np.int32) for values in (stored, other))
    inner = ~np.isin(
        stored, [end for end, step in ((stored.min(), 1), (stored.max(), -1)) if _is_edge(stored, end, step)]
    )
    pairs = inner[:, 1:] & inner[:, :-1]
    rough, smooth = ((np.abs(np.diff(values, axis=1)) * pairs).sum(1) for values in (stored, other))
    is_spread = (smooth < _FOLDED * rough).sum() >= rows * pairs.any(1).sum()
    return bool(pairs.sum() >= _ENOUGH and is_spread and smooth.sum() < _FOLDED * rough.sum())


def _is_edge(stored: Stored, end: int, step: int) -> bool:
    """Whether the lowest or highest value is that of padding, saturation or letters; `step` leads to the next one."""
    share, beside = ((stored == value).mean() for value in (end, end + step))
    return bool(share > _FLAT or share > max(_LETTERS, _TIMES * beside))


def _check(stream: Stream, file: Tags, rows: int, columns: int) -> None:
    """Raise DicomError when a compressed image contradicts the header."""
    if (stream.rows, stream.columns) != (rows, columns):
        raise DicomError(f"contains {stream.columns}x{stream.rows} pixels, but its header says {columns}x{rows}")
    if stream.tiles > codestream.MAX_TILES:
        raise DicomError(f"has JPEG 2000 data of {stream.tiles:,} tiles; at most {codestream.MAX_TILES:,} are accepted")
    if stream.components != 1:
        raise DicomError(f"is not grayscale (its compressed image has {stream.components} samples per pixel)")
    if stream.process not in _PROCESSES.get(file.syntax, {0}):
        raise DicomError(f"has the transfer syntax {syntax.name_of(file.syntax)}, but its image is encoded otherwise")
    if stream.process == codestream.SOF_LOSSLESS and stream.shift:
        raise DicomError("is JPEG Lossless without its lowest bits (point transform), which is not supported")
    allowed = 8 if file.syntax == syntax.BASELINE else file.whole(tags.BITS_ALLOCATED, 0)
    if not 2 <= stream.bits <= allowed:
        raise DicomError(f"contains an image of {stream.bits} bits per pixel, but at most {allowed} are allowed")


def decode_frames(file: Tags, rows: int, columns: int, frames: int) -> Iterator[Stored]:
    """Stored values (rows, columns) of each frame of an image of 1, 8 or 16 bits, uncompressed or RLE, one at a time.

    Raises DicomError for runs that unpack to more than a frame, and whatever pydicom raises for damaged pixel data.
    """
    from pydicom.encaps import generate_frames

    data = bytes(file.values[tags.PIXEL_DATA])
    if file.encapsulated:
        for frame in generate_frames(data, number_of_frames=frames):
            refuse_long_runs(frame, rows * columns, file.whole(tags.BITS_ALLOCATED, 0))
    decoder, options = _pydicom(file, rows, columns, frames, file.bits_stored())
    for values, _ in decoder.iter_array(data, **options):
        yield _native_order(values)


def _pydicom(file: Tags, rows: int, columns: int, frames: int, stored: int) -> tuple[Decoder, dict[str, Any]]:
    """pydicom's decoder for the transfer syntax, and its options."""
    from pydicom.pixels import get_decoder  # late, as imagecodecs: most radiographs need neither
    from pydicom.uid import UID

    return get_decoder(UID(file.syntax)), {
        "decoding_plugin": "pydicom" if file.syntax == syntax.RLE else "",
        "raw": True,
        "rows": rows,
        "columns": columns,
        "number_of_frames": frames,
        "samples_per_pixel": 1,
        "photometric_interpretation": "MONOCHROME2",
        "bits_allocated": file.whole(tags.BITS_ALLOCATED, 0),
        "bits_stored": stored,
        "pixel_representation": file.whole(tags.SIGNED, 0),
        "pixel_keyword": "PixelData",
        "pixel_vr": file.pixel_vr,
        "allow_excess_frames": False,
    }


def _native_order(values: Stored) -> Stored:
    return np.asarray(values.astype(values.dtype.newbyteorder("="), copy=False))
