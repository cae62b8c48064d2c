"""Checks of the settings that name a loss, an encoder or an augmentation, before a training starts.

Refuses: names that are in none of the dicts LOSSES, ENCODERS and RECIPES, and recipes in pipeline files that cannot be
applied (SettingsError). Loads no torch unless the encoder is one of timm, and no albumentations unless there is such
a recipe.
"""

from __future__ import annotations

import difflib
import inspect
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from pydantic import ValidationError

from ptxdist.config import Settings, Transform, explain, nearest
from ptxdist.errors import SettingsError, reason
from ptxdist.train import augment, encoders, losses

_TRIALS = 3  # of a transform, each with other random numbers
_ABSTRACT = {"BasicTransform", "DualTransform", "ImageOnlyTransform", "Transform3D", "Lambda"}


def refuse_unknown(settings: Settings) -> None:
    """Raise SettingsError, with the place and the nearest names, for a choice that does not exist or does not work."""
    with _at("pipeline.model.encoder"):
        encoder = encoders.chosen(settings.pipeline.model)
        if encoder.check:
            for size_px in sorted({stage.size_px for stage in settings.pipeline.stages}):
                encoder.check(size_px)
    for number, stage in enumerate(settings.pipeline.stages, start=1):
        place = f"pipeline.stages.{number}"
        with _at(f"{place}.loss"):
            if losses.chosen(stage).whole is not None and settings.train.micro_batch is not None:
                way = 'dice = "image"' if stage.dice == "batch" else "another loss"
                raise SettingsError(
                    f"'{stage.loss}' is a loss of whole batches, and train.micro_batch divides them; use {way} or no "
                    "micro_batch"
                )
        if isinstance(stage.augmentation, str):
            with _at(f"{place}.augmentation"):
                augment.named(stage.augmentation)
        else:
            for position, transform in enumerate(stage.augmentation, start=1):
                with _at(f"{place}.augmentation.{position}"):
                    _check(transform, stage.size_px)


def _check(transform: Transform, size_px: int) -> None:
    """Make the transform and apply it to an image of this size; SettingsError when that does not work."""
    A, name = augment.load_albumentations(), transform.transform  # noqa: N806
    known = {key: value for key, value in vars(A).items() if inspect.isclass(value) and key not in _ABSTRACT}
    known = {key: value for key, value in known.items() if issubclass(value, A.BasicTransform)}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise SettingsError(
            f"albumentations has no transform '{name}'" + (f" (did you mean {' or '.join(near)}?)" if near else "")
        )
    valid = [*inspect.signature(known[name].__init__).parameters][1:]
    if unknown := [key for key in transform.arguments if key not in valid]:
        raise SettingsError(f"{name} has no argument '{unknown[0]}'{nearest(unknown[0], valid)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transforms that have a newer name
        try:
            made = augment.make_transform(transform)
        except (ValueError, TypeError) as error:
            cause = error.__cause__
            raise SettingsError(explain(cause, (), name) if isinstance(cause, ValidationError) else f"{name}: {error}")  # noqa: B904
        for trial in range(_TRIALS):
            _try(made, name, size_px, trial)


def _try(transform: Any, name: str, size_px: int, seed: int) -> None:
    """Apply the transform to noise, with a mask of a rectangle."""
    generator = np.random.default_rng(seed)
    image, mask = generator.integers(0, 256, (size_px, size_px), np.uint8), np.zeros((size_px, size_px), np.uint8)
    mask[size_px // 4 : size_px // 2, size_px // 4 : size_px // 2] = 255
    transform.set_random_state(generator, random.Random(seed))
    try:
        result = transform(image=image, mask=mask, force_apply=True)
    except Exception as error:
        raise SettingsError(
            f"{name} cannot be applied to a grey image of {size_px} pixels and its mask: {reason(error)}"
        ) from error
    for part in ("image", "mask"):
        found = result[part]
        if getattr(found, "shape", None) != image.shape or found.dtype != image.dtype:
            raise SettingsError(
                f"{name} makes of an {part} of {size_px} x {size_px} pixels in uint8 one of "
                f"{' x '.join(map(str, found.shape))} in {found.dtype}; a transform must not change size or type"
            )


@contextmanager
def _at(place: str) -> Iterator[None]:
    try:
        yield
    except SettingsError as error:
        raise SettingsError(f"{place}: {error}") from error
