"""Size and grey levels of PNG files, as in the PNG mirror of the challenge.

Owns: the chunks of a PNG (ISO/IEC 15948). Refuses: colour, transparency, palettes, animations, damage (a wrong
checksum, a missing end), images whose pixels are not square, sizes above MAX_PIXELS and MAX_SIDE.

Checksums are verified here and not by Pillow's `verify`, which accepts a file that lacks its last bytes, overlooks
transparency and animation after the image data, and names neither the checksum nor the truncation.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import PIL

from ptxdist.errors import DicomError

if TYPE_CHECKING:
    from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Anything above is rejected before it is decoded. A film digitised at 50 um has 7,112 x 8,636 pixels. The side bounds
# the square that an image is padded to, which its product does not.
MAX_PIXELS, MAX_SIDE = 64 * 1024 * 1024, 10_000
MAX_CHUNKS = 100_000  # with those of 8 kB, which most encoders write, far more than the largest image has
# cv2 is a fifth faster, but prints what it finds wrong to standard error.
DECODER = f"pillow {PIL.__version__}"
_GRAY, _COLOUR = 0, 2
_DAMAGED = "is a damaged PNG"


@dataclass(frozen=True)
class PngHeader:
    """Size in pixels, bits per sample, and whether three colour channels are stored."""

    rows: int
    columns: int
    bits: int
    colour: bool


def read_png_header(content: bytes, *, mask: bool = False) -> PngHeader:
    """Read the first chunk; the first 33 bytes of the content are enough.

    8 bits are accepted, 16 in grayscale, and 1 in grayscale for a `mask`. Raises DicomError for anything else, for a
    damaged chunk, and as `check_size`.
    """
    if len(content) < 33 or content[8:16] != b"\0\0\0\rIHDR" or not _sound(content, 8, 13):
        raise DicomError(f"{_DAMAGED} (its header cannot be read)")
    columns, rows, bits, kind = struct.unpack_from(">LLBB", content, 16)
    if rows < 1 or columns < 1:
        raise DicomError(f"{_DAMAGED} (it has no size)")
    check_size(rows, columns)
    if kind not in (_GRAY, _COLOUR):
        raise DicomError("is a PNG with a palette or transparency; only plain grayscale is accepted")
    if bits != 8 and (bits, kind) not in ((16, _GRAY), *[(1, _GRAY)] * mask):
        raise DicomError(f"is a PNG of {bits} bits per sample; 8 are accepted, and 16 in grayscale")
    return PngHeader(rows, columns, bits, kind == _COLOUR)


def check_size(rows: int, columns: int) -> None:
    """Raise DicomError for more than `MAX_PIXELS` pixels, or a side of more than `MAX_SIDE`."""
    if rows * columns > MAX_PIXELS or max(rows, columns) > MAX_SIDE:
        raise DicomError(
            f"claims {columns}x{rows} pixels; at most {MAX_PIXELS:,} are accepted, and {MAX_SIDE:,} on a side"
        )


def decode_png(content: bytes, *, mask: bool = False) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    """Stored values (rows, columns), of 1 bit as 0 and 255; three equal colour channels count as one.

    Raises DicomError as `read_png_header`, and when the file is damaged, coloured, transparent or animated.
    """
    header = read_png_header(content, mask=mask)
    _check_chunks(content, mask)
    try:
        values = _by_pillow(content)
    except DicomError:
        raise
    except Exception:  # Pillow raises almost anything on damaged files, and refuses long texts and profiles
        try:
            values = _by_pillow(_critical(content))
        except Exception as error:
            raise DicomError(f"{_DAMAGED} (its image cannot be decoded)") from error
    if header.colour:
        if values.ndim != 3 or (values != values[:, :, :1]).any():
            raise DicomError("is a colour PNG; only grayscale is accepted")
        values = values[:, :, 0]
    if values.shape != (header.rows, header.columns):
        raise DicomError(f"{_DAMAGED} (it decodes to another size)")
    if header.bits == 1:
        return values.astype(np.uint8) * np.uint8(255)
    return values.astype(np.uint16) if header.bits == 16 else values.astype(np.uint8)


def refuse_damaged(content: bytes) -> None:
    """Raise DicomError for a PNG of any colours that is damaged, animated, transparent, or of too many pixels."""
    if len(content) < 33 or content[8:16] != b"\0\0\0\rIHDR" or not _sound(content, 8, 13):
        raise DicomError(f"{_DAMAGED} (its header cannot be read)")
    check_size(*reversed(struct.unpack_from(">LL", content, 16)))
    _check_chunks(content, mask=True)


def _by_pillow(content: bytes) -> npt.NDArray[Any]:
    from PIL import Image  # late: most data sets have no PNG

    with warnings.catch_warnings(action="ignore"), Image.open(BytesIO(content), formats=("PNG",)) as image:
        values = np.asarray(image)
        refuse_turned(image)
        return values


def refuse_turned(image: Image.Image) -> None:
    """Raise DicomError for a decoded picture that some programs turn or mirror, by an Orientation in EXIF or XMP."""
    if image.getexif().get(0x0112, 1) not in (0, 1):
        raise DicomError(
            "is to be shown turned or mirrored (EXIF Orientation); turn image and mask alike and save them without it"
        )


def _critical(content: bytes) -> bytes:
    """A checked PNG without the chunks that are not needed to decode it, whose names start with a small letter."""
    kept, position = [SIGNATURE], len(SIGNATURE)
    while position < len(content) and kept[-1][4:8] != b"IEND":
        end = position + 12 + int.from_bytes(content[position : position + 4], "big")
        if content[position + 4 : position + 5].isupper():
            kept.append(content[position:end])
        position = end
    return b"".join(kept)


def refuse_not_square(name: str, height: float, width: float) -> None:
    """Raise DicomError when the sides of a pixel differ by more than one per cent."""
    if max(height, width) > 1.01 * min(height, width):
        raise DicomError(
            f"has pixels that are not square ({name} {height:g} to {width:g}); resample the image, and its mask, to "
            "square pixels"
        )


def _check_chunks(content: bytes, mask: bool) -> None:
    position, chunks = len(SIGNATURE), 0
    while position + 12 <= len(content):
        chunks += 1
        if chunks > MAX_CHUNKS:
            raise DicomError(f"is a PNG of more than {MAX_CHUNKS:,} chunks")
        length = int.from_bytes(content[position : position + 4], "big")
        name = content[position + 4 : position + 8]
        if length > len(content) - position - 12:
            break
        if not _sound(content, position, length):
            raise DicomError(f"{_DAMAGED} (a checksum is wrong)")
        if name == b"tRNS":
            raise DicomError("is a PNG with transparency; only plain grayscale is accepted")
        if name == b"acTL":
            raise DicomError("is an animated PNG; only single images are accepted")
        if name == b"pHYs" and length == 9 and not mask:
            across, down = struct.unpack_from(">LL", content, position + 8)  # pixels per unit of length
            if across and down:
                refuse_not_square("pHYs", across, down)
        if name == b"IEND":
            return
        position += 12 + length
    raise DicomError(f"{_DAMAGED} (it is cut off)")


def _sound(content: bytes, position: int, length: int) -> bool:
    end = position + 8 + length
    return zlib.crc32(content[position + 4 : end]) == int.from_bytes(content[end : end + 4], "big")
