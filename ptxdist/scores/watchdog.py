"""Whether a stage has collapsed to empty masks, and whether its masks are worth predicting; judged from its epochs.

Let π be the share of positive images, s the share of them that get a mask (sensitivity), f the share of the negative
ones that get one (1 - specificity), and d the mean Dice of the positive images that get one (positives-only Dice / s).
An image without a mask scores 1 in the Kaggle Dice if it is negative, else 0. So

    Kaggle Dice                     (1 - π) (1 - f) + π s d
    Kaggle Dice of empty masks      (1 - π)
    gain of predicting masks        π s d - (1 - π) f

and masks pay if  s / f > (1 - π) / (π d). The loss with the Dice per image follows the same sum: a network that cannot
tell positive from negative images, s = f, is pushed to empty masks as soon as π d < 1 - π. That is the collapse.

An epoch **pays** if its gain is above 0; it is **empty** if its masks are fewer than a tenth of the positive images.
Any two epochs in a row that do not pay or are empty are a **collapse** in one of two cases:

- Masks were learnt before and are lost. Learnt: two earlier epochs had a positives-only Dice of at least LEARNT and
  left some negative image empty. Lost: both have a positives-only Dice below a quarter and s below half of those of
  the best such epoch.
- Masks were never learnt, both epochs are empty, and the time to learn is over: half of the epochs, at most GRACE. Or,
  before that, both have given masks up: with the Dice per image (smoothing 1 pixel), a positive image without a mask
  costs 1, and a negative one whose probabilities sum to P pixels costs P / (P + 1). So a validation loss from π
  to π + (1 - π) / 4 says that P is below a third of a pixel, and the gradient for any mask has vanished.

So a network that starts with all masks empty, or with all pixels in them, has time to learn. A stage that trains on
phantoms has no collapse: what it does to radiographs is not what it learns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from ptxdist.config import StageSettings
from ptxdist.records import EpochMetrics, Scores

LEARNT = 0.1
GRACE = 15  # epochs; of trainings that learnt in the end, one had its first masks after half of 15, one after 10 of 24

Verdict = Literal["pays", "unpaid", "empty", "collapsed"]


class Worth(NamedTuple):
    """What the masks of an epoch are worth; None where a ratio is not defined.

    `masks` is the share of all images that get one, `dice` is d, `gain` the Kaggle Dice above that of empty masks,
    `ratio` is s / f, and `needed` what it has to exceed.
    """

    masks: float
    dice: float | None
    gain: float
    ratio: float | None
    needed: float | None


def worth(scores: Scores) -> Worth:
    """What the masks of one epoch are worth, by the formulas above; images of a missing kind count as without masks."""
    share = scores.positives / scores.cases
    hit = scores.sensitivity or 0.0
    false = 0.0 if scores.specificity is None else 1 - scores.specificity
    dice = (scores.positive_dice or 0.0) / hit if hit else None
    return Worth(
        share * hit + (1 - share) * false,
        dice,
        share * hit * (dice or 0.0) - (1 - share) * false,
        hit / false if false else None,
        (1 - share) / (share * dice) if dice else None,
    )


def judge(history: Sequence[EpochMetrics], stage: StageSettings) -> tuple[Verdict, ...]:
    """The verdict on each epoch of a stage; that on an epoch depends on it and on those before only.

    `history` has the stage's epochs in order, the averaged weights last, if there are any.
    """
    found: list[Verdict] = []
    for number in range(1, len(history) + 1):
        now = history[number - 1].at_full
        if _collapsed(history[:number], stage):
            found.append("collapsed")
        elif worth(now).gain > 0:
            found.append("pays")
        else:
            found.append("empty" if _is_empty(now) else "unpaid")
    return tuple(found)


def why_not(scores: Scores, stage: StageSettings) -> str | None:
    """A sentence for an epoch whose masks do not pay: how many images get one, and how many may; else None.

    None too where negative cases teach the masks less (`negative_weight`): there the image head says which images get
    one, with the operating point of the evaluation, and the scores of an epoch are those without it. And None after
    phantoms, as in radiographs such a network need not find anything.
    """
    found = worth(scores)
    if found.gain > 0 or stage.negative_weight < 1 or stage.phantoms:
        return None
    hit, false = scores.sensitivity or 0.0, 1 - (1.0 if scores.specificity is None else scores.specificity)
    words = f"{100 * hit:.0f} % of the positive and {100 * false:.0f} % of the negative images get a mask"
    if found.needed is None:
        return f"{words}, and none meets a true mask."
    return (
        f"{words}, a ratio of {found.ratio or 0:.1f}. With a Dice of {found.dice or 0:.2f} on the positive ones, masks "
        f"raise the Kaggle Dice above a ratio of {found.needed:.1f}."
    )


def best_learnt(history: Sequence[Scores]) -> Scores | None:
    """The best epoch of those in which masks were learnt; None before there are two."""
    learnt = [item for item in history if (item.positive_dice or 0.0) >= LEARNT and item.specificity != 0]
    return max(learnt, key=lambda item: item.positive_dice or 0.0) if len(learnt) > 1 else None


def _collapsed(history: Sequence[EpochMetrics], stage: StageSettings) -> bool:
    before, last = [item.at_full for item in history[:-2]], [item.at_full for item in history[-2:]]
    if stage.phantoms or not before or any(worth(item).gain > 0 and not _is_empty(item) for item in last):
        return False
    best = best_learnt(before)
    if best is None:
        late = len(history) > min(GRACE, (stage.epochs + 1) // 2)
        return all(map(_is_empty, last)) and (late or all(_given_up(item, stage) for item in history[-2:]))
    return all(
        (item.positive_dice or 0.0) < (best.positive_dice or 0.0) / 4
        and (item.sensitivity or 0.0) < (best.sensitivity or 0.0) / 2
        for item in last
    )


def _given_up(item: EpochMetrics, stage: StageSettings) -> bool:
    share = item.at_full.positives / item.at_full.cases
    return (stage.loss, stage.dice) == ("bce_dice", "image") and share <= item.val_loss < share + (1 - share) / 4


def _is_empty(scores: Scores) -> bool:
    """Whether hardly any image gets a mask. Where no image is positive, it should be so."""
    return worth(scores).masks < 0.1 * scores.positives / scores.cases
