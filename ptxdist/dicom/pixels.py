"""Decoding of pixel data to stored values, and of stored values to grey levels.

Owns: the decoder of each transfer syntax, and the rule from stored values to uint8. Refuses: pixel data that are
detectably damaged or truncated, and images of another size than the header says.

From stored values to uint8 (PS3.3 C.11.1, C.11.2, C.7.6.3.1.2, C.7.5.1.1.2), in this order:
1. Unsigned values of 8 bits without rescale, window or look-up table stay as they are.
2. Otherwise: modality LUT or rescale. Then the first VOI LUT, whose whole output range (its number of bits, see
   `luts`) becomes 0..255; or else the first window, by its function LINEAR, LINEAR_EXACT or SIGMOID; or else the range
   of the values in the image without padding (Pixel Padding Value, Range Limit). Values outside become 0 or 255.
3. MONOCHROME1, or Presentation LUT Shape INVERSE, is inverted, so that air is dark in every Radiograph.
4. Padding that extends from a corner of the image becomes 0, as the black that a square is padded with. Elsewhere its
   value is also that of saturated bone or of letters of lead, and stays.
An image whose stored values differ and whose grey levels do not is refused.

Stored values are the Bits Stored below High Bit (PS3.5 8.1.1); what lies above and below, such as overlays, is cleared.

The decoders are fixed and not left to pydicom. Of those that never crashed or hung on damaged streams, the ones chosen
detected the most damage: gdcm aborts the process, pylibjpeg-rle panics, pylibjpeg-libjpeg accepts damaged JPEG-LS.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from textwrap import shorten
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from pydicom import uid
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder

from ptxdist.dicom import codestream, tags
from ptxdist.dicom.codestream import Stream
from ptxdist.dicom.luts import Lut, window_of
from ptxdist.dicom.tags import Tags
from ptxdist.errors import DicomError

Pixels = npt.NDArray[np.uint8]
Stored = npt.NDArray[Any]

_NATIVE = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
)
_LIBJPEG = (uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1)
_OPENJPEG = (uid.JPEG2000Lossless, uid.JPEG2000, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K)
# Transfer syntax: name of pydicom's plugin ("" for none), and the package that decodes.
_DECODERS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(_NATIVE, ("", "pydicom")),
    uid.RLELossless: ("pydicom", "pydicom"),
    uid.JPEGBaseline8Bit: ("", "simplejpeg"),
    **dict.fromkeys(_LIBJPEG, ("pylibjpeg", "pylibjpeg-libjpeg")),
    **dict.fromkeys((uid.JPEGLSLossless, uid.JPEGLSNearLossless), ("pyjpegls", "pyjpegls")),
    **dict.fromkeys(_OPENJPEG, ("pylibjpeg", "pylibjpeg-openjpeg")),
}
# Accepted frame markers. Progressive images occur as Baseline, and its decoder is strict with them as well.
_PROCESSES = {
    uid.JPEGBaseline8Bit: {*codestream.SOF_SEQUENTIAL, codestream.SOF_PROGRESSIVE},
    uid.JPEGExtended12Bit: codestream.SOF_SEQUENTIAL,
    uid.JPEGLossless: {codestream.SOF_LOSSLESS},
    uid.JPEGLosslessSV1: {codestream.SOF_LOSSLESS},
    uid.JPEGLSLossless: {codestream.SOF_JPEG_LS},
    uid.JPEGLSNearLossless: {codestream.SOF_JPEG_LS},
}
_BLOCK_ROWS = 256


@cache
def decoder_of(syntax: str) -> str:
    """Name and version of the package that decodes a transfer syntax. Raises DicomError when none does."""
    if syntax not in _DECODERS:
        raise DicomError(f"is encoded as {_name(syntax)}, which is not supported")
    package = _DECODERS[syntax][1]
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        raise DicomError(f"is encoded as {_name(syntax)}, which needs the package {package}: install it") from None


def _name(syntax: str) -> str:
    return uid.UID_dictionary[syntax][0] if syntax in uid.UID_dictionary else "an unknown transfer syntax"


def decode(file: Tags, rows: int, columns: int) -> Stored:
    """Stored values (rows, columns) of a single-frame grayscale image: uint8, int8, uint16 or int16.

    Raises DicomError when the pixel data are missing, cut off, damaged, or of another size.
    """
    if not len(file.values.get(tags.PIXEL_DATA, b"")):
        raise DicomError("has no pixel data")
    if file.encapsulated == (file.syntax in _NATIVE):
        found = "compressed" if file.encapsulated else "not compressed"
        raise DicomError(f"contradicts itself: its pixel data are {found}, its transfer syntax says otherwise")
    try:
        with warnings.catch_warnings(action="ignore"):
            warnings.filterwarnings("error", "The decoded RLE segment")  # … is not of the expected length
            if not file.encapsulated:
                return _native(file, rows, columns)
            return _compressed(file, rows, columns)
    except DicomError:
        raise
    except Exception as error:  # each decoder raises errors of its own
        reason = shorten((str(error).splitlines() or ["no reason given"])[-1], 200, placeholder=" …")
        raise DicomError(
            f"has pixel data that cannot be decoded ({_name(file.syntax)}: {reason}): they are damaged, or of a kind "
            f"that {_DECODERS[file.syntax][1]} does not read"
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
    allocated, bits = file.whole(tags.BITS_ALLOCATED, 0), _bits_stored(file)
    below = _bits_below(file)
    if not below:
        return _by_pydicom(file, data, rows, columns)
    words = _by_pydicom(file, data, rows, columns, allocated, allocated)
    plain = _field(words, 0, bits)
    unsigned = words.view(f"u{words.dtype.itemsize}")
    # Some devices state a High Bit of 15 for values in the lower bits. Then all words fit these, and use the lowest.
    fits = np.array_equal(plain, words) or unsigned.max() < 2**bits
    return plain if fits and (unsigned & (2**below - 1)).any() else _field(words, below, bits)


def _field(words: Stored, below: int, bits: int) -> Stored:
    """The `bits` bits of each word above the `below` lowest ones; with their sign where words are signed."""
    size = 8 * words.dtype.itemsize
    return np.asarray((words << (size - below - bits)) >> (size - bits))


def _bits_below(file: Tags) -> int:
    """Number of bits of a word below its stored value (PS3.5 8.1.1)."""
    bits = _bits_stored(file)
    return file.whole(tags.HIGH_BIT, bits - 1) + 1 - bits


def _compressed(file: Tags, rows: int, columns: int) -> Stored:
    frame = file.frame()
    if file.syntax == uid.RLELossless:
        # pydicom unpacks all runs before it counts; a valid stream is at most twice as long as its content.
        if len(frame) > 2 * rows * columns * file.whole(tags.BITS_ALLOCATED, 0) // 8 + 64:
            raise DicomError("has more run-length data than its size allows")
        return _run_lengths(file, frame, rows, columns)
    stream = codestream.read_jpeg_2000(frame) if file.syntax in _OPENJPEG else codestream.read_jpeg(frame)
    _check(stream, file, rows, columns)
    if file.syntax in _OPENJPEG:
        return _decoded(file, frame, stream, rows, columns)
    regular = codestream.with_regular_scan(frame, stream)
    try:
        return _decoded(file, frame if file.syntax == uid.JPEGBaseline8Bit else regular, stream, rows, columns)
    except Exception:  # each decoder raises errors of its own
        for other in [regular] * (regular != frame) + codestream.without_zeros(regular, stream):
            with suppress(Exception):
                return _decoded(file, other, codestream.read_jpeg(other), rows, columns)
        raise


def _run_lengths(file: Tags, frame: bytes, rows: int, columns: int) -> Stored:
    """Stored values of an RLE image, which more zeros may follow than the one that makes its length even."""
    plain = frame.rstrip(b"\0")
    for data in (frame, plain, plain + bytes(1)):  # the image may end with a zero
        with suppress(Exception):
            return _words(file, encapsulate([data], has_bot=False), rows, columns)
    return _words(file, encapsulate([frame], has_bot=False), rows, columns)


def _decoded(file: Tags, frame: bytes, stream: Stream, rows: int, columns: int) -> Stored:
    """Stored values of a compressed image that has been checked; each decoder raises errors of its own."""
    if file.syntax == uid.JPEGBaseline8Bit:
        # strict: what libjpeg only warns about (too few or too many bytes, unknown codes) is an error.
        pixels = simplejpeg.decode_jpeg(frame, colorspace="GRAY", strict=True)[:, :, 0]
        return _as_stated(np.asarray(pixels.view(np.int8) if file.whole(tags.SIGNED, 0) == 1 else pixels), stream, file)
    # How values are stored follows from the stream, since headers are often wrong about it.
    allocated = 8 if stream.bits <= 8 else 16
    data = encapsulate([frame], has_bot=False)
    pixels = _by_pydicom(file, data, rows, columns, allocated, stream.bits)
    whole = True
    if stream.process == codestream.SOF_LOSSLESS:
        whole = codestream.lossless_is_whole(frame, stream, pixels.view(f"u{pixels.dtype.itemsize}"))
    elif stream.process in codestream.SOF_SEQUENTIAL:
        whole = codestream.sequential_is_whole(frame, stream)
    if not whole:
        raise DicomError("has damaged JPEG data (its codes do not fill its length)")
    return _as_stated(pixels, stream, file)


def _as_stated(pixels: Stored, stream: Stream, file: Tags) -> Stored:
    """Decoded values as the header means them, where the stream has another number of bits than Bits Stored.

    Only JPEG 2000 keeps the sign of its values. Those of other streams were sign-extended from the highest bit of the
    stream, which is not the sign when the stream is deeper. Raises DicomError where header and stream cannot both be
    true.
    """
    bits, below, signed = _bits_stored(file), _bits_below(file), file.whole(tags.SIGNED, 0) == 1
    overlay = file.whole(tags.OVERLAY_BIT, 0) >= bits
    # Equal bits leave one doubt: values that are signed in the stream only.
    if not (stream.signed and not signed) and (stream.bits == bits or not (below or signed or overlay)):
        return pixels
    words = pixels.view(f"u{pixels.dtype.itemsize}")
    if below and stream.bits > bits:
        clear = stream.bits == below + bits
    elif stream.signed:
        sign = words.dtype.type(2 ** (stream.bits - 1))
        # Some encoders mark unsigned words as signed. Then the unsigned values are the smoother image.
        meant = stream.bits == bits and _roughness(words) <= _roughness(words ^ sign)
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


def _roughness(words: Stored) -> float:
    """Mean difference of neighbours in a row."""
    return float(np.abs(np.diff(words.astype(np.int32), axis=1)).mean()) if words.shape[1] > 1 else 0.0


def _check(stream: Stream, file: Tags, rows: int, columns: int) -> None:
    """Raise DicomError when a compressed image contradicts the header."""
    if (stream.rows, stream.columns) != (rows, columns):
        raise DicomError(f"contains {stream.columns}x{stream.rows} pixels, but its header says {columns}x{rows}")
    if stream.tiles > codestream.MAX_TILES:
        raise DicomError(f"has damaged JPEG 2000 data ({stream.tiles:,} tiles)")
    if stream.components != 1:
        raise DicomError(f"is not grayscale (its compressed image has {stream.components} samples per pixel)")
    if stream.process not in _PROCESSES.get(file.syntax, {0}):
        raise DicomError(f"has the transfer syntax {_name(file.syntax)}, but its image is encoded otherwise")
    if stream.process == codestream.SOF_LOSSLESS and stream.shift:
        raise DicomError("is JPEG Lossless without its lowest bits (point transform), which is not supported")
    allowed = 8 if file.syntax == uid.JPEGBaseline8Bit else file.whole(tags.BITS_ALLOCATED, 0)
    if not 2 <= stream.bits <= allowed:
        raise DicomError(f"contains an image of {stream.bits} bits per pixel, but at most {allowed} are allowed")


def _by_pydicom(
    file: Tags, data: bytes, rows: int, columns: int, allocated: int | None = None, stored: int | None = None
) -> Stored:
    values, _ = get_decoder(uid.UID(file.syntax)).as_array(
        data,
        decoding_plugin=_DECODERS[file.syntax][0],
        raw=True,
        rows=rows,
        columns=columns,
        number_of_frames=1,
        samples_per_pixel=1,
        photometric_interpretation="MONOCHROME2",
        bits_allocated=allocated or file.whole(tags.BITS_ALLOCATED, 0),
        bits_stored=stored or _bits_stored(file),
        pixel_representation=file.whole(tags.SIGNED, 0),
        pixel_keyword="PixelData",
        pixel_vr=file.pixel_vr,
        allow_excess_frames=False,
    )
    return np.asarray(values.astype(values.dtype.newbyteorder("="), copy=False))


def _bits_stored(file: Tags) -> int:
    return file.whole(tags.BITS_STORED, file.whole(tags.BITS_ALLOCATED, 0))


@np.errstate(over="ignore", invalid="ignore")  # the result is checked
def to_uint8(stored: Stored, file: Tags) -> Pixels:
    """Grey levels of stored values by the rule at the top of this module: uint8, same shape, air dark.

    Raises DicomError for an invalid window, rescale or look-up table, and for one that leaves a single grey level.
    """
    inverse = file.text(tags.PHOTOMETRIC) == "MONOCHROME1" or file.text(tags.LUT_SHAPE) == "INVERSE"
    slope, intercept = file.decimal(tags.SLOPE), file.decimal(tags.INTERCEPT)
    slope, intercept = 1.0 if slope is None else slope, intercept or 0.0
    center, width = file.decimal(tags.WINDOW_CENTER), file.decimal(tags.WINDOW_WIDTH)
    rescaled = file.modality_lut is not None or (slope, intercept) != (1.0, 0.0)
    plain = not rescaled and file.voi_lut is None and width is None
    plain = plain and stored.dtype == np.uint8 and file.whole(tags.BITS_STORED, 8) >= 8
    if plain and not file.values.get(tags.PADDING):
        return np.ascontiguousarray(255 - stored if inverse else stored)

    # There are only 256 or 65,536 different stored values: the rule is computed once for each of them.
    kind = np.dtype(f"u{stored.dtype.itemsize}")
    number = np.arange(256**stored.dtype.itemsize).astype(kind).view(stored.dtype)
    values = number.astype(np.float64)
    if file.modality_lut is not None:
        values = _through(file.modality_lut, values)
    elif slope:
        values = values * slope + intercept
    else:
        raise DicomError("has a rescale slope of 0")
    padding = _padding(number, file)
    if file.voi_lut is not None:
        unit = _through(file.voi_lut, values) / (2**file.voi_lut.bits - 1)
    elif width is not None:
        unit = window_of(values, center, width, file.text(tags.WINDOW_FUNCTION), abs(slope))
    elif plain:
        unit = values / 255
    else:
        unit = _spread(values, stored, padding)
    if not (np.isfinite(values).all() and np.isfinite(unit).all()):
        raise DicomError("has a rescale or a window whose numbers are too large")
    table = np.rint(np.clip(unit, 0.0, 1.0) * 255).astype(np.uint8)
    if inverse:
        table = 255 - table
    pixels = np.empty(stored.shape, np.uint8)
    for target, block in zip(_blocks(pixels, pixels.dtype), _blocks(stored, kind), strict=True):
        target[:] = table[block]
    corners = stored[:: max(1, len(stored) - 1), :: max(1, stored.shape[1] - 1)].view(kind)
    if padding[corners].any() and table[padding].any():
        pixels[_from_corners(np.concatenate([padding[block] for block in _blocks(stored, kind)]))] = 0
    if _blank(pixels) and not _blank(stored):
        raise DicomError(
            "has pixels that differ, but its window, rescale or look-up table turns them into a single grey level; "
            "correct or remove it"
        )
    return pixels


def _spread(values: npt.NDArray[np.float64], stored: Stored, padding: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Values by their place in the range of those in the image without padding, whatever their unit; 0..1 within."""
    present = np.zeros(len(values), bool)
    for block in _blocks(stored, np.dtype(f"u{stored.dtype.itemsize}")):
        present[block] = True
    unpadded = values[present & ~padding]
    in_range = unpadded if unpadded.size else values[present]
    low = in_range.min()
    return np.asarray((values - low) / ((in_range.max() - low) or 1.0))


