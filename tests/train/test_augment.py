"""What is drawn and written is what albumentations makes of image and mask, to the bit."""

from __future__ import annotations

import hashlib
import random
import re
import tomllib
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptxdist.config import Recipe, Transform
from ptxdist.errors import SettingsError, TrainingError
from ptxdist.train.augment import RECIPES, Augmentation, Draw, FullDraw, Named, in_words, make


def transform(name: str, **arguments: object) -> Transform:
    return Transform.model_validate({"transform": name, **arguments})


# Each transform that is applied by table is in one of these.
BY_TABLE: dict[str, Recipe] = {
    "none": "none",
    "siim": "siim",
    "tables": (
        transform("RandomGamma", gamma_limit=[40, 250], p=0.7),
        transform("Posterize", num_bits=[2, 7], p=0.3),
        transform("HorizontalFlip", p=0.5),
        transform("Solarize", threshold_range=[0.2, 0.9], p=0.4),
        transform("InvertImg", p=0.4),
        transform("HorizontalFlip", p=0.3),
        transform("RandomBrightnessContrast", brightness_limit=0.7, contrast_limit=0.7, p=0.6),
    ),
}
# As many kinds as there are: on image and mask together, on the image alone, with either generator, slow ones left out.
IN_FULL: dict[str, Recipe] = {
    "strong": "strong",
    "blur and tables": (transform("GaussianBlur", p=0.7), transform("RandomGamma", p=0.5), transform("InvertImg")),
    "affine": (transform("HorizontalFlip"), transform("Affine", rotate=[-20, 20], scale=[0.8, 1.2], p=0.8)),
    "distortion": (
        transform("ElasticTransform", alpha=30, sigma=5, p=0.6),
        transform("GridDistortion", p=0.5),
        transform("OpticalDistortion", p=0.5),
        transform("RandomRotate90", p=0.5),
    ),
    "noise and holes": (
        transform("GaussNoise", p=0.7),
        transform("CoarseDropout", p=0.5),
        transform("RandomToneCurve", p=0.5),
        transform("PixelDropout", p=0.5),
        transform("CLAHE", p=0.5),
    ),
    "mean of the image": (transform("RandomBrightnessContrast", brightness_by_max=False, p=1),),
    "extremes of the image": (transform("RandomBrightnessContrast", ensure_safe_range=True, p=1),),
    "vertical": (transform("VerticalFlip", p=0.5),),
}


DOCS = Path(__file__).parents[2] / "docs" / "train.md"


def by_albumentations(recipe: Recipe, image: np.ndarray, mask: np.ndarray, seed: str) -> tuple[np.ndarray, np.ndarray]:
    """The recipe as albumentations itself applies it, all its draws from generators of the case's seed."""
    compose = A.Compose(make(recipe), mask_interpolation=cv2.INTER_LINEAR)
    numpy_seed = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:16])
    compose.set_random_state(np.random.default_rng(numpy_seed), random.Random(seed))
    result = compose(image=image, mask=mask)
    return result["image"], result["mask"]


def applied(augmentation: Augmentation, image: np.ndarray, mask: np.ndarray, **key: object) -> tuple[np.ndarray, ...]:
    found = np.zeros_like(image), np.zeros_like(mask)
    augmentation.draw(**{"epoch": 0, "case": "a", **key}).write(image, mask, *found)
    return found


def sample(noise: int, size_px: int = 16) -> tuple[np.ndarray, np.ndarray]:
    image, mask = np.random.default_rng(noise).integers(0, 256, (2, size_px, size_px), dtype=np.uint8)
    for array in (image, mask):
        array.flags.writeable = False  # as those of a store
    return image, mask


