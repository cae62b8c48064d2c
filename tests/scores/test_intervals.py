"""Intervals: as in theory where it gives them, wider when patients have many images, equal for any order."""

from __future__ import annotations

import numpy as np
import pytest

from ptxdist.scores.intervals import calibration_interval, difference_intervals, score_intervals
from ptxdist.scores.metrics import auroc, scores


def cases(count: int, seed: int = 0, positive_share: float = 0.3) -> np.ndarray:
    random = np.random.default_rng(seed)
    truth = np.where(random.random(count) < positive_share, random.integers(500, 20_000, count), 0)
    predicted = np.where(random.random(count) < 0.4, random.integers(100, 20_000, count), 0)
    overlap = (np.minimum(truth, predicted) * random.random(count)).astype(np.int64)
    return np.column_stack((overlap, predicted, truth)).astype(np.int64)


def test_interval_of_a_mean_is_the_one_of_the_normal_distribution() -> None:
    counts = cases(4_000)
    low, high = score_intervals(counts, [str(index) for index in range(len(counts))])["kaggle_dice"]
    from ptxdist.scores.metrics import image_dice

    dice = image_dice(counts)
    half = 1.96 * dice.std() / len(dice) ** 0.5
    assert low == pytest.approx(dice.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(dice.mean() + half, abs=0.1 * half)


def test_every_score_lies_in_its_interval() -> None:
    counts = cases(600, seed=2)
    found = score_intervals(counts, [str(index // 3) for index in range(600)])
    assert set(found) == {"kaggle_dice", "positive_dice", "pooled_dice", "pooled_iou", "sensitivity", "specificity"}
    for name, (low, high) in found.items():
        assert low < getattr(scores(counts), name) < high
        assert low >= 0
        assert high <= 1


def test_the_same_image_ten_times_is_no_more_evidence() -> None:
    """Drawn by image the interval would shrink by the root of ten; drawn by patient it stays."""
    counts = cases(300, seed=3)
    alone = score_intervals(counts, [str(index) for index in range(300)])["kaggle_dice"]
    repeated = np.repeat(counts, 10, axis=0)
    by_patient = score_intervals(repeated, [str(index // 10) for index in range(3_000)])["kaggle_dice"]
    by_image = score_intervals(repeated, [str(index) for index in range(3_000)])["kaggle_dice"]
    width = alone[1] - alone[0]
    assert by_patient[1] - by_patient[0] == pytest.approx(width, rel=1e-6)
    assert by_image[1] - by_image[0] == pytest.approx(width / 10**0.5, rel=0.15)


def test_coverage_is_about_ninety_five_percent() -> None:
    """Samples of 120 patients out of a population whose score is known."""
    population = cases(30_000, seed=4)
    true = scores(population).positive_dice
    assert true is not None
    random, inside = np.random.default_rng(5), 0
    for _ in range(200):
        sample = population[random.choice(len(population), 240, replace=False)]
        low, high = score_intervals(sample, [str(index // 2) for index in range(240)], draws=300)["positive_dice"]
        inside += low <= true <= high
    assert 180 <= inside <= 199


def test_what_patients_are_called_does_not_matter() -> None:
    counts = cases(200, seed=6)
    first = score_intervals(counts, [str(index // 2) for index in range(200)])
    assert score_intervals(counts, [f"{index // 2 * 7919 % 101:03}-{index // 2}" for index in range(200)]) == first


def test_the_interval_of_the_auroc_is_about_hanley_and_mcneil_s() -> None:
    """Two normal distributions; their standard error of 1982, for one image a patient."""
    random = np.random.default_rng(7)
    counts = cases(800, seed=7)
    positive = counts[:, 2] > 0
    image_score = random.normal(positive * 1.0)
    low, high = score_intervals(counts, [str(index) for index in range(800)], image_score=image_score)["auroc"]
    area = float(auroc(image_score, positive)[0])
    ones, zeros = positive.sum(), (~positive).sum()
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (area * (1 - area) + (ones - 1) * (q1 - area**2) + (zeros - 1) * (q2 - area**2)) / (ones * zeros)
    assert low < area < high
    assert high - low == pytest.approx(2 * 1.96 * variance**0.5, rel=0.15)


def test_a_paired_difference_is_surer_than_two_intervals() -> None:
    """The second run is slightly better on every case: the scores overlap, their difference excludes zero."""
    before = cases(400, seed=8)
    after = before.copy()
    after[:, 0] = np.minimum(np.minimum(after[:, 1], after[:, 2]), (after[:, 0] * 1.1).astype(np.int64))
    groups = [str(index // 2) for index in range(400)]
    first, second = (score_intervals(counts, groups)["positive_dice"] for counts in (before, after))
    assert first[1] > second[0]
    low, high = difference_intervals(before, after, groups)["positive_dice"]
    improved = scores(after).positive_dice - scores(before).positive_dice  # type: ignore[operator]
    assert 0 < low < improved < high
    assert difference_intervals(before, before, groups)["kaggle_dice"] == (0.0, 0.0)
    assert difference_intervals(before, after, ["one"] * 400) == {}


def test_without_positive_images_their_scores_have_no_interval() -> None:
    counts = cases(50, positive_share=0.0)
    found = score_intervals(counts, [str(index) for index in range(50)])
    assert "positive_dice" not in found
    assert "sensitivity" not in found
    assert "kaggle_dice" in found


def test_a_single_patient_or_none_gives_no_intervals() -> None:
    assert score_intervals(cases(20), ["one"] * 20) == {}
    assert score_intervals(np.zeros((0, 3), np.int64), []) == {}


def test_the_interval_of_the_calibration_error_holds_that_of_resampled_patients() -> None:
    """200 patients of two images whose probabilities are 0.1 too high; the edges are those of a plain resampling."""
    random = np.random.default_rng(9)
    truth = random.random((200, 2)) < 0.4
    sums = np.stack((np.ones((200, 2)), np.full((200, 2), 0.5), truth), axis=2)[..., None]  # patients, images, 3, bins
    groups = [str(patient) for patient in range(200) for _ in range(2)]
    found = calibration_interval(sums.reshape(400, 3, 1), groups)
    assert found is not None
    drawn = truth[random.integers(0, 200, (4000, 200))]
    assert found == pytest.approx(np.quantile(np.abs(drawn.mean((1, 2)) - 0.5), (0.025, 0.975)), abs=0.006)
    assert calibration_interval(sums.reshape(400, 3, 1), ["one"] * 400) is None
