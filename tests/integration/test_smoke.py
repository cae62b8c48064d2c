"""The whole way through the commands on real Ray workers: phantoms, cache, stages, numbers, report; and resuming."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ptxdist.data import rle
from ptxdist.learn.metrics import count, scores
from ptxdist.rundir import read_metrics, read_result, read_settings, read_stage_result, stage_folder

pytestmark = pytest.mark.slow

Trained = tuple[Path, subprocess.CompletedProcess[str]]


def ptxdist(*arguments: str | Path, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ptxdist", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=400)
    assert done.returncode == code, f"{arguments}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache of 40 phantoms at 64 and 96 px."""
    work = tmp_path_factory.mktemp("smoke")
    ptxdist("phantom", work / "ph", "--cases", 40, "--positive-share", 0.5)
    ptxdist(
        "preprocess", "--dicom", work / "ph/dicom-images", "--labels", work / "ph/train-rle.csv",
        "--patients", work / "ph/patients.csv", "--out", work / "cache", "--size", 64, "--size", 96,
    )  # fmt: skip
    return work


@pytest.fixture(scope="module")
def trained(work: Path) -> Trained:
    """The smoke pipeline, trained on two Ray workers, and what the command printed."""
    run = work / "runs" / "smoke"
    done = ptxdist("train", "--pipeline", "smoke", "--workers", 2, "--data", work / "cache", "--run", run, "--json")
    return run, done


def test_a_run_leaves_settings_metrics_results_and_a_report(
    trained: Trained,
) -> None:
    run, done = trained
    printed = json.loads(done.stdout)
    result = read_result(run)
    assert {**result.model_dump(mode="json"), "report": str(run / "report" / "index.html")} == printed
    assert [(stage.stage, stage.size_px, stage.epochs, stage.workers) for stage in result.stages] == [
        (1, 64, 1, 2),
        (2, 96, 1, 2),
    ]
    assert [(item.stage, item.epoch) for item in read_metrics(run)] == [(1, 1), (2, 1)]
    assert read_settings(run).train.workers == 2
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert not list(run.rglob("checkpoints")), "resumable checkpoints go when a stage is finished"
    assert (run / "report" / "index.html").read_text().count("<figure>") >= 1
    assert list((run / "report" / "overlays").glob("*.png"))


def test_ray_keeps_out_of_the_terminal(trained: Trained) -> None:
    run, done = trained
    known = re.compile(r"^(Ray starts|stage \d|evaluation|warning: stage|\s*$)")
    assert [line for line in done.stderr.splitlines() if not known.match(line)] == []
    assert (run / "ray.log").is_file()


def test_the_printed_scores_can_be_computed_from_the_tables_of_the_run(work: Path, trained: Trained) -> None:
    import torch

    run, _ = trained
    with open(work / "ph" / "train-rle.csv", newline="") as file:
        rows = [(row["ImageId"], row[" EncodedPixels"].strip()) for row in csv.DictReader(file)]
    with open(run / "evaluation" / "predictions.csv", newline="") as file:
        predictions = {row["ImageId"]: row["EncodedPixels"] for row in csv.DictReader(file)}
    masks = [
        (rle.decode(text, 1024, 1024), rle.decode([mask for known, mask in rows if known == case_id], 1024, 1024))
        for case_id, text in predictions.items()
    ]
    predicted, truth = (torch.from_numpy(np.stack(side)).bool() for side in zip(*masks, strict=True))
    assert scores(count(predicted, truth).numpy()) == read_result(run).evaluation.scores


def test_the_same_command_again_trains_nothing(work: Path, trained: Trained) -> None:
    run, _ = trained
    before = {path: path.stat().st_mtime_ns for path in run.glob("stages/*/*") if path.is_file()}
    done = ptxdist("train", "--pipeline", "smoke", "--workers", 2, "--data", work / "cache", "--run", run)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "epoch 1 of 1: train" not in done.stderr
    assert "positives" in done.stdout


def test_other_settings_on_the_same_run_are_refused(work: Path, trained: Trained) -> None:
    run, _ = trained
    done = ptxdist(
        "train", "--pipeline", "smoke", "--set", "stages.2.epochs=2", "--data", work / "cache", "--run", run, code=8
    )
    assert "stages.2.epochs: 1 -> 2" in done.stderr


def test_a_run_beside_it_uses_the_finished_stage_again_and_trains_only_the_other(work: Path, trained: Trained) -> None:
    first, _ = trained
    run = work / "runs" / "other"
    ptxdist(
        "train", "--pipeline", "smoke", "--workers", 3, "--set", "stages.2.learning_rate=0.0005",
        "--data", work / "cache", "--run", run,
    )  # fmt: skip
    stages = read_result(run).stages
    assert [stage.reused_from for stage in stages] == ["smoke", None]
    assert stages[0].weights_sha256 == read_result(first).stages[0].weights_sha256
    assert stages[1].workers == 3


def test_evaluate_report_and_inspect_work_on_the_finished_run(work: Path, trained: Trained) -> None:
    run, _ = trained
    before = read_result(run).evaluation.scores
    assert json.loads(ptxdist("evaluate", run, "--json").stdout)["scores"]["cases"] == before.cases
    assert read_result(run).evaluation.scores == before
    assert Path(json.loads(ptxdist("report", run, "--json").stdout)["report"]).is_file()
    assert json.loads(ptxdist("inspect", run, "--json").stdout)["pipeline"] == "smoke"
    cache = json.loads(ptxdist("inspect", work / "cache", "--json").stdout)
    assert cache["reconciliation"]["labelled"] == 39
    assert Path(cache["contact_sheet"]).stat().st_size > 10_000


@pytest.mark.parametrize("victim", ["driver", "worker"])
def test_after_kill_9_the_run_ends_with_the_same_weights(work: Path, trained: Trained, victim: str) -> None:
    """The driver is killed in the second stage and started again; a worker is killed in the first and replaced."""
    run = work / f"killed-{victim}" / "smoke"  # a folder of its own, so that no stage of another run is used again
    words = ["train", "--pipeline", "smoke", "--workers", 2, "--data", work / "cache", "--run", run]
    command = [sys.executable, "-m", "ptxdist", *map(str, words)]
    log = work / f"killed-{victim}.log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)
    deadline, first, second = time.monotonic() + 300, stage_folder(run, 1, 64), stage_folder(run, 2, 96)
    if victim == "driver":
        while not second.is_dir() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert read_stage_result(first) is not None
        assert read_stage_result(second) is None, "killed before the second stage was finished"
        written = (first / "result.json").stat().st_mtime_ns
        subprocess.run(command, check=True, capture_output=True, timeout=400)
        assert (first / "result.json").stat().st_mtime_ns == written, "the finished stage is not trained again"
    else:
        while "epoch 1 of 1: train" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        found = subprocess.run(["pgrep", "-f", "ray::RayTrainWorker"], capture_output=True, text=True, check=False)
        own = [int(pid) for pid in found.stdout.split() if _belongs_to(int(pid), process.pid)]
        assert len(own) == 2, log.read_text()
        assert read_stage_result(first) is None, "killed before the first stage was finished"
        os.kill(own[-1], signal.SIGKILL)
        assert process.wait(timeout=400) == 0, log.read_text()
    assert [(item.stage, item.epoch) for item in read_metrics(run)] == [(1, 1), (2, 1)]
    for before, after in zip(read_result(trained[0]).stages, read_result(run).stages, strict=True):
        assert before.weights_sha256 == after.weights_sha256


def _belongs_to(pid: int, ancestor: int) -> bool:
    """Whether a process descends from another one."""
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            return False
    return False