@pytest.mark.parametrize("name", [*BY_TABLE, *IN_FULL])
@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31 - 1),
    epoch=st.integers(0, 200),
    case=st.text("0123456789.", min_size=1, max_size=40),
    repeat=st.integers(0, 3),
    noise=st.integers(0, 2**32 - 1),
)
def test_it_writes_what_albumentations_makes_of_image_and_mask(
    name: str, seed: int, epoch: int, case: str, repeat: int, noise: int
) -> None:
    recipe = {**BY_TABLE, **IN_FULL}[name]
    image, mask = sample(noise)
    augmentation = Augmentation(recipe, seed)
    assert augmentation.by_table == (name in BY_TABLE)
    found = applied(augmentation, image, mask, epoch=epoch, case=case, repeat=repeat)
    expected = by_albumentations(recipe, image.copy(), mask.copy(), f"{seed} {epoch} {case} {repeat}")
    assert (found[0] == expected[0]).all()
    assert (found[1] == expected[1]).all()


def test_the_draws_of_a_recipe_are_of_every_kind() -> None:
    """Else the property above would hold for nothing."""
    draws = [Augmentation("siim", 0).draw(epoch=0, case=str(case)) for case in range(400)]
    assert 150 < sum(draw.flip for draw in draws) < 250
    assert 60 < sum(draw.table is None for draw in draws) < 140
    assert len({draw.table.tobytes() for draw in draws if draw.table is not None}) > 250
    assert all(draw == Draw() for draw in [Augmentation("none", 0).draw(epoch=0, case="1")])


@pytest.mark.parametrize("name", IN_FULL)
def test_what_happens_to_a_case_depends_on_its_key_only(name: str) -> None:
    """Not on the cases before it, nor on the generators of numpy, random and OpenCV."""
    cases = [str(number) for number in range(12)]

    def all_of(order: list[str], seed: int) -> dict[str, bytes]:
        augmentation = Augmentation(IN_FULL[name], 1)
        np.random.seed(seed)
        random.seed(seed)
        cv2.setRNGSeed(seed)
        return {
            case: b"".join(part.tobytes() for part in applied(augmentation, *sample(7, 32), case=case))
            for case in order
        }

    first = all_of(cases, 1)
    assert first == all_of(cases[::-1], 2)
    if not name.endswith("of the image") and name != "vertical":
        assert len(set(first.values())) > 6
    assert all_of(cases, 1) != {
        case: b"".join(part.tobytes() for part in applied(Augmentation(IN_FULL[name], 2), *sample(7, 32), case=case))
        for case in cases
    }


def test_the_recipe_in_the_docs_is_strong() -> None:
    """So what is written there for a pipeline file is complete and correct."""
    (text,) = re.findall(r"```toml\n(augmentation = .*?)```", DOCS.read_text(), re.DOTALL)
    written = tuple(Transform.model_validate(item) for item in tomllib.loads(text)["augmentation"])
    image, mask = sample(3, 64)
    ours, theirs = Augmentation("strong", 4), Augmentation(written, 4)
    for case in range(20):
        found = [applied(recipe, image, mask, case=str(case)) for recipe in (ours, theirs)]
        assert all((one == other).all() for one, other in zip(*found, strict=True))


def test_strong_moves_most_cases_and_what_comes_in_from_outside_is_no_mask() -> None:
    noise, full = sample(3, 64)[0], np.full((64, 64), 255, np.uint8)
    augmentation, cases = Augmentation("strong", 2), range(100)
    moved = [(applied(augmentation, noise, noise, case=str(case))[1] != noise).any() for case in cases]
    assert 80 < sum(moved) < 98  # 1 - 0.5 * 0.3 * 0.7 of all
    ends = [applied(augmentation, full, full, case=str(case))[1] for case in cases]
    assert 50 < sum(end.min() == 0 for end in ends) < 80
    assert all(end[32, 32] == 255 for end in ends)


@pytest.mark.parametrize("name", ["affine", "distortion"])
def test_geometry_moves_image_and_mask_together_and_keeps_area_fractions(name: str) -> None:
    """A mask that is the image comes out as the image does, in between 0 and 255 where the image is."""
    edge = np.zeros((64, 64), np.uint8)
    edge[20:44, 16:40] = 255
    augmentation, fractions = Augmentation(IN_FULL[name], 0), 0
    for case in range(20):
        image, mask = applied(augmentation, edge, edge, case=str(case))
        assert np.abs(image.astype(int) - mask).max() <= 1
        fractions += bool(((mask > 0) & (mask < 255)).any())
    assert fractions > 10


