"""Faults on a local cluster of several nodes: what happens to a training, and how long it takes.

    python tests/benchmarks/bench_faults.py [FAULT ...] > faults.json

Each fault is real: signals to raylets, workers and the driver of a cluster of several raylets on this machine. The
weights of a run with a fault are compared with those of a run without. `lost_s` is the time from the fault to the first
progress after it, `total_s` that of the whole command.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from faults import Training, cluster, drain_node, kill_node, living_nodes, train_workers

from ptxdist.rundir import read_result

WORDS = ("--pipeline", "smoke", "--set", "stages.1.epochs=12", "--set", "stages.1.best_by=loss", "--workers", 2,
         "--set", "train.worker_timeout_s=10", "--set", "train.resize_every_s=3", "--set",
         "train.checkpoint_every_s=1")  # fmt: skip
ELASTIC = ("--set", "train.min_workers=1")
Fault = Callable[[Cluster, Training], None]


def nothing(nodes: Cluster, training: Training) -> None:
    """No fault."""


def worker_dies(nodes: Cluster, training: Training) -> None:
    """SIGKILL to a worker."""
    os.kill(train_workers(living_nodes(nodes)[-1])[0], signal.SIGKILL)


def worker_hangs(nodes: Cluster, training: Training) -> None:
    """SIGSTOP to a worker."""
    os.kill(train_workers(living_nodes(nodes)[-1])[0], signal.SIGSTOP)


def node_dies(nodes: Cluster, training: Training) -> None:
    """SIGKILL to all of a node; another one takes its place at once, as an autoscaler would have it."""
    kill_node(living_nodes(nodes)[-1])
    nodes.add_node(num_cpus=1)


def node_dies_for_good(nodes: Cluster, training: Training) -> None:
    """SIGKILL to all of a node, and none comes."""
    kill_node(living_nodes(nodes)[-1])


def node_is_preempted(nodes: Cluster, training: Training) -> None:
    """A node is announced to go in 10 s, goes, and another one comes."""
    node = living_nodes(nodes)[-1]
    drain_node(nodes.address, node, 10)
    nodes.add_node(num_cpus=1)
    time.sleep(10)
    kill_node(node)


def node_joins(nodes: Cluster, training: Training) -> None:
    """A second node for a run that had to begin with one worker of two."""
    nodes.add_node(num_cpus=1)


def driver_dies(nodes: Cluster, training: Training) -> None:
    """SIGKILL to the driver; the same command is given again at once."""
    training.process.send_signal(signal.SIGKILL)
    training.process.wait()
    training.start()


# name: the fault, nodes at the start, further words
FAULTS: dict[str, tuple[Fault, int, tuple[object, ...]]] = {
    "nothing": (nothing, 2, ()),
    "worker dies": (worker_dies, 2, ()),
    "worker hangs": (worker_hangs, 2, ()),
    "node dies": (node_dies, 2, ()),
    "node dies for good": (node_dies_for_good, 2, ELASTIC),
    "node preempted": (node_is_preempted, 2, ()),
    "node joins": (node_joins, 1, ELASTIC),
    "driver dies": (driver_dies, 2, ()),
}


def measure(name: str, cache: Path, folder: Path) -> dict[str, object]:
    """Train with one fault; seconds, words, and the weights' checksums."""
    fault, nodes, words = FAULTS[name]
    run = folder / name.replace(" ", "-") / "run"
    run.parent.mkdir(parents=True)
    command = ["train", "--data", cache, "--run", run, "--json", *WORDS, *words]
    with cluster(nodes) as made, Training(made.address, command, log=run.with_suffix(".log")) as training:
        started = time.monotonic()
        training.wait_for(lambda: training.words.count("epoch 2/12") > 0, 300)
        seen = training.words.count("\n")
        hit = time.monotonic()
        fault(made, training)
        if fault is not nothing:
            training.wait_for(lambda: any("resumes after" in line for line in training.words.splitlines()[seen:]), 300)
        lost = time.monotonic() - hit
        training.finish(400)
        return {
            "fault": name,
            "lost_s": round(lost, 1),
            "total_s": round(time.monotonic() - started, 1),
            "said": [line for line in training.words.splitlines()[seen:] if "epoch" not in line.split(":")[0]],
            "workers": [stage.workers for stage in read_result(run).stages],
            "weights": [stage.weights_sha256 for stage in read_result(run).stages],
            "val_loss": [stage.best.val_loss for stage in read_result(run).stages],
            "run": str(run),
        }


def largest_difference(one: Path, other: Path) -> float:
    """Largest difference between the weights of two runs, relative to the largest weight of each tensor."""
    largest = 0.0
    for path in sorted(one.glob("stages/*/best.safetensors")):
        mine, yours = load_file(path), load_file(other / path.relative_to(one))
        for key, value in mine.items():
            if value.is_floating_point():
                largest = max(largest, float((value - yours[key]).abs().max() / value.abs().max().clamp(min=1e-12)))
    return largest


def main(names: list[str]) -> None:
    """Measure the faults of these names, all without any."""
    with tempfile.TemporaryDirectory(prefix="ptxdist-faults-") as name:
        work = Path(name)
        ptxdist = [sys.executable, "-m", "ptxdist"]
        for words in (
            ["phantom", "ph", "--cases", "40", "--positive-share", "0.5"],
            ["preprocess", "--dicom", "ph/dicom-images", "--labels", "ph/train-rle.csv", "--patients",
             "ph/patients.csv", "--out", "cache", "--size", "64", "--size", "96"],
        ):  # fmt: skip
            subprocess.run([*ptxdist, *words], check=True, cwd=work, capture_output=True)
        rows: list[dict[str, object]] = []
        for fault in dict.fromkeys(["nothing", *(names or FAULTS)]):
            try:
                row = measure(fault, work / "cache", work)
                row["same_weights"] = row["weights"] == (rows[0] if rows else row)["weights"]
                row["difference"] = largest_difference(Path(str((rows or [row])[0]["run"])), Path(str(row["run"])))
            except Exception as error:
                row = {"fault": fault, "failed": str(error)[-3000:]}
            rows.append(row)
            print(json.dumps(row, indent=2), file=sys.stderr, flush=True)
        versions = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
        print(json.dumps({"versions": versions, "rows": rows}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
