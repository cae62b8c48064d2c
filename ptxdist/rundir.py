"""Names inside a run folder, and reading and writing the records in it.

    RUN/                        e.g. runs/exp4
        settings.json           resolved settings
        environment.json        versions, commit, hardware
        origin.json             Origin: what the training images are like, and the model that the network started from
        training-images.csv     one-way fingerprints of the training images
        metrics.jsonl           one line an epoch, all stages, from the first epoch on
        result.json             PipelineResult: one StageResult a stage, and the evaluation
        ray.log                 the output of Ray
        lock                    locked by the process that trains the run; empty
        tensorboard/            event files, a folder a stage
        mlflow.json             id of the MLflow run, with train.mlflow
        stages/1-256px/
            result.json         StageResult, written last: a stage without it is not finished
            best.safetensors    the weights that the next stage starts from
            checkpoints/        resumable, removed when the stage is finished
        evaluation/
            result.json         EvaluationResult
            cases.csv           one line a validation case, from which every number can be recomputed
            histograms.safetensors  pixels by probability of each case, to count masks at other thresholds
            predictions.csv     its mask as run-length text, in the challenge's format
        report/index.html

and of the folder of `ptxdist predict`, which `predict/folder.py` describes:

    OUT/submission.csv, predict.json, findings/

Owns: these names; `records` has the content. Refuses: folders that are not runs, and files that are damaged (RunError):
each JSON file has a checksum, origin.json that of training-images.csv too, and the result of an evaluation those of its
tables. What an older version wrote has none and is used as it is.
"""

from __future__ import annotations

import os
from collections.abc import Sized
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from ptxdist import files, places
from ptxdist.config import Settings, differences, restore, snapshot
from ptxdist.errors import RunError, SettingsError
from ptxdist.records import Environment, EpochMetrics, EvaluationResult, Origin, PipelineResult, Record, StageResult

SETTINGS = places.SETTINGS
ENVIRONMENT = "environment.json"
ORIGIN = "origin.json"
TRAINING_IMAGES = "training-images.csv"
METRICS = "metrics.jsonl"
RESULT = places.RESULT
RAY_LOG = "ray.log"
LOCK = "lock"
TENSORBOARD = "tensorboard"
MLFLOW = "mlflow.json"
BEST_WEIGHTS = "best.safetensors"
CHECKPOINTS = "checkpoints"
EVALUATION = "evaluation"
CASES = places.CASES
HISTOGRAMS = "histograms.safetensors"
PREDICTIONS = "predictions.csv"
TABLES = (CASES, PREDICTIONS, HISTOGRAMS)
REPORT = "report"
REPORT_PAGE = "report/index.html"
SUBMISSION = "submission.csv"
PREDICT_SETTINGS = places.PREDICT_SETTINGS
FINDINGS = "findings"
FINDINGS_TABLE = "findings.csv"
FINDINGS_PAGE = "index.html"
_ON_PURPOSE = "after a change on purpose, remove `sha256` from it"
_Record = TypeVar("_Record", bound=Record)


def stage_folder(run: Path, stage: int, size_px: int) -> Path:
    """Folder of a stage; stages are numbered from 1."""
    return run / "stages" / f"{stage}-{size_px}px"


def read_settings(run: Path) -> Settings:
    """Settings of a run; RunError when the folder is not a run."""
    path = run / SETTINGS
    if not path.is_file():
        raise RunError(f"{run} is not a run folder (no {SETTINGS}); `ptxdist train --run {run}` makes one")
    content = files.read_json(path, f"put it back from a copy; {_ON_PURPOSE}")
    try:
        return restore(content)
    except SettingsError as error:
        raise RunError(f"{path} does not fit this version of ptxdist: {error}") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise RunError(f"{path} is damaged ({error}); the run cannot be continued") from error


def start_run(run: Path, settings: Settings) -> None:
    """Make the run folder, or check that the run in it has the same pipeline settings, and write the settings.

    The caller holds the lock of the run. `settings.train` and `settings.data` may differ from those of the former
    start; RunError lists what differs in `settings.pipeline`. Nothing binds a run in which nothing has been trained.
    """
    files.remove_leftovers(run, deep=False)
    if (run / SETTINGS).is_file():
        before, after = (snapshot(item.pipeline) for item in (read_settings(run), settings))
        changed = [
            line
            for line in differences(before, after)
            if not line.startswith(("purpose:", "source:", "target:"))  # texts for people
        ]
        if changed and not _has_trained(run):
            for name in (ORIGIN, TRAINING_IMAGES):
                (run / name).unlink(missing_ok=True)
        elif changed:
            raise RunError(
                f"{run} was started with other settings ({'; '.join(changed)}); "
                f"give another folder with --run, or remove this one"
            )
    elif run.is_dir() and any(path.name != LOCK for path in run.iterdir()):
        raise RunError(f"{run} holds other files and is not a run; give another folder with --run")
    files.remove_leftovers(run)
    files.write_json(run / SETTINGS, snapshot(settings))


def _has_trained(run: Path) -> bool:
    """Whether a run has a checkpoint or a finished stage."""
    return any(next(run.glob(f"stages/*/{name}"), None) for name in (RESULT, f"{CHECKPOINTS}/*"))


