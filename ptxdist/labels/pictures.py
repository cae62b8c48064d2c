"""Mask images, PNG, TIFF, GIF and BMP -> one mask a file. Owns: what their values mean.

A pixel of a grayscale mask is inside when its value is above half of the range of its type (over 127 of 255), or is 1
in a file with no other values than 0 and 1; edges may be soft. A mask in colours, with a palette or without, has
exactly two, of which one is black. Anything else is refused with the values that were found.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from ptxdist.dicom.png import SIGNATURE, check_size, decode_png, refuse_damaged, refuse_turned
from ptxdist.dicom.radiograph import read_bytes
from ptxdist.errors import DicomError, LabelError, raise_limit
from ptxdist.labels.found import CLASSES, FoundMask, about, place_of

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".tif", ".tiff", ".gif", ".bmp")
_FORMATS = ("TIFF", "GIF", "BMP")
_TIFF_BYTES = (1, 2, 7)  # kinds of tags that are kept as bytes
_NOISE = 1 / 16  # of the range of values, in images from JPEG
_GREY = 1 / 4  # of the pixels; a soft edge has far fewer
_STRIP_ROWS = 256
_MAX_NUMBERS = 2**20  # of a tag of a TIFF: that of its strips has up to 10,000
_FEW_VALUES, _MANY_VALUES = 4, 16

Values = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


def read_picture(folder: Path, path: Path) -> list[FoundMask]:
    """The mask of one image file below `folder`, whose name says which image it belongs to.

    Raises LabelError for a file that cannot be read, has several pages or transparency, and is no mask: its brightest
    pixel is dark, but not black; its darkest one is bright; it has many greys, areas of a third value, or more than two
    colours.
    """
    place = place_of(folder, path)
    try:
        values = _open(read_bytes(path))
    except DicomError as error:
        raise LabelError(f"{place} {error}") from None
    if values.dtype == np.uint32:
        return [_two_colours(place, values)]
    darkest, brightest, highest = int(values.min()), int(values.max()), int(np.iinfo(values.dtype).max)
    half = highest // 2
    if 1 < brightest <= half:
        distinct = np.unique(values).tolist()
        listed = f" (its values are {', '.join(map(str, distinct))}; {CLASSES})" if 2 < len(distinct) <= 16 else ""
        raise LabelError(
            f"{place} is dark (its brightest pixel is {brightest}); a mask must be black and white{listed}"
        )
    if darkest > half or darkest == brightest == 1:
        raise LabelError(f"{place} has no black pixel (its darkest one is {darkest}); a mask must be black outside")
    levels = _levels(values)
    between = [level for level in levels if darkest < level < brightest]
    if between:
        raise LabelError(f"{place} has areas of more than two values ({darkest}, {between[0]}, {brightest}); {CLASSES}")
    noise = _NOISE * (brightest - darkest)
    if ((values > darkest + noise) & (values < brightest - noise)).mean() > _GREY:
        raise LabelError(f"{place} is a picture in greys; a mask must be black and white")
    inside = brightest / highest if brightest in levels and brightest > darkest else 0.0
    with about(place):
        return [FoundMask.of(values > (half if brightest > 1 else 0), inside)]


def read_png(folder: Path, path: Path) -> Values:
    """Stored values (rows, columns) of a grayscale PNG below `folder`; LabelError when it cannot be used."""
    try:
        content = read_bytes(path)
        if not content.startswith(SIGNATURE):
            raise DicomError("is not a PNG")
        return decode_png(content, mask=True)
    except DicomError as error:
        raise LabelError(f"{place_of(folder, path)} {error}") from None


def _open(content: bytes) -> npt.NDArray[Any]:
    """Values of a picture, uint8 or uint16 (rows, columns); of one in colours, uint32, a byte for each of the three."""
    from PIL import Image  # late: most data sets come with a table

    is_png = content.startswith(SIGNATURE)
    if is_png and content[25:26] == b"\0":
        return decode_png(content, mask=True)
    if is_png:
        refuse_damaged(content)
    try:
        with warnings.catch_warnings(action="ignore"):
            if content[:2] in (b"II", b"MM"):
                _refuse_long_tags(content)
            image = Image.open(BytesIO(content), formats=("PNG",) if is_png else _FORMATS)
            check_size(image.height, image.width)  # nothing is decoded yet
            with suppress(EOFError):  # `n_frames` would look for all pages, of which a file may claim millions
                image.seek(1)
                raise DicomError("has several pages; only single images are accepted")
            values = _values(image)
            refuse_turned(image)  # a TIFF was turned when it was decoded
            return values
    except DicomError:
        raise
    except Exception as error:  # Pillow raises almost anything on damaged files
        raise_limit(error)
        raise DicomError("is not a PNG, TIFF, GIF or BMP image, or is damaged") from error


def _refuse_long_tags(content: bytes) -> None:
    """Raise DicomError for a TIFF with a list of millions of numbers, of which Pillow makes Python's."""
    order, is_big = ("<" if content[:1] == b"I" else ">"), 43 in content[2:4]
    size, count, entry = ("Q", "Q", 20) if is_big else ("L", "H", 12)
    with suppress(struct.error):  # where the file ends
        place = 8 if is_big else 4
        for _ in range(2):  # pages; nobody looks for a third one
            [place] = struct.unpack_from(f"{order}{size}", content, place)
            if not place:
                return
            [tags] = struct.unpack_from(f"{order}{count}", content, place)
            place += struct.calcsize(count)
            for _ in range(tags):
                kind, numbers = struct.unpack_from(f"{order}2xH{size}", content, place)
                if numbers > _MAX_NUMBERS and kind not in _TIFF_BYTES:
                    raise DicomError(f"is a TIFF with a list of {numbers:,} numbers; at most {_MAX_NUMBERS:,} are read")
                place += entry


