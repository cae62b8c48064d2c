"""Named augmentation recipes: albumentations on one-channel uint8, drawn first and applied while copying.

Owns: the recipes and their randomness. Refuses: nothing (`config` checks the name). Called by: `dataset`, `on_device`.

The draws of a case depend on (seed, epoch, case) only: not on the batch, the worker or the order. For this all
transforms share one random.Random, which is seeded anew for each case; that takes microseconds, where building
generators anew (`Compose.set_random_seed`) takes longer than the transforms themselves.

A recipe is made of mirroring and of transforms that give each grey level another one, whatever stands around it. So a
case's draw is a flip and a table of 256 grey levels: the table is what albumentations makes of the levels 0..255, and
the image that comes out is albumentations' own, to the bit, for less than half of the time.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import NamedTuple

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks the network for newer versions

import albumentations as A
import cv2
import numpy as np
import stringzilla

from ptxdist.cache.store import Samples

_LEVELS = np.arange(256, dtype=np.uint8)[None]  # an image with each grey level once


class _NoGenerator:
    """Stands where a transform would find a NumPy generator: one that asks for it is not keyed to the case."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"an augmentation drew from NumPy's generator ({name}), which is not seeded per case")


def _siim() -> list[A.BasicTransform]:
    """Horizontal flip, random contrast, random brightness, random gamma, as Abedalla et al. 2020 name them."""
    return [
        A.HorizontalFlip(p=0.5),
        A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.5),
        A.RandomGamma(gamma_limit=(80, 120), p=0.5),
    ]


RECIPES: dict[str, Callable[[], list[A.BasicTransform]]] = {"none": list, "siim": _siim}


class Draw(NamedTuple):
    """What an augmentation does to one case.

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


class Augmentation:
    """One recipe, ready to draw from."""

    def __init__(self, recipe: str, seed: int) -> None:
        self._transforms = RECIPES[recipe]()
        self._random = random.Random()
        self._seed = seed
        for transform in self._transforms:
            transform.py_random, transform.random_generator = self._random, _NoGenerator()

    def draw(self, *, epoch: int, case: str, repeat: int = 0) -> Draw:
        """What happens to a case in an epoch. `repeat` counts how often the epoch has had this case already."""
        if not self._transforms:
            return Draw()
        self._random.seed(f"{self._seed} {epoch} {case} {repeat}")
        self._random.random()  # as A.Compose, which draws whether it does anything at all
        flip, levels = False, _LEVELS
        for transform in self._transforms:
            if not transform.should_apply():
                continue
            if isinstance(transform, A.HorizontalFlip):
                flip = not flip
                continue
            drawn = transform.get_params_dependent_on_data(transform.get_params(), {"image": levels})
            levels = transform.apply(levels, **drawn)
        return Draw(flip, None if levels is _LEVELS else levels[0])
