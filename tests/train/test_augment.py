"""What is drawn and written is what albumentations makes of the image, to the bit."""

from __future__ import annotations

import random

import albumentations as A
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptxdist.train.augment import RECIPES, Augmentation, Draw, make


def by_albumentations(recipe: str, image: np.ndarray, mask: np.ndarray, seed: str) -> tuple[np.ndarray, np.ndarray]:
    """The recipe as albumentations itself applies it, all its draws from one generator of the case's seed."""
    transforms = make(recipe)
    compose = A.Compose(transforms)
    generator = random.Random(seed)
    for owner in (compose, *transforms):
        owner.py_random, owner.random_generator = generator, None
    result = compose(image=image, mask=mask)
    return result["image"], result["mask"]


@pytest.mark.parametrize("recipe", sorted(RECIPES))
@given(
    seed=st.integers(0, 2**31 - 1),
    epoch=st.integers(0, 200),
    case=st.text("0123456789.", min_size=1, max_size=40),
    repeat=st.integers(0, 3),
    noise=st.integers(0, 2**32 - 1),
)
def test_it_writes_what_albumentations_makes_of_the_image(
    recipe: str, seed: int, epoch: int, case: str, repeat: int, noise: int
) -> None:
    image, mask = np.random.default_rng(noise).integers(0, 256, (2, 16, 16), dtype=np.uint8)
    before = image.copy(), mask.copy()
    found = np.zeros_like(image), np.zeros_like(mask)
    Augmentation(recipe, seed).draw(epoch=epoch, case=case, repeat=repeat).write(image, mask, *found)
    expected = by_albumentations(recipe, image, mask, f"{seed} {epoch} {case} {repeat}")
    assert (found[0] == expected[0]).all()
    assert (found[1] == expected[1]).all()
    assert (image == before[0]).all(), "the inputs stay as they are"
    assert (mask == before[1]).all(), "the inputs stay as they are"


def test_the_draws_of_a_recipe_are_of_every_kind() -> None:
    """Else the property above would hold for nothing."""
    draws = [Augmentation("siim", 0).draw(epoch=0, case=str(case)) for case in range(400)]
    assert 150 < sum(draw.flip for draw in draws) < 250
    assert 60 < sum(draw.table is None for draw in draws) < 140
    assert len({draw.table.tobytes() for draw in draws if draw.table is not None}) > 250
    assert all(draw == Draw() for draw in [Augmentation("none", 0).draw(epoch=0, case="1")])


def test_no_transform_draws_from_a_generator_that_is_not_keyed_to_the_case() -> None:
    augmentation = Augmentation("siim", 0)
    with pytest.raises(AssertionError, match="not seeded per case"):
        augmentation._transforms[0].random_generator.normal()
