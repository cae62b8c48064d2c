"""Polygons -> the pixels inside, as spans down the columns of the image.

A pixel is inside when its centre is, by the even-odd rule. Coordinates are those of COCO and LabelMe: x to the right, y
down, in pixels; the upper left corner of the image is (0, 0), so the centre of its first pixel is (0.5, 0.5). A centre
on the left or upper edge of a polygon is inside, one on the right or lower edge is outside: of two polygons with a
common edge, each pixel is in one. pycocotools rounds corners to a fifth of a pixel first; it differs only in pixels
whose centres are less than that from an edge, and in none where polygons follow the edges of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ptxdist.errors import LabelError
from ptxdist.labels.rle import Spans

MARGIN_PX = 2.0  # tools let a corner leave the image by this much; more means another image
_MOST_CROSSINGS = 2**22  # of edges with columns of pixels; an outline drawn by hand has some thousands


def read_corners(numbers: Any, rows: int, columns: int) -> npt.NDArray[np.float64]:
    """Corners of a polygon, float64 (n, 2) of x and y, from a list of pairs or of alternating x and y.

    Raises LabelError, a sentence without a subject, for anything but at least three finite points in the image of
    `rows` and `columns`, or up to `MARGIN_PX` outside of it.
    """
    try:
        flat = np.asarray(numbers, np.float64).reshape(-1)
    except (TypeError, ValueError, OverflowError):
        raise LabelError("has an outline that is no list of numbers") from None
    if len(flat) < 6 or len(flat) % 2:
        raise LabelError(f"has an outline of {len(flat)} numbers; expected x and y of at least three points")
    corners = flat.reshape(-1, 2)
    if not np.isfinite(corners).all():
        raise LabelError("has an outline with a number that is not finite")
    low, high = corners.min(axis=0), corners.max(axis=0)
    if min(low) < -MARGIN_PX or high[0] > columns + MARGIN_PX or high[1] > rows + MARGIN_PX:
        x, y = (end if abs(end) > abs(start) else start for start, end in zip(low, high, strict=True))
        raise LabelError(f"has an outline that leaves the image of {columns}x{rows} pixels, to ({x:g}, {y:g})")
    return corners


def fill(corners: npt.NDArray[np.float64], rows: int, columns: int) -> Spans:
    """Spans int64 (n, 2) of the pixels inside a polygon, as `rle.read_spans` returns; (0, 2) when there is none.

    `corners` are float64 (n, 2) of x and y; the last one is joined with the first. What is outside of the image is cut
    off. Raises LabelError for an outline with so many long edges that it cannot have been drawn.
    """
    starts, ends = corners, np.roll(corners, -1, axis=0)
    swap = starts[:, 0] > ends[:, 0]
    left, right = np.where(swap[:, None], ends, starts), np.where(swap[:, None], starts, ends)
    # The columns whose centres an edge passes, its left end included.
    first, last = (np.clip(np.ceil(side[:, 0] - 0.5), 0, columns).astype(np.int64) for side in (left, right))
    passed = last - first
    if passed.sum() > _MOST_CROSSINGS:
        raise LabelError(f"has an outline of {len(corners):,} points that crosses the image {len(corners):,} times")
    edge = np.repeat(np.arange(len(corners)), passed)
    column = np.arange(len(edge)) - np.repeat(np.cumsum(passed) - passed, passed) + first[edge]
    width, height = (right - left)[edge].T
    y = left[edge, 1] + (column + 0.5 - left[edge, 0]) * (height / width)
    order = np.lexsort((y, column))  # each column is passed an even number of times
    row = np.clip(np.ceil(y[order] - 0.5), 0, rows).astype(np.int64)
    spans = (column[order] * rows + row).reshape(-1, 2)
    return np.asarray(spans[spans[:, 0] < spans[:, 1]], np.int64)


def fill_circle(centre: Sequence[float], radius: float, rows: int, columns: int) -> Spans:
    """Spans int64 (n, 2) of the pixels whose centres are up to `radius` from `centre` (x, y), cut off as in `fill`."""
    first, last = (int(np.clip(np.ceil(centre[0] + sign * radius - 0.5), 0, columns)) for sign in (-1, 1))
    column = np.arange(first, last)
    half = np.sqrt(np.maximum(radius**2 - (column + 0.5 - centre[0]) ** 2, 0.0))
    row = [np.clip(np.ceil(centre[1] + sign * half - 0.5), 0, rows).astype(np.int64) for sign in (-1, 1)]
    spans = np.column_stack((column * rows + row[0], column * rows + row[1]))
    return np.asarray(spans[spans[:, 0] < spans[:, 1]], np.int64)
