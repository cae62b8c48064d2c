"""Counts and scores: by hand, and as properties."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, jaccard_score, roc_auc_score
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_f1_score,
    binary_jaccard_index,
    binary_recall,
    binary_specificity,
)

from ptxdist.records import Scores
from ptxdist.scores.metrics import auroc, image_dice, scores
from ptxdist.train.scoring import count

px = st.integers(0, 2**20)


@st.composite
def rows(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    sizes = draw(st.lists(st.tuples(px, px), min_size=1, max_size=30))
    return [(draw(st.integers(0, min(pair))), *pair) for pair in sizes]


def table(*cases: tuple[int, int, int]) -> np.ndarray:
    return np.array(cases, np.int64).reshape(-1, 3)


@pytest.mark.parametrize("shape", [(3, 1, 5, 7), (3, 5, 7), (0, 1, 5, 7), (0, 5, 7)])
def test_counts_are_the_px_of_intersection_prediction_and_truth(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, truth = (torch.rand(shape, generator=generator) > 0.6 for _ in range(2))
    expected = [[int((p & t).sum()), int(p.sum()), int(t.sum())] for p, t in zip(prediction, truth, strict=True)]
    counts = count(prediction, truth)
    assert counts.dtype == torch.int64
    assert counts.shape == (shape[0], 3)
    assert counts.tolist() == expected


def test_counts_of_a_full_size_mask_do_not_overflow() -> None:
    full = torch.ones(1, 1, 1024, 1024, dtype=torch.bool)
    assert count(full, full).tolist() == [[2**20] * 3]


def test_image_dice_follows_the_rules_of_the_challenge() -> None:
    counts = table((0, 0, 0), (0, 5, 0), (0, 0, 5), (0, 5, 5), (4, 4, 4), (2, 4, 6))
    assert image_dice(counts).tolist() == [1, 0, 0, 0, 1, 0.4]
    assert image_dice(table()).shape == (0,)


def test_the_three_dice_scores_differ_as_computed_by_hand() -> None:
    result = scores(table((0, 0, 0), (0, 10, 0), (50, 100, 100), (0, 0, 30)))
    assert result == Scores(
        cases=4,
        positives=2,
        kaggle_dice=(1 + 0 + 0.5 + 0) / 4,
        positive_dice=(0.5 + 0) / 2,
        pooled_dice=2 * 50 / (110 + 130),
        sensitivity=1 / 2,
        specificity=1 / 2,
        all_empty_dice=2 / 4,
    )
    assert not result.equals_all_empty


def test_empty_masks_for_all_training_images_score_what_was_measured() -> None:
    result = scores(table(*[(0, 0, 0)] * 9378, *[(0, 0, 8630)] * 2669))
    assert result.kaggle_dice == pytest.approx(0.77845, abs=5e-6)
    assert result.kaggle_dice == result.all_empty_dice
    assert (result.positive_dice, result.pooled_dice, result.sensitivity, result.specificity) == (0, 0, 0, 1)
    assert result.equals_all_empty


def test_scoring_the_baseline_by_chance_is_not_predicting_nothing() -> None:
    # One negative lost, one positive won: the mean equals the baseline's, though something is predicted.
    result = scores(table((0, 0, 0), (0, 7, 0), (9, 9, 9), (0, 0, 9)))
    assert result.kaggle_dice == result.all_empty_dice
    assert not result.equals_all_empty


def test_predicting_only_in_negative_images_is_not_predicting_nothing() -> None:
    result = scores(table((0, 7, 0), (0, 0, 9)))
    assert result.sensitivity == 0
    assert not result.equals_all_empty


def test_scores_without_positive_or_negative_images_are_none() -> None:
    negatives = scores(table((0, 0, 0), (0, 0, 0)))
    assert (negatives.positive_dice, negatives.sensitivity, negatives.specificity) == (None, None, 1)
    assert (negatives.pooled_dice, negatives.all_empty_dice, negatives.equals_all_empty) == (1, 1, True)
    positives = scores(table((3, 3, 3)))
    assert (positives.positive_dice, positives.sensitivity, positives.specificity) == (1, 1, None)
    assert not positives.equals_all_empty


def test_no_cases_have_no_scores() -> None:
    with pytest.raises(ValueError, match="no cases"):
        scores(table())


@given(rows(), st.randoms(use_true_random=False), st.integers(1, 5))
def test_scores_do_not_depend_on_the_partition_of_the_cases(cases: list, random, ranks: int) -> None:
    shuffled = random.sample(cases, len(cases))
    parts = [table(*shuffled[rank::ranks]) for rank in range(ranks)]
    assert scores(np.concatenate(parts)) == scores(table(*cases))


@given(rows())
def test_scores_are_between_0_and_1(cases: list) -> None:
    content = scores(table(*cases)).model_dump(mode="json")
    assert content.pop("cases") == len(cases)
    assert 0 <= content.pop("positives") <= len(cases)
    assert all(value is None or 0 <= value <= 1 for value in content.values())


@given(rows())
def test_scores_survive_json(cases: list) -> None:
    result = scores(table(*cases))
    assert Scores.model_validate_json(result.model_dump_json()) == result


def test_the_counts_of_separate_batches_are_those_of_one_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    prediction, truth = (torch.rand((7, 1, 8, 8), generator=generator) > 0.5 for _ in range(2))
    parts = [count(p, t) for p, t in zip(prediction.split([3, 0, 4]), truth.split([3, 0, 4]), strict=True)]
    assert torch.cat(parts).equal(count(prediction, truth))


@given(
    st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=60).filter(
        lambda cases: len({positive for _, positive in cases}) == 2
    )
)
def test_auroc_is_scikit_learn_s_with_ties_too(cases: list[tuple[int, bool]]) -> None:
    score, positive = np.array([score for score, _ in cases], float), np.array([positive for _, positive in cases])
    assert auroc(score, positive) == pytest.approx(roc_auc_score(positive, score))


def test_auroc_of_one_kind_of_images_or_none_is_not_defined() -> None:
    assert auroc(np.array([0.1, 0.2]), np.array([True, True])) is None
    assert auroc(np.zeros(0), np.zeros(0, bool)) is None


def test_dice_and_iou_are_scikit_learn_s() -> None:
    random = np.random.default_rng(1)
    prediction, truth = random.random((2, 5, 24, 24)) < np.array([0.3, 0.2])[:, None, None, None]
    prediction[1], truth[1:3], truth[4] = False, False, prediction[4]
    counts = count(torch.from_numpy(prediction), torch.from_numpy(truth)).numpy()
    for index in range(5):
        expected = f1_score(truth[index].ravel(), prediction[index].ravel(), zero_division=1.0)
        assert image_dice(counts)[index] == pytest.approx(expected)
    assert scores(counts).pooled_dice == pytest.approx(f1_score(truth.ravel(), prediction.ravel()))
    assert scores(counts).pooled_iou == pytest.approx(jaccard_score(truth.ravel(), prediction.ravel()))


@pytest.mark.parametrize("seed", range(4))
def test_scores_of_masks_are_those_of_monai_and_torchmetrics(seed: int) -> None:
    """Twelve masks, among them equal, empty and full ones; each empty beside another empty and beside a full one."""
    from monai.metrics import compute_dice, compute_iou  # takes two seconds

    random = np.random.default_rng(seed)
    prediction, truth = random.random((2, 12, 16, 16)) < random.random((2, 12, 1, 1))
    prediction[:2], truth[1:3] = False, False
    prediction[3], truth[4], prediction[5:7], truth[6:8] = truth[3], prediction[4], True, True
    pair = torch.from_numpy(prediction), torch.from_numpy(truth)
    counts = count(*pair).numpy()
    found, wanted = scores(counts), truth.any((1, 2))
    both = [mask[:, None].float() for mask in pair]
    assert image_dice(counts) == pytest.approx(compute_dice(*both, ignore_empty=False).flatten().numpy())
    assert found.positive_dice == pytest.approx(float(compute_dice(*both).flatten()[torch.from_numpy(wanted)].mean()))
    whole = [mask.reshape(1, 1, -1, 1) for mask in both]
    assert found.pooled_dice == pytest.approx(float(compute_dice(*whole)))
    assert found.pooled_iou == pytest.approx(float(compute_iou(*whole)))
    flat = [mask.flatten().int() for mask in pair]
    assert found.pooled_dice == pytest.approx(float(binary_f1_score(*flat)))
    assert found.pooled_iou == pytest.approx(float(binary_jaccard_index(*flat)))
    any_px = [mask.flatten(1).any(1).int() for mask in pair]
    assert found.sensitivity == pytest.approx(float(binary_recall(*any_px)))
    assert found.specificity == pytest.approx(float(binary_specificity(*any_px)))
    score = torch.from_numpy(random.integers(0, 5, 12) / 5)
    assert auroc(score.numpy(), wanted) == pytest.approx(float(binary_auroc(score, any_px[1])))