def _from_corners(padded: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Padding in lines from those parts of the edges that are padding from a corner on; none where all is padding."""
    found, sweep = np.zeros_like(padded), np.logical_and.accumulate
    for turns in range(4):
        turned = np.rot90(padded, turns)
        edge = sweep(turned[0]) | sweep(turned[0, ::-1])[::-1]
        np.rot90(found, turns)[...] |= sweep(turned & edge, axis=0)
    return found if not found.all() else np.zeros_like(padded)


def _blank(values: Stored) -> bool:
    """Whether 99.9 % of an image, or of a sample of at least 256 x 256 of its pixels, have one value."""
    step = max(1, min(values.shape) // 256)
    sample = np.ascontiguousarray(values[::step, ::step]).view(f"u{values.dtype.itemsize}")
    return bool(np.bincount(sample.reshape(-1)).max() >= 0.999 * sample.size)


def _blocks(array: Stored, kind: np.dtype[Any]) -> list[Stored]:
    """Blocks of rows, small enough that indexing with one takes little memory."""
    return [array[start : start + _BLOCK_ROWS].view(kind) for start in range(0, len(array), _BLOCK_ROWS)]


def _padding(number: Stored, file: Tags) -> npt.NDArray[np.bool_]:
    """Which stored values are padding. The header gives 16 bits, of which the pixels have the stored ones."""
    if not file.values.get(tags.PADDING):
        return np.zeros(len(number), bool)
    bits = min(_bits_stored(file), 8 * number.dtype.itemsize)
    ends: list[int] = []
    for tag in (tags.PADDING, tags.PADDING_LIMIT):
        end = file.whole(tag, ends[0] if ends else 0) % 2**bits
        ends.append(end - 2**bits if number.dtype.kind == "i" and end >= 2 ** (bits - 1) else end)
    return np.asarray((number >= min(ends)) & (number <= max(ends)))


def _through(lut: Lut, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    index = np.clip(np.rint(values) - lut.first, 0, len(lut.entries) - 1).astype(np.intp)
    return np.asarray(lut.entries[index], np.float64)
