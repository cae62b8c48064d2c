"""Names inside a run folder, and the JSON that stands there.

    RUN/                        e.g. runs/exp4
        settings.json           resolved settings, as `--dry-run` prints them
        environment.json        versions, commit, hardware
        metrics.jsonl           one line an epoch, all stages, from the first epoch on
        result.json             PipelineResult: one StageResult a stage, and the evaluation
        ray.log                 what Ray printed
        lock                    held by the one training of the run, empty
        tensorboard/            event files, a folder a stage
        mlflow.json             which MLflow run it is, with train.mlflow
        stages/1-256px/
            result.json         StageResult, written last: a stage without it is not finished
            best.safetensors    the weights that the next stage starts from
            checkpoints/        resumable, removed when the stage is finished
        evaluation/
            result.json         EvaluationResult
            cases.csv           one line a validation case, from which every number can be computed again
            histograms.safetensors  px by probability of each case, from which masks at other thresholds are counted
            predictions.csv     its mask as run-length text, in the challenge's format
        report/index.html

Owns: these names and records. Refuses: folders that are not runs (RunError). Called by: `learn`, `cluster`, `cli`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
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
LOCK = "lock"
TENSORBOARD = "tensorboard"
MLFLOW = "mlflow.json"
BEST_WEIGHTS = "best.safetensors"
CHECKPOINTS = "checkpoints"
EVALUATION = "evaluation"
CASES = "cases.csv"
HISTOGRAMS = "histograms.safetensors"
PREDICTIONS = "predictions.csv"
REPORT = "report"

Intervals = dict[str, tuple[float, float]]
Step = tuple[int, str, int, int, int]  # progress: stage, "train", "validate" or "evaluate", epoch, images done, images


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
    def pooled_iou(self) -> float:
        """Intersection over union of the px of all images together, which the pooled Dice determines."""
        return self.pooled_dice / (2 - self.pooled_dice)

    @property
    def equals_all_empty(self) -> bool:
        """Whether not a single px was predicted, so that nothing but the baseline is measured."""
        return self.sensitivity in (None, 0.0) and self.specificity in (None, 1.0)


class OperatingPoint(Record):
    """How a probability map becomes a mask: empty unless `min_area_px` px reach `top`, else all px that reach `bottom`.

    Areas are in px of the original image. `top == bottom` is the plain pair of a threshold and a smallest area; the
    source's way is such a pair with `min_area_px` 0.
    """

    top: float
    min_area_px: int
    bottom: float


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


class StageHistory(Record):
    """The finished epochs of a stage that goes on after an interruption; none of a stage that begins."""

    stage: int
    epochs: tuple[EpochMetrics, ...]


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


class TunedPoint(Record):
    """The operating point that scores the best Kaggle Dice, and how much of that is more than luck.

    `kind` is "pair" (threshold, smallest area) or "triplet" (top threshold, smallest area, bottom threshold). `scores`
    are those of `point` on the cases it was chosen on, and flatter it. `estimate` is the number to report: each case is
    masked by the point chosen on the cases of the other `folds`, which share no patient with it; its points are
    `points`, its 95 % intervals `intervals`.
    `surface` has the mean Kaggle Dice on all cases for each of `thresholds` (rows; for a triplet the bottom one, at
    the best top) and each of `areas_px`; None where no point is tried.
    """

    kind: str
    point: OperatingPoint
    scores: Scores
    estimate: Scores
    intervals: Intervals = {}
    folds: int
    points: tuple[OperatingPoint, ...]
    thresholds: tuple[float, ...]
    areas_px: tuple[int, ...]
    surface: tuple[tuple[float | None, ...], ...]


class Reliability(Record):
    """Predicted against observed: things (px or images) by their predicted probability, in bins of equal width.

    `predicted` is the mean probability in a bin, `observed` the share that is pneumothorax; empty bins are left out.
    `error` is the expected calibration error: the mean of |predicted - observed| over all things (Naeini et al. 2015);
    `interval` is its 95 % interval, None with one patient. Predicting the share of pneumothorax for all would score 0.
    """

    things: str
    counts: tuple[int, ...]
    predicted: tuple[float, ...]
    observed: tuple[float, ...]
    error: float
    interval: tuple[float, float] | None = None


class Subgroup(Record):
    """Scores of the cases that have one property, such as view AP; `small` marks those too few to conclude from."""

    by: str
    name: str
    scores: Scores
    intervals: Intervals = {}
    small: bool


class SharedPatients(Record):
    """Scores of validation cases whose patient is in training, and of those whose patient is not; None without any.

    `known_from` is where the patients come from: "catalog" or "patient map".
    """

    known_from: str
    shared: Scores | None
    shared_intervals: Intervals = {}
    apart: Scores | None
    apart_intervals: Intervals = {}


class EvaluationResult(Record):
    """Scores of the last stage's weights on cases they have not seen, at the original resolution.

    `scores` are those at `threshold`, with masks below `min_area_px` emptied; `intervals` are the 95 % intervals by
    name (also `pooled_iou` and `auroc`), from a bootstrap over patients; empty with one patient. `auroc` is that of the
    image-level score (the highest probability); None without both kinds of images. `tuned` is () with too few patients.
    `folds` are the folds whose cases were evaluated, `runs` how many runs took part. What has a default is missing in
    results of an older version.
    """

    threshold: float
    min_area_px: int
    flip_averaging: bool
    runs: int = 1
    folds: tuple[int, ...] = (0,)
    scores: Scores
    auroc: float | None = None
    intervals: Intervals = {}
    at_other_thresholds: dict[str, Scores]
    tuned: tuple[TunedPoint, ...] = ()
    calibration: tuple[Reliability, ...] = ()
    subgroups: tuple[Subgroup, ...] = ()
    shared_patients: SharedPatients | None = None
    seconds: float


class Compared(Record):
    """One run of a comparison: its scores on the common cases, and its differences from the first run.

    `run` is the name of its folder, `cases` how many it evaluated itself; the first run has no differences.
    """

    run: str
    cases: int
    scores: Scores
    intervals: Intervals = {}
    differences: dict[str, float] = {}
    difference_intervals: Intervals = {}


class Comparison(Record):
    """Runs beside each other, on the `cases` images that all of them evaluated."""

    cases: int
    runs: tuple[Compared, ...]


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
    """Write JSON in one step: the file is there whole, or the former one stays; RunError when it cannot be written."""
    plain = content.model_dump(mode="json") if isinstance(content, Record) else content
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(plain, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}; what was saved before is kept") from error


def copy_file(source: Path, target: Path) -> None:
    """Copy a file in one step: `target` is there whole, or as it was; RunError when it cannot be written."""
    temporary = target.with_name(target.name + ".tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, temporary)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{target} cannot be written: {error.strerror}; what was saved before is kept") from error


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
    elif run.is_dir() and any(path.name != LOCK for path in run.iterdir()):
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


def read_stages(run: Path) -> list[StageResult]:
    """Results of all stages of a run, in order; RunError when one of them is not finished."""
    sizes = [stage.size_px for stage in read_settings(run).pipeline.stages]
    found = [read_stage_result(stage_folder(run, number, size)) for number, size in enumerate(sizes, start=1)]
    stages = [stage for stage in found if stage is not None]
    if len(stages) < len(sizes):
        raise RunError(f"{run} is not finished; run the same `ptxdist train` again, it goes on where it stopped")
    return stages


def read_evaluation(folder: Path) -> EvaluationResult:
    """Result of an evaluation's folder; RunError when there is none."""
    path = folder / RESULT
    if not path.is_file():
        raise RunError(f"{folder} holds no evaluation; `ptxdist evaluate` makes one")
    try:
        return EvaluationResult.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise RunError(f"{path} is damaged or of another version; `ptxdist evaluate` makes it anew") from error


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
