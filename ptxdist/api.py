"""The commands as functions of the same names, whose parameters are named like the options of the commands.

All of them take paths as text or as `Path`, print their progress on stderr as the commands do (in a notebook as lines),
unless `quiet`, and raise a `ptxdist.errors.PtxdistError`, whose text says what to do. `workers` above 1 starts
processes, which import the script that calls: there the call belongs below `if __name__ == "__main__":`.

The examples follow each other; a test runs them. Heavy libraries are loaded by the function that needs them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ptxdist.errors import RunError, SettingsError

if TYPE_CHECKING:
    from ptxdist.cache.preprocess import PreprocessResult
    from ptxdist.config import Settings
    from ptxdist.events import Event, OnEvent
    from ptxdist.executor import OnProgress
    from ptxdist.phantoms.dataset import PhantomResult
    from ptxdist.records import EvaluationResult, PipelineResult
    from ptxdist.run.engine import Engine
    from ptxdist.run.planning import Planned
    from ptxdist.scores.compare import Comparison
    from ptxdist.scores.external import ExternalScores
    from ptxdist.scores.working import Kind
    from ptxdist.storage.runs import Mirror

Place = str | os.PathLike[str]


def phantom(
    out: Place,
    *,
    cases: int = 300,
    seed: int = 0,
    positive_share: float = 0.2215,
    labels: Place | None = None,
    bedside: bool = False,
    workers: int = 1,
    quiet: bool = False,
) -> PhantomResult:
    """Write synthetic radiographs of 1024 x 1024 pixels with masks, in the format of the SIIM-ACR challenge.

    With `labels`, a label table, they are drawn for its ids and masks, for all of them if `cases` is 0. Returns the
    places of images and tables, and their numbers. Errors as `phantoms.dataset.write_phantoms`.

    >>> written = ptxdist.phantom("phantoms", cases=12, positive_share=0.5)
    >>> written.images, written.labels.name
    (12, 'train-rle.csv')
    """
    from ptxdist.phantoms.dataset import write_phantoms

    with _shown(quiet) as update:
        return write_phantoms(
            Path(out),
            cases=cases,
            seed=seed,
            positive_share=positive_share,
            labels=_path(labels),
            bedside=bedside,
            workers=workers,
            on_image=partial(update, "images"),
        )


def preprocess(
    dicom: Place,
    labels: Place,
    out: Place,
    *,
    match: str | None = None,
    finding: str = "pneumothorax",
    unlisted: Literal["unused", "negative"] = "unused",
    patients: Place | None = None,
    patient_key: Place | None = None,
    size: int | Sequence[int] = (256, 512),
    folds: int = 10,
    dialect: str | None = None,
    replace: bool = False,
    workers: int = 1,
    quiet: bool = False,
) -> PreprocessResult:
    """Convert a folder of DICOM or PNG images and their labels to a cache, `out`: a folder or s3://….

    Called again after a change or an interruption, it skips what is finished and unchanged. `size` is the side of the
    images in the cache in pixels, one or several. Returns the catalog (cases, split, rejected files) and the numbers of
    shards written and kept. Errors as `cache.preprocess.preprocess`; an object store raises StorageError.

    >>> built = ptxdist.preprocess(
    ...     "phantoms/dicom-images", "phantoms/train-rle.csv", "cache", patients="phantoms/patients.csv", size=64
    ... )
    >>> len(built.catalog.labelled), len(built.catalog.rejects), built.sizes_px
    (12, 0, (64,))
    """
    from ptxdist.cache.preprocess import preprocess as build
    from ptxdist.storage.caches import working_cache

    if unlisted not in ("unused", "negative"):
        raise SettingsError(f"unlisted={unlisted!r} is not one of 'unused', 'negative'")
    with _shown(quiet) as update, working_cache(os.fspath(out), update) as folder:
        return build(
            Path(dicom),
            Path(labels),
            folder,
            match=match,
            finding=finding,
            unlisted_negative=unlisted == "negative",
            patients=_path(patients),
            patient_key=_path(patient_key),
            sizes_px=_many(size),
            folds=folds,
            dialect=dialect,
            replace_other=replace,
            workers=workers,
            on_progress=update,
        )


def plan(cache: Place, *, out: Place = "plan.toml", quiet: bool = False) -> Planned:
    """Write a pipeline that fits a cache and this machine, each line with its reason.

    Returns the path of the file, what it follows from, and the estimated time, from a few steps of each stage. Errors
    as `run.planning.write_plan`.

    >>> planned = ptxdist.plan("cache")
    >>> planned.command
    'ptxdist train --pipeline plan.toml --data cache'
    >>> [stage.size_px for stage in planned.settings.pipeline.stages]
    [64, 64]
    """
    from ptxdist.run.planning import write_plan

    with _shown(quiet) as update:
        return write_plan(_place(cache), Path(out), on_progress=update)


def train(
    data: Place | None = None,
    *,
    pipeline: Place = "paper",
    run: Place | None = None,
    workers: int | None = None,
    site: Place | None = None,
    encoder_weights: Place | None = None,
    init: Place | None = None,
    fold: int | Literal["all"] | None = None,
    set: Mapping[str, Any] | None = None,
    no_reuse: bool = False,
    on_event: OnEvent = lambda event: None,
    quiet: bool = False,
) -> PipelineResult | EvaluationResult:
    """Train a pipeline on the cache `data`, evaluate it and write RUN/report/index.html; called again, it resumes.

    `pipeline` is a name or a TOML file, as `plan` writes it; `set` changes any setting by its name. `run` is a folder
    or s3://…, by default runs/PIPELINE. Training takes place in this process, under torchrun in all of its processes,
    and with `workers` on so many Ray workers. `on_event` is called with each `events.Event`, maybe in another thread;
    an exception in it is logged and does not stop the training.

    Returns the content of RUN/result.json: stages with the scores of each epoch, and the evaluation. With `fold="all"`
    one run for each fold is trained, and their common EvaluationResult returned. Errors as `run.pipeline.train`.

    >>> result = ptxdist.train("cache", pipeline="plan.toml", run="runs/first", set={"stages.*.epochs": 1})
    >>> [stage.best.epoch for stage in result.stages], 0 <= result.evaluation.scores.kaggle_dice <= 1
    ([1, 1], True)
    """
    from ptxdist.console.calls import training_shown
    from ptxdist.resolve import load_settings
    from ptxdist.run import folds
    from ptxdist.run import pipeline as one
    from ptxdist.train.choices import refuse_unknown

    options = {
        **(set or {}),
        "train.workers": workers,
        "train.reuse": False if no_reuse else None,
        "data.cache": data,
        "pipeline.model.encoder_weights": encoder_weights,
        "pipeline.model.init": init,
        "pipeline.fold": None if fold == "all" else fold,
    }
    settings = load_settings(os.fspath(pipeline), site=None if site is None else os.fspath(site), options=options)
    refuse_unknown(settings)
    work: Callable[..., PipelineResult | EvaluationResult] = folds.train_folds if fold == "all" else one.train
    with training_shown(settings.pipeline.stages, quiet, on_event) as (show, progress):
        return work(
            settings,
            Path("runs") / settings.pipeline.name if run is None else _place(run),
            engine=None if workers is None else ray_with_log,
            on_event=show,
            on_progress=progress,
        )


def evaluate(
    models: Place | Sequence[Place],
    *,
    out: Place | None = None,
    patients: Place | None = None,
    data: Place | None = None,
    split: Literal["all", "train", "val"] = "all",
    sensitivity: float | Sequence[float] = (),
    specificity: float | Sequence[float] = (),
    prevalence: float | None = None,
    workers: int | None = None,
    quiet: bool = False,
) -> EvaluationResult:
    """Score finished runs on the cases that each has held out, or with `data` runs and bundles on another cache.

    Several runs of one fold are an ensemble, runs of several folds are pooled. `out` is the folder of the evaluation,
    by default that of the only run. Scores have 95 % intervals by patient, if there are five patients at least.
    `sensitivity` and `specificity` find working points, which `Predictor.load(…, at="sensitivity=0.95")` uses. With
    `workers`, so many Ray workers divide the cases; under torchrun its processes do. Errors as
    `run.evaluation.evaluate_models`; BusyError while the run it would be written into is trained or evaluated.

    >>> evaluation = ptxdist.evaluate("runs/first", sensitivity=0.9)
    >>> evaluation.scores.kaggle_dice == result.evaluation.scores.kaggle_dice
    True
    """
    places = [_place(model) for model in _many(models)]
    refuse_unfit(places, out, data, split, (*_many(sensitivity), *_many(specificity)), prevalence)
    from ptxdist import locks
    from ptxdist.events import Progress
    from ptxdist.run.evaluation import EvaluationTask, evaluate_here
    from ptxdist.rundir import LOCK, SETTINGS
    from ptxdist.scores.working import Wanted

    targets: list[tuple[Kind, float]] = [("sensitivity", value) for value in _many(sensitivity)]
    targets += [("specificity", value) for value in _many(specificity)]
    task = EvaluationTask(
        models=tuple(map(_absolute, places)),
        data=None if data is None else _absolute(data),
        split=split,
        out=None if out is None else _absolute(out),
        patients=None if patients is None else _absolute(patients),
        working=Wanted(tuple(targets), prevalence),
    )
    run = Path(task.models[0])
    alone: AbstractContextManager[object] = nullcontext()
    if task.out is None and (run / SETTINGS).is_file() and os.environ.get("RANK", "0") == "0":  # written into the run
        alone = locks.only(run / LOCK, f"a `train` or `evaluate` works on {run}; wait for it, or give another --out")
    with alone, _shown(quiet) as update:
        if workers is None:
            return evaluate_here(task, on_cases=partial(update, "images"))

        from ptxdist import console
        from ptxdist.cluster.engine import evaluate_on_workers
        from ptxdist.config import TrainSettings

        def on_event(event: Event) -> None:
            if isinstance(event, Progress):
                update("images", event.done, event.total)

        with console.ray_log(task.folder if task.out else task.folder.parent):
            return evaluate_on_workers(task, TrainSettings(workers=workers), on_event)


def refuse_unfit(
    models: Sequence[Path | str],
    out: Place | None,
    data: Place | None,
    split: str,
    targets: Sequence[float],
    prevalence: float | None,
) -> None:
    """Raise SettingsError or RunError when the options of `evaluate` do not go together; loads nothing."""
    if prevalence is not None and not targets:
        raise SettingsError("--prevalence goes with --sensitivity or --specificity")
    if split != "all" and data is None:
        raise SettingsError("--split goes with --data; a run is evaluated on the cases that it has held out")
    if not models:
        raise RunError("no model to evaluate: give a finished run or a bundle")
    if out is None and (data is not None or isinstance(models[0], str)):
        reason = "" if data is not None else f"{models[0]} is only read; "
        raise RunError(f"{reason}name a folder for the evaluation with --out")


def compare(runs: Sequence[Place]) -> Comparison:
    """Compare evaluated runs with the first one, on the cases that all have evaluated.

    A run may also be the folder of an evaluation. Returns scores, differences and 95 % intervals of both. Errors as
    `scores.compare.compare`.

    >>> comparison = ptxdist.compare(["runs/first", "runs/first"])
    >>> comparison.runs[1].differences["kaggle_dice"]
    0.0
    """
    from ptxdist.scores import compare as comparison
    from ptxdist.storage.runs import local_run

    return comparison.compare([local_run(_place(run)) for run in runs])


def score(
    predictions: Place,
    truth: Place,
    *,
    match: str | None = None,
    finding: str = "pneumothorax",
    patients: Place | None = None,
    subset: bool = False,
    threshold: float | None = None,
    dialect: str | None = None,
    truth_dialect: str | None = None,
    size_px: int | None = None,
    surfaces: bool = False,
    quiet: bool = False,
) -> ExternalScores:
    """Score the masks of any tool under every definition of Dice in use, without a model.

    Both sides may be tables of run-length masks, folders of images or NIfTI; `truth` may have each format that
    `preprocess` reads. Returns each score with its interval and its definition. Errors as
    `scores.external.score_predictions`.

    >>> perfect = ptxdist.score("phantoms/train-rle.csv", "phantoms/train-rle.csv")
    >>> perfect.cases, perfect.scores["kaggle_dice"].value
    (12, 1.0)
    """
    from ptxdist.scores.external import score_predictions

    with _shown(quiet) as update:
        return score_predictions(
            Path(predictions),
            Path(truth),
            match=match,
            finding=finding,
            patients=_path(patients),
            subset=subset,
            threshold=threshold,
            dialect=dialect,
            truth_dialect=truth_dialect,
            size_px=size_px,
            surfaces=surfaces,
            on_progress=update,
        )


def report(run: Place) -> Path:
    """Rewrite the report of a finished run, or of an evaluation on data from elsewhere; returns the path of its page.

    Errors as `report.report.write_report`.

    >>> ptxdist.report("runs/first").as_posix()
    'runs/first/report/index.html'
    """
    from ptxdist.report.report import write_report
    from ptxdist.storage.runs import local_run

    return write_report(local_run(_place(run)))


@contextmanager
def ray_with_log(settings: Settings, mirror: Mirror, on_event: OnEvent) -> Iterator[Engine]:
    """The Ray engine, with the output of Ray in RUN/ray.log; a `run.engine.OpenEngine`."""
    from ptxdist import console
    from ptxdist.cluster.engine import ray_engine

    with console.ray_log(mirror.folder), ray_engine(settings, mirror, on_event) as engine:
        yield engine


def _shown(quiet: bool) -> AbstractContextManager[OnProgress]:
    from ptxdist.console.calls import shown

    return shown(quiet)


def _place(place: Place) -> Path | str:
    """An address in an object store as text, anything else as a path."""
    return text if "://" in (text := os.fspath(place)) else Path(text)


def _absolute(place: Place) -> str:
    return text if "://" in (text := os.fspath(place)) else os.path.abspath(text)


def _path(place: Place | None) -> Path | None:
    return None if place is None else Path(place)


def _many(value: Any) -> tuple[Any, ...]:
    """One value, or several."""
    return (value,) if isinstance(value, str | os.PathLike | int | float) else tuple(value)
