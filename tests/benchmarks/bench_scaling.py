"""Several workers: strong scaling on the CPU, the loop with Ray beside the loop without, the time between two epochs.

    python tests/benchmarks/bench_scaling.py [--size 128] [--batch 8] [--steps 4] [--epochs 3] [--workers 1 2 4]
                                             [--save scaling]

One global batch, the network of the default settings, random images; W processes with one thread each over gloo,
synchronised batch norm, and the same W as Ray Train workers. From `loop.fit` itself:

images/s        of the training part of an epoch, all but the first one
boundary ms     from the end of an epoch's last step to the start of the next one's first step, less the validation:
                weights and checkpoint copied, progress told, `report()`, the first batch read
all-reduce ms   of the gradients alone, 97.7 MB of float32, as one tensor
Ray             seconds from `TorchTrainer.fit` until every worker is in the training function, for the first trainer
                in a fresh Ray and for the next one

Scaling is strong: the batch is divided. With more workers than cores it shows what is lost, not what is won.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")  # as ptxdist's coordinator sets it

import torch
import torch.distributed as dist
import torch.multiprocessing

PARAMETERS = 24_436_369


def train(task: dict[str, Any], on_event: Callable[[Any], None]) -> None:
    """One rank: fit, and what rank 0 has seen of it as JSON."""
    import numpy as np

    from ptxdist.cache.catalog import Case
    from ptxdist.cache.store import ARRAYS, SHARD_CASES, Store, map_shard, shard_path
    from ptxdist.config import ModelSettings, StageSettings, TrainSettings
    from ptxdist.train import loop
    from ptxdist.train.dataset import Batch
    from ptxdist.train.distributed import rank, world_size
    from ptxdist.train.loop import StageData
    from ptxdist.train.step import Stepper
    from ptxdist.train.unet import build_unet

    entered = time.time()
    torch.set_num_threads(1)
    size, batch, cases = task["size"], task["batch"], task["steps"] * task["batch"]
    path = Path(task["store"])
    shards = [(map_shard(shard_path(path, name, 0), SHARD_CASES, size)[0],) for name in ARRAYS]
    store = Store(path, size, SHARD_CASES, "", *shards)
    cases_of = tuple(
        Case(f"1.2.{n}", "0", "none", size, size, f"g{n}", (), 0, split="train", fold=0) for n in range(SHARD_CASES)
    )
    steps: list[tuple[float, float]] = []  # start and end of each

    class TimedStepper(Stepper):
        def step(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            started = time.perf_counter()
            result = super().step(batch)
            steps.append((started, time.perf_counter()))
            return result

    loop.Stepper = TimedStepper
    torch.manual_seed(0)
    result = loop.fit(
        build_unet(ModelSettings(encoder_weights="none")),
        StageData(store, cases_of, np.arange(cases), np.arange(cases, cases + 8)),
        StageSettings(size_px=size, epochs=task["epochs"], batch_size=batch, best_by="loss"),
        TrainSettings(checkpoint_every_s=0), number=1, seed=0, device=torch.device("cpu"), folder=Path(task["folder"]),
        on_event=on_event,
    )  # fmt: skip
    reduced = []
    gradients = torch.zeros(PARAMETERS)
    for _ in range(4 if world_size() > 1 else 0):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(gradients)
        reduced.append(1000 * (time.perf_counter() - started))
    if rank() != 0:
        return
    boundaries = [
        1000 * (steps[e * task["steps"]][0] - steps[e * task["steps"] - 1][1] - result.history[e - 1].val_seconds)
        for e in range(1, task["epochs"])
    ]
    rates = [item.images_per_second for item in result.history[1:]]
    found = {"rates": rates, "boundaries": boundaries, "all_reduce": reduced[1:], "entered": entered,
             "loss": result.history[-1].train_loss}  # fmt: skip
    Path(task["result"]).write_text(json.dumps(found))


def on_rank(rank: int, task: dict[str, Any]) -> None:
    dist.init_process_group("gloo", f"file://{task['folder']}.meet", rank=rank, world_size=task["workers"])
    train(task, lambda event: None)
    dist.barrier()
    dist.destroy_process_group()


def with_ray(task: dict[str, Any]) -> None:
    import ray.train

    from ptxdist.records import EpochMetrics

    def on_event(event: Any) -> None:
        if isinstance(event, EpochMetrics):
            ray.train.report({"epoch": event.epoch, "val_loss": event.val_loss})

    train(task, on_event)


def run_ray(tasks: list[dict[str, Any]]) -> float:
    """The tasks, one trainer after the other in one Ray; seconds to start Ray."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    started = time.time()
    ray.init(
        address="local", num_cpus=max(os.cpu_count() or 1, *(task["workers"] for task in tasks)),
        include_dashboard=False, log_to_driver=False, logging_level="ERROR",
    )  # fmt: skip
    init_s = time.time() - started
    try:
        for task in tasks:
            Path(task["result"]).with_suffix(".start").write_text(str(time.time()))
            TorchTrainer(
                with_ray, train_loop_config=task, torch_config=TorchConfig(backend="gloo"),
                scaling_config=ScalingConfig(num_workers=task["workers"], resources_per_worker={"CPU": 1}),
                run_config=RunConfig(name=Path(task["result"]).stem, storage_path=task["folder"] + ".ray"),
            ).fit()  # fmt: skip
    finally:
        ray.shutdown()
    return init_s


