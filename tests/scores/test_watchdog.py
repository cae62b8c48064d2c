"""When masks pay, and what counts as a collapse."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ptxdist.config import StageSettings
from ptxdist.records import EpochMetrics, Scores
from ptxdist.scores.metrics import scores
from ptxdist.scores.watchdog import GRACE, judge, why_not, worth

SIGNS = {"pays": "+", "unpaid": "-", "empty": ".", "collapsed": "C"}


def item(of: Scores, epoch: int = 1, val_loss: float = 1.1) -> EpochMetrics:
    return EpochMetrics(
        stage=1, epoch=epoch, learning_rate=1e-3, train_loss=1, val_loss=val_loss, at_stage=of, at_full=of,
        train_seconds=1, val_seconds=1, images_per_second=1,
    )  # fmt: skip


def stage(epochs: int, **settings: object) -> StageSettings:
    return StageSettings(size_px=32, epochs=epochs, batch_size=1, **settings)


def rates(hit: float, false: float, positive_dice: float, share: float = 0.23) -> Scores:
    """Scores of 1,000 cases with these rates."""
    positives = round(1000 * share)
    return Scores(
        cases=1000, positives=positives, kaggle_dice=(1 - share) * (1 - false) + share * positive_dice,
        positive_dice=positive_dice, pooled_dice=positive_dice, sensitivity=hit, specificity=1 - false,
        all_empty_dice=1 - share,
    )  # fmt: skip


def signs(history: Sequence[Scores], epochs: int = 24) -> str:
    return "".join(SIGNS[verdict] for verdict in judge([item(of, n) for n, of in enumerate(history, 1)], stage(epochs)))


@st.composite
def counted(draw: st.DrawFn) -> Scores:
    """Scores of a few cases with any counts."""
    rows = draw(arrays.arrays(np.int64, (draw(st.integers(1, 12)), 3), elements=st.integers(0, 4)))
    rows[:, 0] = np.minimum(rows[:, 0], rows[:, 1:].min(1))
    return scores(rows)


@given(counted())
def test_the_gain_is_the_kaggle_dice_above_that_of_empty_masks_and_the_ratio_has_its_sign(of: Scores) -> None:
    found = worth(of)
    assert found.gain == pytest.approx(of.kaggle_dice - of.all_empty_dice, abs=1e-12)
    assert 0 <= found.masks <= 1
    if found.ratio is not None and found.needed is not None:
        assert (found.ratio > found.needed) == (found.gain > 0) or found.gain == pytest.approx(0, abs=1e-12)
    elif found.needed is None:  # no mask meets a positive image
        assert found.gain <= 0
    reason = why_not(of, stage(2))
    assert reason.endswith(".") if found.gain <= 0 and reason else reason is None and found.gain > 0


@given(st.lists(counted(), max_size=12), st.integers(1, 30))
def test_a_verdict_depends_on_its_epoch_and_those_before_only(history: list[Scores], epochs: int) -> None:
    found = signs(history, epochs)
    assert [signs(history[:end], epochs) for end in range(len(history) + 1)] == [
        found[:end] for end in range(len(history) + 1)
    ]
    assert "C" not in found[:2]


@given(st.lists(counted().filter(lambda of: worth(of).gain > 0 and worth(of).masks >= 0.3), max_size=12))
def test_an_epoch_with_many_masks_that_pay_is_no_collapse(history: list[Scores]) -> None:
    assert signs(history) == "+" * len(history)


EMPTY, FULL = rates(0, 0, 0), rates(1, 1, 0.03)
POOR, GOOD = rates(0.9, 0.8, 0.25), rates(0.8, 0.05, 0.4)


def test_masks_that_were_learnt_and_are_lost_are_a_collapse_in_the_second_epoch_after() -> None:
    assert signs([FULL, POOR, POOR, EMPTY, EMPTY, EMPTY]) == "---.CC"
    assert signs([GOOD, GOOD, EMPTY, EMPTY, GOOD, GOOD]) == "++.C++"
    few = rates(0.12, 0.1, 0.02)  # as measured: masks left, but on other images than the positive ones
    assert signs([POOR] * 12 + [few] * 3, 24) == "-" * 13 + "CC"
    one = rates(0.02, 0, 0.01)
    assert signs([GOOD, GOOD, one, one]) == "+++C"  # a single mask that is correct does not count


@pytest.mark.parametrize(
    ("history", "epochs"),
    [
        ([FULL, *[EMPTY] * 8, GOOD, GOOD], 24),  # starts full or empty, and learns later
        ([*[EMPTY] * 8, POOR, GOOD], 15),
        ([*[EMPTY] * 10, rates(0.6, 0.5, 0.1), *[POOR] * 13], 24),
        ([FULL, rates(0.5, 0.3, 0.0), EMPTY, EMPTY, rates(0.9, 0.6, 0.13), GOOD], 13),  # phantoms, as recorded
        ([*[FULL] * 4, EMPTY, EMPTY, GOOD], 15),
        ([GOOD, EMPTY, GOOD, GOOD, EMPTY, GOOD], 8),  # a bad epoch now and then
        ([POOR, GOOD, rates(0.4, 0.02, 0.2), rates(0.3, 0.01, 0.15)], 8),  # more and more careful
        ([GOOD, GOOD, FULL, FULL, GOOD], 8),  # masks everywhere are no empty masks
        ([EMPTY], 1),
        ([], 5),
    ],
)
def test_a_healthy_stage_is_not_accused(history: list[Scores], epochs: int) -> None:
    assert "C" not in signs(history, epochs)


def test_a_stage_that_never_learns_is_named_after_half_of_its_epochs_at_most_fifteen() -> None:
    assert signs([EMPTY] * 6, 6) == "...CCC"
    assert signs([FULL, *[EMPTY] * 6], 7) == "-...CCC"
    assert signs([EMPTY] * (GRACE + 4), 100) == "." * GRACE + "C" * 4
    assert signs([rates(0.6, 0.6, 0.01)] * 20, 20) == "-" * 20  # masks that do not pay are another matter


@pytest.mark.parametrize(
    ("losses", "settings", "expected"),
    [
        ([1.0, 0.72, 0.27, 0.268, 0.266], {}, "...CC"),  # as measured, with a share of positives of 0.23
        ([1.1, 1.02, 1.02, 1.01, 0.99], {}, "....."),  # of a training that learnt
        ([0.6, 0.3, 0.15, 0.15, 0.15], {}, "....."),  # the soft masks meet the true ones
        ([1.0, 0.72, 0.27, 0.268, 0.266], {"dice": "batch"}, "....."),
    ],
)
def test_masks_that_the_loss_per_image_has_given_up_are_named_at_once(
    losses: list[float], settings: dict[str, object], expected: str
) -> None:
    history = [item(EMPTY, number, loss) for number, loss in enumerate(losses, 1)]
    assert "".join(SIGNS[verdict] for verdict in judge(history, stage(24, **settings))) == expected


def test_empty_masks_are_correct_where_no_image_is_positive() -> None:
    assert "C" not in signs([scores(np.array([[0, 0, 0], [0, 0, 0]]))] * 20, 20)


def test_the_words_for_masks_that_do_not_pay() -> None:
    assert why_not(rates(0.6, 0.5, 0.15), stage(2)) == (
        "60 % of the positive and 50 % of the negative images get a mask, a ratio of 1.2. With a Dice of 0.25 on the "
        "positive ones, masks raise the Kaggle Dice above a ratio of 13.4."
    )
    assert why_not(rates(0.1, 0.1, 0), stage(2)) == (
        "10 % of the positive and 10 % of the negative images get a mask, and none meets a true mask."
    )


def test_masks_that_only_positive_cases_teach_are_not_blamed_for_those_of_negative_ones() -> None:
    every, settings = [rates(1, 1, 0.3)] * 12, stage(12, negative_weight=0.0, best_by="loss")
    assert why_not(every[0], settings) is None
    assert "collapsed" not in judge([item(of, n) for n, of in enumerate(every, 1)], settings)
