"""Store + indices -> batches, the same for any number of workers.

Owns: the order of the cases, their division among ranks, and the prefetching thread. Refuses: nothing. Called by:
`loop`, `evaluate`. What leaves this module is uint8 with one channel; three channels and normalisation belong to the
model, on the device.

Training: the epoch's permutation is cut into global batches; of each one, rank r takes the cases r, r + ranks, … A
rank may get none of a last, small batch. Validation: fixed blocks of cases, block b for rank b % ranks, so that a
forward pass sees the same cases together whatever the number of ranks; nothing is padded, no case is seen twice.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ptxdist.data.store import Samples, Store
from ptxdist.learn.augment import Augmentation

VAL_BLOCK = 8
_PREFETCHED = 3

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


def epoch_order(indices: Indices, *, seed: int, epoch: int) -> Indices:
    """The cases in the order of one epoch; depends on (seed, epoch) and the set of cases only."""
    return np.random.default_rng((seed, epoch)).permutation(np.sort(indices))


def training_shares(order: Indices, batch_size: int, rank: int, ranks: int) -> list[tuple[Indices, int]]:
    """Cases of this rank in each global batch, and the size of that batch; the last batch may be smaller."""
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [(batch[rank::ranks], len(batch)) for batch in batches]


def validation_shares(indices: Indices, rank: int, ranks: int, block: int = VAL_BLOCK) -> list[tuple[Indices, int]]:
    """Blocks of this rank, each with its size; over all ranks every case is there exactly once."""
    blocks = [indices[start : start + block] for start in range(0, len(indices), block)]
    return [(block, len(block)) for block in blocks[rank::ranks]]


def batches(
    store: Store,
    shares: Sequence[tuple[Indices, int]],
    *,
    augmentation: Augmentation | None = None,
    epoch: int = 0,
    device: torch.device | None = None,
) -> Iterator[Batch]:
    """The shares as batches, prepared ahead by one thread (gathering and augmenting release the GIL).

    Host buffers are pinned and copied asynchronously when `device` is a GPU. An error in the thread is raised here; the
    thread ends when the caller stops reading.
    """
    pin = device is not None and device.type == "cuda"
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=_PREFETCHED)
    stopped = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def prepare() -> None:
        try:
            for indices, global_size in shares:
                if stopped.is_set():
                    return
                put(_prepare(store, indices, global_size, augmentation, epoch, pin))
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=prepare, name="ptxdist-batches", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if device is None:
                yield item
            else:
                image, mask = (tensor.to(device, non_blocking=pin) for tensor in (item.image, item.mask))
                yield Batch(image, mask, item.index, item.global_size)
    finally:
        stopped.set()
        thread.join()


def _prepare(
    store: Store, indices: Indices, global_size: int, augmentation: Augmentation | None, epoch: int, pin: bool
) -> Batch:
    shape = (len(indices), 1, store.size_px, store.size_px)
    image, mask = (torch.empty(shape, dtype=torch.uint8, pin_memory=pin) for _ in range(2))
    images: Samples = image.numpy()[:, 0]
    masks: Samples = mask.numpy()[:, 0]
    if augmentation is None:
        store.gather(indices, images, masks)
    else:
        for row, index in enumerate(indices):
            images[row], masks[row] = augmentation.apply(*store.sample(int(index)), epoch=epoch, case=int(index))
    return Batch(image, mask, torch.from_numpy(np.asarray(indices, np.int64)), global_size)
