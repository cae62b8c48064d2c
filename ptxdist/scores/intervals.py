"""95 % intervals of the scores, by patient.

Images of one patient are alike, so the error of a score is found by leaving out one patient after the other (jackknife;
Efron and Stein 1981). Counting images instead would treat twenty images of one patient as twenty pieces of evidence.

    score within 0..1        Wilson's interval (1927) for the sample size that the error amounts to, so that its edges
                             stay within 0..1: n = value (1 - value) / error². Shares of images take the quantile of the
                             normal distribution, Dice scores and the AUROC, whose errors are less sure, that of
                             Student's t
    score of exactly 0 or 1  the exact bound of Clopper and Pearson (1934), with the effective number of patients as
                             sample size; of an AUROC the lower of those of both kinds: as many disjoint pairs there are
    difference               value and error, with the quantile of t for the degrees of freedom of this error, since few
                             patients often make all of a difference; if none differs, the bound of Clopper and Pearson

Effective patients (Kish 1965) are (sum of weights)² / sum of squares: patients that all have the same number of images
count as one each. A score from fewer than FEWEST patients gets no interval. The binned calibration error gets none
either: bins alone make it too large in small samples, and no interval around it covers the right value.
`tests/benchmarks/bench_coverage.py` measures how often the intervals hold the right value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ptxdist.records import Intervals
from ptxdist.scores.counts import Counts
from ptxdist.scores.metrics import image_dice, wins

FEWEST = 5  # patients
_FEWEST_POOLED = 15  # effective patients, by pixels, of a difference of the pooled Dice
_TAIL = 0.025
_NORMAL = 1.959964  # quantile of the normal distribution
_NO_ERROR = 1e-12  # rounding
_SHARES = ("sensitivity", "specificity")  # of images

Floats = npt.NDArray[np.float64]


def score_intervals(counts: Counts, groups: Sequence[str], *, image_score: Floats | None = None) -> Intervals:
    """95 % interval of each score of `metrics.scores`, by its name, from counts int64 (n, 3) and each case's group.

    With `image_score` (n,) also of `auroc`. A score has no entry if it is not defined or fewer than FEWEST groups have
    images for it; of the AUROC, positive or negative ones.
    """
    group, names = number_groups(groups)
    found = {
        name: _interval(_ratio(upper, lower, group, names), share=name in _SHARES)
        for name, (upper, lower) in _ratios(counts).items()
    }
    if pooled := found["pooled_dice"]:
        found["pooled_iou"] = pooled[0] / (2 - pooled[0]), pooled[1] / (2 - pooled[1])
    if image_score is not None:
        found["auroc"] = _interval(_auroc(image_score, counts[:, 2] > 0, group, names))
    return {name: edges for name, edges in found.items() if edges}


def ratio_interval(
    upper: Floats, lower: Floats, groups: Sequence[str], *, share: bool = False
) -> tuple[float, float] | None:
    """95 % interval of sum(upper) / sum(lower), within 0..1, from float64 (n,) each and each case's group.

    `lower` is 0 or more. `share` says that it is a share of images. None as for `score_intervals`.
    """
    return _interval(_ratio(upper, lower, *number_groups(groups)), share=share)


def difference_intervals(before: Counts, after: Counts, groups: Sequence[str]) -> Intervals:
    """95 % intervals of `after` minus `before`, by score, on the same cases: what is hard for both cancels out.

    Both are int64 (n, 3), in the order of `groups`. Missing entries as in `score_intervals`; the pooled Dice, whose
    differences are those of a few large masks, needs more patients.
    """
    group, names = number_groups(groups)
    found: Intervals = {}
    for name, ratio in _ratios(before).items():
        other = _ratios(after)[name]
        used = np.bincount(group, ratio[1] + other[1], names) > 0
        first, second = (_ratio(*one, group, names, used) for one in (ratio, other))
        if first is None or second is None or (name == "pooled_dice" and first.effective < _FEWEST_POOLED):
            continue
        value, without = second.value - first.value, second.without - first.without
        error = _error(without)
        half = 1 - _TAIL ** (1 / first.effective)
        if error > _NO_ERROR:
            half = _student(min(first.effective - 1, _freedom(without))) * error
        found[name] = max(-1.0, value - half), min(1.0, value + half)
    return found


class _Jackknife(NamedTuple):
    """A score, its values without one patient after the other (patients,), effective patients, degrees of freedom."""

    value: float
    without: Floats
    effective: float
    freedom: float


def _interval(found: _Jackknife | None, *, share: bool = False) -> tuple[float, float] | None:
    if found is None:
        return None
    value, error = found.value, _error(found.without)
    bound = _TAIL ** (1 / found.effective)
    if value <= _NO_ERROR:
        return 0.0, 1 - bound
    if value >= 1 - _NO_ERROR:
        return bound, 1.0
    times = _NORMAL if share else _student(found.freedom)
    size = value * (1 - value) / error**2 if error > _NO_ERROR else found.effective
    middle, shrink = (value + times**2 / (2 * size)), 1 + times**2 / size
    half = times * math.sqrt(value * (1 - value) / size + times**2 / (4 * size**2))
    return max(0.0, (middle - half) / shrink), min(1.0, (middle + half) / shrink)


def _error(without: Floats) -> float:
    """Standard error by the jackknife."""
    count = len(without)
    return math.sqrt((count - 1) / count * float(((without - without.mean()) ** 2).sum()))


def _freedom(without: Floats) -> float:
    """Degrees of freedom of the squared error (Satterthwaite 1946): 2 n / (kurtosis - 1) - 1; n - 1 if normal."""
    squares = (without - without.mean()) ** 2
    kurtosis = len(squares) * float((squares**2).sum() / squares.sum() ** 2)
    return 2 * len(squares) / max(kurtosis - 1, 1e-9) - 1


def _student(freedom: float) -> float:
    from scipy.special import stdtrit  # 0.2 s

    return float(stdtrit(max(1.0, freedom), 1 - _TAIL))


def _ratio(
    upper: Floats, lower: Floats, group: npt.NDArray[np.intp], names: int, used: npt.NDArray[np.bool_] | None = None
) -> _Jackknife | None:
    """The ratio of two sums over cases; None with fewer than FEWEST groups that contribute to `lower`.

    `used` (names,) are the groups that are left out, one after the other; by default those that contribute.
    """
    up, down = (np.bincount(group, part, names) for part in (upper, lower))
    if np.count_nonzero(down) < FEWEST:
        return None
    used = down > 0 if used is None else used
    total, effective = down.sum(), float(down.sum() ** 2 / (down**2).sum())
    without = (up.sum() - up[used]) / (total - down[used])
    return _Jackknife(float(up.sum() / total), without, effective, freedom=effective - 1)


def _auroc(
    score: Floats, positive: npt.NDArray[np.bool_], group: npt.NDArray[np.intp], names: int
) -> _Jackknife | None:
    """The AUROC; None with fewer than FEWEST groups with positive, or with negative images."""
    sides = [np.bincount(group[kind], minlength=names).astype(float) for kind in (positive, ~positive)]
    if min(np.count_nonzero(side) for side in sides) < FEWEST:
        return None
    won = wins(score[positive], score[~positive])
    lost = positive.sum() - wins(score[~positive], score[positive])
    of_group = np.bincount(group[positive], won, names) + np.bincount(group[~positive], lost, names)
    for number in np.flatnonzero((sides[0] > 0) & (sides[1] > 0)):  # pairs within a group were counted twice
        own = group == number
        of_group[number] -= wins(score[own & positive], score[own & ~positive]).sum()
    pairs, left = sides[0].sum() * sides[1].sum(), (sides[0].sum() - sides[0]) * (sides[1].sum() - sides[1])
    without = (won.sum() - of_group) / left
    effective = min(float(side.sum() ** 2 / (side**2).sum()) for side in sides)
    return _Jackknife(float(won.sum() / pairs), without, effective, _welch(without, sides[0] > 0))


def _welch(without: Floats, kind: npt.NDArray[np.bool_]) -> float:
    """Degrees of freedom of an error that two kinds of patients contribute to (Satterthwaite 1946)."""
    squares = (without - without.mean()) ** 2
    parts = np.array([squares[side].sum() for side in (kind, ~kind)])
    counts = np.array([max(1, np.count_nonzero(side) - 1) for side in (kind, ~kind)])
    lower = float((parts**2 / counts).sum())
    return float(parts.sum()) ** 2 / lower if lower > 0 else len(without) - 1.0


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


def number_groups(groups: Sequence[str]) -> tuple[npt.NDArray[np.intp], int]:
    """Number of each case's group, in order of first appearance, so that names do not matter; and how many groups."""
    names: dict[str, int] = {}
    return np.array([names.setdefault(group, len(names)) for group in groups], np.intp), len(names)
