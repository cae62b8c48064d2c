"""A hung worker, a dead node and a joining node do not change a bit of a run; on a Ray cluster of several nodes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from commands import INSIDE, train_words
from faults import Training, cluster, kill_node, living_nodes, train_workers
from ray.cluster_utils import Cluster

from ptxdist.rundir import read_result, stage_folder

pytestmark = pytest.mark.slow


def test_a_hung_worker_and_a_dead_node_cost_no_bit_and_a_new_node_is_taken_in(
    work: Path, reference: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster of a head and two nodes: a worker hangs in the first stage, a node dies in the second one.

    Then a run that needs only one worker starts on the one node that is left, and another node joins.
    """
    # Ray looks at its nodes every 20 s, and waits so long (default: 60 s) for resources of a node that has died since.
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
    monkeypatch.setenv("SLOW_S", "0.2")  # so that the workers are still at work when something happens to them
    run = work / "cluster" / "smoke"
    words = train_words(work, run, inside=True)
    words += ["--set", "train.worker_timeout_s=8", "--set", "train.max_worker_failures=4"]
    with cluster(2) as nodes:
        with Training(nodes.address, words, log=work / "cluster.log") as training:
            training.wait_for((stage_folder(run, 1, 64) / "checkpoints" / INSIDE).exists)
            os.kill(train_workers(living_nodes(nodes)[-1])[0], signal.SIGSTOP)
            training.wait_for((stage_folder(run, 2, 96) / "checkpoints" / INSIDE).exists)
            kill_node(living_nodes(nodes)[-1])
            nodes.add_node(num_cpus=1)
            training.finish()
        for stage in (1, 2):
            assert f"stage {stage} resumes after epoch 0 of 1 and 10 steps of the next" in training.words
        assert "a worker failed with WorkerHealthCheckTimeoutError" in training.words
        assert [stage.weights_sha256 for stage in read_result(run).stages] == reference

        kill_node(living_nodes(nodes)[-1])
        run = work / "grown" / "smoke"
        words = train_words(work, run, inside=True)
        words += ["--set", "train.min_workers=1", "--set", "train.resize_every_s=1"]
        words += ["--set", "stages.1.epochs=100"]  # it is still in its first stage when Ray has found the new node
        with Training(nodes.address, words, log=work / "grown.log") as training:
            training.wait_for((stage_folder(run, 1, 64) / "checkpoints" / INSIDE).exists)
            assert len(workers_on(nodes)) == 1
            nodes.add_node(num_cpus=1)
            training.wait_for(lambda: len(workers_on(nodes)) == 2)
            assert not stage_folder(run, 2, 96).exists()
        assert "the cluster has capacity for 1 of 2 workers, 1 are needed" in training.words


def workers_on(nodes: Cluster) -> list[int]:
    """Process ids of the workers on all nodes of a cluster."""
    return [pid for node in living_nodes(nodes) for pid in train_workers(node)]