def main() -> None:
    from bench_reading import make_store
    from measuring import header, publish, spread, table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="of an epoch")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--ray-workers", type=int, nargs="+", default=[2, 2], help="a trainer for each")
    parser.add_argument("--save", help="name of the files in tests/benchmarks/results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = make_store(folder, arguments.size, 128)

        def task(label: str, workers: int) -> dict[str, Any]:
            return {
                "store": str(store.path), "size": arguments.size, "batch": arguments.batch, "steps": arguments.steps,
                "epochs": arguments.epochs, "workers": workers, "folder": str(folder / label),
                "result": str(folder / f"{label}.json"),
            }  # fmt: skip

        plain = [task(f"plain-{workers}", workers) for workers in arguments.workers]
        for item in plain:
            torch.multiprocessing.spawn(on_rank, (item,), nprocs=item["workers"])
        rays = [task(f"ray-{number}-{workers}", workers) for number, workers in enumerate(arguments.ray_workers)]
        init_s = run_ray(rays)
        found = {Path(item["result"]).stem: json.loads(Path(item["result"]).read_text()) for item in plain + rays}
        starts = {
            Path(item["result"]).stem: found[Path(item["result"]).stem]["entered"]
            - float(Path(item["result"]).with_suffix(".start").read_text())
            for item in rays
        }
    parts = {}
    for key, unit in (("rates", "images/s"), ("boundaries", "boundary ms"), ("all_reduce", "all-reduce ms")):
        rows = {label: spread(values[key]) for label, values in found.items() if values[key]}
        parts[key] = table(unit, rows, 2 if key == "rates" else 0)
    lines = [f"Ray starts in {init_s:.1f} s; " + ", ".join(f"{k}: {v:.1f} s" for k, v in starts.items()) + "."]
    for item in rays:
        label, other = Path(item["result"]).stem, f"plain-{item['workers']}"
        if other in found:
            ratio = statistics.median(found[label]["rates"]) / statistics.median(found[other]["rates"])
            lines.append(
                f"{label}: {ratio:.3f} of {other}; equal losses: {found[label]['loss'] == found[other]['loss']}."
            )
    report = header(
        "Several workers on the CPU", ["ptxdist", "torch", "ray"], size_px=arguments.size, batch=arguments.batch,
        steps=arguments.steps, epochs=arguments.epochs, threads_each=1,
    )  # fmt: skip
    report |= {"result": found, "ray_init_s": init_s, "ray_start_s": starts}
    publish(report, "\n\n".join([*parts.values(), *lines]), arguments.save)


def test_the_tables_of_the_docs_are_those_of_the_script() -> None:
    from expect_scaling import data_table, gpu_table, input_table

    page = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text()
    for made in (gpu_table(), input_table(), data_table()):
        assert made in page


if __name__ == "__main__":
    main()
