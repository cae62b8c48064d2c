"""A Ray cluster of several nodes on this machine, and faults caused by real signals; for tests and the benchmark.

The cluster is `ray.cluster_utils.Cluster`: each node has its own raylet and workers. Only processes of this cluster,
found by their parents and command lines, receive signals.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster


@contextmanager
def cluster(nodes: int, **head: Any) -> Iterator[Cluster]:
    """A head without CPUs, on which drivers and events run, and `nodes` nodes of one CPU."""
    without = {"include_dashboard": False, "include_log_monitor": False}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **without, **head})
    try:
        for _ in range(nodes):
            made.add_node(num_cpus=1, wait=False, **without)
        made.wait_for_nodes()
        yield made
    finally:
        for node in [*living_nodes(made), made.head_node]:
            kill_node(node)  # an end in order takes Ray some seconds for each node
        made.shutdown()


class Training:
    """`ptxdist train …` in a process on a cluster; what it prints is appended to `log`."""

    def __init__(self, address: str, words: Sequence[object], *, log: Path) -> None:
        self.log = log
        self.command = [sys.executable, "-m", "ptxdist", *map(str, words)]
        self.environment = {**os.environ, "RAY_ADDRESS": address}
        self.start()

    def start(self) -> None:
        """Start it, or restart it."""
        with open(self.log, "ab") as file:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=subprocess.DEVNULL, stderr=file, start_new_session=True
            )

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def words(self) -> str:
        """Everything printed so far."""
        return self.log.read_text()

    def wait_for(self, ready: Callable[[], bool], timeout_s: float = 400) -> float:
        """Wait until `ready()` and return the seconds; AssertionError when the run ends before that."""
        started = time.monotonic()
        while not ready():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.words}"
            assert time.monotonic() - started < timeout_s, f"not within {timeout_s} s:\n{self.words}"
            time.sleep(0.05)
        return time.monotonic() - started

    def finish(self, timeout_s: float = 400) -> float:
        """Wait for the end with exit code 0 and return the seconds."""
        started = time.monotonic()
        assert self.process.wait(timeout=timeout_s) == 0, self.words
        return time.monotonic() - started


def living_nodes(cluster: Cluster) -> list[Any]:
    """The nodes of a cluster that are alive, without the head, in the order in which they were added."""
    living = [node for node in cluster.worker_nodes if node.all_processes["raylet"][0].process.poll() is None]
    return sorted(living, key=lambda node: node.all_processes["raylet"][0].process.pid)


def train_workers(node: Any) -> list[int]:
    """Process ids of Ray Train's workers on one node of the cluster."""
    import psutil

    raylet = node.all_processes["raylet"][0].process.pid
    found = []
    for process in psutil.Process(raylet).children(recursive=True):
        with suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def kill_node(node: Any) -> None:
    """SIGKILL raylet, agents and workers of a node at once, as a power cut would, without notice to the cluster."""
    import psutil

    raylet = node.all_processes["raylet"][0].process.pid
    processes = [*psutil.Process(raylet).children(recursive=True), psutil.Process(raylet)]
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(signal.SIGSTOP)  # none of them can react to the end of another one
    for process in processes:
        with suppress(psutil.Error):
            process.kill()
    node.all_processes["raylet"][0].process.wait()


def drain_node(address: str, node: Any, deadline_s: int) -> None:
    """Send the cluster a preemption notice for a node, as a cloud does for a spot instance."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    accepted, reason = GcsClient(address=address).drain_node(
        node.node_id,
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "spot instance reclaimed",
        int((time.time() + deadline_s) * 1000),
    )
    assert accepted, reason
