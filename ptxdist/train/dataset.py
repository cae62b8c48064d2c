"""From a store and positions in it to batches, the same for any number of workers.

Owns: the order of the cases, their division among ranks, and what is prepared ahead. Batches are uint8 with one
channel; three channels and normalisation are made in the model, on the device.

Training: the epoch's order is cut into global batches; of each one, rank r takes the cases r, r + ranks, … A rank may
get none of a last, small batch. Validation: fixed blocks of cases, block b for rank b % ranks, so that a
forward pass sees the same cases together whatever the number of ranks; nothing is padded, no case is seen twice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ptxdist.cache.store import Samples, Store
from ptxdist.executor import ahead
from ptxdist.train.augment import Augmentation, Draw, FullDraw, Part
from ptxdist.train.on_device import OnDeviceStore, draws_as_tensors

VAL_BLOCK = 8
_PREPARED = 4  # batches in advance

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch: `image` and `mask` uint8 (B, 1, size, size), `index` int64 (B,) on the CPU.

    `mask` is the area fraction 0..255, `index` the position in the store, `global_size` the cases over all ranks.
    """

    image: Tensor
    mask: Tensor
    index: Tensor
    global_size: int


class Share(NamedTuple):
    """One rank's part of a global batch: positions, size of that batch, how often each has been in the epoch before."""

    indices: Indices
    global_size: int
    repeats: Indices


class _Drawn(NamedTuple):
    """What happens to a case; `mixed`: another case, what happens to it, and the part of it that is put in."""

    draw: Draw | FullDraw
    mixed: tuple[int, Draw | FullDraw, Part] | None


