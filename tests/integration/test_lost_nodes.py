"""A hung worker, a dead node and a joining node do not change a bit of a run; on a Ray cluster of several nodes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import INSIDE, one_stage, train_words
from faults import Training, cluster, kill_node, living_nodes, train_workers
from ray.cluster_utils import Cluster

from ptxdist.rundir import RESULT, read_stage_result, stage_folder

pytestmark = pytest.mark.slow
Words = Callable[..., list[object]]

# By default Ray asks each node every three seconds, and takes five missing answers for a death.
DEAD_AT_ONCE = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 2}


@pytest.fixture
def words(work: Path, monkeypatch: pytest.MonkeyPatch) -> Words:
    """Function that gives the words of a training of the first stage of smoke, by run and settings of `train`."""
    # How long Ray waits (default: 60 s) for resources of a node that has died since it looked.
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
    # And how long (30 s) for a worker that hangs to leave its process group.
    monkeypatch.setenv("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "2")
    monkeypatch.setenv("SLOW_S", "0.4")  # so that the workers are still at work when something happens to them
    pipeline = one_stage(work)

    def words(run: Path, **settings: object) -> list[object]:
        given = (word for key, value in settings.items() for word in ("--set", f"train.{key}={value}"))
        return [*train_words(work, run, inside=True), "--pipeline", pipeline, *given]

    return words


def test_a_hung_worker_and_a_dead_node_cost_no_bit(work: Path, reference: list[str], words: Words) -> None:
    """On a cluster of a head and two nodes: a worker hangs, then a node dies."""
    run = work / "cluster" / "one"
    resumes = "stage 1 resumes after epoch 0 of 1 and 10 steps of the next"
    with cluster(2, _system_config=DEAD_AT_ONCE) as nodes:
        lost = words(run, worker_timeout_s=8, max_worker_failures=4)
        with Training(nodes.address, lost, log=work / "cluster.log") as training:
            training.wait_for((stage_folder(run, 1, 64) / "checkpoints" / INSIDE).exists)
            os.kill(train_workers(living_nodes(nodes)[-1])[0], signal.SIGSTOP)
            training.wait_for(lambda: resumes in training.words)
            kill_node(living_nodes(nodes)[-1])
            nodes.add_node(num_cpus=1)
            # The evaluation is tested by test_smoke. It may have asked Ray for its workers already.
            training.wait_for(lambda: "stage 1 of 1 is finished" in training.words)
            training.process.terminate()
            assert training.process.wait(timeout=60) == 143, training.words
    assert training.words.count(resumes) == 2
    assert "did not answer within train.worker_timeout_s; stage 1 resumes" in training.words
    assert "RAY_" not in training.words
    stage = read_stage_result(stage_folder(run, 1, 64))
    assert stage is not None
    assert stage.weights_sha256 == reference[0]


@pytest.mark.skipif("PTXDIST_HOSTS" not in os.environ, reason="`make hosts` runs it, with the other faults of hosts")
def test_a_node_that_joins_is_taken_in(work: Path, words: Words) -> None:
    """A run that needs only one worker starts on the only node, and another one joins."""
    run = work / "grown" / "one"
    # Of a hundred epochs: it is still training when Ray has found the new node.
    grown = [*words(run, min_workers=1, resize_every_s=1), "--set", "stages.1.epochs=100"]
    with cluster(1) as nodes, Training(nodes.address, grown, log=work / "grown.log") as training:
        training.wait_for((stage_folder(run, 1, 64) / "checkpoints" / INSIDE).exists)
        assert len(workers_on(nodes)) == 1
        nodes.add_node(num_cpus=1)
        training.wait_for(lambda: len(workers_on(nodes)) == 2)
        assert not (run / RESULT).exists()
    assert "the cluster has room for 1 of 2 workers; stage 1" in training.words


def workers_on(nodes: Cluster) -> list[int]:
    """Process ids of the workers on all nodes of a cluster."""
    return [pid for node in living_nodes(nodes) for pid in train_workers(node)]
