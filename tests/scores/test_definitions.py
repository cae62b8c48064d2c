"""Every Dice in use against other implementations, on masks: MONAI, torchmetrics, scikit-learn, or plain loops."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torchmetrics.functional.classification import binary_f1_score
from torchmetrics.functional.segmentation import dice_score

from ptxdist.labels import rle
from ptxdist.scores import definitions
from ptxdist.scores.constant import GRID, ConstantMask
from ptxdist.scores.definitions import DEFINITIONS, resampled
from ptxdist.scores.metrics import scores

Masks = npt.NDArray[np.bool_]
SIDE = 6


@st.composite
def mask_pairs(draw: st.DrawFn) -> tuple[Masks, Masks]:
    """1 to 40 predicted and true masks of 6 x 6 pixels, many of them empty, equal or full."""
    number, seed = draw(st.integers(1, 40)), draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    shares = random.choice([0.0, 0.0, 0.2, 0.6, 1.0], (2, number, 1, 1))
    predicted, true = random.random((2, number, SIDE, SIDE)) < shares
    equal = random.random(number) < 0.2
    predicted[equal] = true[equal]
    return predicted, true


def count(predicted: Masks, true: Masks) -> npt.NDArray[np.int64]:
    sums = [mask.sum(axis=(1, 2)) for mask in (predicted & true, predicted, true, np.ones_like(true))]
    return np.stack(sums, axis=1).astype(np.int64)


def dice_of(predicted: Masks, true: Masks, empty: float) -> float:
    total = int(predicted.sum()) + int(true.sum())
    return 2 * int((predicted & true).sum()) / total if total else empty


def kaggle(predicted: Masks, true: Masks) -> float:
    return sum(dice_of(p, t, 1.0) for p, t in zip(predicted, true, strict=True)) / len(true)


def medical(predicted: Masks, true: Masks) -> list[float]:
    """Of each image as GLoRIA, MGCA and MRM have it: an empty truth is 1 without and 0 with a predicted pixel."""
    return [
        (0.0 if p.any() else 1.0) if not t.any() else 2 * np.logical_and(p, t).sum() / (p.sum() + t.sum())
        for p, t in zip(predicted, true, strict=True)
    ]


def value(field: str, pair: tuple[Masks, Masks]) -> float | None:
    return DEFINITIONS[field].of(count(*pair))


@given(mask_pairs())
def test_kaggle_and_mrm(pair: tuple[Masks, Masks]) -> None:
    assert value("kaggle_dice", pair) == pytest.approx(kaggle(*pair))
    assert value("mrm_dice", pair) == pytest.approx(np.mean(medical(*pair)))
    assert value("mrm_dice", pair) == pytest.approx(value("kaggle_dice", pair))
    each = [f1_score(t.ravel(), p.ravel(), zero_division=1.0) for p, t in zip(*pair, strict=True)]
    assert value("kaggle_dice", pair) == pytest.approx(np.mean(each))


@given(mask_pairs())
def test_positives_only_is_monai_s_dice_metric(pair: tuple[Masks, Masks]) -> None:
    from monai.metrics import DiceMetric  # takes two seconds

    metric = DiceMetric(ignore_empty=True)
    metric(*(torch.from_numpy(mask[:, None]).float() for mask in pair))
    found = value("positive_dice", pair)
    assert found == pytest.approx(float(metric.aggregate())) if pair[1].any() else found is None


@given(mask_pairs())
def test_pooled_and_the_background_are_torchmetrics_s(pair: tuple[Masks, Masks]) -> None:
    predicted, true = (torch.from_numpy(mask.reshape(-1)).int() for mask in pair)
    if pair[0].any() or pair[1].any():
        assert value("pooled_dice", pair) == pytest.approx(float(binary_f1_score(predicted, true)))
    background = binary_f1_score(1 - predicted, 1 - true) if not (pair[0].all() and pair[1].all()) else None
    front = binary_f1_score(predicted, true) if pair[0].any() or pair[1].any() else None
    wanted = [float(each) for each in (background, front) if each is not None]
    assert value("mmseg_dice", pair) == pytest.approx(sum(wanted) / len(wanted))


@given(mask_pairs())
def test_nnunet_leaves_out_what_is_empty_twice(pair: tuple[Masks, Masks]) -> None:
    each = [dice_of(p, t, math.nan) for p, t in zip(*pair, strict=True)]
    found = value("nnunet_dice", pair)
    assert found == pytest.approx(np.nanmean(each)) if not np.isnan(each).all() else found is None


@given(mask_pairs())
@settings(max_examples=30)
def test_nnunet_is_torchmetrics_s_and_monai_s_where_none_is_empty_twice(pair: tuple[Masks, Masks]) -> None:
    from monai.metrics import compute_dice

    used = pair[0].any((1, 2)) | pair[1].any((1, 2))
    if not used.any():
        return
    tensors = [torch.from_numpy(mask[used][:, None]).int() for mask in pair]
    found = value("nnunet_dice", pair)
    assert found == pytest.approx(float(dice_score(*tensors, num_classes=1, input_format="one-hot").mean()))
    assert found == pytest.approx(float(compute_dice(*(each.float() for each in tensors), ignore_empty=False).mean()))


@given(mask_pairs())
def test_flattened_over_batches(pair: tuple[Masks, Masks]) -> None:
    batches = []
    for start in range(0, len(pair[0]), 16):
        p, t = (mask[start : start + 16].reshape(-1).astype(float) for mask in pair)
        batches.append((2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
    assert value("flattened_dice", pair) == pytest.approx(np.mean(batches))


@given(mask_pairs())
def test_gloria_and_mgca_average_batches(pair: tuple[Masks, Masks]) -> None:
    batches = [np.mean(medical(*(mask[start : start + 8] for mask in pair))) for start in range(0, len(pair[0]), 8)]
    assert value("gloria_dice", pair) == pytest.approx(np.mean(batches))
    if len(pair[0]) % 8 == 0:
        assert value("gloria_dice", pair) == pytest.approx(value("kaggle_dice", pair))


@given(mask_pairs())
def test_scores_per_image(pair: tuple[Masks, Masks]) -> None:
    predicted, true = (mask.any((1, 2)) for mask in pair)
    negative = [int(p.sum()) for p, t in zip(*pair, strict=True) if not t.any()]
    assert value("false_alarm_px", pair) == (pytest.approx(np.mean(negative)) if negative else None)
    assert value("sensitivity", pair) == (pytest.approx(predicted[true].mean()) if true.any() else None)
    assert value("specificity", pair) == (pytest.approx(1 - predicted[~true].mean()) if (~true).any() else None)


def test_predicting_nothing() -> None:
    """Three negative images and one positive one of half the pixels; the second batch of 8 has two images."""
    true = np.zeros((10, SIDE, SIDE), bool)
    true[8, :3] = True
    empty = np.zeros_like(true)
    found = {field: value(field, (empty, true)) for field in DEFINITIONS}
    assert found == {
        "kaggle_dice": 0.9, "positive_dice": 0.0, "pooled_dice": 0.0, "nnunet_dice": 0.0,
        "flattened_dice": pytest.approx(1 / 19), "gloria_dice": pytest.approx((1 + 1 / 2) / 2), "mrm_dice": 0.9,
        "mmseg_dice": pytest.approx(2 * 342 / (342 + 360) / 2), "sensitivity": 0.0, "specificity": 1.0,
        "false_alarm_px": 0.0,
    }  # fmt: skip


def test_every_score_says_what_it_is_and_what_it_may_be_compared_with() -> None:
    assert len({score.definition for score in DEFINITIONS.values()}) == len(DEFINITIONS)
    assert all(score.compare.endswith(".") and score.definition.endswith(".") for score in DEFINITIONS.values())


@given(mask_pairs())
@settings(max_examples=25)
def test_the_standard_scores_are_those_of_every_other_command(pair: tuple[Masks, Masks]) -> None:
    counts = count(*pair)
    found = scores(counts[:, :3])
    for field in ("kaggle_dice", "positive_dice", "pooled_dice", "sensitivity", "specificity"):
        assert DEFINITIONS[field].of(counts) == getattr(found, field)


# --- constant mask ----------------------------------------------------------------------------------------------------


def constant_of(masks: list[Masks]) -> npt.NDArray[np.int64] | None:
    found = ConstantMask()
    for mask in masks:
        found.add(rle.spans_of(mask), (mask.shape[0], mask.shape[1]))
    return found.counts()


def test_the_constant_mask_is_the_true_one_if_that_is_always_the_same() -> None:
    true = np.zeros((2 * GRID, 2 * GRID), bool)
    true[20:52, 40:72] = True  # 16 x 16 cells of 4 pixels; 256 of them are one of the numbers tried
    found = constant_of([true, np.zeros_like(true), true])
    assert found is not None
    assert found[:, 2].tolist() == [1024, 0, 1024]
    assert definitions.kaggle_dice(found[[0, 2]]) > 0.95
    assert found[1, 0] == 0
    assert found[1, 1] > 0


def test_the_constant_mask_in_images_of_several_sizes_is_the_same_part_of_each() -> None:
    small, large = np.zeros((70, 90), bool), np.zeros((700, 900), bool)
    small[7:35, 9:45], large[70:350, 90:450] = True, True
    found = constant_of([small, large])
    assert found is not None
    assert found[0, 1] / small.size == pytest.approx(found[1, 1] / large.size, rel=0.1)
    assert (2 * found[:, 0] / found[:, 1:].sum(1) > 0.85).all()


def test_the_constant_mask_is_counted_as_if_it_was_drawn() -> None:
    random = np.random.default_rng(3)
    masks = [random.random((GRID, GRID)) < 0.2 * (np.arange(GRID) > 40) for _ in range(5)]  # one pixel a cell
    found = constant_of(masks)
    assert found is not None
    share = np.mean(masks, axis=0).reshape(-1)
    best = max(
        (
            np.mean([2 * mask.reshape(-1)[chosen].sum() / (len(chosen) + mask.sum()) for mask in masks])
            for number in np.unique(np.geomspace(1, GRID**2, 25).astype(int))
            for chosen in [np.argsort(-share, kind="stable")[:number]]
        ),
    )
    assert definitions.kaggle_dice(found) == pytest.approx(best)


def test_no_constant_mask_without_a_true_one() -> None:
    assert constant_of([np.zeros((9, 9), bool)]) is None


# --- intervals --------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_the_textbook_s() -> None:
    random = np.random.default_rng(0)
    each = random.random(400)
    found = resampled({"mean": lambda places: float(each[places].mean())}, np.arange(400))["mean"]
    half = 1.96 * each.std() / 20
    assert found == (pytest.approx(each.mean() - half, abs=0.006), pytest.approx(each.mean() + half, abs=0.006))


def test_images_of_one_patient_are_drawn_together() -> None:
    each, patient = np.repeat(np.arange(20) % 2, 30).astype(float), np.repeat(np.arange(20), 30)
    mean = {"mean": lambda places: float(each[places].mean())}
    low, high = resampled(mean, patient)["mean"]
    low_images, high_images = resampled(mean, np.arange(600))["mean"]
    assert high - low > 3 * (high_images - low_images)


def _patients(random: np.random.Generator) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.intp]]:
    """Counts and patients of about 100 images of 40 patients in random order; images of a patient are alike."""
    rows, patient = [], []
    for number in range(40):
        sick, quality = random.random() < 0.3, random.random()
        for _ in range(random.geometric(0.4)):
            true = int(random.lognormal(8, 0.8)) if sick and random.random() < 0.8 else 0
            found = int(true * quality) if true else int(900 * (random.random() < 0.1))
            rows.append((found if true else 0, found, true, 2**20))
            patient.append(number)
    order = random.permutation(len(rows))
    return np.array(rows)[order], np.array(patient)[order]


def test_intervals_of_batches_cover_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(definitions, "DRAWS", 120)
    random = np.random.default_rng(0)
    expected = np.mean([definitions.flattened_dice(_patients(random)[0]) for _ in range(400)])
    covered = 0
    for _ in range(80):
        counts, patient = _patients(random)
        low, high = resampled({"": lambda places, of=counts: definitions.flattened_dice(of[places])}, patient)[""]
        covered += low <= expected <= high
    assert covered / 80 > 0.87


def test_no_interval_where_none_can_be_known() -> None:
    constant = {"same": lambda places: 1.0, "none": lambda places: None}
    assert resampled(constant, np.arange(9)) == {}
    assert resampled({"mean": lambda places: float(places.mean())}, np.zeros(9, int)) == {}
