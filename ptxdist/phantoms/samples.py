"""Phantoms in memory, with the masks of given cases: what a network can learn from before it sees the cases.

The random numbers of a phantom depend only on (seed, its position), and not on the threads. They are not those of
`dataset`, so that a data set of phantoms is never trained on in this way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from ptxdist.cache.catalog import Case
from ptxdist.cache.render import fit_square, resize
from ptxdist.cache.store import SHARD_CASES, Samples, Store
from ptxdist.labels import rle
from ptxdist.phantoms import anatomy, greys
from ptxdist.phantoms.anatomy import SIZE_PX

_STREAM = 2  # of random numbers


def draw_samples(
    cases: Sequence[Case],
    count: int,
    size_px: int,
    *,
    seed: int,
    threads: int = 1,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> Store:
    """A store in memory of `count` phantoms; those at even positions have the masks of the positive `cases` in turn.

    At least one case is positive. Samples are as in the store of a cache, uint8 (size, size). `on_image` is called with
    (phantoms done, count). One phantom takes about 35 ms of a core, and 2 * size² bytes.
    """
    positives = [case for case in cases if case.masks]
    images, masks = (np.zeros((count, size_px, size_px), np.uint8) for _ in range(2))

    def draw(position: int) -> None:
        rng = np.random.default_rng((seed, position, _STREAM))
        mask = np.zeros((SIZE_PX, SIZE_PX), np.uint8)
        if is_positive(position):
            case = positives[position // 2 % len(positives)]
            square = fit_square(rle.decode(case.masks or (), case.rows, case.columns))
            mask = np.asarray(cv2.resize(square, (SIZE_PX, SIZE_PX), interpolation=cv2.INTER_NEAREST), np.uint8)
        chest = anatomy.pose(rng, "PA" if rng.random() < 0.6 else "AP")
        images[position] = resize(greys.draw_image(rng, chest, mask), size_px)
        masks[position] = resize(mask * np.uint8(255), size_px)

    with ThreadPoolExecutor(threads) as pool:
        for done, _ in enumerate(pool.map(draw, range(count)), start=1):
            on_image(done, count)
    return Store(Path("phantoms"), size_px, count, "phantoms", _shards(images), _shards(masks))


def is_positive(position: int) -> bool:
    """Whether the phantom at a position shows a pneumothorax."""
    return position % 2 == 0


def _shards(samples: Samples) -> tuple[Samples, ...]:
    return tuple(samples[start : start + SHARD_CASES] for start in range(0, len(samples), SHARD_CASES))
