"""The whole way through the commands on real Ray workers: phantoms, cache, stages, numbers, report; and resuming.

On the way all workers and then the command are killed. The run ends with the bits of one that torchrun has trained
undisturbed. (`tests/storage/test_runs.py` trains with Ray and without any death.)
"""

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
from typing import NamedTuple

import numpy as np
import pytest
from commands import INSIDE, ptxdist, train_words, wait_for, workers_of

from ptxdist.interrupts import SENTENCE
from ptxdist.labels import rle
from ptxdist.run.pipeline import only_training
from ptxdist.rundir import read_metrics, read_result, read_settings, read_stage_result, stage_folder
from ptxdist.scores.metrics import scores
from ptxdist.train.scoring import count

pytestmark = pytest.mark.slow


class Trained(NamedTuple):
    """A run, what the first and the second command said, and what the second one printed."""

    run: Path
    said: tuple[str, str]
    printed: str


@pytest.fixture(scope="module")
def trained(work: Path) -> Trained:
    """The smoke pipeline on two Ray workers, with deaths.

    All workers are killed at once inside an epoch, and the command gets SIGTERM while it starts new ones. That one of
    two workers dies is tested by `test_lost_nodes`. The second command goes on undisturbed.
    """
    run = work / "runs" / "smoke"
    words = [sys.executable, "-m", "ptxdist", *map(str, train_words(work, run, inside=True)), "--json"]
    first = stage_folder(run, 1, 64)
    logs = work / "first.log", work / "second.log"

    def start(log: Path) -> subprocess.Popen[bytes]:
        slow = {**os.environ, "SLOW_S": "0.2"}  # so that the workers are still at work when they are killed
        with open(log, "w") as said, open(work / "printed", "w") as printed:
            return subprocess.Popen(words, stdout=printed, stderr=said, env=slow)

    process = start(logs[0])
    wait_for(first / "checkpoints" / INSIDE, process, logs[0])
    workers = workers_of(process.pid)
    assert len(workers) == 2, logs[0].read_text()
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    while "with new workers" not in logs[0].read_text():
        assert process.poll() is None, logs[0].read_text()
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=60) == 143, logs[0].read_text()
    assert logs[0].read_text().splitlines()[-1] == SENTENCE
    assert read_stage_result(first) is None, "killed before the first stage was finished"

    process = start(logs[1])
    assert process.wait(timeout=400) == 0, logs[1].read_text()
    return Trained(run, (logs[0].read_text(), logs[1].read_text()), (work / "printed").read_text())


def test_what_was_killed_resumes_from_the_last_checkpoint(trained: Trained) -> None:
    assert re.search(r"^a worker .*; stage 1 resumes .* with new workers \(1 of 2\)$", trained.said[0], re.MULTILINE)
    assert "stage 1 resumes after epoch 0 of 1 and 10 steps of the next" in trained.said[1]
    groups = sorted(path.parent.name for path in (trained.run / "tensorboard").glob("*/*"))
    assert groups == ["1-64px", "2-96px", "evaluation"], "one file for each, whatever was killed"


def test_a_run_leaves_settings_metrics_results_and_a_report(
    trained: Trained,
) -> None:
    run, printed = trained.run, json.loads(trained.printed)
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
    assert environment["memory_gib"] > 0
    assert environment["nodes"][0]["CPU"] >= 2
    assert len(list((run / "tensorboard" / "2-96px").iterdir())) == 1
    assert not list(run.rglob("checkpoints")), "resumable checkpoints go when a stage is finished"
    assert (run / "report" / "index.html").read_text().count('<figure class="case"') >= 1
    assert list((run / "report" / "overlays").glob("*.png"))


def test_ray_keeps_out_of_the_terminal_and_patients_out_of_its_log(work: Path, trained: Trained) -> None:
    known = re.compile(
        r"^(check of \d+ px|trains smoke on |\S+ trains on |Ray starts|stage \d|training will take|evaluation|"
        r"a worker |interrupted|warning: |the masks of |\s*$)"
    )
    assert [line for said in trained.said for line in said.splitlines() if not known.match(line)] == []
    with open(work / "ph" / "patients.csv", newline="") as file:
        names = {name for row in csv.reader(file) for name in row}
    words = set(re.findall(r"[\w.-]+", (trained.run / "ray.log").read_text()))
    assert words
    assert not words & names


