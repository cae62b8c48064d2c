"""Shuffled batches of 40 at 256 px: the mapped store against fancy indexing through zarr, and against memory.

    python tests/benchmarks/bench_reading.py [--seconds 3] [--save NAME]

Three readers in one run, interleaved, first round dropped, five rounds; samples/s of image and mask pairs as min,
median, max. `memory` is the limit: the same gather from arrays that lie in RAM.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import zarr

from ptxdist.data.store import ARRAYS, Store, _map_shard, shard_count, store_path, write_metadata, write_shard

CASES, SIZE_PX, BATCH, ROUNDS = 1024, 256, 40, 5


def make_store(folder: Path) -> Store:
    """A store of noise."""
    path = store_path(folder, SIZE_PX)
    random = np.random.default_rng(0)
    for shard in range(shard_count(CASES)):
        for name in ARRAYS:
            write_shard(path, name, shard, random.integers(0, 256, (256, SIZE_PX, SIZE_PX), dtype=np.uint8))
    write_metadata(path, SIZE_PX, {"case_id": np.arange(CASES).astype(str)})
    arrays = [
        tuple(_map_shard(path, name, shard, 256, SIZE_PX) for shard in range(shard_count(CASES))) for name in ARRAYS
    ]
    return Store(path, SIZE_PX, CASES, "", *arrays)


def measure(read: Callable[[np.ndarray], None], seconds: float) -> float:
    """Pairs per second of shuffled batches."""
    random, done, started = np.random.default_rng(1), 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        read(random.choice(CASES, BATCH, replace=False))
        done += BATCH
    return done / elapsed


def run(seconds: float) -> dict[str, dict[str, float]]:
    """Samples/s of each reader: min, median, max over the rounds."""
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder))
        group = zarr.open_group(store.path, mode="r")
        image, mask = (np.empty((BATCH, SIZE_PX, SIZE_PX), np.uint8) for _ in range(2))
        in_memory = [np.concatenate(arrays) for arrays in (store.images, store.masks)]

        def from_zarr(indices: np.ndarray) -> None:
            for name, out in zip(ARRAYS, (image, mask), strict=True):
                out[:] = group[name].oindex[np.sort(indices)]

        def from_memory(indices: np.ndarray) -> None:
            for array, out in zip(in_memory, (image, mask), strict=True):
                np.take(array, indices, axis=0, out=out)

        readers: dict[str, Callable[[np.ndarray], None]] = {
            "mapped store": lambda indices: store.gather(indices, image, mask),
            "zarr oindex": from_zarr,
            "memory": from_memory,
        }
        rounds = [{name: measure(read, seconds) for name, read in readers.items()} for _ in range(ROUNDS + 1)][1:]
    return {
        name: {"min": min(values), "median": statistics.median(values), "max": max(values)}
        for name in readers
        for values in [[round_[name] for round_ in rounds]]
    }


def test_the_mapped_store_is_many_times_faster_than_fancy_indexing() -> None:
    result = run(seconds=0.3)
    assert result["mapped store"]["median"] > 20 * result["zarr oindex"]["median"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--save", help="name of a file in tests/benchmarks/results, without suffix")
    arguments = parser.parse_args()
    report = {
        "what": "pairs/s, 256 px, batches of 40",
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("ptxdist", "numpy", "zarr")},
        "machine": platform.platform(),
        "result": run(arguments.seconds),
    }
    print(json.dumps(report, indent=2))
    if arguments.save:
        (Path(__file__).parent / "results" / f"{arguments.save}.json").write_text(json.dumps(report, indent=2) + "\n")
