"""A baseline for every score: one mask for all images, which looks at no image.

The constant mask is a set of cells of a grid of 64 x 64 cells over the image, whatever its size: the k cells that lie
most often inside the true masks, for the one of 25 values of k that has the highest positives-only Dice on the same
images. It is chosen on the truth that it is scored on, so it is slightly too good, and a model below it has learned no
more than where masks usually are. (The empty mask is a baseline of its own.)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ptxdist.labels.evidence import Size
from ptxdist.labels.rle import Spans
from ptxdist.scores.counts import Counts
from ptxdist.scores.metrics import image_dice

GRID = 64
_SIZES = 25


class ConstantMask:
    """Collects true masks, of each only the number of its pixels in each cell, and finds the best constant mask."""

    def __init__(self) -> None:
        self._inside: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]] = []  # cells and pixels of each image
        self._sizes: list[Size] = []
        self._share = np.zeros(GRID * GRID)

    def add(self, true: Spans, size: Size) -> None:
        """Add the true mask of the next image, spans down its columns, int64 (n, 2), and its (rows, columns)."""
        rows, columns = size
        lengths = true[:, 1] - true[:, 0]
        before = np.cumsum(lengths) - lengths
        pixel = np.repeat(true[:, 0] - before, lengths) + np.arange(lengths.sum())
        column, row = np.divmod(pixel, rows)
        found = np.bincount(row * GRID // rows * GRID + column * GRID // columns, minlength=GRID * GRID)
        cells = np.flatnonzero(found)
        self._inside.append((cells, found[cells]))
        self._sizes.append(size)
        self._share[cells] += found[cells] / _areas(size)[cells]

    def counts(self) -> Counts | None:
        """Intersection, prediction and truth of the mask in each image, int64 (n, 3); None without a true mask."""
        if not self._share.any():
            return None
        order = np.argsort(-self._share, kind="stable")
        numbers = np.unique(np.geomspace(1, GRID * GRID, _SIZES).astype(int))
        tried = (self._counts_of(order[:number]) for number in numbers)
        return max(tried, key=lambda found: float(image_dice(found)[found[:, 2] > 0].mean()))

    def _counts_of(self, chosen: npt.NDArray[np.intp]) -> Counts:
        """The counts of the mask of these cells."""
        mask = np.zeros(GRID * GRID, bool)
        mask[chosen] = True
        area = {size: int(_areas(size)[mask].sum()) for size in set(self._sizes)}
        rows = [
            (pixels[mask[cells]].sum(), area[size], pixels.sum())
            for (cells, pixels), size in zip(self._inside, self._sizes, strict=True)
        ]
        return np.array(rows, np.int64)


def _areas(size: Size) -> npt.NDArray[np.intp]:
    """Pixels of each cell in an image of this size, (GRID * GRID,); some are 0 in an image smaller than the grid."""
    down, across = (np.bincount(np.arange(side) * GRID // side, minlength=GRID) for side in size)
    return np.outer(down, across).reshape(-1)
