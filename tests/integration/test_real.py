"""The main job on a few real SIIM-ACR files: preprocess, train a ResNet-34, numbers on held-out patients.

Without Ray, which adds nothing here: test_smoke.py trains phantoms on its workers.
"""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from ptxdist.cache.catalog import read_catalog
from ptxdist.rundir import read_result

pytestmark = pytest.mark.slow

CASES = 15  # of each kind


def test_real_files_become_a_trained_and_evaluated_run(real_data: Path, tmp_path: Path) -> None:
    siim = real_data / "siim-real"
    with gzip.open(siim / "train-rle.csv.gz", "rt", newline="") as file:
        masks: dict[str, list[str]] = {}
        for case_id, text in csv.reader(file):
            masks.setdefault(case_id, []).append(text.strip())
    files = {path.stem: path for path in sorted((siim / "dicom-images").rglob("*.dcm"))}
    with open(siim / "nih_id.csv", newline="") as file:
        patient = {row["Kaggle_ID"]: row["NIH_ID"][:8] for row in csv.DictReader(file)}
    positive = [uid for uid in files if uid in masks and masks[uid] != ["-1"]][:CASES]
    negative = [uid for uid in files if masks.get(uid) == ["-1"]][:CASES]
    unlabelled = [uid for uid in files if uid not in masks][:2]
    for uid in (*positive, *negative, *unlabelled):
        target = tmp_path / "dicom" / files[uid].relative_to(siim / "dicom-images")
        target.parent.mkdir(parents=True)
        shutil.copyfile(files[uid], target)

    _ptxdist(
        "preprocess", "--dicom", tmp_path / "dicom", "--labels", siim / "train-rle.csv.gz",
        "--patients", siim / "nih_id.csv", "--out", tmp_path / "cache", "--size", 96,
    )  # fmt: skip
    catalog = read_catalog(tmp_path / "cache")
    sides = {side: {case.case_id for case in catalog.cases if case.split == side} for side in ("train", "val")}
    assert sides["train"] | sides["val"] == {*positive, *negative}
    assert not {patient[uid] for uid in sides["train"]} & {patient[uid] for uid in sides["val"]}

    run, pipeline = tmp_path / "runs" / "real", tmp_path / "real.toml"
    pipeline.write_text("[model]\nencoder_weights = 'none'\n[[stages]]\nsize_px = 96\nepochs = 1\nbatch_size = 8\n")
    printed = _ptxdist(
        "train", "--without-ray", "--pipeline", pipeline, "--data", tmp_path / "cache", "--run", run, "--json"
    )
    result = read_result(run)
    assert json.loads(printed)["evaluation"] == result.evaluation.model_dump(mode="json")
    assert [(stage.size_px, stage.workers) for stage in result.stages] == [(96, 1)]
    held_out = sides["val"]
    scores = result.evaluation.scores
    assert (scores.cases, scores.positives) == (len(held_out), len(held_out & set(positive)))
    assert scores.all_empty_dice == pytest.approx(len(held_out & set(negative)) / len(held_out))
    overlays = sorted((run / "report" / "overlays").glob("*.png"))
    assert overlays
    picture = cv2.imread(str(overlays[0]))
    assert picture is not None
    assert picture.std() > 10
    names = {patient[uid] for uid in files if uid in patient}
    for path in (*run.rglob("*.json"), *run.rglob("*.csv"), *run.rglob("*.html")):
        text = path.read_text(errors="replace")
        assert not any(f"{name}_" in text or f'"{name}"' in text for name in names), path


def _ptxdist(*arguments: object) -> str:
    command = [sys.executable, "-m", "ptxdist", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout
