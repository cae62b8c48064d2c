"""An image that is unlike the training images is recognised, in the right words; one of the same kind is not."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from ptxdist.cache.likeness import FEWEST, likeness_of, look, unlike
from ptxdist.records import Likeness

Image = npt.NDArray[np.uint8]
SIDE = 64


def chest(seed: int) -> Image:
    """Two dark ellipses on a bright ground, with some noise; each image a little different."""
    random = np.random.default_rng(seed)
    image = np.full((SIDE, SIDE), 150 + random.normal(0, 8), np.float32)
    for x in (20, 44):
        centre = (x + int(random.integers(-2, 3)), 30 + int(random.integers(-3, 4)))
        cv2.ellipse(image, centre, (9, 20), 0, 0, 360, 60 + random.normal(0, 5), -1)
    image = cv2.GaussianBlur(image, (0, 0), 1) + random.normal(0, random.uniform(2, 3), image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def training() -> Likeness:
    found = likeness_of([look(chest(seed), 1024) for seed in range(FEWEST)])
    assert found is not None
    return found


def test_few_images_say_nothing() -> None:
    assert likeness_of([look(chest(seed), 1024) for seed in range(FEWEST - 1)]) is None


def test_images_of_the_same_kind_are_not_accused(training: Likeness) -> None:
    accused = [unlike(look(chest(seed), 1024), training) for seed in range(1000, 1100)]
    assert sum(map(bool, accused)) <= 1, accused
    assert not unlike(look(chest(1000), 2048), training), "a scan of twice the size is nothing special"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda image: image // 3, "darker, of less contrast than nearly all of them"),
        (lambda image: cv2.add(image, 70), "brighter than nearly all of them"),
        (lambda image: cv2.GaussianBlur(image, (0, 0), 2), "blurrier than nearly all of them"),
        (lambda image: cv2.add(image, np.random.default_rng(0).integers(0, 40, image.shape, np.uint8)), "noisier"),
        (lambda image: 255 - image, "of another layout (another view or part of the body, turned, or inverted)"),
        (lambda image: np.rot90(image).copy(), "of another layout"),
        (lambda image: np.zeros_like(image), "; of another layout"),
    ],
)
def test_an_image_is_unlike_in_a_way_that_is_said(
    training: Likeness, change: Callable[[Image], Image], words: str
) -> None:
    assert words in unlike(look(change(chest(2000)), 1024), training)


@pytest.mark.parametrize(("side_px", "word"), [(200, "smaller"), (5000, "larger")])
def test_the_size_of_the_original_counts(training: Likeness, side_px: int, word: str) -> None:
    assert unlike(look(chest(2000), side_px), training) == f"{word} than nearly all of them"