def test_the_printed_scores_can_be_computed_from_the_tables_of_the_run(work: Path, trained: Trained) -> None:
    import torch

    run = trained.run
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


def test_torchrun_trains_the_same_weights_without_ray_and_without_a_death(trained: Trained, torchrun: Path) -> None:
    assert not (torchrun / "ray.log").exists()
    for with_ray, without in zip(read_result(trained.run).stages, read_result(torchrun).stages, strict=True):
        assert without.workers == 2
        assert without.weights_sha256 == with_ray.weights_sha256


def test_workers_that_torchrun_did_not_start_are_refused(work: Path) -> None:
    done = ptxdist("train", "--without-ray", "--workers", 3, "--pipeline", "smoke", "--data", work / "cache", code=3)
    assert "torchrun --nproc-per-node 3" in done.stderr


def test_the_same_command_again_trains_nothing(work: Path, trained: Trained) -> None:
    run = trained.run
    before = {path: path.stat().st_mtime_ns for path in run.glob("stages/*/*") if path.is_file()}
    done = ptxdist(*train_words(work, run))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "epoch 1 of 1: train" not in done.stderr
    assert "positives" in done.stdout


def test_a_second_training_of_the_same_run_is_refused(work: Path, trained: Trained) -> None:
    run = trained.run
    with only_training(run):
        assert f"another `ptxdist train` works on {run}" in ptxdist(*train_words(work, run), code=12).stderr


def test_other_settings_on_the_same_run_are_refused(work: Path, trained: Trained) -> None:
    run = trained.run
    done = ptxdist(*train_words(work, run), "--set", "stages.2.epochs=2", code=8)
    assert "stages.2.epochs: 1 -> 2" in done.stderr


def test_a_run_beside_it_uses_the_finished_stage_again_and_trains_only_the_other(work: Path, trained: Trained) -> None:
    first = trained.run
    run = work / "runs" / "other"
    ptxdist(*train_words(work, run, workers=1), "--without-ray", "--set", "stages.2.learning_rate=0.0005")
    stages = read_result(run).stages
    assert [stage.reused_from for stage in stages] == ["smoke", None]
    assert stages[0].weights_sha256 == read_result(first).stages[0].weights_sha256
    assert stages[1].workers == 1


def test_evaluate_report_and_inspect_work_on_the_finished_run(work: Path, trained: Trained) -> None:
    run = trained.run
    before = read_result(run).evaluation.scores
    assert json.loads(ptxdist("evaluate", run, "--json").stdout)["scores"]["cases"] == before.cases
    assert read_result(run).evaluation.scores == before
    assert Path(json.loads(ptxdist("report", run, "--json").stdout)["report"]).is_file()
    assert json.loads(ptxdist("inspect", run, "--json").stdout)["pipeline"] == "smoke"
    cache = json.loads(ptxdist("inspect", work / "cache", "--json").stdout)
    assert cache["reconciliation"]["labelled"] == 39
    assert Path(cache["contact_sheet"]).stat().st_size > 10_000


def test_two_ray_workers_evaluate_on_a_cache_as_one_process_does(work: Path, trained: Trained) -> None:
    words = ["evaluate", trained.run, "--data", work / "cache", "--sensitivity", 0.9]
    ptxdist(*words, "--out", work / "one")
    printed = json.loads(ptxdist(*words, "--out", work / "two", "--workers", 2, "--json").stdout)
    assert (printed["scores"]["cases"], len(printed["working"])) == (39, 1)
    for name in ("cases.csv", "predictions.csv", "histograms.safetensors"):
        assert (work / "one" / name).read_bytes() == (work / "two" / name).read_bytes(), name
    assert (work / "two" / "ray.log").is_file()
