"""95 % intervals of the scores, from a bootstrap over patients.

Images of one patient are alike, so patients are drawn and not images: drawing images would treat twenty images of one
patient as twenty pieces of evidence, and the interval would be too narrow (Field and Welsh 2007, cluster bootstrap;
percentile interval).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ptxdist.records import Intervals
from ptxdist.scores.counts import Counts
from ptxdist.scores.metrics import auroc, image_dice

DRAWS = 2000
_LEVEL = 0.95
_AT_ONCE = 200

Floats = npt.NDArray[np.float64]


def score_intervals(
    counts: Counts,
    groups: Sequence[str],
    *,
    image_score: Floats | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Intervals:
    """95 % interval of each score of `metrics.scores`, by its name, from counts int64 (n, 3) and each case's group.

    With `image_score` (n,) also of `auroc`. A score that some draw leaves undefined (no positive image in it) is taken
    over the other draws; one that is undefined in all of them has no entry. Cases of a single group, or none, give no
    intervals at all.
    """
    group, names = _number(groups)
    if names < 2:
        return {}
    ratios = _ratios(counts)
    sums = np.array([[np.bincount(group, part, names) for part in ratio] for ratio in ratios.values()])
    values: dict[str, list[Floats]] = {name: [] for name in (*ratios, "auroc")}
    positive = counts[:, 2] > 0
    for times in _draws(names, draws, seed):
        upper, lower = np.einsum("dg,rpg->prd", times, sums)
        found = np.divide(upper, lower, out=np.full_like(upper, np.nan), where=lower > 0)
        for name, row in zip(ratios, found, strict=True):
            values[name].append(row)
        if image_score is not None:
            values["auroc"].append(auroc(image_score, positive, times[:, group].astype(float)))
    pooled = values["pooled_dice"]
    values["pooled_iou"] = [dice / (2 - dice) for dice in pooled]
    return {name: edges for name, rows in values.items() if rows and (edges := _edges(np.concatenate(rows)))}


def difference_intervals(
    before: Counts, after: Counts, groups: Sequence[str], *, draws: int = DRAWS, seed: int = 0
) -> Intervals:
    """95 % intervals of `after` minus `before`, by score, on the same cases: what is hard for both cancels out.

    Both are int64 (n, 3), in the order of `groups`. Undefined scores and single groups as in `score_intervals`.
    """
    group, names = _number(groups)
    if names < 2:
        return {}
    both = [_ratios(counts) for counts in (before, after)]
    sums = [
        np.array([[np.bincount(group, part, names) for part in ratio] for ratio in ratios.values()]) for ratios in both
    ]
    rows = []
    for times in _draws(names, draws, seed):
        first, second = (
            np.divide(upper, lower, out=np.full_like(upper, np.nan), where=lower > 0)
            for upper, lower in (np.einsum("dg,rpg->prd", times, side) for side in sums)
        )
        rows.append(second - first)
    found = np.concatenate(rows, axis=1)
    return {name: edges for name, row in zip(both[0], found, strict=True) if (edges := _edges(row))}


def calibration_interval(
    sums: Floats, groups: Sequence[str], *, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float] | None:
    """95 % interval of the expected calibration error; None with a single group.

    `sums` is (n, 3, bins): by case and bin, number of things, sum of their probabilities, number of positives.
    """
    group, names = _number(groups)
    if names < 2:
        return None
    total = np.zeros((names, *sums.shape[1:]))
    np.add.at(total, group, sums)
    errors = []
    for times in _draws(names, draws, seed):
        drawn = (times @ total.reshape(names, -1)).reshape(-1, *sums.shape[1:])
        errors.append(np.abs(drawn[:, 1] - drawn[:, 2]).sum(1) / drawn[:, 0].sum(1))
    return _edges(np.concatenate(errors))


def _ratios(counts: Counts) -> dict[str, tuple[Floats, Floats]]:
    """Each score as numerator and denominator of each case: it is a ratio of two sums over cases."""
    positive, predicted = counts[:, 2] > 0, counts[:, 1] > 0
    dice = image_dice(counts)
    return {
        "kaggle_dice": (dice, np.ones(len(counts))),
        "positive_dice": (dice * positive, positive.astype(float)),
        "pooled_dice": (2 * counts[:, 0].astype(np.float64), (counts[:, 1] + counts[:, 2]).astype(np.float64)),
        "sensitivity": ((positive & predicted).astype(float), positive.astype(float)),
        "specificity": ((~positive & ~predicted).astype(float), (~positive).astype(float)),
    }


def _number(groups: Sequence[str]) -> tuple[npt.NDArray[np.intp], int]:
    """Number of each case's group, in order of first appearance, so that names do not matter; and how many groups."""
    names: dict[str, int] = {}
    return np.array([names.setdefault(group, len(names)) for group in groups], np.intp), len(names)


def _draws(groups: int, draws: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """How often each group is drawn, in blocks int64 (some draws, groups), until there are `draws`."""
    random = np.random.default_rng(seed)
    for start in range(0, draws, _AT_ONCE):
        yield random.multinomial(groups, np.full(groups, 1 / groups), min(_AT_ONCE, draws - start))


def _edges(values: Floats) -> tuple[float, float] | None:
    sound = values[~np.isnan(values)]
    if not len(sound):
        return None
    low, high = np.quantile(sound, ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2))
    return float(low), float(high)
