"""The estimate of the time that is left, with a clock of the test's own."""

from __future__ import annotations

import pytest

from ptxdist.console.eta import TimeLeft, in_words
from ptxdist.events import Progress
from ptxdist.records import EpochMetrics, Scores

NOTHING = Scores(
    cases=1, positives=0, kaggle_dice=1, positive_dice=None, pooled_dice=1, sensitivity=None, specificity=1,
    all_empty_dice=1,
)  # fmt: skip


def epoch(stage: int, number: int, seconds: float, *, averaged: bool = False) -> EpochMetrics:
    return EpochMetrics(
        stage=stage, epoch=number, averaged=averaged, learning_rate=1e-3, train_loss=1.0, val_loss=1.0,
        at_stage=NOTHING, at_full=NOTHING, train_seconds=seconds - 2, val_seconds=2, images_per_second=1.0,
    )  # fmt: skip


def test_a_later_stage_counts_by_the_px_of_its_images_until_it_is_measured() -> None:
    now = 100.0
    left = TimeLeft([256, 512], [5, 2], clock=lambda: now)
    left.start(1, [])
    assert left.seconds(1) is None, "nothing is measured yet"
    now = 110.0
    left.add(epoch(1, 1, 10))
    assert left.seconds(1) == pytest.approx((40, 40 + 2 * 40))
    now = 114.0  # four seconds into the second epoch
    assert left.seconds(1) == pytest.approx((36, 36 + 80))
    now = 200.0  # it takes longer than the first one did; the other epochs are still to come
    assert left.seconds(1) == pytest.approx((30, 30 + 80))
    for number in range(2, 6):
        left.add(epoch(1, number, 20))
    left.add(epoch(1, 5, 3, averaged=True))
    assert left.seconds(1) == pytest.approx((0, 2 * 80))
    left.start(2, [])
    assert left.seconds(2) == pytest.approx((160, 160))
    left.add(epoch(2, 1, 50))
    assert left.seconds(2) == pytest.approx((50, 50))
    left.add(epoch(2, 2, 50))
    assert left.seconds(2) == (0, 0)


def test_a_stage_that_goes_on_knows_its_epochs() -> None:
    left = TimeLeft([64], [6], clock=lambda: 0.0)
    left.start(1, [epoch(1, 1, 99), epoch(1, 2, 10), epoch(1, 3, 20), epoch(1, 4, 30)])
    assert left.seconds(1) == pytest.approx((40, 40)), "two epochs of the mean of the last three"


def test_the_first_steps_give_an_estimate_of_all_stages() -> None:
    """100 images of 64 px at 10 images/s, and 30 in validation; then 50 images of 128 px, of four times the pixels."""
    now = 0.0
    left = TimeLeft([64, 128], [2, 3], clock=lambda: now)
    left.expect([100, 50], 30)
    left.start(1, [])

    def step(after_s: float, done: int, stage: int = 1) -> bool:
        nonlocal now
        now += after_s
        return left.step(Progress(stage=stage, step="train", epoch=1, done=done, total=100))

    assert [step(20, 10), step(4, 50), step(0.5, 55)] == [False] * 3, "the first step, and less than five seconds"
    assert left.seconds(1) is None
    assert step(0.5, 60)
    first, later = 11.0 * 2, 4 * 6.0 * 3  # seconds of an epoch, times epochs
    assert left.seconds(1) == pytest.approx((first - 11, first - 11 + later)), "25 s have gone, at most an epoch counts"
    left.add(epoch(1, 1, 22))
    assert left.seconds(1) == pytest.approx((22, 22 + 2 * later)), "what a whole epoch took counts more"
    left.add(epoch(1, 2, 22))
    left.start(2, [])
    assert left.seconds(2) == pytest.approx((2 * later, 2 * later))
    assert [step(1, 10, 2), step(6, 20, 2), step(6, 30, 2)] == [False, False, True]
    assert left.seconds(2) == pytest.approx((0.6 * 60 * 3 - 13, 0.6 * 60 * 3 - 13)), "measured in its own steps"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (89, "89 s"), (95, "2 min"), (5300, "88 min"), (5400, "1 h 30 min"), (11_100, "3 h 05 min"),
     (183_600, "2 d 3 h")],
)  # fmt: skip
def test_seconds_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
