"""Names inside a run folder, and the JSON that stands there.

    RUN/                        e.g. runs/exp4
        settings.json           resolved settings, as `--dry-run` prints them
        environment.json        versions, commit, hardware
        metrics.jsonl           one line an epoch, all stages
        result.json             PipelineResult: one StageResult a stage, and the evaluation
        ray.log                 what Ray printed
        stages/1-256px/
            result.json         StageResult, written last: a stage without it is not finished
            best.safetensors    the weights that the next stage starts from
            checkpoints/        resumable, removed when the stage is finished
        evaluation/
            cases.csv           one line a validation case
            predictions.csv     its mask as run-length text, in the challenge's format
        report/index.html

Owns: these names and records. Refuses: folders that are not runs (RunError). Called by: `learn`, `cluster`, `cli`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ptxdist.config import Settings, differences, restore, snapshot
from ptxdist.errors import RunError

SETTINGS = "settings.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
RESULT = "result.json"
RAY_LOG = "ray.log"
BEST_WEIGHTS = "best.safetensors"
CHECKPOINTS = "checkpoints"
EVALUATION = "evaluation"
CASES = "cases.csv"
PREDICTIONS = "predictions.csv"
REPORT = "report"


class Record(BaseModel):
    """A frozen record that is written as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Scores(Record):
    """Scores of a set of cases, each 0..1; None where they are not defined.

    `kaggle_dice`     mean Dice over all images, 1 where truth and prediction are empty, 0 where one of them is
    `positive_dice`   mean Dice over the images with a pneumothorax; None without such images
    `pooled_dice`     Dice over the px of all images together; 1 when nothing is there and nothing is predicted
    `sensitivity`     part of the positive images with at least one px predicted; None without positive images
    `specificity`     part of the negative images without any px predicted; None without negative images
    `all_empty_dice`  the Kaggle Dice that empty masks for all images would score
    """

    cases: int
    positives: int
    kaggle_dice: float
    positive_dice: float | None
    pooled_dice: float
    sensitivity: float | None
    specificity: float | None
    all_empty_dice: float

    @property
    def equals_all_empty(self) -> bool:
        """Whether not a single px was predicted, so that nothing but the baseline is measured."""
        return self.sensitivity in (None, 0.0) and self.specificity in (None, 1.0)


class EpochMetrics(Record):
    """One line of metrics.jsonl. `epoch` counts from 1; `averaged` marks the SWA weights, after the last epoch.

    Losses are means per case; `at_stage` scores at the stage's size, `at_full` at the original resolution.
    """

    stage: int
    epoch: int
    averaged: bool = False
    learning_rate: float
    train_loss: float | None
    val_loss: float
    at_stage: Scores
    at_full: Scores
    train_seconds: float
    val_seconds: float
    images_per_second: float | None


class StageResult(Record):
    """What a finished stage leaves: its epochs, the best of them, and its weights (a path below the run folder).

    `reused_from` names the run that trained it, when it was not this one.
    """

    stage: int
    size_px: int
    fingerprint: str
    epochs: int
    workers: int
    seconds: float
    best: EpochMetrics
    history: tuple[EpochMetrics, ...]
    weights: str
    weights_sha256: str
    reused_from: str | None = None


class EvaluationResult(Record):
    """Scores of the last stage's weights on the validation cases, at the original resolution."""

    threshold: float
    min_area_px: int
    flip_averaging: bool
    scores: Scores
    at_other_thresholds: dict[str, Scores]
    seconds: float


class PipelineResult(Record):
    """What a finished pipeline leaves."""

    pipeline: str
    stages: tuple[StageResult, ...]
    evaluation: EvaluationResult
    seconds: float


def file_sha256(path: Path) -> str:
    """sha256 of a file in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stage_folder(run: Path, stage: int, size_px: int) -> Path:
    """Folder of a stage; stages are numbered from 1."""
    return run / "stages" / f"{stage}-{size_px}px"


def write_json(path: Path, content: Mapping[str, Any] | Record) -> None:
    """Write JSON in one step: the file is there whole, or the former one stays."""
    plain = content.model_dump(mode="json") if isinstance(content, Record) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(plain, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_settings(run: Path) -> Settings:
    """Settings that a run was started with; RunError when the folder is not a run."""
    path = run / SETTINGS
    if not path.is_file():
        raise RunError(f"{run} is not a run folder (no {SETTINGS}); `ptxdist train --run {run}` makes one")
    try:
        return restore(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); the run cannot be continued") from error


def start_run(run: Path, settings: Settings) -> None:
    """Make the run folder, or check that it belongs to the same pipeline, so that the same command goes on.

    How much machine is used may change between the two; what is trained may not: RunError says what differs.
    """
    if (run / SETTINGS).is_file():
        before, after = (snapshot(item.pipeline) for item in (read_settings(run), settings))
        changed = [
            line
            for line in differences(before, after)
            if not line.startswith(("purpose:", "source:", "target:"))  # what people read, not what is trained
        ]
        if changed:
            raise RunError(
                f"{run} was started with other settings ({'; '.join(changed)}); "
                f"give another folder with --run, or remove this one"
            )
    elif run.is_dir() and any(run.iterdir()):
        raise RunError(f"{run} holds other files and is not a run; give another folder with --run")
    write_json(run / SETTINGS, snapshot(settings))


def read_stage_result(folder: Path) -> StageResult | None:
    """Result of a stage folder; None when the stage is not finished."""
    path = folder / RESULT
    if not path.is_file():
        return None
    try:
        return StageResult.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise RunError(f"{path} is damaged or of another version; remove {folder} to train this stage again") from error


def read_result(run: Path) -> PipelineResult:
    """Result of a finished run; RunError when it is not finished."""
    read_settings(run)
    path = run / RESULT
    if not path.is_file():
        raise RunError(f"{run} is not finished; run the same `ptxdist train` again, it goes on where it stopped")
    try:
        return PipelineResult.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise RunError(f"{path} is damaged or of another version") from error


def read_metrics(run: Path) -> list[EpochMetrics]:
    """Lines of metrics.jsonl, in order; [] when there are none yet."""
    path = run / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [EpochMetrics.model_validate_json(line) for line in lines]


def write_metrics(run: Path, metrics: list[EpochMetrics]) -> None:
    """Write metrics.jsonl whole, in one step."""
    temporary = run / (METRICS + ".tmp")
    temporary.write_text("".join(item.model_dump_json() + "\n" for item in metrics), encoding="utf-8")
    temporary.replace(run / METRICS)
