"""Intervals: as in theory where it gives them, wider when patients have many images, equal for any order."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks import bench_coverage

from ptxdist.scores import intervals
from ptxdist.scores.intervals import difference_intervals, ratio_interval, score_intervals
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
    area = auroc(image_score, positive)
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
    bound = 1 - 0.025 ** (1 / 200)  # that no patient differs may be chance
    assert difference_intervals(before, before, groups)["kaggle_dice"] == pytest.approx((-bound, bound))
    assert difference_intervals(before, after, ["one"] * 400) == {}


def test_a_difference_between_models_that_agree_on_few_patients_is_not_certain() -> None:
    """No mask of 20 images changes from empty to not empty, so sensitivity is equal, by chance perhaps."""
    before = cases(20, seed=11)
    after = before.copy()
    after[before[:, 1] > 0, 1] += 1
    low, high = difference_intervals(before, after, [str(index) for index in range(20)])["specificity"]
    negatives = int((before[:, 2] == 0).sum())
    assert (low, high) == pytest.approx((0.025 ** (1 / negatives) - 1, 1 - 0.025 ** (1 / negatives)))


def test_models_that_mark_different_images_are_compared() -> None:
    """The pixels of a pooled Dice are those of other images then. The interval is that of a plain jackknife.

    One image makes 71 % of the squared error, so that its degrees of freedom are three.
    """
    before, after = cases(120, seed=14), cases(120, seed=14)
    after[:60, :2] = cases(120, seed=15)[:60, :2]
    after[:, 0] = np.minimum(after[:, 0], after[:, 1:].min(1))
    found = difference_intervals(before, after, [str(index) for index in range(120)])["pooled_dice"]
    used = np.flatnonzero((before[:, 1:] + after[:, 1:]).sum(1))
    gains = [scores(np.delete(after, i, 0)).pooled_dice - scores(np.delete(before, i, 0)).pooled_dice for i in used]
    error = ((len(used) - 1) * np.var(gains)) ** 0.5
    assert (found[1] - found[0]) / error == pytest.approx(2 * 3.17, rel=0.01)


@pytest.mark.parametrize(("wrong", "negatives"), [(0, 14), (0, 200), (14, 14)])
def test_a_share_of_all_or_none_has_the_exact_bound(wrong: int, negatives: int) -> None:
    """Clopper and Pearson: 14 of 14 negatives without a mask is a specificity of at least 0.77."""
    counts = np.array([(0, int(number < wrong), 0) for number in range(negatives)])
    found = score_intervals(counts, [str(index) for index in range(negatives)])["specificity"]
    bound = 0.025 ** (1 / negatives)
    assert found == pytest.approx((0, 1 - bound) if wrong else (bound, 1))
    assert bound == pytest.approx({14: 0.768, 200: 0.982}[negatives], abs=1e-3)
    twice = score_intervals(np.repeat(counts, 2, axis=0), [str(index // 2) for index in range(2 * negatives)])
    assert twice["specificity"] == pytest.approx(found)  # two images of one patient are no more evidence


def test_a_share_of_images_has_wilson_s_interval_where_each_is_of_another_patient() -> None:
    """3 of 40; for a share the jackknife's n is n - 1."""
    counts = np.array([(1, int(number < 3), 1) for number in range(40)])
    found = score_intervals(counts, [str(index) for index in range(40)])["sensitivity"]
    n, share, z = 39, 3 / 40, 1.959964
    middle, half = share + z**2 / (2 * n), z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    assert found == pytest.approx([(middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1)], rel=1e-6)


def test_a_perfect_auroc_is_bounded_by_the_disjoint_pairs() -> None:
    counts = np.array([(0, 0, int(number < 6)) for number in range(40)])
    names = [str(index) for index in range(40)]
    found = score_intervals(counts, names, image_score=(counts[:, 2] > 0) + 0.0)["auroc"]
    assert found == pytest.approx((0.025 ** (1 / 6), 1))
    fewer = np.array([(0, 0, int(number < 3)) for number in range(4)])  # three positive, one negative
    assert "auroc" not in score_intervals(fewer, names[:4], image_score=(fewer[:, 2] > 0) + 0.0)


def test_the_jackknife_of_the_auroc_is_that_of_scores_without_each_patient() -> None:
    """Ties, and patients with images of both kinds."""
    random = np.random.default_rng(12)
    counts, patients = cases(90, seed=12, positive_share=0.4), np.sort(random.integers(0, 25, 90))
    positive, score = counts[:, 2] > 0, random.integers(0, 8, 90) / 8 + 0.2 * (counts[:, 2] > 0)
    found = intervals._auroc(score, positive, *intervals.number_groups(list(map(str, patients))))
    assert found is not None
    names = dict.fromkeys(patients.tolist())
    naive = [auroc(score[patients != one], positive[patients != one]) for one in names]
    assert found.without == pytest.approx(naive)
    assert found.value == pytest.approx(auroc(score, positive))


def test_fewer_than_five_patients_give_no_interval() -> None:
    counts = np.array([(50, 100, 100)] * 4 + [(0, 0, 0)] * 30)
    found = score_intervals(counts, [str(index) for index in range(34)])
    assert set(found) == {"kaggle_dice", "specificity"}
    more = np.concatenate((counts, counts[:1]))
    assert "positive_dice" in score_intervals(more, [str(index) for index in range(35)])
    assert "positive_dice" not in score_intervals(more, [*(str(index) for index in range(34)), "0"])


def test_a_ratio_of_other_counts() -> None:
    counts = cases(300, seed=13)
    names = [str(index // 3) for index in range(300)]
    positive = (counts[:, 2] > 0).astype(float)
    hits = positive * (counts[:, 1] > 0)
    assert ratio_interval(hits, positive, names, share=True) == score_intervals(counts, names)["sensitivity"]
    assert ratio_interval(np.zeros(0), np.zeros(0), []) is None


@pytest.mark.parametrize("cases_", [20, 87, 536])
def test_intervals_hold_the_right_value_as_often_as_they_say(cases_: int) -> None:
    """Of patients with several images; nominal 95 %. Wider where there are five or six positive patients."""
    count = {20: 500, 87: 400, 536: 150}[cases_]
    held = bench_coverage.coverage(cases_, count, seed=3) | bench_coverage.difference_coverage(
        cases_, count // 2, seed=3
    )
    for name, (share, samples) in held.items():
        spread = 3 * (0.05 * 0.95 / samples) ** 0.5
        assert 0.93 - spread < share, name
        assert share < (0.97 + spread if cases_ > 20 else 1), name


def test_without_positive_images_their_scores_have_no_interval() -> None:
    counts = cases(50, positive_share=0.0)
    found = score_intervals(counts, [str(index) for index in range(50)])
    assert "positive_dice" not in found
    assert "sensitivity" not in found
    assert "kaggle_dice" in found


def test_a_single_patient_or_none_gives_no_intervals() -> None:
    assert score_intervals(cases(20), ["one"] * 20) == {}
    assert score_intervals(np.zeros((0, 3), np.int64), []) == {}