def epoch_order(
    indices: Indices,
    *,
    seed: int,
    epoch: int,
    positive: npt.NDArray[np.bool_] | None = None,
    positive_share: float | None = None,
) -> Indices:
    """The cases in the order of one epoch, as many as there are; depends on (seed, epoch) and the set of cases only.

    Without a `positive_share` it is a permutation. With one, `positive` (bool, one for each of `indices`) marks the
    positive cases. They are spread evenly over the epoch in that share, each drawn once before any is drawn again, and
    so are the negative cases. Where there is only one kind, the order is a permutation.
    """
    random = np.random.default_rng((seed, epoch))
    order = np.argsort(indices, kind="stable")
    if positive is None or positive_share is None or positive.all() or not positive.any():
        return random.permutation(indices[order])
    count, is_positive = len(indices), positive[order]
    wanted = min(count - 1, max(1, round(positive_share * count)))
    drawn = []
    for pool, times in ((indices[order][is_positive], wanted), (indices[order][~is_positive], count - wanted)):
        rounds = [random.permutation(pool) for _ in range(-(-times // len(pool)))]
        drawn.append(np.concatenate(rounds)[:times])
    return _spread(*drawn)


def positives_order(
    indices: Indices, *, seed: int, positive: npt.NDArray[np.bool_], positive_shares: Sequence[float]
) -> Indices:
    """The cases in the order of an epoch of each positive case once and negative cases up to a share.

    `positive_shares` are those of the epochs 1, 2, … up to this one, at least one; `positive` (bool, one for each of
    `indices`) marks the positive cases. No case occurs twice, so where there are too few negative cases, all occur.
    Over the epochs, each negative case occurs before any occurs again. The order depends on the seed, the shares and
    the set of cases only. Where there is only one kind, it is a permutation of all.
    """
    epoch, order = len(positive_shares), np.argsort(indices, kind="stable")
    if positive.all() or not positive.any():
        return epoch_order(indices, seed=seed, epoch=epoch)
    positives, negatives = indices[order][positive[order]], indices[order][~positive[order]]
    times = np.zeros(len(negatives), np.int64)
    for number, share in enumerate(positive_shares, start=1):
        random = np.random.default_rng((seed, number))
        wanted = min(len(negatives), round(len(positives) * (1 - share) / share))
        chosen = np.lexsort((random.permutation(len(negatives)), times))[:wanted]
        times[chosen] += 1
    return _spread(random.permutation(positives), random.permutation(negatives[chosen]))


def _spread(positives: Indices, negatives: Indices) -> Indices:
    """Both in one order, each in its own, the positive cases spread evenly."""
    count = len(positives) + len(negatives)
    places = np.diff(np.arange(count + 1) * len(positives) // count).astype(bool)
    result = np.empty(count, np.int64)
    result[places], result[~places] = positives, negatives
    return result


def training_shares(order: Indices, batch_size: int, rank: int, ranks: int) -> list[Share]:
    """Part of this rank in each global batch; the last batch may be smaller."""
    places = np.argsort(order, kind="stable")  # of one case after another, each in the order of its turns
    first = np.flatnonzero(np.diff(order[places], prepend=-1))  # where the next case begins among them
    repeats = np.empty(len(order), np.int64)
    repeats[places] = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
    starts = range(0, len(order), batch_size)
    parts = [(order[s : s + batch_size], repeats[s : s + batch_size]) for s in starts]
    return [Share(batch[rank::ranks], len(batch), before[rank::ranks]) for batch, before in parts]


def validation_shares(indices: Indices, rank: int, ranks: int) -> list[Share]:
    """Blocks of this rank, each with its size; over all ranks every case occurs exactly once."""
    blocks = [indices[start : start + VAL_BLOCK] for start in range(0, len(indices), VAL_BLOCK)]
    return [Share(block, len(block), np.zeros(len(block), np.int64)) for block in blocks[rank::ranks]]


def batches(
    store: Store,
    shares: Sequence[Share],
    *,
    augmentation: Augmentation | None = None,
    names: Sequence[str] = (),
    others: Indices | None = None,
    epoch: int = 0,
    device: torch.device | None = None,
) -> Iterator[Batch]:
    """The shares as batches, prepared ahead by one thread (gathering and augmenting release the GIL).

    `names` are the ids of the store's cases. They key the draws of an `augmentation`, so that a case keeps its draws
    when other cases are added or removed. `others` are the cases that it mixes in, in any order.
    Host buffers are pinned and copied asynchronously when `device` is a GPU. With an OnDeviceStore only positions and
    draws are prepared; the samples are taken on its device, and are the same. A recipe that is applied in full needs
    the samples in host memory, whatever the store. An error in the thread is raised by the iterator; the thread ends
    when the caller stops reading.
    """
    pin = device is not None and device.type == "cuda"
    # torch reuses page-locked memory when the copy to the GPU is done.
    pinned = partial(torch.empty, dtype=torch.uint8, pin_memory=True)
    allocate: Callable[..., Tensor] = pinned if pin else _Buffers()
    pool = np.sort(others) if others is not None else np.empty(0, np.int64)

    def draws(share: Share) -> list[_Drawn] | None:
        if augmentation is None:
            return None
        drawn = []
        for index, repeat in zip(share.indices.tolist(), share.repeats.tolist(), strict=True):
            name, mixed = names[index], None
            if part := augmentation.part(epoch=epoch, case=name, repeat=repeat):
                other = int(pool[int(part.case * len(pool))])
                draw = augmentation.draw(epoch=epoch, case=f"{names[other]} in {name}", repeat=repeat)
                mixed = (other, draw, part)
            drawn.append(_Drawn(augmentation.draw(epoch=epoch, case=name, repeat=repeat), mixed))
        return drawn

    def prepare(share: Share) -> Callable[[], Batch]:
        drawn = draws(share)
        if isinstance(store, OnDeviceStore) and (augmentation is None or augmentation.by_table):
            tables = None if drawn is None else [cast(Draw, item.draw) for item in drawn]
            return _on_device(store, share, tables, pin)
        return _on_host(store, share, drawn, allocate, device)

    with closing(ahead(prepare, shares, threads=1, most=_PREPARED)) as prepared:
        for finish in prepared:
            yield finish()


class _Buffers:
    """Host memory that is reused when no tensor refers to it: fresh pages cost more than copying into them."""

    def __init__(self) -> None:
        self._arrays: list[Samples] = []

    def __call__(self, *shape: int) -> Tensor:
        for array in self._arrays:
            # Tensors and views of an array refer to it; otherwise only the list, the loop and the call do.
            if array.shape == shape and sys.getrefcount(array) == 3:
                return torch.from_numpy(array)
        # torch's memory starts at a multiple of 64 bytes. Large arrays of numpy start 16 bytes past a page, and copying
        # whole pages of a mapped file to there takes five times as long on some processors.
        self._arrays.append(torch.empty(shape, dtype=torch.uint8).numpy())
        return torch.from_numpy(self._arrays[-1])


def _on_host(
    store: Store,
    share: Share,
    draws: Sequence[_Drawn] | None,
    allocate: Callable[..., Tensor],
    device: torch.device | None,
) -> Callable[[], Batch]:
    """Prepare a batch in host memory; the function it returns puts the batch on the device."""
    image, mask = (allocate(len(share.indices), 1, store.size_px, store.size_px) for _ in range(2))
    images: Samples = image.numpy()[:, 0]
    masks: Samples = mask.numpy()[:, 0]
    if draws is None:
        store.gather(share.indices, images, masks)
    else:
        for row, (index, (draw, mixed)) in enumerate(zip(share.indices.tolist(), draws, strict=True)):
            draw.write(*store.sample(index), images[row], masks[row])
            if mixed:
                other, other_draw, part = mixed
                sample = (np.empty_like(images[row]), np.empty_like(masks[row]))
                other_draw.write(*store.sample(other), *sample)
                for source, target in zip(sample, (images[row], masks[row]), strict=True):
                    part.copy(source, target)
    index = torch.from_numpy(share.indices)

    def finish() -> Batch:
        if device is None:
            return Batch(image, mask, index, share.global_size)
        pinned = image.is_pinned()
        there = [tensor.to(device, non_blocking=pinned) for tensor in (image, mask)]
        return Batch(there[0], there[1], index, share.global_size)

    return finish


def _on_device(store: OnDeviceStore, share: Share, draws: Sequence[Draw] | None, pin: bool) -> Callable[[], Batch]:
    """Prepare the positions and draws of a batch; the function it returns takes the samples."""
    index = torch.from_numpy(share.indices)
    host = [index, *(draws_as_tensors(draws) if draws is not None else ())]
    host = [tensor.pin_memory() for tensor in host] if pin else host

    def finish() -> Batch:
        there = [tensor.to(store.device_images.device, non_blocking=pin) for tensor in host]
        flips, tables = there[1:] or (None, None)
        return Batch(*store.take(there[0], flips, tables), index, share.global_size)

    return finish
