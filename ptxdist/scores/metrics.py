"""Scores of predicted masks, computed from counts.

A case is counted as three numbers of pixels: intersection, predicted, truth. Ranks and batches concatenate these rows,
in any order and division, and `scores` turns all rows into ratios at the end, since averages of ratios per batch or
rank would weight cases unevenly. Three Dice scores are in use for these data and are often confused, so all of them are
computed, with the score of predicting nothing (0.77845 on the 12,047 SIIM-ACR training images).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ptxdist.records import Scores
from ptxdist.scores.counts import Counts
from ptxdist.scores.names import DICES


def image_dice(counts: Counts) -> npt.NDArray[np.float64]:
    """Dice of each image, float64 (n,): 2 intersection / (predicted + truth), and 1 where both are empty.

    This is the challenge's score of one image. `counts` is int64 (n, 3); (0, 3) gives (0,).
    """
    total = counts[:, 1] + counts[:, 2]
    return np.where(total == 0, 1.0, 2 * counts[:, 0] / np.maximum(total, 1))


def scores(counts: Counts) -> Scores:
    """Scores of the cases of `counts`, int64 (n, 3); equal to the last bit for any order of rows.

    Raises ValueError when there are no cases.
    """
    if len(counts) == 0:
        raise ValueError("there are no cases to score")
    dice, positive, predicted = image_dice(counts), counts[:, 2] > 0, counts[:, 1] > 0
    return Scores(
        cases=len(counts),
        positives=int(positive.sum()),
        kaggle_dice=math.fsum(dice) / len(counts),
        positive_dice=_mean(dice[positive]),
        pooled_dice=float(image_dice(counts.sum(0, keepdims=True))[0]),
        sensitivity=_mean(predicted[positive]),
        specificity=_mean(~predicted[~positive]),
        all_empty_dice=float((~positive).sum()) / len(counts),
    )


def differences(before: Counts, after: Counts) -> dict[str, float]:
    """Each Dice score of `after` minus that of `before`, by name; both int64 (n, 3), at least one case."""
    pairs = {score.field: (score.of(scores(before)), score.of(scores(after))) for score in DICES}
    return {name: new - old for name, (old, new) in pairs.items() if old is not None and new is not None}


def auroc(score: npt.NDArray[np.float64], positive: npt.NDArray[np.bool_]) -> float | None:
    """Area under the ROC curve: how often a positive image has a higher score than a negative one; ties count half.

    `score` and `positive` are (n,). None for images of one class only (Hanley and McNeil 1982).
    """
    pairs = int(positive.sum()) * int((~positive).sum())
    return float(wins(score[positive], score[~positive]).sum()) / pairs if pairs else None


def wins(score: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """How many of `others` each score is above, ties counting half; (len(score),)."""
    ordered = np.sort(others)
    return np.asarray(sum(np.searchsorted(ordered, score, side) for side in ("left", "right")) / 2, np.float64)


def _mean(values: npt.NDArray[Any]) -> float | None:
    return math.fsum(values) / len(values) if len(values) else None  # fsum is exact: the order does not matter
