"""Shuffled batches: the mapped store and the loader beside what people use instead, and beside memory.

    python tests/benchmarks/bench_reading.py [--size 256] [--size 512] [--seconds 0.5] [--rounds 3] [--save reading]

Pairs/s of image and mask, uint8, noise, in the page cache; 256 px in batches of 40, 512 px in batches of 14.

memory copy         as many bytes copied from one array in RAM to another: the limit
memory gather       np.take from arrays in RAM
ours: gather        the mapped store, into two buffers
ours: loader        the thread that prefetches, no augmentation
ours: augmented     the same with the recipe `siim`: drawn as flip and table, applied while copying
ours: strong        the same with the recipe `strong`: albumentations moves and bends image and mask
ours: Compose       what `ours: augmented` was before: albumentations' Compose on each pair, in the same thread
zarr                zarr-python, oindex of the same store
tensorstore         the same store, one gather a batch
litdata, streaming  litdata's and MosaicML's StreamingDataset, sample by sample, from files of their own formats
DataLoader          PyTorch's with two worker processes over np.memmap, no augmentation, batches of uint8
DataLoader, usual   the same with the usual recipe: three channels, albumentations, Normalize, ToTensorV2

All but the last two, which have two processes beside the reader, work in one thread (tensorstore in its pool, OpenCV is
given one); all of ours have one thread beside the reader. litdata and mosaicml-streaming are no dependencies of
ptxdist: a way whose package is missing is left out and named. Ways take turns; the first round is dropped.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import tensorstore
import torch
import zarr
from measuring import header, in_turn, per_second, publish, table
from torch.utils.data import DataLoader, Dataset

from ptxdist.cache.store import (
    ARRAYS,
    SHARD_CASES,
    Store,
    map_shard,
    pending,
    shard_count,
    shard_path,
    shard_writer,
    store_path,
    write_metadata,
)
from ptxdist.train.augment import Augmentation, make
from ptxdist.train.dataset import batches, epoch_order, training_shares

BATCH = {256: 40, 512: 14}
CASES = {256: 1024, 512: 512}
PACKAGES = "ptxdist numpy zarr torch albumentations opencv-python-headless stringzilla tensorstore litdata"

Step = Callable[[], int]  # reads one batch and says how many pairs it had


def make_store(folder: Path, size_px: int, cases: int) -> Store:
    """A store of noise."""
    path = store_path(folder, size_px)
    random = np.random.default_rng(0)
    for shard in range(shard_count(cases)):
        for name in ARRAYS:
            file = shard_path(path, name, shard)
            with shard_writer(file, SHARD_CASES, size_px) as writer:
                for row in range(SHARD_CASES):
                    writer.put(row, random.integers(0, 256, (size_px, size_px), dtype=np.uint8))
            pending(file).replace(file)
    write_metadata(path, size_px, {"case_id": np.arange(cases).astype(str)})
    arrays = [
        tuple(map_shard(shard_path(path, name, n), SHARD_CASES, size_px)[0] for n in range(shard_count(cases)))
        for name in ARRAYS
    ]
    return Store(path, size_px, cases, "", *arrays)


def orders(cases: int, batch: int) -> Iterator[np.ndarray]:
    """Whole shuffled batches of indices, epoch after epoch."""
    for epoch in itertools.count():
        order = epoch_order(np.arange(cases), seed=0, epoch=epoch)
        yield from (order[start : start + batch] for start in range(0, cases - batch + 1, batch))


def buffers(store: Store, batch: int) -> list[np.ndarray]:
    """Two arrays for a batch, aligned as torch's are: numpy's own alignment makes copying of mapped files slow."""
    return [torch.empty((batch, store.size_px, store.size_px), dtype=torch.uint8).numpy() for _ in range(2)]


class MappedSamples(Dataset[Any]):
    """What a user writes: two memory-mapped arrays, and a transform for each sample."""

    def __init__(self, folder: Path, transform: A.Compose | None) -> None:
        self.arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.arrays[0])

    def __getitem__(self, index: int) -> Any:
        image, mask = (np.array(array[index]) for array in self.arrays)
        if self.transform is None:
            return image, mask
        result = self.transform(image=np.repeat(image[..., None], 3, axis=2), mask=mask)
        return result["image"], result["mask"]


def usual_recipe() -> A.Compose:
    """The recipe `siim` as it is usually written: three channels, normalised on the CPU."""
    return A.Compose([*make("siim"), A.Normalize(), A.ToTensorV2()])


class ByCompose:
    """The recipe applied by albumentations' Compose: the draws and pixels of `Augmentation`, in more time."""

    def __init__(self, seed: int) -> None:
        augmentation = Augmentation("siim", seed)
        self._random, self._seed = augmentation._random, seed
        self._compose = A.Compose(augmentation._transforms)
        self._compose.py_random = self._random

    def write(
        self, case: str, image: np.ndarray, mask: np.ndarray, image_out: np.ndarray, mask_out: np.ndarray
    ) -> None:
        self._random.seed(f"{self._seed} 0 {case} 0")
        result = self._compose(image=image, mask=mask)
        image_out[:], mask_out[:] = result["image"], result["mask"]


