"""What is counted of each case, from which all scores follow: numbers of pixels, a histogram of probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Histograms = npt.NDArray[np.int32]
LEVELS = 200  # of probability, each 0.005 wide


@dataclass(frozen=True)
class CaseCounts:
    """Counts of n cases in the order asked for: intersection, predicted, truth in pixels.

    `loss` float64 (n, parts), of which `train.losses` makes the validation loss, (n, 0) if it is not asked for; `score`
    float64 (n,), see `train.scoring.case_score`; `at_stage` int64 (n, 3) at the first threshold; `at_full` int64
    (thresholds, n, 3) at the original resolution. If asked for, also `histograms` int32 (n, 2, LEVELS): pixels of each
    level at the original resolution, all pixels and those of the truth; and `brightness` float64 (n,), the mean grey
    level of the image, 0..255. Else these are empty.
    """

    loss: npt.NDArray[np.float64]
    score: npt.NDArray[np.float64]
    at_stage: Counts
    at_full: Counts
    histograms: Histograms
    brightness: npt.NDArray[np.float64]
