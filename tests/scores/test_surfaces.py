"""HD95 and surface Dice through MONAI, against loops over all pairs of edge pixels."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from ptxdist import files
from ptxdist.errors import SettingsError
from ptxdist.labels import rle
from ptxdist.scores.surfaces import TOLERANCE_PX, require_surfaces, surface_scores

Mask = npt.NDArray[np.bool_]


def edge(mask: Mask) -> npt.NDArray[np.intp]:
    """Places of the pixels of a mask with a neighbour outside it, or outside the image."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.argwhere(mask & ~inner)


def slow(predicted: Mask, true: Mask) -> tuple[float, float]:
    first, second = edge(predicted), edge(true)
    between = np.sqrt(((first[:, None] - second[None]) ** 2).sum(-1))
    there, back = between.min(1), between.min(0)
    near = (there <= TOLERANCE_PX).sum() + (back <= TOLERANCE_PX).sum()
    return max(np.quantile(there, 0.95), np.quantile(back, 0.95)), near / (len(there) + len(back))


def fast(predicted: Mask, true: Mask) -> tuple[float, float]:
    return surface_scores(rle.spans_of(predicted), rle.spans_of(true), (true.shape[0], true.shape[1]))


@pytest.mark.parametrize("seed", range(6))
def test_random_masks(seed: int) -> None:
    random = np.random.default_rng(seed)
    shape = tuple(random.integers(5, 40, 2))
    predicted, true = (random.random((2, *shape)) < random.random((2, 1, 1))) | (random.random((2, *shape)) < 0.02)
    if not predicted.any() or not true.any():
        predicted[0, 0] = true[-1, -1] = True
    assert fast(predicted, true) == pytest.approx(slow(predicted, true), rel=1e-5)


def test_masks_at_the_edge_of_the_image_and_equal_ones() -> None:
    true = np.zeros((30, 20), bool)
    true[:, :4] = True
    assert fast(true, true) == (0, 1)
    shifted = np.roll(true, 5, axis=1)
    assert fast(shifted, true) == pytest.approx(slow(shifted, true))
    assert fast(shifted, true)[0] == 5


def test_an_empty_mask_has_no_distance() -> None:
    full, empty = np.ones((4, 4), bool), np.zeros((4, 4), bool)
    assert all(math.isnan(number) for pair in ((full, empty), (empty, full), (empty, empty)) for number in fast(*pair))


def test_the_extra_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    require_surfaces()
    monkeypatch.setattr(files, "_is_installed", lambda module: False)
    with pytest.raises(SettingsError, match=r"monai\): pip install 'ptxdist\[surfaces\]'"):
        require_surfaces()
