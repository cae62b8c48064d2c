"""Counts at the stage's size and at the original resolution, against a direct computation."""

from __future__ import annotations

import threading
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptxdist.cache.catalog import Case, read_catalog
from ptxdist.cache.render import fit_square, resize
from ptxdist.cache.store import open_store
from ptxdist.labels import rle
from ptxdist.scores.metrics import scores
from ptxdist.train import scoring
from ptxdist.train.scoring import _histogram, case_score, predict_probability, score_cases, to_original

CPU = torch.device("cpu")


class Darkness(nn.Module):
    """A segmentation of dark pixels: nearly perfect on the tiny cache, and without weights."""

    def forward(self, image: Tensor) -> Tensor:
        return 80 - image.float()


class Nothing(nn.Module):
    """Predicts nothing anywhere."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.full_like(image, -9, dtype=torch.float32)


def test_a_good_segmentation_scores_well_at_both_sizes(cache: Path) -> None:
    cases = read_catalog(cache).labelled
    done: list[int] = []
    masks: dict[int, np.ndarray] = {}
    counts = score_cases(
        Darkness(), open_store(cache, 64), cases, np.arange(10), thresholds=[0.5, 0.9], device=CPU,
        on_cases=done.append, on_mask=masks.__setitem__,
    )  # fmt: skip
    assert done == [8, 10]
    assert counts.at_full.shape == (2, 10, 3)
    assert scores(counts.at_stage).kaggle_dice > 0.95
    assert scores(counts.at_full[0]).kaggle_dice > 0.95
    for index, case in enumerate(cases):
        truth = rle.decode(case.masks or (), case.rows, case.columns)
        expected = [(masks[index] & (truth > 0)).sum(), masks[index].sum(), truth.sum()]
        assert counts.at_full[0, index].tolist() == expected


def test_an_error_of_the_caller_leaves_torch_as_many_threads_as_before(cache: Path) -> None:
    def stop(index: int, mask: object) -> None:
        assert torch.get_num_threads() == 1
        raise KeyboardInterrupt

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            score_cases(
                Darkness(), open_store(cache, 64), read_catalog(cache).labelled, np.arange(10), thresholds=[0.5],
                device=CPU, on_mask=stop,
            )  # fmt: skip
        assert torch.get_num_threads() == 2
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("ptxdist-ahead")]
        assert caught.tb
    finally:
        torch.set_num_threads(before)


def test_predicting_nothing_equals_the_all_empty_baseline(cache: Path) -> None:
    cases = read_catalog(cache).labelled
    counts = score_cases(Nothing(), open_store(cache, 32), cases, np.arange(10), thresholds=[0.5], device=CPU)
    result = scores(counts.at_full[0])
    assert result.kaggle_dice == result.all_empty_dice == 0.5
    assert result.equals_all_empty


def test_small_masks_are_emptied(cache: Path) -> None:
    cases, store = read_catalog(cache).labelled, open_store(cache, 64)
    areas = score_cases(Darkness(), store, cases, np.arange(10), thresholds=[0.5], device=CPU).at_full[0, :, 1]
    limit = int(np.median(areas[areas > 0]))
    kept = score_cases(
        Darkness(), store, cases, np.arange(10), thresholds=[0.5], device=CPU, min_area_px=limit
    ).at_full[0, :, 1]
    assert (kept == np.where(areas < limit, 0, areas)).all()


@pytest.mark.parametrize(("rows", "columns"), [(120, 200), (200, 120), (160, 160)])
def test_a_mask_of_an_oblong_image_comes_back_where_it_was(rows: int, columns: int) -> None:
    mask = np.zeros((rows, columns), np.uint8)
    mask[20:60, 30:90] = 255
    small = torch.from_numpy(resize(fit_square(mask), 64)).float() / 255
    back = (to_original(small, rows, columns) >= 0.5).numpy()
    assert back.shape == (rows, columns)
    overlap = 2 * (back & (mask > 0)).sum() / (back.sum() + (mask > 0).sum())
    assert overlap > 0.95


def test_flip_averaging_of_a_symmetric_model_changes_nothing(cache: Path) -> None:
    cases, store = read_catalog(cache).labelled, open_store(cache, 32)
    plain, averaged = (
        score_cases(Darkness(), store, cases, np.arange(4), thresholds=[0.5], device=CPU, flip_averaging=flip)
        for flip in (False, True)
    )
    assert (plain.at_full == averaged.at_full).all()


class Sides(nn.Module):
    """A map that is the image, and an image logit that sees its left half only."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        grey = image.float() / 64 - 2
        return grey, grey[..., : image.shape[-1] // 2].mean((1, 2, 3))


@pytest.mark.parametrize("one_pass", [False, True])
def test_flip_averaging_averages_the_probability_of_the_image_head_too(one_pass: bool) -> None:
    image = torch.randint(0, 256, (3, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (mask, head), (_, mirrored) = Sides()(image), Sides()(image.flip(-1))
    found = predict_probability(Sides(), image, True, one_pass=one_pass)
    torch.testing.assert_close(found.output, (mask, head))
    torch.testing.assert_close(found.probability, mask.sigmoid())
    assert found.image is not None
    assert found.image.equal((head.sigmoid() + mirrored.sigmoid()) / 2)
    assert not found.image.equal(head.sigmoid())


def test_the_score_of_a_case_is_its_highest_pixel_or_with_an_image_head_more() -> None:
    probability = torch.zeros(2, 1, 32, 64)
    probability[0, 0, 5, 10:20] = torch.linspace(0.1, 1.0, 10)  # the highest 8 of 2048 pixels are 0.3 to 1
    assert case_score(probability, None).tolist() == [1, 0]
    assert case_score(probability, torch.tensor([0.25, 0.5])).tolist() == pytest.approx([(3 * 0.25 + 0.65) / 4, 0.375])
    assert case_score(probability[:0], torch.zeros(0)).shape == case_score(probability[:0], None).shape == (0,)


def test_levels_are_counted_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    full, area = torch.rand(50, 30), torch.rand(50, 30) < 0.2
    whole = _histogram(full, area)
    monkeypatch.setattr(scoring, "_BLOCK_ROWS", 7)
    assert torch.equal(_histogram(full, area), whole)
    assert torch.equal(whole.sum(1), torch.tensor([1500, int(area.sum())]))
    assert torch.equal(_histogram(full, None), torch.stack([whole[0], torch.zeros_like(whole[0])]))


def test_no_cases_give_empty_counts(cache: Path) -> None:
    cases: tuple[Case, ...] = read_catalog(cache).labelled
    counts = score_cases(Darkness(), open_store(cache, 32), cases, np.array([], np.int64), thresholds=[0.5], device=CPU)
    assert counts.at_full.shape == (1, 0, 3)


class Wide(nn.Module):
    """Many channels at few pixels: here threads that share a convolution divide the sums over its channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(1, 480, 1), nn.ReLU(), nn.Conv2d(480, 80, 1), nn.Conv2d(80, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        small = F.avg_pool2d(image.float() / 255, image.shape[-1] // 8)
        return F.interpolate(self.layers(small), size=image.shape[-2:])


def test_the_number_of_threads_changes_no_bit_of_the_counts(cache: Path) -> None:
    """Ten cases are two blocks; a forward pass by two threads differs in the last digits."""
    store, model, found = open_store(cache, 32), Wide(), []
    cases = read_catalog(cache).labelled
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            counts = score_cases(
                model, store, cases, np.arange(len(cases)), thresholds=[0.5], device=CPU, histograms=True,
            )  # fmt: skip
            assert torch.get_num_threads() == threads, "as it was before"
            found.append([getattr(counts, field.name).tobytes() for field in fields(counts)])
    finally:
        torch.set_num_threads(before)
    assert found[1:] == found[:1] * 2
