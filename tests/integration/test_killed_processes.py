"""A run whose processes are killed ends with the bits of one that was left alone; with Ray on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import INSIDE, train_words, wait_for, workers_of

from ptxdist.rundir import read_metrics, read_result, read_stage_result, stage_folder

pytestmark = pytest.mark.slow


def test_whatever_is_killed_the_run_ends_with_the_same_weights(
    work: Path, reference: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run, three deaths: a worker inside an epoch; the coordinator between the stages; all workers at once."""
    monkeypatch.setenv("SLOW_S", "0.2")  # so that the workers are still at work when they are killed
    run = work / "killed" / "smoke"  # a folder of its own, so that no stage of another run is used again
    command = [sys.executable, "-m", "ptxdist", *map(str, train_words(work, run, inside=True))]
    first, second = stage_folder(run, 1, 64), stage_folder(run, 2, 96)
    log = work / "killed.log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)
    wait_for(first / "checkpoints" / INSIDE, process, log)
    workers = workers_of(process.pid)
    assert len(workers) == 2, log.read_text()
    os.kill(workers[-1], signal.SIGKILL)
    wait_for(first / "result.json", process, log)
    process.kill()
    process.wait()
    told = log.read_text()
    assert "a worker failed with" in told
    assert "stage 1 resumes after epoch 0 of 1 and 10 steps of the next" in told
    assert read_stage_result(second) is None, "killed before the second stage was finished"
    written = (first / "result.json").stat().st_mtime_ns

    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)
    wait_for(second / "checkpoints" / INSIDE, process, log)
    workers = workers_of(process.pid)
    assert len(workers) == 2, log.read_text()
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    assert process.wait(timeout=400) == 0, log.read_text()
    assert "stage 2 resumes after epoch 0 of 1 and 10 steps of the next" in log.read_text()
    assert "stage 1 resumes" not in log.read_text()
    assert (first / "result.json").stat().st_mtime_ns == written, "the finished stage is not trained again"
    assert [(item.stage, item.epoch) for item in read_metrics(run)] == [(1, 1), (2, 1)]
    assert sorted(path.parent.name for path in (run / "tensorboard").glob("*/*")) == [
        "1-64px", "2-96px", "evaluation",
    ]  # fmt: skip
    assert [stage.weights_sha256 for stage in read_result(run).stages] == reference
