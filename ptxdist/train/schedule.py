"""Learning rate of an epoch and of its steps, and share of positive cases of an epoch.

They are functions of epoch, steps and losses so far, so there is no state to save.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ptxdist.config import StageSettings

PLATEAU_THRESHOLD = 1e-4  # relative; torch's default


def learning_rate(stage: StageSettings, val_losses: Sequence[float]) -> float:
    """Learning rate of the epoch that follows `val_losses` (one per finished epoch; none before the first epoch).

    cosine: half a cosine from `learning_rate` towards 0 over the stage's epochs (Loshchilov and Hutter 2017, no
    restarts), as torch's CosineAnnealingLR. plateau: times `plateau_factor` whenever more than `plateau_patience`
    epochs pass without a loss lower by at least 0.01 %, as torch's ReduceLROnPlateau.
    """
    if stage.schedule == "constant":
        return stage.learning_rate
    if stage.schedule == "cosine":
        return stage.learning_rate * (1 + math.cos(math.pi * len(val_losses) / stage.epochs)) / 2
    rate, best, bad_epochs = stage.learning_rate, math.inf, 0
    for loss in val_losses:
        if loss < best * (1 - PLATEAU_THRESHOLD):
            best, bad_epochs = loss, 0
        else:
            bad_epochs += 1
        if bad_epochs > stage.plateau_patience:
            rate, bad_epochs = rate * stage.plateau_factor, 0
    return rate


def warm_up(stage: StageSettings, steps: int) -> float:
    """Factor of the learning rate after so many optimiser steps of the stage: 1 / `warmup_steps` at first, then 1."""
    return min(1.0, (steps + 1) / stage.warmup_steps) if stage.warmup_steps else 1.0


def positive_share(stage: StageSettings, epoch: int) -> float | None:
    """Share of positive cases in the batches of an epoch (from 1), linear over the epochs; None: as in the data.

    The winners of the challenge went from 0.8 down to 0.22 or 0.4, so that the network does not first learn that most
    images are empty.
    """
    if stage.positive_share is None:
        return None
    first, last = stage.positive_share
    return first + (last - first) * (epoch - 1) / max(1, stage.epochs - 1)
