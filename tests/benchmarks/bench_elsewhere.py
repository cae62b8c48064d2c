"""What `evaluate RUN --data CACHE` costs beside `evaluate RUN`, on as many cases.

    python tests/benchmarks/bench_elsewhere.py [--cases 12047] [--rounds 2] [--save NAME]

Both caches have noise of 64 x 64 pixels, every fifth case with a mask, two images a patient. The run has trained a tiny
network for one epoch on so many cases and holds out as many; the other cache has as many new ones. A small network and
small images make what is compared large: fingerprints of all images, what is different, and who was in the training.

CPU seconds of all threads, so that other work on the machine does not count, and the peak of memory.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from measuring import header, in_turn, publish, table

from ptxdist.cache.catalog import FILE_NAME, Case, Catalog, Reconciliation, write_catalog
from ptxdist.cache.manifest import Manifest, ShardRecord, StoreRecord, write_manifest
from ptxdist.cache.split import Leakage
from ptxdist.cache.store import (
    ARRAYS,
    SHARD_CASES,
    pending,
    shard_count,
    shard_path,
    shard_writer,
    store_path,
    write_metadata,
)
from ptxdist.config import DataSettings, ModelSettings, PipelineSettings, Settings, StageSettings
from ptxdist.labels import rle
from ptxdist.predict.elsewhere import evaluate_elsewhere
from ptxdist.run.pipeline import run_pipeline
from ptxdist.run.plan import plan_run
from ptxdist.train.encoders import ENCODERS
from ptxdist.train.evaluate import evaluate_runs

SIDE_PX = 64


def make_cache(folder: Path, train: int, val: int, seed: int) -> Path:
    """A cache of noise at one size; a mask is a square that is darker."""
    random, mask, cases = np.random.default_rng(seed), np.zeros((SIDE_PX, SIDE_PX), np.uint8), []
    mask[20:40, 30:50] = 255
    text, area = rle.encode(mask), int(np.count_nonzero(mask))
    for number in range(train + val):
        texts, side = ((text,) if number % 5 == 0 else ()), "train" if number < train else "val"
        cases.append(
            Case(
                f"{seed}-{number:05}", "0", "none", SIDE_PX, SIDE_PX, f"patient-{seed}-{number // 2}", texts,
                area if texts else 0, view=("AP", "PA")[number % 3 == 0], sex="FM"[number % 2], age=20 + number % 60,
                split=side, fold=int(side == "train"),
            )
        )  # fmt: skip
    store, sums = store_path(folder, SIDE_PX), []
    for shard in range(shard_count(len(cases))):
        rows = cases[shard * SHARD_CASES : (shard + 1) * SHARD_CASES]
        images = random.integers(80, 200, (len(rows), SIDE_PX, SIDE_PX), dtype=np.uint8)
        masks = np.stack([mask if case.masks else 0 * mask for case in rows])
        images[masks > 0] //= 3
        checksums = []
        for name, samples in zip(ARRAYS, (images, masks), strict=True):
            path = shard_path(store, name, shard)
            with shard_writer(path, len(rows), SIDE_PX) as writer:
                for row, sample in enumerate(samples):
                    writer.put(row, sample)
            pending(path).replace(path)
            checksums.append(writer.crc32c)
        sums.append(ShardRecord("0", *checksums))
    write_metadata(store, SIDE_PX, {"case_id": np.array([case.case_id for case in cases])})
    write_manifest(folder, Manifest({SIDE_PX: StoreRecord(True, len(cases), str(seed), tuple(sums))}))
    positive = sum(bool(case.masks) for case in cases)
    counts = Reconciliation(len(cases), len(cases), positive, 0, 0, len(cases), 0, 0, len(cases), positive, 0, 0)
    leakage = Leakage("patient map", len(cases) // 2, positive, val, val // 5, 0, 0, 0.0, 0.0)
    write_catalog(Catalog(tuple(cases), counts, leakage, (), ()), folder / FILE_NAME)
    return folder


def make_run(folder: Path, cache: Path) -> Path:
    """A run of one epoch with the tiny network of the tests."""
    sys.path.append(str(Path(__file__).parents[1]))
    from tiny_encoder import TINY

    ENCODERS["tiny"] = TINY
    model = ModelSettings(encoder="tiny", encoder_weights="none", decoder_channels=(8, 8, 8, 8, 8))
    stage = StageSettings(size_px=SIDE_PX, epochs=1, batch_size=256)
    pipeline = PipelineSettings(name="bench", model=model, stages=(stage,))
    run_pipeline(plan_run(Settings(data=DataSettings(cache=str(cache)), pipeline=pipeline), folder / "run"))
    return folder / "run"


def seconds_of(call: Callable[[], object]) -> Callable[[], float]:
    def measure() -> float:
        started = time.process_time()
        call()
        return time.process_time() - started

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=12_047)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--save", help="name of the files in results/, after today's date")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = make_run(folder, make_cache(folder / "own", options.cases, options.cases, 1))
        other = make_cache(folder / "other", options.cases // 2, options.cases - options.cases // 2, 2)
        ways = {
            "evaluate RUN": seconds_of(lambda: evaluate_runs([run], folder=folder / "held-out")),
            "evaluate RUN --data CACHE": seconds_of(lambda: evaluate_elsewhere([run], other, folder=folder / "out")),
        }
        found = in_turn(ways, options.rounds)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    own, there = (value["median"] for value in found.values())
    report = header("Evaluation elsewhere", ["ptxdist", "torch", "numpy"], **vars(options))
    report |= {"cpu_seconds": found, "peak_mib": memory}
    text = (
        f"{table(f'CPU seconds for {options.cases:,} cases of {SIDE_PX} px', found, 1)}\n\n"
        f"With --data it takes {there / own:.2f} times as long. Peak of the process: {memory:,.0f} MiB."
    )
    publish(report, text, options.save)


if __name__ == "__main__":
    main()
