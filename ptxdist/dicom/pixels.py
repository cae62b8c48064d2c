"""Grey levels of stored values.

Owns: the rule from stored values to uint8. Refuses: a window, rescale or look-up table that cannot be applied.

The rule (PS3.3 C.11.1, C.11.2, C.7.6.3.1.2, C.7.5.1.1.2), in this order:
1. Unsigned values of 8 bits without rescale, window or look-up table stay as they are.
2. Otherwise: modality LUT or rescale. Then the first VOI LUT, whose whole output range (its number of bits, see
   `luts`) becomes 0..255; or else the first window, by its function LINEAR, LINEAR_EXACT or SIGMOID; or else the range
   of the values in the image without padding (Pixel Padding Value, Range Limit). Values outside become 0 or 255.
3. MONOCHROME1, or Presentation LUT Shape INVERSE, is inverted, so that air is dark in every Radiograph.
4. Padding that extends from a corner of the image becomes 0, as the black that a square is padded with. Elsewhere its
   value is also that of saturated bone or of letters of lead, and stays.
An image whose stored values differ and whose grey levels do not is refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ptxdist.dicom import tags
from ptxdist.dicom.luts import Lut, window_of
from ptxdist.dicom.tags import Tags
from ptxdist.errors import DicomError

Pixels = npt.NDArray[np.uint8]
Stored = npt.NDArray[Any]

_BLOCK_ROWS = 256


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
    bits = min(file.bits_stored(), 8 * number.dtype.itemsize)
    ends: list[int] = []
    for tag in (tags.PADDING, tags.PADDING_LIMIT):
        end = file.whole(tag, ends[0] if ends else 0) % 2**bits
        ends.append(end - 2**bits if number.dtype.kind == "i" and end >= 2 ** (bits - 1) else end)
    return np.asarray((number >= min(ends)) & (number <= max(ends)))


def _through(lut: Lut, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    index = np.clip(np.rint(values) - lut.first, 0, len(lut.entries) - 1).astype(np.intp)
    return np.asarray(lut.entries[index], np.float64)