def test_transforms_of_the_image_leave_the_mask_as_it_is() -> None:
    image, mask = sample(3, 32)
    augmentation = Augmentation((transform("GaussianBlur", p=1), transform("GaussNoise", p=1)), 0)
    found = applied(augmentation, image, mask)
    assert (found[0] != image).any()
    assert (found[1] == mask).all()


def test_a_recipe_in_code_may_choose_among_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    def either() -> list[A.BasicTransform]:
        return [A.OneOf([A.Rotate((-30, 30), p=1), A.InvertImg(p=1)], p=0.8)]

    monkeypatch.setitem(RECIPES, "either", Named("rotation or inversion", either))
    augmentation = Augmentation("either", 0)
    assert not augmentation.by_table
    assert in_words("either") == "rotation or inversion"
    image, mask = sample(5, 32)
    results = {applied(augmentation, image, mask, case=str(case))[0].tobytes() for case in range(20)}
    assert len(results) > 5
    assert (255 - image).tobytes() in results


def test_a_transform_that_changes_the_size_is_named_when_it_is_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "crop", Named("crop", lambda: [A.RandomCrop(16, 16, p=1)]))
    with pytest.raises(TrainingError, match=r"makes images of \(16, 16\) uint8 from \(32, 32\) uint8"):
        applied(Augmentation("crop", 0), *sample(1, 32))


def test_words_are_those_of_the_recipe_or_its_transforms() -> None:
    assert in_words("siim") == "siim (horizontal flip, brightness, contrast, gamma)"
    assert in_words(IN_FULL["affine"]) == "HorizontalFlip(), Affine(rotate=[-20, 20], scale=[0.8, 1.2], p=0.8)"
    with pytest.raises(SettingsError, match="unknown augmentation 'stron'"):
        in_words("stron")


def test_no_transform_of_a_table_draws_from_a_generator_that_is_not_keyed_to_the_case() -> None:
    augmentation = Augmentation("siim", 0)
    with pytest.raises(AssertionError, match="not seeded per case"):
        augmentation._transforms[0].random_generator.normal()
    assert isinstance(Augmentation(IN_FULL["affine"], 0).draw(epoch=0, case="a"), FullDraw)


def test_so_many_cases_get_a_part_of_another_and_the_part_depends_on_the_case_only() -> None:
    augmentation, names = Augmentation("siim", 3, mix=0.6), [str(number) for number in range(1000)]
    assert not augmentation.by_table, "on a GPU the samples of another case are not at hand"
    parts = {name: augmentation.part(epoch=2, case=name) for name in names}
    found = [part for part in parts.values() if part]
    assert 550 < len(found) < 650
    sides = [part for part in found if part.bottom - part.top == 1]
    assert 0.4 < len(sides) / len(found) < 0.6
    assert all(0.42 <= (part.right if part.left == 0 else part.left) <= 0.58 for part in sides)
    assert {part.left == 0 for part in sides} == {part.right == 1 for part in sides} == {True, False}
    for part in found:
        assert 0 <= part.case < 1
        assert 0 <= part.top < part.bottom <= 1
        assert 0 <= part.left < part.right <= 1
        assert part in sides or all(0.3 <= side <= 0.75 for side in (part.bottom - part.top, part.right - part.left))
    assert parts == {name: augmentation.part(epoch=2, case=name) for name in names[::-1]}
    assert parts != {name: augmentation.part(epoch=3, case=name) for name in names}
    assert parts != {name: augmentation.part(epoch=2, case=name, repeat=1) for name in names}
    assert not any(Augmentation("siim", 3).part(epoch=2, case=name) for name in names)