def _values(image: Image.Image) -> npt.NDArray[Any]:
    """As `_open` returns, from strips: Pillow takes four bytes a pixel, and each conversion takes them again."""
    if image.mode in ("I", "F"):
        return _two_numbers(image)
    if image.mode == "P":
        used = np.flatnonzero(image.histogram())
        palette = np.reshape(image.getpalette("RGB") or [], (-1, 3)).astype(np.uint8)
        if len(np.unique(_packed(palette[used]))) != len(used):
            raise DicomError("has several entries of its palette in one colour; write 0 and 255 without a palette")
    strips = [_of_strip(strip) for strip in _strips(image)]
    if any(strip.dtype == np.uint32 for strip in strips):
        strips = [strip if strip.dtype == np.uint32 else strip * np.uint32(0x010101) for strip in strips]
    return np.concatenate(strips)


def _strips(image: Image.Image) -> Iterator[Image.Image]:
    for top in range(0, image.height, _STRIP_ROWS):
        yield image.crop((0, top, image.width, min(top + _STRIP_ROWS, image.height)))


def _of_strip(image: Image.Image) -> npt.NDArray[Any]:
    mode = image.mode
    if mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        opaque = np.asarray(image.convert("RGBA"))[:, :, 3] == 255
        if not opaque.all():
            raise DicomError("has transparency; a mask must be black and white, or of two colours")
        image = image.convert("L" if mode == "LA" else "RGB" if mode == "RGBA" else "P")
    if image.mode == "1":
        return np.asarray(image, np.uint8) * np.uint8(255)
    if image.mode == "L" or image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint8 if image.mode == "L" else np.uint16)
    if image.mode not in ("P", "RGB"):
        raise DicomError(f"is an image of the kind {image.mode}; a mask must be black and white, or of two colours")
    colours = np.asarray(image.convert("RGB"))
    return np.asarray(colours[:, :, 0] if (colours == colours[:, :, :1]).all() else _packed(colours))


def _two_numbers(image: Image.Image) -> npt.NDArray[np.uint8]:
    distinct = np.zeros(0)
    parts = []
    for strip in _strips(image):
        values = np.asarray(strip)
        distinct = np.unique(np.append(distinct, np.unique(values)))
        if len(distinct) > 2:
            break
        parts.append((values != 0).astype(np.uint8))
    if len(distinct) > 2 or distinct[0] != 0:  # not of the first strip alone: 0 may come later
        shown = f"{len(distinct):,} values from {distinct[0]:g} to {distinct[-1]:g}"
        raise DicomError(f"has at least {shown}; a mask has 0 and 1")
    return np.concatenate(parts)


def _packed(colours: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    red, green, blue = np.moveaxis(colours.astype(np.uint32), -1, 0)
    return np.asarray(red << 16 | green << 8 | blue, np.uint32)


def _two_colours(place: str, packed: npt.NDArray[np.uint32]) -> FoundMask:
    distinct = np.unique(packed).tolist()
    if len(distinct) == 2 and distinct[0] == 0:
        with about(place):
            return FoundMask.of(packed != 0, f"#{distinct[1]:06x}")
    if len(distinct) > _MANY_VALUES:
        raise LabelError(f"{place} is a picture in colours; a mask must be black and white, or of two colours")
    names = ", ".join(f"#{colour:06x}" for colour in distinct)
    if len(distinct) > 2:
        raise LabelError(f"{place} has {len(distinct)} colours ({names}); {CLASSES}")
    raise LabelError(f"{place} has no black pixel (its colours are {names}); a mask must be black outside")


def _levels(values: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]) -> list[int]:
    """The values of a mask that fill areas, in increasing order: all if there are two, else those of flat squares.

    A soft edge has many values, but no flat squares. Images that were JPEG files have many values too; those near the
    darkest or the brightest are taken for it.
    """
    found = np.flatnonzero(np.bincount(values.reshape(-1)))
    darkest, brightest = int(found[0]), int(found[-1])
    noise = _NOISE * (brightest - darkest) if len(found) > _MANY_VALUES else 0
    if len(found) > 2:
        # Larger than the steps of a soft edge that was enlarged, which has more values than a few classes.
        side = max(3, min(values.shape) // 64) if len(found) > _FEW_VALUES else 3
        if min(values.shape) < side:
            return []
        across = sliding_window_view(values[:, 1:] == values[:, :-1], side - 1, axis=1).all(axis=-1)
        first = values[:, : across.shape[1]]
        down = sliding_window_view(first[1:] == first[:-1], side - 1, axis=0).all(axis=-1)
        flat = sliding_window_view(across, side, axis=0).all(axis=-1) & down
        found = np.unique(first[: down.shape[0]][flat])
    return [darkest if v - darkest <= noise else brightest if brightest - v <= noise else v for v in found.tolist()]
