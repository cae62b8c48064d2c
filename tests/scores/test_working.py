"""Working points, calibration and ROC against scikit-learn and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import auc, confusion_matrix, roc_curve

from ptxdist.scores.working import Kind, calibrate, calibrated, folds_of, roc, working_point


def cases(count: int, seed: int = 0, shift: float = 1.5) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    """Scores, truths, patients of two images each, folds."""
    random = np.random.default_rng(seed)
    positive = random.random(count) < 0.3
    score = 1 / (1 + np.exp(-random.normal(shift * positive - 1, 1)))
    groups = [f"g{number // 2}" for number in range(count)]
    return score, positive, groups, folds_of([f"c{number}" for number in range(count)], groups, positive * 100)


@pytest.mark.parametrize(("kind", "target"), [("sensitivity", 0.9), ("sensitivity", 1.0), ("specificity", 0.95)])
def test_the_threshold_is_the_tightest_that_reaches_the_target(kind: Kind, target: float) -> None:
    score, positive, groups, folds = cases(301)
    score[:40] = np.round(score[:40], 1)  # ties
    point = working_point(score, positive, groups, folds, kind=kind, target=target)
    assert point is not None
    reached = np.round(score, 6) >= point.threshold
    share = reached[positive].mean() if kind == "sensitivity" else 1 - reached[~positive].mean()
    assert share >= target
    rounded = np.round(score, 6)
    if kind == "sensitivity":
        tighter = rounded > rounded[rounded == point.threshold].max()
        assert tighter[positive].mean() < target
    else:
        looser = rounded >= rounded[rounded < point.threshold].max()
        assert 1 - looser[~positive].mean() < target


def test_the_numbers_are_cross_fitted_by_patient_and_those_of_the_confusion_matrix() -> None:
    score, positive, groups, folds = cases(400, seed=1)
    assert all(len({folds[row] for row in range(400) if groups[row] == group}) == 1 for group in set(groups))
    point = working_point(score, positive, groups, folds, kind="sensitivity", target=0.9, prevalence=0.02)
    assert point is not None
    flagged = np.zeros(400, bool)
    for fold in set(folds.tolist()):
        own = np.sort(np.round(score[(folds != fold) & positive], 6))[::-1]
        flagged[folds == fold] = np.round(score[folds == fold], 6) >= own[int(np.ceil(0.9 * len(own))) - 1]
    rejections, alarms, misses, hits = confusion_matrix(positive, flagged).ravel().tolist()
    assert (point.rejections, point.alarms, point.misses, point.hits) == (rejections, alarms, misses, hits)
    assert point.sensitivity == pytest.approx(hits / (hits + misses))
    assert point.specificity == pytest.approx(rejections / (rejections + alarms))
    assert point.flagged == pytest.approx(flagged.mean())
    sick, well = 0.02 * point.sensitivity, 0.98 * (1 - point.specificity)
    assert point.ppv == pytest.approx(sick / (sick + well))
    assert point.npv == pytest.approx(
        0.98 * point.specificity / (0.98 * point.specificity + 0.02 * (hits and misses) / (hits + misses))
    )
    for name in ("sensitivity", "specificity"):
        low, high = point.intervals[name]
        assert low < getattr(point, name) < high


def test_the_estimate_holds_for_new_patients_where_the_chosen_threshold_promises_too_much() -> None:
    new, truth, _, _ = cases(60_000, seed=99)
    estimates, promises, real = [], [], []
    for seed in range(60):
        score, positive, groups, folds = cases(160, seed=seed)
        point = working_point(score, positive, groups, folds, kind="sensitivity", target=0.9)
        assert point is not None
        estimates.append(point.sensitivity)
        promises.append((np.round(score, 6) >= point.threshold)[positive].mean())
        real.append((new >= point.threshold)[truth].mean())
    gaps = np.array(promises) - real, np.array(estimates) - real
    assert gaps[0].mean() > 0.02
    assert abs(gaps[1].mean()) < gaps[0].mean() / 2


def test_points_that_cannot_be_chosen_are_none() -> None:
    score, positive, groups, folds = cases(40)
    for wrong in (np.zeros(40, bool), np.ones(40, bool)):
        assert working_point(score, wrong, groups, folds, kind="sensitivity", target=0.9) is None
        assert calibrate(score, wrong, folds) is None
    one = folds_of(["a"] * 40, ["same"] * 40, positive * 1)
    assert working_point(score, positive, groups, one, kind="specificity", target=0.9) is None
    few = positive & (np.arange(40) == np.flatnonzero(positive)[0])  # one positive image, missing in the other folds
    assert working_point(score, few, groups, folds, kind="sensitivity", target=0.9) is None


def test_no_image_is_flagged_where_all_negatives_have_the_highest_score() -> None:
    score, positive, groups, folds = (
        np.ones(40),
        np.arange(40) % 3 == 0,
        [str(row) for row in range(40)],
        np.arange(40) % 4,
    )
    point = working_point(score, positive, groups, folds, kind="specificity", target=0.9)
    assert point is not None
    assert (point.hits, point.alarms, point.ppv) == (0, 0, None)
    assert point.threshold > 1


def test_the_calibration_is_that_of_scikit_learn_and_makes_probabilities_right() -> None:
    score, positive, _, folds = cases(3_000, seed=2)
    found = calibrate(score, positive, folds)
    assert found is not None
    platt, crossed = found
    odds = np.log(score / (1 - score))
    ones, zeros = positive.sum(), (~positive).sum()
    soft = np.where(positive, (ones + 1) / (ones + 2), 1 / (zeros + 2))
    reference = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(
        np.tile(odds, 2)[:, None], np.repeat([1, 0], 3_000), sample_weight=np.concatenate((soft, 1 - soft))
    )
    assert platt.slope == pytest.approx(float(reference.coef_[0, 0]), rel=1e-3)
    assert platt.intercept == pytest.approx(float(reference.intercept_[0]), rel=1e-3)
    assert np.abs(crossed - calibrated(score, platt)).max() < 0.05
    for low, high in ((0.0, 0.2), (0.2, 0.5), (0.5, 1.0)):
        inside = (crossed >= low) & (crossed < high)
        assert positive[inside].mean() == pytest.approx(crossed[inside].mean(), abs=0.06)
    new, truth, _, _ = cases(3_000, seed=3)
    assert np.corrcoef(calibrated(new, platt), truth)[0, 1] > 0.4


def test_perfectly_separated_scores_give_finite_probabilities() -> None:
    positive = np.arange(30) % 2 == 0
    found = calibrate(positive.astype(float), positive, np.arange(30) % 5)
    assert found is not None
    assert np.isfinite([found[0].slope, found[0].intercept]).all()
    assert 0.8 < found[1][positive].min() < 1


def test_the_roc_curve_is_that_of_scikit_learn() -> None:
    score, positive, _, _ = cases(150, seed=4)
    score[:50] = np.round(score[:50], 1)
    alarms, hits, _ = roc_curve(positive, score, drop_intermediate=False)
    points = roc(score, positive)
    assert np.array(points) == pytest.approx(np.column_stack((alarms, hits)))
    many, truth, _, _ = cases(5_000, seed=5)
    short = roc(many, truth)
    assert (len(short) <= 200, short[0], short[-1]) == (True, (0.0, 0.0), (1.0, 1.0))
    alarms, hits, _ = roc_curve(truth, many)
    assert auc(*zip(*short, strict=True)) == pytest.approx(auc(alarms, hits), abs=2e-3)
    assert roc(score, np.zeros(150, bool)) == ()
