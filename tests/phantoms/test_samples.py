"""Phantoms in memory: masks of the given cases, the same for any number of threads."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from ptxdist.cache import store as stores
from ptxdist.cache.catalog import Case, read_catalog
from ptxdist.cache.store import open_store
from ptxdist.labels import rle
from ptxdist.phantoms import samples as phantom_samples
from ptxdist.phantoms.samples import draw_samples, is_positive

WIDE, TALL = (512, 1024), (2048, 1024)


def case(shape: tuple[int, int], left: int, name: str = "a") -> Case:
    """A case with a box of a tenth of each side as its mask."""
    rows, columns = shape
    mask = np.zeros(shape, np.uint8)
    mask[rows // 2 : rows // 2 + rows // 10, left : left + columns // 10] = 1
    return Case(name, "0", "none", rows, columns, name, (rle.encode(mask),))


def negative() -> Case:
    return Case("n", "0", "none", 1024, 1024, "n", ())


def test_masks_are_those_of_the_positive_cases_in_turn_in_the_geometry_of_the_cache(cache: Path) -> None:
    cases = read_catalog(cache).labelled
    store = draw_samples(cases, 9, 64, seed=0)
    real = open_store(cache, 64)
    positives = [index for index, item in enumerate(cases) if item.masks]
    for position in range(9):
        image, mask = store.sample(position)
        assert image.dtype == np.uint8
        assert image.std() > 20
        if not is_positive(position):
            assert not mask.any()
            continue
        wanted = real.sample(positives[position // 2 % len(positives)])[1]
        assert np.abs(mask.astype(int) - wanted).max() <= 1
    wide, _ = draw_samples([case(WIDE, 100), negative()], 3, 256, seed=0).sample(2)
    assert wide.shape == (256, 256)
    for shape, (x, y, width, height) in ((WIDE, (25, 128, 26, 13)), (TALL, (76, 128, 13, 26))):
        box = cv2.boundingRect(draw_samples([case(shape, 100)], 1, 256, seed=0).sample(0)[1])
        assert np.abs(np.subtract(box, (x, y, width, height))).max() <= 1


def test_phantoms_depend_on_seed_and_position_only_and_show_the_pneumothorax(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (phantom_samples, stores):
        monkeypatch.setattr(module, "SHARD_CASES", 32)
    cases = [case((1024, 1024), 150), case((1024, 1024), 700, "b")]
    seen: list[tuple[int, int]] = []
    one = draw_samples(cases, 44, 32, seed=5, on_image=lambda done, total: seen.append((done, total)))
    more = draw_samples(cases, 45, 32, seed=5, threads=4)
    other = draw_samples(cases, 2, 32, seed=6)
    assert seen == [(done, 44) for done in range(1, 45)]
    assert [len(shard) for shard in one.images] == [32, 12]
    for position in (0, 1, 31, 32, 43):
        for left, right in zip(one.sample(position), more.sample(position), strict=True):
            assert np.array_equal(left, right)
    assert not np.array_equal(one.sample(0)[0], other.sample(0)[0])
    image, mask = (np.stack([one.sample(position)[kind] for position in range(0, 44, 4)]) for kind in (0, 1))
    without = np.stack([one.sample(position)[0] for position in range(1, 44, 4)])
    assert image[mask > 200].mean() < without[mask > 200].mean() - 10  # air is dark
