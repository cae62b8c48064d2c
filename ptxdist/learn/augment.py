"""Named augmentation recipes: albumentations on one-channel uint8.

Owns: the recipes and their randomness. Refuses: nothing (`config` checks the name). Called by: `dataset`.

The draws of a case depend on (seed, epoch, case) only: not on the batch, the worker or the order. For this all
transforms share one random.Random, which is seeded anew for each case; that takes microseconds, where building
generators anew (`Compose.set_random_seed`) takes longer than the transforms themselves.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks the network for newer versions

import albumentations as A

from ptxdist.data.store import Samples


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


class Augmentation:
    """One recipe, ready to apply."""

    def __init__(self, recipe: str, seed: int) -> None:
        self._transforms = RECIPES[recipe]()
        self._random = random.Random()
        self._seed = seed
        self._compose = A.Compose(self._transforms)
        for owner in (self._compose, *self._transforms):
            owner.py_random, owner.random_generator = self._random, _NoGenerator()

    def apply(self, image: Samples, mask: Samples, *, epoch: int, case: int) -> tuple[Samples, Samples]:
        """Augmented copies of image and mask, uint8 (size, size) each; the inputs stay as they are.

        With the recipe `none` the inputs themselves come back.
        """
        if not self._transforms:
            return image, mask
        self._random.seed(f"{self._seed} {epoch} {case}")
        result = self._compose(image=image, mask=mask)
        return result["image"], result["mask"]
