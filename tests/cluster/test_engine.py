"""What is done when workers fail: who is lost is replaced, what would come again ends the work at once."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray._private.state import actors
from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError
from ray.exceptions import OutOfMemoryError as RayOutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from ptxdist.cluster.engine import ray_engine
from ptxdist.cluster.failures import LostError, cause_of, loss_of, verdict
from ptxdist.errors import PtxdistError, TrainingError
from ptxdist.events import Event, Message
from ptxdist.resolve import load_settings
from ptxdist.run.engine import StageTask
from ptxdist.storage.runs import Mirror

DEAD = WorkerHealthCheckFailedError("rank 1", ActorDiedError())
HUNG = WorkerHealthCheckTimeoutError("rank 1")
CUT_OFF = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")


def test_the_command_and_ray_s_controller_need_no_torch() -> None:
    lines = (
        "import sys",
        "from ray.train.v2._internal.execution import controller",
        "from ptxdist.cluster import backend, engine, worker",
        "from ptxdist.run import pipeline",
        "from ptxdist.run.environment import environment",
        "config = backend.GroupConfig('gloo', 300.0); config.backend_cls(); config.train_func_context",
        "cuda = environment([])['cuda']",
        "assert 'torch' not in sys.modules",
        "import torch; assert cuda == torch.version.cuda",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


@pytest.mark.parametrize(
    "failures",
    [[DEAD], [HUNG], [CUT_OFF], [CUT_OFF, DEAD], [KeyError("x"), DEAD], [OSError(errno.ESTALE, "Stale file handle")],
     [torch.distributed.DistBackendError("NCCL")]],
    ids=str,
)  # fmt: skip
def test_lost_workers_are_restarted(failures: list[Exception]) -> None:
    found = verdict([cause_of(failure) for failure in failures], "stage 1")
    assert isinstance(found, LostError)
    assert not found.preempted


@pytest.mark.parametrize(
    ("failures", "words"),
    [
        ([TrainingError("loss of nan in step 3"), CUT_OFF], "^loss of nan in step 3$"),
        ([TrainingError("loss of nan in step 3"), DEAD], "^loss of nan in step 3$"),
        ([KeyError("lr"), CUT_OFF], "^stage 1 stopped: a worker failed with KeyError: 'lr'$"),
        ([ValueError("one\ntwo")], "ValueError: two"),
        ([torch.OutOfMemoryError("CUDA out of memory")], r"smaller train\.micro_batch"),
        ([OSError(errno.ENOSPC, "No space left on device")], "No space left on device"),
    ],
    ids=str,
)
def test_what_would_come_again_is_final(failures: list[Exception], words: str) -> None:
    found = verdict(failures, "stage 1")
    assert isinstance(found, PtxdistError)
    with pytest.raises(TrainingError, match=words):
        raise found


def test_a_node_that_was_taken_away_with_notice_is_nobodys_failure() -> None:
    gone = ActorDiedError()
    gone._preempted = True
    found = verdict([cause_of(WorkerHealthCheckFailedError("rank 0", gone)), CUT_OFF], "stage 1")
    assert isinstance(found, LostError)
    assert found.preempted


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (WorkerHealthCheckTimeoutError("hangs\nmetadata=ActorMetadata(node_ip='10.0.0.3', pid=7)"),
         "a worker on 10.0.0.3 did not answer within train.worker_timeout_s"),
        (RuntimeError("[gloo/unbound_buffer.cc:78] Timed out waiting 300000ms for recv operation to complete"),
         "a collective did not end within train.collective_timeout_s: another worker is stuck or cut off"),
        (RuntimeError("[/__w/gloo/gloo/transport/tcp/pair.cc:545] Read error [10.0.0.3]:61331: Connection reset by "
                      "peer. This is typically caused by a remote worker hanging. Check the logs. GLHF!"),
         "a worker lost its connection to the one on 10.0.0.3, which died or was cut off"),
        (RuntimeError("NCCL error in: /src/NCCLUtils.cpp:77, remote process exited or there was a network error\n"
                      "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting."),
         "a worker lost its connection to another one, which died or was cut off"),
        (RayOutOfMemoryError("Task was killed. Set RAY_memory_usage_threshold to another value."),
         "a worker was ended because its node ran out of memory; use fewer workers a node, or larger nodes"),
        (NodeDiedError("gone"), "a worker was lost with its node, which died or was cut off"),
        (ActorDiedError(), "a worker died"),
        (RuntimeError("It failed. Set RAY_some_timeout_s to wait longer."),
         "a worker failed with RuntimeError: It failed."),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_no_text_of_rays_names_what_a_user_of_ptxdist_cannot_set(error: Exception, words: str) -> None:
    assert loss_of(error) == words


@pytest.mark.slow
def test_a_real_worker_that_raises_is_not_tried_again_and_its_traceback_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"):
        monkeypatch.setenv(name, os.environ.get(name, "0.1" if "INTERVAL" in name else "60"))
    tries, events = tmp_path / "tries", list[Event]()

    def mistaken(config: dict[str, Any]) -> None:  # inside, so that Ray sends it along
        with open(tries, "a") as file:
            file.write("x")
        config["absent"]

    settings = load_settings("smoke", options={"train.workers": 1, "train.device": "cpu"})
    task = StageTask(
        settings=settings, token="", run=str(tmp_path / "run"), number=1, fingerprint="", parent=None
    )  # fmt: skip
    with ray_engine(settings, Mirror(tmp_path / "run"), events.append) as engine:
        left = ray.util.placement_group([{"CPU": 0.5}])  # as a trainer leaves it that could not end in order
        assert left.wait(30)
        with pytest.raises(TrainingError, match="stage 1 stopped: a worker failed with KeyError: 'absent'"):
            engine.workers.work(mistaken, task, tmp_path / "run" / "stage", "stage 1", "resumes")
        end = time.monotonic() + 30
        while (free := ray.available_resources().get("CPU")) != ray.cluster_resources()["CPU"]:
            assert time.monotonic() < end, f"of the CPUs {free} are free"
            time.sleep(0.1)
        actor, entry = next(iter(actors().items()))
        place = entry["Address"]["IPAddress"]
        assert loss_of(ActorUnavailableError("late", bytes.fromhex(actor))) == f"a worker on {place} cannot be reached"
        # Each is a process, and most of them load pandas and more of Ray for a second or two.
        assert sorted(actor["ActorClassName"] for actor in actors().values()) == [
            "Inbox", "RayTrainWorker", "SynchronizationActor", "TrainController",
        ]  # fmt: skip
    assert tries.read_text() == "x"
    assert events == [Message(text="Ray starts")]
    assert 'config["absent"]' in caplog.text, "the traceback, which RUN/ray.log gets"
