"""Working points by the score of an image, calibration of that score, and its ROC curve.

A working point is a threshold of the score at which a wanted share of the positive images is flagged (sensitivity), or
of the negative ones is not (specificity). It is chosen on all cases. What it gives is estimated by patients: each case
is flagged by the threshold that was chosen on the cases of other folds. The probability of an image is calibrated in
the same way, by Platt's logistic regression on the log-odds of the score (Platt 1999, with his smoothed targets).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ptxdist.cache.split import assign_folds
from ptxdist.records import Platt, WorkingPoint
from ptxdist.scores.intervals import ratio_interval

FOLDS = 5
DIGITS = 6  # of a score, as it is written for people
_ROC_POINTS = 200
_EDGE = 1e-6  # scores are kept so far from 0 and 1
_STEPS = 50

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Kind = Literal["sensitivity", "specificity"]


@dataclass(frozen=True)
class Wanted:
    """The working points that are asked for, as kind and target, and the prevalence for their predictive values."""

    targets: tuple[tuple[Kind, float], ...] = ()
    prevalence: float | None = None


NO_POINTS = Wanted()


def folds_of(case_ids: Sequence[str], groups: Sequence[str], truth_px: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    """Fold of each case (n,), at most FOLDS and none shared by a patient; all 0 with a single patient."""
    folds = min(FOLDS, len(set(groups)))
    if folds < 2:
        return np.zeros(len(case_ids), np.intp)
    return np.array(assign_folds(case_ids, groups, truth_px.tolist(), folds=folds), np.intp)


def working_point(
    score: Floats,
    positive: Flags,
    groups: Sequence[str],
    folds: npt.NDArray[np.intp],
    *,
    kind: Kind,
    target: float,
    prevalence: float | None = None,
) -> WorkingPoint | None:
    """The point for a target, above 0 and at most 1, from scores 0..1 and truths (n,), the patients and folds of cases.

    `prevalence` is that for which the predictive values are stated; None: the share of positive images here. None with
    one fold, or when some fold leaves no image of either kind to the others.
    """
    sides = _others(positive, folds)
    if not sides:
        return None
    score = np.round(score, DIGITS)
    flagged = np.zeros(len(score), bool)
    for side in sides:
        flagged[~side] = score[~side] >= _threshold(score[side], positive[side], kind, target)
    hits, alarms = flagged & positive, flagged & ~positive
    sensitivity, specificity = hits.sum() / positive.sum(), 1 - alarms.sum() / (~positive).sum()
    share = float(positive.mean()) if prevalence is None else prevalence

    def interval(part: Flags, whole: Flags) -> tuple[float, float] | None:
        return ratio_interval(part.astype(np.float64), whole.astype(np.float64), groups, share=True)

    intervals = {"sensitivity": interval(hits, positive), "specificity": interval(~positive & ~flagged, ~positive)}
    return WorkingPoint(
        kind=kind,
        target=target,
        threshold=_threshold(score, positive, kind, target),
        hits=int(hits.sum()),
        misses=int((positive & ~flagged).sum()),
        alarms=int(alarms.sum()),
        rejections=int((~positive & ~flagged).sum()),
        sensitivity=float(sensitivity),
        specificity=float(specificity),
        intervals={name: span for name, span in intervals.items() if span},
        flagged=float(flagged.mean()),
        prevalence=share,
        ppv=_ratio(sensitivity * share, (1 - specificity) * (1 - share)),
        npv=_ratio(specificity * (1 - share), (1 - sensitivity) * share),
    )


def _others(positive: Flags, folds: npt.NDArray[np.intp]) -> list[Flags]:
    """For each fold the cases of the others; [] with one fold, or where a fold leaves images of one kind only."""
    sides = [folds != number for number in np.unique(folds)]
    return [] if len(sides) < 2 or any(positive[side].all() or not positive[side].any() for side in sides) else sides


def _threshold(score: Floats, positive: Flags, kind: Kind, target: float) -> float:
    """The highest threshold with the wanted sensitivity, or the lowest with the wanted specificity."""
    if kind == "sensitivity":
        own = np.sort(score[positive])[::-1]
        return float(own[math.ceil(target * len(own) - 1e-9) - 1])
    own = np.sort(score[~positive])
    last = own[math.ceil(target * len(own) - 1e-9) - 1]  # the highest one that is not to be flagged
    above = score[score > last]
    # Halfway to the next score of any image, so that neither is at the edge; above 1 no image is flagged.
    return round(float((last + above.min()) / 2), DIGITS) if len(above) else round(float(last) + 10**-DIGITS, DIGITS)


def _ratio(true: float, false: float) -> float | None:
    return float(true / (true + false)) if true + false > 0 else None


def roc(score: Floats, positive: Flags) -> tuple[tuple[float, float], ...]:
    """Points (1 - specificity, sensitivity) of the ROC curve, from (0, 0) to (1, 1), at most _ROC_POINTS.

    () without both kinds of images.
    """
    if positive.all() or not positive.any():
        return ()
    order = np.argsort(-score, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)  # where a new value begins after
    hits, alarms = np.cumsum(positive[order])[ends], np.cumsum(~positive[order])[ends]
    points = np.column_stack((alarms / (~positive).sum(), hits / positive.sum()))
    if len(points) > _ROC_POINTS:
        points = points[np.unique(np.linspace(0, len(points) - 1, _ROC_POINTS - 1).round().astype(int))]
    return ((0.0, 0.0), *map(tuple, points.tolist()))


def calibrate(score: Floats, positive: Flags, folds: npt.NDArray[np.intp]) -> tuple[Platt, Floats] | None:
    """The calibration that is fitted to all cases, and the cross-fitted probabilities (n,).

    None with one fold, or when some fold leaves no image of either kind to the others.
    """
    sides = _others(positive, folds)
    if not sides:
        return None
    found = np.zeros(len(score))
    for side in sides:
        found[~side] = calibrated(score[~side], _fit(score[side], positive[side]))
    return _fit(score, positive), found


def calibrated(score: Floats, platt: Platt) -> Floats:
    """Probabilities (n,) from scores (n,), 0..1."""
    return np.asarray(1 / (1 + np.exp(-(platt.slope * _log_odds(score) + platt.intercept))), np.float64)


def _log_odds(score: Floats) -> Floats:
    kept = np.clip(np.asarray(score, np.float64), _EDGE, 1 - _EDGE)
    return np.asarray(np.log(kept / (1 - kept)), np.float64)


def _fit(score: Floats, positive: Flags) -> Platt:
    """Newton's method on the log-loss; it is convex, and the smoothed targets keep its lowest point finite."""
    ones, zeros = positive.sum(), (~positive).sum()
    target = np.where(positive, (ones + 1) / (ones + 2), 1 / (zeros + 2))
    design = np.column_stack((_log_odds(score), np.ones(len(score))))
    weights = np.zeros(2)

    def loss(at: Floats) -> float:
        odds = design @ at
        return float((np.logaddexp(0, odds) - target * odds).sum())

    for _ in range(_STEPS):
        probability = 1 / (1 + np.exp(-design @ weights))
        gradient = design.T @ (probability - target)
        curvature = (design * (probability * (1 - probability))[:, None]).T @ design + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        while loss(weights - step) > loss(weights) and float(np.abs(step).max()) > 1e-10:
            step = step / 2
        weights = weights - step
        if float(np.abs(step).max()) < 1e-10:
            break
    return Platt(slope=float(weights[0]), intercept=float(weights[1]))
