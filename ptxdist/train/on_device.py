"""The whole data set in the memory of the device, where batches are gathered and augmented.

Owns: when a store is copied there, and how draws are applied there, to the same bytes as on the CPU. Refuses: a store
that does not fit (TrainingError). Each rank holds all cases, since any case may be in batches of any rank: 1.6 GB at
256 pixels and 6.3 GB at 512 pixels for the 12,047 images of the challenge and their masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ptxdist.cache.store import Store
from ptxdist.errors import TrainingError
from ptxdist.executor import OnCount
from ptxdist.train.augment import Draw

_SHARE_OF_FREE = 0.25  # of the GPU's free memory; the rest is the network's

Choice = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class OnDeviceStore(Store):
    """A store with a copy on a device: `device_images` and `device_masks`, uint8 (cases, size, size)."""

    device_images: Tensor
    device_masks: Tensor

    def take(self, indices: Tensor, flips: Tensor | None, tables: Tensor | None) -> tuple[Tensor, Tensor]:
        """Images and masks, uint8 (B, 1, size, size) on the device, of the positions `indices`, int64 (B,) there.

        `flips`, bool (B,), and `tables`, uint8 (B, 256), also on the device, are made by `draws_as_tensors`; None
        leaves the samples as they are. B = 0 gives empty tensors.
        """
        image, mask = (samples.index_select(0, indices) for samples in (self.device_images, self.device_masks))
        if flips is not None and tables is not None:
            mirrored = flips[:, None, None]
            image, mask = (torch.where(mirrored, samples.flip(-1), samples) for samples in (image, mask))
            image = tables.gather(1, image.flatten(1).long()).view_as(image)
        return image[:, None], mask[:, None]


def draws_as_tensors(draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """Draws of B cases for `OnDeviceStore.take`: bool (B,) and uint8 (B, 256), on the CPU."""
    tables = np.tile(np.arange(256, dtype=np.uint8), (len(draws), 1))
    for row, draw in enumerate(draws):
        if draw.table is not None:
            tables[row] = draw.table
    return torch.tensor([draw.flip for draw in draws], dtype=torch.bool), torch.from_numpy(tables)


def hold(store: Store, device: torch.device, choice: Choice, on_images: OnCount = lambda done, total: None) -> Store:
    """The store, with a copy on the device if `choice` is `on`, or `auto` and it takes at most a quarter of the free
    memory of a GPU. On a CPU `on` copies it into memory, which only tests use.

    Raises TrainingError when the choice is `on` and the store is larger than the free memory.
    """
    needed = 2 * store.cases * store.size_px**2
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    if choice == "off" or (choice == "auto" and (free is None or needed > _SHARE_OF_FREE * free)):
        return store
    if free is not None and needed > free:
        raise TrainingError(
            f"the store of {store.size_px} pixels takes {needed / 1e9:.1f} GB and the GPU has {free / 1e9:.1f} GB "
            "free; use train.data_on_device = 'auto' or 'off'"
        )
    image, mask = (
        torch.empty((store.cases, store.size_px, store.size_px), dtype=torch.uint8, device=device) for _ in range(2)
    )
    done = 0
    for shards, target in ((store.images, image), (store.masks, mask)):
        start = 0
        for shard in shards:
            target[start : start + len(shard)] = torch.from_numpy(np.array(shard))  # a copy: mapped files are read-only
            start += len(shard)
            done += len(shard)
            on_images(done // 2, store.cases)
    return OnDeviceStore(
        **{field.name: getattr(store, field.name) for field in fields(Store)}, device_images=image, device_masks=mask
    )