# --- the ways: each returns a step ---------------------------------------------------------------------------------


def ours(store: Store, batch: int, kind: str) -> Step:
    names = [f"1.2.826.0.1.{number}" for number in range(store.cases)]
    image, mask = buffers(store, batch)
    indices = orders(store.cases, batch)
    if kind == "gather":

        def gather() -> int:
            store.gather(next(indices), image, mask)
            return batch

        return gather
    if kind == "Compose":
        compose = ByCompose(0)

        def augment() -> int:
            for row, index in enumerate(next(indices).tolist()):
                compose.write(names[index], *store.sample(index), image[row], mask[row])
            return batch

        return augment
    recipes = {"augmented": "siim", "strong": "strong"}
    augmentation = Augmentation(recipes[kind], 0) if kind in recipes else None

    def endless() -> Iterator[int]:
        for epoch in itertools.count():
            shares = training_shares(epoch_order(np.arange(store.cases), seed=0, epoch=epoch), batch, 0, 1)
            for item in batches(store, shares, augmentation=augmentation, names=names, epoch=epoch):
                yield len(item.image)

    return partial(next, endless())


def from_memory(store: Store, batch: int, kind: str) -> Step:
    arrays = [np.concatenate(shards) for shards in (store.images, store.masks)]
    outs = buffers(store, batch)
    indices = orders(store.cases, batch)

    def step() -> int:
        chosen = next(indices)
        for array, out in zip(arrays, outs, strict=True):
            if kind == "copy":
                start = min(int(chosen[0]), store.cases - batch)
                out[:] = array[start : start + batch]
            else:
                np.take(array, chosen, axis=0, out=out)
        return batch

    return step


def by_zarr(store: Store, batch: int) -> Step:
    group, indices = zarr.open_group(store.path, mode="r"), orders(store.cases, batch)

    def step() -> int:
        chosen = np.sort(next(indices))
        return min(len(group[name].oindex[chosen]) for name in ARRAYS)

    return step


def by_tensorstore(store: Store, batch: int) -> Step:
    arrays = [
        tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store.path / name)}}, read=True
        ).result()
        for name in ARRAYS
    ]
    indices = orders(store.cases, batch)

    def step() -> int:
        chosen = next(indices)
        return min(len(read.result()) for read in [array[chosen].read() for array in arrays])

    return step


def by_litdata(store: Store, batch: int, folder: Path) -> Step:
    from litdata import StreamingDataset
    from litdata.streaming.cache import Cache

    target = folder / "litdata"
    target.mkdir()
    cache = Cache(str(target), chunk_bytes="64MB")
    for index in range(store.cases):
        cache[index] = dict(zip(ARRAYS, (np.array(sample) for sample in store.sample(index)), strict=True))
    cache.done()
    cache.merge()
    return sample_by_sample(StreamingDataset(str(target), shuffle=False), store, batch)


