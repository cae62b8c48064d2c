"""The sentences about a stage that has collapsed to empty masks, and the setting that cures it.

`scores.watchdog` judges; this module has the words for log, error and report. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ptxdist.config import StageSettings
from ptxdist.records import EpochMetrics
from ptxdist.scores.watchdog import best_learnt, judge, worth
from ptxdist.train.losses import LOSSES


class Collapse(NamedTuple):
    """The first collapse of a stage: the `epoch` that shows it, whether it is `over`, what happened, what to do."""

    epoch: int
    over: bool
    words: str
    cure: str


def find(history: Sequence[EpochMetrics], stage: StageSettings, number: int) -> Collapse | None:
    """The first collapse among the epochs of stage `number` (from 1); None if there is none. It is the same on all
    ranks."""
    verdicts = judge(history, stage)
    if "collapsed" not in verdicts:
        return None
    place = verdicts.index("collapsed")
    now, best = history[place].at_full, best_learnt([item.at_full for item in history[: place - 1]])
    words = (
        f"In epoch {history[place].epoch} of {stage.epochs}, {100 * worth(now).masks:.0f} % of the images get a mask"
    )
    if best is not None:
        words += f" and the positives-only Dice is {now.positive_dice or 0:.2f}, after {best.positive_dice or 0:.2f}"
    else:
        words += ", and no masks were learnt before"
    return Collapse(history[place].epoch, verdicts[-1] != "collapsed", f"{words}.", _cure(stage, number))


def _cure(stage: StageSettings, number: int) -> str:
    key = f"stages.{number}"
    if stage.dice == "image" and LOSSES[stage.loss].batch is not None:
        return (
            f"Start a new run with --set {key}.dice=batch: with the Dice per image, empty masks are the best answer of "
            "a network that cannot tell positive from negative images."
        )
    if min(stage.positive_share or (0.0,)) < 0.5:
        return f"Start a new run with --set '{key}.positive_share=[0.5,0.5]', so that half of the cases show a mask."
    return (
        "Start a new run from pre-trained weights (--encoder-weights imagenet, or --init), with --set "
        f"model.image_head=true, or with a lower {key}.learning_rate."
    )
