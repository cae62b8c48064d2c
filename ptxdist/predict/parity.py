"""Comparison of an exported network with its checkpoint, on real images where there are some.

Owns: which images are compared, and how large a difference of probabilities is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ptxdist.cache.catalog import read_catalog
from ptxdist.cache.render import resize
from ptxdist.cache.split import split_indices
from ptxdist.cache.store import open_store
from ptxdist.dicom.pixels import Pixels
from ptxdist.errors import PtxdistError
from ptxdist.executor import OnProgress
from ptxdist.phantoms import anatomy, greys
from ptxdist.predict.predictor import Predictor
from ptxdist.rundir import read_settings
from ptxdist.storage.caches import local_cache
from ptxdist.train.losses import heads

LIMIT = 1e-4  # of a probability; operating points are searched in steps of 0.005
BATCHES = (1, 3, 4)  # batch sizes that are compared: the smallest, an odd one, the one that was traced
_IMAGES = sum(BATCHES)
_PLAIN_LOGITS = 100  # up to which `LIMIT` holds; above it rounding shows, and the limit grows with the logits
_MOST_ROUNDING = 100  # times `LIMIT` at most, whatever the logits

# (B, 1, size, size) -> probabilities of the same shape, and with an image head the scores (B,)
Run = Callable[[npt.NDArray[np.uint8]], tuple[npt.NDArray[np.float32], ...]]


def comparison_images(
    model: Path, size_px: int, *, on_progress: OnProgress = lambda what, done, total: None
) -> tuple[list[Pixels], str]:
    """Images uint8 (size, size) to compare on, and what they are, in words.

    They are held-out images of the run's cache, some positive and some negative. A cache in an object store is copied
    to this node first. Without such images (a bundle, a cache that is gone), they are phantoms, and the words say why.
    """
    reason = "a bundle has no images"
    if model.is_dir():
        try:
            images = _held_out_images(model, size_px, on_progress)
        except PtxdistError as error:
            reason = f"the run's cache cannot be read: {error}"
        else:
            if images:
                return images, "held-out images of the run's cache"
            reason = "the run's cache has no held-out images"
    return [resize(image, size_px) for image in _phantoms(_IMAGES)], f"phantoms ({reason})"


def _held_out_images(run: Path, size_px: int, on_progress: OnProgress) -> list[Pixels]:
    settings = read_settings(run)
    cache = local_cache(settings.data.cache, [size_px], data=settings.data, on_progress=on_progress)
    cases = read_catalog(cache).labelled
    _, held_out = split_indices(cases, settings.pipeline.fold)
    store = open_store(cache, size_px)
    rows = sorted(held_out.tolist(), key=lambda row: not cases[row].masks)  # positive ones first
    half = _IMAGES // 2
    return [np.array(store.sample(row)[0]) for row in rows[:half] + rows[half:][::-1][:half]]


def _phantoms(number: int) -> Iterator[Pixels]:
    for index in range(number):
        rng = np.random.default_rng((0, index))
        chest = anatomy.pose(rng, "PA")
        union = np.maximum.reduce(anatomy.draw_masks(rng, chest))
        yield greys.draw_image(rng, chest, union)


@torch.no_grad()
def largest_difference(
    predictor: Predictor,
    run: Run,
    images: Sequence[Pixels],
    *,
    on_progress: OnProgress = lambda what, done, total: None,
) -> float:
    """Largest difference of any probability or score between `predictor` and `run`, over batches of several sizes.

    `images` uint8 (size, size), at least one; they are repeated where there are too few. NaN if a probability is NaN.
    """
    found, first = 0.0, 0
    for size in BATCHES:
        batch = np.stack([images[number % len(images)] for number in range(first, first + size)])
        first += size
        probability, score = predictor.probabilities(list(batch), batch.shape[-1], fewest=1)
        expected = (probability[:, None], score) if predictor.image_head else (probability[:, None],)
        for part, wanted in zip(run(batch[:, None]), expected, strict=True):
            found = float(np.maximum(found, np.abs(part - wanted.numpy()).max()))  # keeps NaN
        on_progress("comparison with the checkpoint", first, sum(BATCHES))
    return found


@torch.no_grad()
def allowed_difference(predictor: Predictor, images: Sequence[Pixels]) -> float:
    """How much rounding may change a probability: LIMIT, or more for a network with logits of hundreds and thousands.

    Logits of a trained network stay within tens. After an epoch or two they may not, and then even the checkpoint's
    own fp32 differs by about 1e-7 of the largest logit from exact arithmetic.
    """
    outputs = [heads(predictor.models[0](torch.from_numpy(image[None, None].copy()))) for image in images]
    largest = max(float(part.abs().amax()) for output in outputs for part in output if part is not None)
    return LIMIT * min(max(1.0, largest / _PLAIN_LOGITS), _MOST_ROUNDING)