def read_stage_result(folder: Path) -> StageResult | None:
    """Result of a stage folder; None when the stage is not finished."""
    path = folder / RESULT
    return _read(path, StageResult, f"remove {folder} to retrain this stage") if os.path.lexists(path) else None


def read_stages(run: Path) -> list[StageResult]:
    """Results of all stages of a run, in order; RunError when one is not finished."""
    sizes = [stage.size_px for stage in read_settings(run).pipeline.stages]
    found = [read_stage_result(stage_folder(run, number, size)) for number, size in enumerate(sizes, start=1)]
    stages = [stage for stage in found if stage is not None]
    if len(stages) < len(sizes):
        raise RunError(f"{run} is not finished; rerun the same `ptxdist train`, which skips finished stages")
    return stages


def write_evaluation(folder: Path, evaluation: EvaluationResult) -> None:
    """Write the result of an evaluation, last: it has the checksums of the tables."""
    files.write_json(folder / RESULT, evaluation, beside=TABLES)


def read_evaluation(folder: Path, *tables: str) -> EvaluationResult:
    """Result of an evaluation's folder; RunError when there is none, or when one of these `tables` is damaged."""
    path = folder / RESULT
    if not os.path.lexists(path):
        raise RunError(f"{folder} holds no evaluation; `ptxdist evaluate` makes one")
    return _read(path, EvaluationResult, "rerun `ptxdist evaluate`", *tables)


def read_result(run: Path) -> PipelineResult:
    """Result of a finished run; RunError when it is not finished, or when its files are those of different runs."""
    pipeline, path = read_settings(run).pipeline, run / RESULT
    if not os.path.lexists(path):
        raise RunError(f"{run} is not finished; rerun the same `ptxdist train`, which skips finished stages")
    remedy = "rerun the same `ptxdist train`, which writes it again"
    result = _read(path, PipelineResult, remedy)
    sizes = [(number, stage.size_px) for number, stage in enumerate(pipeline.stages, start=1)]
    held_out = result.evaluation.folds if "folds" in result.evaluation.model_fields_set else (pipeline.fold,)
    if [(stage.stage, stage.size_px) for stage in result.stages] != sizes or held_out != (pipeline.fold,):
        raise RunError(f"{path} is not of the run in {run / SETTINGS}; {remedy}")
    for stage in result.stages:
        folder, own = stage_folder(run, stage.stage, stage.size_px), None
        with suppress(RunError):  # damage is said by those who need more than `result`
            own = read_stage_result(folder)
        if own not in (None, stage):
            raise RunError(f"{path} and {folder / RESULT} are not of one run; {remedy}")
    return result


def read_origin(run: Path) -> Origin | None:
    """What the network of a run is made from; None for runs of older versions, which have no record of it.

    RunError when it or training-images.csv is damaged, or one of both is missing.
    """
    path = run / ORIGIN
    if not any(os.path.lexists(run / name) for name in (ORIGIN, TRAINING_IMAGES)):
        return None
    remedy = f"rerun the same `ptxdist train` with {path} removed, which it writes again"
    return _read(path, Origin, remedy, TRAINING_IMAGES)


def read_training_images(run: Path) -> bytes | None:
    """Content of training-images.csv; None for runs of older versions. Errors as for `read_origin`."""
    path = run / TRAINING_IMAGES
    return path.read_bytes() if read_origin(run) and path.is_file() else None


def read_environment(run: Path) -> Environment:
    """The versions that a run was made with; an empty record where they are not known."""
    path = run / ENVIRONMENT
    return (
        _read(path, Environment, f"remove {path}: the report does without it")
        if os.path.lexists(path)
        else Environment()
    )


def read_metrics(run: Path) -> list[EpochMetrics]:
    """Lines of metrics.jsonl, in order; [] before the first epoch is finished. RunError when it is damaged.

    It is for people and other programs: the epochs of a finished stage are in its result too.
    """
    path = run / METRICS
    try:
        lines = path.read_bytes().decode().splitlines() if path.is_file() else []
        return [EpochMetrics.model_validate(files.parse_json(line)) for line in lines]
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged; the same epochs are in the results of the stages") from error


def _read(path: Path, kind: type[_Record], remedy: str, *beside: str) -> _Record:
    content = files.read_json(path, remedy, *beside)
    try:
        record = kind.model_validate(content)
        _check_lengths(getattr(record, "evaluation", record))
        return record
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged or of another version; {remedy}") from error


def _check_lengths(record: object) -> None:
    """Raise ValueError when lists of an evaluation that belong together differ in length."""
    if isinstance(record, EvaluationResult):
        pairs: list[tuple[Sized, Sized]] = [(row, found.areas_px) for found in record.tuned for row in found.surface]
        pairs += [(found.surface, found.thresholds) for found in record.tuned]
        pairs += [(found.counts, side) for found in record.calibration for side in (found.predicted, found.observed)]
        if any(len(one) != len(other) for one, other in pairs):
            raise ValueError("lists that belong together differ in length")


def write_metrics(run: Path, metrics: list[EpochMetrics]) -> None:
    """Write metrics.jsonl."""
    files.write_whole(run / METRICS, "".join(item.model_dump_json() + "\n" for item in metrics))