def by_streaming(store: Store, batch: int, folder: Path) -> Step:
    from streaming import MDSWriter, StreamingDataset

    target = folder / "streaming"
    kind = f"ndarray:uint8:{store.size_px},{store.size_px}"
    with MDSWriter(out=str(target), columns=dict.fromkeys(ARRAYS, kind)) as writer:
        for index in range(store.cases):
            writer.write(dict(zip(ARRAYS, map(np.array, store.sample(index)), strict=True)))
    return sample_by_sample(StreamingDataset(local=str(target), batch_size=batch, shuffle=False), store, batch)


def sample_by_sample(dataset: Any, store: Store, batch: int) -> Step:
    image, mask = buffers(store, batch)
    indices = orders(store.cases, batch)

    def step() -> int:
        for row, index in enumerate(next(indices).tolist()):
            sample = dataset[index]
            image[row], mask[row] = sample["image"], sample["mask"]
        return batch

    return step


def by_dataloader(store: Store, batch: int, folder: Path, transform: A.Compose | None) -> Step:
    for name, shards in zip(ARRAYS, (store.images, store.masks), strict=True):
        np.save(folder / f"{name}.npy", np.concatenate(shards))
    loader = DataLoader(
        MappedSamples(folder, transform), batch, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )
    endless = (len(image) for _ in itertools.count() for image, _ in loader)
    return partial(next, endless)


def run(size_px: int, seconds: float, rounds: int, only: tuple[str, ...] = ()) -> dict[str, dict[str, float]]:
    """Pairs/s of each way: min, median, max over the rounds."""
    batch, cases = BATCH[size_px], CASES[size_px]
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = make_store(folder, size_px, cases)
        makers: dict[str, Callable[[], Step]] = {
            "memory copy": lambda: from_memory(store, batch, "copy"),
            "memory gather": lambda: from_memory(store, batch, "take"),
            **{
                f"ours: {kind}": partial(ours, store, batch, kind)
                for kind in ("gather", "loader", "augmented", "strong")
            },
            "ours: Compose": partial(ours, store, batch, "Compose"),
            "zarr": lambda: by_zarr(store, batch),
            "tensorstore": lambda: by_tensorstore(store, batch),
            "litdata": lambda: by_litdata(store, batch, folder),
            "streaming": lambda: by_streaming(store, batch, folder),
            "DataLoader": lambda: by_dataloader(store, batch, folder, None),
            "DataLoader, usual": lambda: by_dataloader(store, batch, folder, usual_recipe()),
        }
        steps: dict[str, Step] = {}
        for way, make in makers.items():
            if only and way not in only:
                continue
            try:
                steps[way] = make()
            except ModuleNotFoundError as error:
                print(f"{way} is left out: {error.name} is not installed", file=sys.stderr)
        return in_turn({way: partial(per_second, step, seconds) for way, step in steps.items()}, rounds)


def test_the_mapped_store_is_many_times_faster_than_fancy_indexing() -> None:
    result = run(256, seconds=0.2, rounds=3, only=("ours: gather", "zarr"))
    assert result["ours: gather"]["median"] > 20 * result["zarr"]["median"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, action="append", choices=sorted(BATCH))
    parser.add_argument("--seconds", type=float, default=0.5, help="of each way in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", help="name of the files in tests/benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = header(
        "Reading shuffled batches, pairs/s", [*PACKAGES.split(), "mosaicml-streaming"], seconds=arguments.seconds,
        rounds=arguments.rounds,
    )  # fmt: skip
    report["result"] = {size: run(size, arguments.seconds, arguments.rounds) for size in arguments.size or BATCH}
    text = "\n\n".join(table(f"{size} px, batches of {BATCH[size]}", rows) for size, rows in report["result"].items())
    publish(report, text, arguments.save)
