"""Recipes of augmentation: lists of albumentations' transforms, applied to images and masks of one channel in uint8.

Owns: RECIPES, and the randomness of each case. To add a recipe, write a function and add a line to RECIPES; a list of
transforms in a pipeline file is a recipe too (`train.choices` checks it). A recipe is applied in one of two ways, and
both give what `A.Compose` gives:

- **By table**, if it consists of horizontal flips and of transforms that map each grey level to another one, whatever
  surrounds it. What happens to a case is then a flip and a table of 256 grey levels, which albumentations makes from
  the levels 0..255. That takes less than half of the time, and works on a GPU too.
- **In full**, for all other recipes: albumentations transforms image and mask together. Masks are area fractions 0..255
  and not labels, so they are interpolated linearly, whatever `mask_interpolation` a transform has.

The randomness of a case depends on (seed, epoch, case, repeat) only: not on the batch, the process or the order. All
transforms of a recipe share one random.Random, which is seeded for each case, and in full also one NumPy generator.
(`Compose.set_random_seed` makes generators for each transform, which takes longer than the transforms.)

albumentations is imported in functions only, so that a report can name a recipe without loading it.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import stringzilla

from ptxdist.config import Recipe, Transform, nearest
from ptxdist.errors import SettingsError, TrainingError

if TYPE_CHECKING:
    import albumentations as A

    from ptxdist.cache.store import Samples

_LEVELS = np.arange(256, dtype=np.uint8)[None]  # an image with each grey level once


def load_albumentations() -> ModuleType:
    """The package, imported without its question to the network whether there is a newer version."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    return importlib.import_module("albumentations")


def _siim() -> list[A.BasicTransform]:
    """Horizontal flip, random contrast, random brightness, random gamma, as Abedalla et al. 2020 name them."""
    A = load_albumentations()  # noqa: N806
    return [
        A.HorizontalFlip(p=0.5),
        A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.5),
        A.RandomGamma(gamma_limit=(80, 120), p=0.5),
    ]


def _strong() -> list[A.BasicTransform]:
    """Shift, scale and rotation, a bent grid, and `siim`: geometry as in the winning entries of the challenge.

    They use an elastic transform too, which takes ten times as long as the grid. What comes in from outside is 0, as
    the padding of images that are not square. Grey levels change last, so both kinds of padding stay alike.
    """
    A = load_albumentations()  # noqa: N806
    return [
        A.Affine(translate_percent=(-0.1, 0.1), scale=(0.8, 1.2), keep_ratio=True, rotate=(-20, 20), p=0.7),
        A.GridDistortion(num_steps=5, distort_limit=(-0.2, 0.2), p=0.3),
        *_siim(),
    ]


@dataclass(frozen=True)
class Named:
    """A recipe that has a name: the `words` for reports, and a function that makes its transforms."""

    words: str
    make: Callable[[], list[A.BasicTransform]]


RECIPES = {
    "none": Named("none", list),
    "siim": Named("siim (horizontal flip, brightness, contrast, gamma)", _siim),
    "strong": Named(
        "strong (shift, scale, rotation, grid distortion, horizontal flip, brightness, contrast, gamma)", _strong
    ),
}


def in_words(recipe: Recipe) -> str:
    """The recipe in words: those of its name, or its transforms with their arguments."""
    return named(recipe).words if isinstance(recipe, str) else ", ".join(map(_words, recipe))


def _words(transform: Transform) -> str:
    arguments = ", ".join(f"{name}={value}" for name, value in transform.arguments.items())
    return f"{transform.transform}({arguments})"


def named(recipe: str) -> Named:
    """The recipe of this name; SettingsError with the nearest name when there is none."""
    if recipe not in RECIPES:
        raise SettingsError(f"unknown augmentation '{recipe}'{nearest(recipe, RECIPES)}")
    return RECIPES[recipe]


def make(recipe: Recipe) -> list[A.BasicTransform]:
    """The transforms of a recipe, which `train.choices` has checked."""
    return named(recipe).make() if isinstance(recipe, str) else [make_transform(transform) for transform in recipe]


def make_transform(transform: Transform) -> A.BasicTransform:
    """A transform of a pipeline file. ValueError for wrong arguments, among them unknown ones."""
    kind = getattr(load_albumentations(), transform.transform)
    arguments = {name: _frozen(value) for name, value in transform.arguments.items()}
    if "InitSchema" in vars(kind) or "__init__" not in vars(kind):  # the others pass it on to one that checks
        arguments["strict"] = True  # or arguments that cannot be checked are replaced by the defaults, with a warning
    result: A.BasicTransform = kind(**arguments)
    return result


def _frozen(value: object) -> object:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


class Draw(NamedTuple):
    """What a recipe that is applied by table does to one case.

    `flip`: image and mask are mirrored, left to right. `table`: uint8 (256,), the grey level that each one of the image
    becomes; None where all stay as they are.
    """

    flip: bool = False
    table: Samples | None = None

    def write(self, image: Samples, mask: Samples, image_out: Samples, mask_out: Samples) -> None:
        """Copy image and mask, uint8 (size, size) each, into the last two, augmented. Those are contiguous."""
        if self.flip:
            cv2.flip(image, 1, image_out)
            cv2.flip(mask, 1, mask_out)
        else:
            image_out[:], mask_out[:] = image, mask
        if self.table is not None:
            stringzilla.translate(image_out.data, self.table.data, inplace=True)  # as albumentations does


