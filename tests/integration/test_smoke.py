"""The whole way through the commands on real Ray workers: phantoms, cache, stages, numbers, report; and resuming."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from commands import ptxdist, train_words

from ptxdist.labels import rle
from ptxdist.run.pipeline import only_training
from ptxdist.rundir import read_metrics, read_result, read_settings
from ptxdist.scores.metrics import scores
from ptxdist.train.scoring import count

pytestmark = pytest.mark.slow

Trained = tuple[Path, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def trained(work: Path) -> Trained:
    """The smoke pipeline, trained on two Ray workers, and what the command printed."""
    run = work / "runs" / "smoke"
    return run, ptxdist(*train_words(work, run), "--json")


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
    assert environment["memory_gib"] > 0
    assert environment["nodes"][0]["CPU"] >= 2
    assert len(list((run / "tensorboard" / "2-96px").iterdir())) == 1
    assert not list(run.rglob("checkpoints")), "resumable checkpoints go when a stage is finished"
    assert (run / "report" / "index.html").read_text().count('<figure class="case"') >= 1
    assert list((run / "report" / "overlays").glob("*.png"))


def test_ray_keeps_out_of_the_terminal(trained: Trained) -> None:
    run, done = trained
    known = re.compile(r"^(check of \d+ px|Ray starts|stage \d|evaluation|warning: stage|the masks of stage|\s*$)")
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


def test_torchrun_trains_the_same_weights_without_ray(trained: Trained, torchrun: Path) -> None:
    assert not (torchrun / "ray.log").exists()
    for with_ray, without in zip(read_result(trained[0]).stages, read_result(torchrun).stages, strict=True):
        assert without.workers == 2
        assert without.weights_sha256 == with_ray.weights_sha256


def test_workers_that_torchrun_did_not_start_are_refused(work: Path) -> None:
    done = ptxdist("train", "--without-ray", "--workers", 3, "--pipeline", "smoke", "--data", work / "cache", code=3)
    assert "torchrun --nproc-per-node 3" in done.stderr


def test_the_same_command_again_trains_nothing(work: Path, trained: Trained) -> None:
    run, _ = trained
    before = {path: path.stat().st_mtime_ns for path in run.glob("stages/*/*") if path.is_file()}
    done = ptxdist(*train_words(work, run))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "epoch 1 of 1: train" not in done.stderr
    assert "positives" in done.stdout


def test_a_second_training_of_the_same_run_is_refused(work: Path, trained: Trained) -> None:
    run, _ = trained
    with only_training(run):
        assert f"another `ptxdist train` works on {run}" in ptxdist(*train_words(work, run), code=12).stderr


def test_other_settings_on_the_same_run_are_refused(work: Path, trained: Trained) -> None:
    run, _ = trained
    done = ptxdist(*train_words(work, run), "--set", "stages.2.epochs=2", code=8)
    assert "stages.2.epochs: 1 -> 2" in done.stderr


def test_a_run_beside_it_uses_the_finished_stage_again_and_trains_only_the_other(work: Path, trained: Trained) -> None:
    first, _ = trained
    run = work / "runs" / "other"
    ptxdist(*train_words(work, run, workers=1), "--without-ray", "--set", "stages.2.learning_rate=0.0005")
    stages = read_result(run).stages
    assert [stage.reused_from for stage in stages] == ["smoke", None]
    assert stages[0].weights_sha256 == read_result(first).stages[0].weights_sha256
    assert stages[1].workers == 1


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
