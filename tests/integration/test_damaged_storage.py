"""A full disk, a kill and a damaged checkpoint change no bit of a run; without Ray, which adds nothing here."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from commands import wait_for

from ptxdist.resolve import load_settings
from ptxdist.run.pipeline import run_pipeline
from ptxdist.run.plan import plan_run
from ptxdist.rundir import read_result, stage_folder

pytestmark = pytest.mark.slow


def test_a_full_disk_a_kill_and_a_damaged_checkpoint_cost_no_bit(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run without Ray, where Ray adds nothing: stopped twice, once with its newest checkpoint spoilt."""
    pipeline = work / "three.toml"
    pipeline.write_text(
        "[model]\nencoder = 'small'\nencoder_weights = 'none'\n"
        "[[stages]]\nsize_px = 64\nepochs = 3\nbatch_size = 8\nswa_epochs = 2\n"
    )
    whole = run_pipeline(
        plan_run(load_settings(str(pipeline), options={"data.cache": str(work / "cache")}), work / "whole" / "three"),
        on_event=cannot_show,
    )
    monkeypatch.setenv("SLOW_S", "0.2")  # so that the processes can be stopped between two checkpoints
    run, log = work / "stopped" / "three", work / "stopped.log"
    command = [sys.executable, "-m", "ptxdist", "train", "--without-ray", "--pipeline", str(pipeline)]
    command += ["--data", str(work / "cache"), "--run", str(run)]
    saved = stage_folder(run, 1, 64) / "checkpoints"

    def start() -> subprocess.Popen[bytes]:
        with open(log, "w") as file:
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)

    process = start()
    wait_for(saved / "epoch-0001-step-000000", process, log)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**20, 2**20))  # from now on no file holds more than 1 MiB
    assert process.wait(timeout=200) == 9, log.read_text()
    assert re.search(r"error: .*cannot be written: .*File too large.*; what was saved before is kept", log.read_text())
    assert [path.name for path in saved.glob("epoch-*")] == ["epoch-0001-step-000000"]

    process = start()
    wait_for(saved / "epoch-0002-step-000000", process, log)
    process.kill()
    process.wait()
    assert "resumes after epoch 1 of 3" in log.read_text()
    weights = saved / "epoch-0002-step-000000" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)

    process = start()
    assert process.wait(timeout=200) == 0, log.read_text()
    assert "checkpoint epoch-0002-step-000000 is damaged" in log.read_text()
    assert "stage 1 resumes after epoch 1 of 3" in log.read_text()
    assert read_result(run).stages[0].weights_sha256 == whole.stages[0].weights_sha256
    assert read_result(run).evaluation.scores == whole.evaluation.scores


def cannot_show(event: object) -> None:
    """What a terminal that is gone does to the display; training goes on."""
    raise BrokenPipeError