class FullDraw(NamedTuple):
    """What a recipe that is applied in full does to one case: the transforms, and what they are seeded with."""

    transforms: A.Compose
    seed: str

    def write(self, image: Samples, mask: Samples, image_out: Samples, mask_out: Samples) -> None:
        """As `Draw.write`; TrainingError when the transforms change shape or dtype."""
        generator = random.Random(self.seed)
        numpy_seed = hashlib.sha256(self.seed.encode()).digest()[:16]
        self.transforms.set_random_state(np.random.default_rng(int.from_bytes(numpy_seed)), generator)
        result = self.transforms(image=image.copy(), mask=mask.copy())  # a sample is read-only
        for name, out in (("image", image_out), ("mask", mask_out)):
            if result[name].shape != out.shape or result[name].dtype != out.dtype:
                raise TrainingError(
                    f"the augmentation makes {name}s of {result[name].shape} {result[name].dtype} from {out.shape} "
                    f"{out.dtype}; leave out the transform that changes size or type"
                )
            out[:] = result[name]


class Part(NamedTuple):
    """The part of an image and its mask that another case fills: `case` chooses that one, the others are its edges.

    All are fractions, `case` of the number of cases to choose from, the edges of the side of the image.
    """

    case: float
    top: float
    bottom: float
    left: float
    right: float

    def copy(self, source: Samples, target: Samples) -> None:
        """Copy this part of one image, (size, size), to another."""
        size = len(source)
        top, bottom, left, right = (round(edge * size) for edge in self[1:])
        target[top:bottom, left:right] = source[top:bottom, left:right]


class Augmentation:
    """One recipe with a seed. `by_table` is the way in which it is applied.

    With `mix`, so many of the cases get a part of another case, after both have been augmented: half of them a box with
    sides of 0.3 to 0.75 of the image (CutMix, Yun et al. 2019), the others one side of the chest.
    """

    def __init__(self, recipe: Recipe, seed: int, mix: float = 0.0) -> None:
        self._transforms = make(recipe)
        self._seed, self._mix = seed, mix
        self.by_table = not mix and all(map(_maps_levels, self._transforms))
        if self.by_table:
            self._random = random.Random()
            for transform in self._transforms:
                transform.py_random, transform.random_generator = self._random, _NoGenerator()
        else:
            self._compose = load_albumentations().Compose(self._transforms, mask_interpolation=cv2.INTER_LINEAR)

    def draw(self, *, epoch: int, case: str, repeat: int = 0) -> Draw | FullDraw:
        """What happens to a case in an epoch. `repeat` counts how often the epoch has had this case already."""
        seed = f"{self._seed} {epoch} {case} {repeat}"
        return self._draw_table(seed) if self.by_table else FullDraw(self._compose, seed)

    def part(self, *, epoch: int, case: str, repeat: int = 0) -> Part | None:
        """Which part of another case a case gets in an epoch; None for those that stay as they are."""
        generator = random.Random(f"{self._seed} {epoch} {case} {repeat} mix")
        if generator.random() >= self._mix:
            return None
        other = generator.random()
        if generator.random() < 0.5:
            middle = generator.uniform(0.42, 0.58)
            return Part(other, 0, 1, *((0, middle) if generator.random() < 0.5 else (middle, 1)))
        height, width = generator.uniform(0.3, 0.75), generator.uniform(0.3, 0.75)
        top, left = generator.uniform(0, 1 - height), generator.uniform(0, 1 - width)
        return Part(other, top, top + height, left, left + width)

    def _draw_table(self, seed: str) -> Draw:
        if not self._transforms:
            return Draw()
        self._random.seed(seed)
        self._random.random()  # as A.Compose, which draws whether it does anything at all
        flip, levels = False, _LEVELS
        for transform in self._transforms:
            if not transform.should_apply():
                continue
            if type(transform).__name__ == "HorizontalFlip":
                flip = not flip
                continue
            drawn = transform.get_params_dependent_on_data(transform.get_params(), {"image": levels})
            levels = transform.apply(levels, **drawn)
        return Draw(flip, None if levels is _LEVELS else levels[0])


def _maps_levels(transform: A.BasicTransform) -> bool:
    """Whether a flip and a table can replace the transform.

    Such transforms are listed and not tried out: one that looks at other pixels only sometimes would pass a trial.
    """
    A = load_albumentations()  # noqa: N806
    if type(transform) is A.RandomBrightnessContrast:  # otherwise it looks at the mean or the extremes of the image
        return transform.brightness_by_max and not transform.ensure_safe_range
    return type(transform) in (A.HorizontalFlip, A.RandomGamma, A.InvertImg, A.Solarize, A.Posterize)


class _NoGenerator:
    """Takes the place of the NumPy generator where none is seeded for the case: to draw from it is an error."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"an augmentation drew from NumPy's generator ({name}), which is not seeded per case")
