"""The operating point: the thresholds and the smallest area with the best masks, and a cross-fitted estimate.

A mask is empty unless enough pixels reach a top threshold; otherwise it is all pixels that reach a bottom threshold
(the winners' triplet). With equal thresholds this is the pair of a threshold and a smallest area. For a model with an
image head a mask is also empty unless the case's score reaches an image threshold. The mask at any such point can be
counted from a case's score and a histogram of its probabilities at the original resolution, without its image:

    total(image, top, area, bottom) = sum over cases of
        empty + reached(image) * kept(top, area) * (dice(bottom) - empty)

is one matrix product for the cases between two image thresholds, summed from the highest threshold down, for each fold
of patients. The cross-fitted estimate follows from these sums: the point for a fold is the best one of the total less
the fold's own sum, and its score on the fold is in that sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ptxdist.cache.split import assign_folds
from ptxdist.records import OperatingPoint, TunedPoint
from ptxdist.scores.counts import LEVELS, Counts, Histograms
from ptxdist.scores.intervals import score_intervals
from ptxdist.scores.metrics import scores

FOLDS = 5
LEVELS_TRIED = np.arange(5, LEVELS, 5)  # thresholds 0.025, 0.05, … 0.975; the source's 0.5 and 0.55 are among them
AREAS_PX = np.array(
    (0, 64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)
)  # of 1024 x 1024 pixels, to 3 % of them; on the 848 real cases (docs/learning.md) the best lies at 3,072 to 8,192
IMAGES_TRIED = np.arange(40) / 40  # thresholds of the score 0, 0.025, … 0.975; any score reaches the first
_TIE = 1e-9  # relative difference of sums that is rounding

Floats = npt.NDArray[np.float64]
_Place = tuple[int, int, int, int]  # of image, top, area and bottom in the lists above


def tune(
    histograms: Histograms,
    truth_px: npt.NDArray[np.int64],
    case_ids: Sequence[str],
    groups: Sequence[str],
    kind: str,
    image_scores: Floats | None = None,
) -> tuple[TunedPoint, Counts] | None:
    """The best "pair" or "triplet" on the cases with its estimate, and the cross-fitted counts int64 (n, 3).

    `histograms` is int32 (n, 2, LEVELS) as from `scoring`, `truth_px` (n,). With `image_scores` (n,), 0..1, the image
    threshold is searched too; without them it is 0. None with fewer than two groups.
    """
    folds = min(FOLDS, len(set(groups)))
    if folds < 2:
        return None
    fold = np.array(assign_folds(case_ids, groups, truth_px.tolist(), folds=folds))
    table = _Table.of(histograms, truth_px, image_scores)
    sums = np.stack([table.total(fold == number) for number in range(folds)])
    shape = sums.shape[1:]
    top, bottom = np.arange(shape[1])[:, None, None], np.arange(shape[3])[None, None, :]
    tried = np.broadcast_to(top == bottom if kind == "pair" else top >= bottom, shape[1:])

    best = _best(sums.sum(0), tried)
    chosen = [_best(sums.sum(0) - sums[number], tried) for number in range(folds)]
    estimate = np.zeros((len(truth_px), 3), np.int64)
    for number, place in enumerate(chosen):
        estimate[fold == number] = table.counts(place)[fold == number]
    mean = np.where(tried, sums[:, best[0]].sum(0) / len(truth_px), np.nan)
    surface = mean[np.arange(shape[1]), :, np.arange(shape[3])] if kind == "pair" else mean[best[1]].T
    result = TunedPoint(
        kind=kind,
        point=_point(best),
        scores=scores(table.counts(best)),
        estimate=scores(estimate),
        intervals=score_intervals(estimate, groups),
        folds=folds,
        points=tuple(map(_point, chosen)),
        thresholds=tuple((LEVELS_TRIED / LEVELS).tolist()),
        areas_px=tuple(AREAS_PX.tolist()),
        surface=tuple(tuple(None if np.isnan(value) else round(value, 6) for value in row) for row in surface.tolist()),
    )
    return result, estimate


@dataclass(frozen=True)
class _Table:
    """Pixels of each case at each threshold: `predicted` and `overlap`, int64 (n, levels tried).

    `reached` int64 (n,) is how many of the `images` thresholds above 0 the case's score reaches.
    """

    predicted: npt.NDArray[np.int64]
    overlap: npt.NDArray[np.int64]
    truth: npt.NDArray[np.int64]
    reached: npt.NDArray[np.int64]
    images: int

    @classmethod
    def of(cls, histograms: Histograms, truth_px: npt.NDArray[np.int64], image_scores: Floats | None) -> _Table:
        px = np.cumsum(histograms[:, :, ::-1], axis=2, dtype=np.int64)[:, :, ::-1][:, :, LEVELS_TRIED]
        reached, images = np.zeros(len(truth_px), np.int64), 1
        if image_scores is not None:
            rounded = [round(score, 6) for score in image_scores.tolist()]  # as in `OperatingPoint.admits`
            reached, images = np.searchsorted(IMAGES_TRIED, rounded, side="right") - 1, len(IMAGES_TRIED)
        return cls(px[:, 0], px[:, 1], truth_px, reached, images)

    def total(self, chosen: npt.NDArray[np.bool_]) -> Floats:
        """Sum of the Kaggle Dice of the chosen cases at every point, (images, tops, areas, bottoms); 0 for no case."""
        found = np.zeros((self.images, len(LEVELS_TRIED), len(AREAS_PX), len(LEVELS_TRIED)))
        for number in range(self.images):
            found[number] = self._gain(chosen & (self.reached == number))
        for number in range(self.images - 2, -1, -1):  # what reaches a threshold reaches those below it
            found[number] += found[number + 1]
        found += np.count_nonzero(self.truth[chosen] == 0)
        return found

    def _gain(self, chosen: npt.NDArray[np.bool_]) -> Floats:
        """How much more than empty masks the masks of the chosen cases score, (tops, areas, bottoms)."""
        predicted, truth = self.predicted[chosen], self.truth[chosen, None]
        sizes = predicted + truth
        dice = np.where(sizes == 0, 1.0, 2 * self.overlap[chosen] / np.maximum(sizes, 1))
        kept = (predicted[:, :, None] >= AREAS_PX).astype(float)
        found: Floats = np.tensordot(kept, dice - (truth == 0), axes=(0, 0))
        return found

    def counts(self, place: _Place) -> Counts:
        """Counts int64 (n, 3) at one point."""
        image, top, area, bottom = place
        kept = (self.reached >= image) & (self.predicted[:, top] >= AREAS_PX[area])
        return np.stack((self.overlap[:, bottom] * kept, self.predicted[:, bottom] * kept, self.truth), axis=1)


def _best(total: Floats, tried: npt.NDArray[np.bool_]) -> _Place:
    """The point whose neighbourhood scores best, since a peak without high neighbours is chance.

    Each point is scored by the mean over itself and its neighbours on the grid, as far as they are tried; of equal
    points the one with the lowest image threshold, then top, area and bottom is taken. `tried` is (tops, areas,
    bottoms), the same for every image threshold.
    """
    values, weights = np.where(tried, total, 0.0), np.broadcast_to(tried.astype(float), total.shape)
    for axis in range(4):
        values, weights = _with_neighbours(values, axis), _with_neighbours(weights, axis)
    mean = np.where(tried, values / np.maximum(weights, 1), -np.inf)
    highest = mean.max(axis=(1, 2, 3))
    image = int(np.argmax(highest >= highest.max() - _TIE * abs(highest.max())))
    top, area, bottom = np.unravel_index(int(np.argmax(mean[image])), mean.shape[1:])
    return image, int(top), int(area), int(bottom)


def _with_neighbours(values: Floats, axis: int) -> Floats:
    padded = np.pad(values, [(1, 1) if number == axis else (0, 0) for number in range(values.ndim)])
    length = values.shape[axis]
    total: Floats = np.add.reduce([np.take(padded, np.arange(start, start + length), axis) for start in range(3)])
    return total


def _point(place: _Place) -> OperatingPoint:
    image, top, area, bottom = place
    return OperatingPoint(
        image=float(IMAGES_TRIED[image]),
        top=float(LEVELS_TRIED[top] / LEVELS),
        min_area_px=int(AREAS_PX[area]),
        bottom=float(LEVELS_TRIED[bottom] / LEVELS),
    )
