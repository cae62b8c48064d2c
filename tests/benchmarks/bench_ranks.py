"""The parts of docs/scaling.md's model that a CPU can check, with many logical workers on this machine.

    python tests/benchmarks/bench_ranks.py [--ranks 2 4 8 16] [--megabytes 16] [--rounds 3] [--save ranks]

W logical workers are W gloo processes with one thread each. They share cores and the loopback interface, so not their
speed but their laws are looked at:

exchanged      bytes over the loopback interface of one all-reduce of B bytes, counted by the kernel, by the model's
               volume 2 (W - 1) B of a ring; other traffic adds, a rank that begins before the count is read takes away
all-reduce     ms; one machine carries the traffic of all ranks, so it grows as W - 1 where a cluster's stays the same
collective     ms of a small all-reduce, as synchronised batch norm makes 92 of a step
step           ms of steps whose computing is a sleep of `IMAGE_S` an image, for a batch that W does not divide, by the
               model: the fullest rank's images + the all-reduce + 92 small collectives, each as measured alone
order          us a case to draw the order of an epoch and divide it, for growing sets: the model takes it as linear
catalog        us a case to read a catalog, a fifth of the cases with masks: the same

From the network itself: its parameters, and how many collectives one step of it makes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import expect_scaling
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

IMAGE_S = 4e-3
BATCH = 65  # one more than the recipe's, so that one rank has a case more
SMALL = 2 * 128 + 1  # numbers of one synchronised batch norm


def loopback_bytes() -> int:
    """Bytes that the loopback interface has carried."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split(":")[1].split()[0])


def timed(work: Callable[[], object], rounds: int) -> tuple[float, int]:
    """Median seconds of a round that all ranks begin together, and the fewest bytes that one has sent."""
    seconds, carried = [], []
    for _ in range(rounds + 1):
        dist.barrier()
        before, started = loopback_bytes(), time.perf_counter()
        work()
        dist.barrier()
        seconds.append(time.perf_counter() - started)
        carried.append(loopback_bytes() - before)
    return statistics.median(seconds[1:]), min(carried[1:])


def on_rank(rank: int, ranks: int, megabytes: int, rounds: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / f'meet-{ranks}'}", rank=rank, world_size=ranks)
    large, small = torch.zeros(megabytes * 250_000), torch.zeros(SMALL, dtype=torch.float64)
    collectives = expect_scaling.COLLECTIVES

    def smalls() -> None:
        for _ in range(collectives):
            dist.all_reduce(small)

    def step() -> None:
        time.sleep(IMAGE_S * len(range(rank, BATCH, ranks)))
        dist.all_reduce(large)
        smalls()

    nothing, _ = timed(lambda: None, rounds)
    reduce_s, carried = timed(lambda: dist.all_reduce(large), rounds)
    smalls_s, _ = timed(smalls, rounds)
    step_s, _ = timed(step, rounds)
    if rank == 0:
        predicted = IMAGE_S * -(-BATCH // ranks) + reduce_s - nothing + smalls_s - nothing
        found = {
            "ranks": ranks, "exchanged": carried / (2 * (ranks - 1) * large.numel() * 4), "all_reduce_s": reduce_s,
            "collective_s": (smalls_s - nothing) / collectives, "step_s": step_s, "predicted_s": predicted,
        }  # fmt: skip
        (folder / f"{ranks}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def order_s(cases: int) -> float:
    """Seconds a case to order an epoch and divide it, as the middle of eight ranks does."""
    from ptxdist.train.dataset import epoch_order, training_shares

    indices = np.arange(cases)
    started = time.perf_counter()
    training_shares(epoch_order(indices, seed=0, epoch=1), 64, 4, 8)
    return (time.perf_counter() - started) / cases


def catalog_s(cases: int, folder: Path) -> float:
    """Seconds a case to read a catalog."""
    from ptxdist.cache.catalog import FILE_NAME, Case, Catalog, Reconciliation, read_catalog, write_catalog
    from ptxdist.cache.split import Leakage

    mask = " ".join(f"{gap} {length}" for gap, length in zip(range(900, 1040), range(20, 160), strict=True))
    many = tuple(
        Case(
            f"1.2.3.{number:08}", f"{number:032x}", "none", 1024, 1024, f"g{number}",
            (mask,) if number % 5 == 0 else (), 8000, split="train", fold=1,
        )
        for number in range(cases)
    )  # fmt: skip
    counts = Reconciliation(cases, cases, cases // 5, 0, 0, cases, 0, 0, cases, cases // 5, 0, 0)
    leakage = Leakage("patient map", cases, cases // 5, 0, 0, 0, 0, 0.0, 0.0)
    write_catalog(Catalog(many, counts, leakage, (), ()), folder / FILE_NAME)
    started = time.perf_counter()
    read_catalog(folder)
    return (time.perf_counter() - started) / cases


def test_the_model_counts_what_the_network_has() -> None:
    from ptxdist.config import ModelSettings
    from ptxdist.train.unet import build_unet

    with torch.device("meta"):
        model = build_unet(ModelSettings(encoder_weights="none"))
    assert sum(parameter.numel() for parameter in model.parameters()) * 4 == expect_scaling.GRADIENT_BYTES
    layers = sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in model.modules())
    assert 2 * layers == expect_scaling.COLLECTIVES


def main() -> None:
    from measuring import header, publish

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--megabytes", type=int, default=16, help="of one all-reduce; the gradients are 97.7")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", help="name of the files in tests/benchmarks/results")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for ranks in arguments.ranks:
            words = (ranks, arguments.megabytes, arguments.rounds, folder)
            torch.multiprocessing.spawn(on_rank, words, nprocs=ranks)
            rows.append(json.loads((folder / f"{ranks}.json").read_text()))
        orders = {cases: order_s(cases) for cases in (10_000, 100_000, 1_000_000)}
        catalogs = {cases: catalog_s(cases, folder) for cases in (5_000, 20_000, 80_000)}
    lines = [
        "| logical workers | exchanged, by the model's volume | all-reduce, ms | by (W - 1) | small collective, ms | "
        "step, ms | by the model |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ranks, reduce_ms, step_ms = row["ranks"], 1000 * row["all_reduce_s"], 1000 * row["step_s"]
        lines.append(
            f"| {ranks} | {row['exchanged']:.3f} | {reduce_ms:.0f} | {reduce_ms / (ranks - 1):.1f} | "
            f"{1000 * row['collective_s']:.2f} | {step_ms:.0f} | {step_ms / 1000 / row['predicted_s']:.2f} |"
        )
    lines += ["", "| cases | order, us a case | | cases | catalog, us a case |", "|---|---|---|---|---|"]
    for (few, order), (many, catalog) in zip(orders.items(), catalogs.items(), strict=True):
        lines.append(f"| {few:,} | {1e6 * order:.2f} | | {many:,} | {1e6 * catalog:.1f} |")
    report = header(
        "Logical workers", ["ptxdist", "torch"], megabytes=arguments.megabytes, batch=BATCH, image_ms=1000 * IMAGE_S
    )
    report |= {"ranks": rows, "order_s": orders, "catalog_s": catalogs}
    publish(report, "\n".join(lines), arguments.save)


if __name__ == "__main__":
    main()
