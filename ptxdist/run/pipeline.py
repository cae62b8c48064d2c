"""`train()`: a run from its settings to its report, for the command line and for notebooks.

Owns: the order of the stages, which finished stages are reused, the results of the run. Refuses: caches that lack a
size, run folders of other settings, two trainings of one run at the same time.

    with working_run(…), only_training(…):      the run folder, locked
        plan = plan_run(…)                      all checks, before anything starts
        result = run_pipeline(plan, …)          stage by stage, then the evaluation
        write_report(…)

An engine does the work: `run.local` without Ray, `cluster.engine` with it. Rerun after an interruption, `train` skips
finished stages, and the unfinished one resumes from its last checkpoint. When nothing is left to do, no engine starts.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

from ptxdist import files, locks
from ptxdist.config import Settings
from ptxdist.errors import PtxdistError, RunError, SettingsError, system_says
from ptxdist.events import Event, Message, OnEvent
from ptxdist.records import PipelineResult, StageResult
from ptxdist.report.model_card import made_from
from ptxdist.report.report import write_report
from ptxdist.run.engine import Engine, OpenEngine, refuse_other_workers
from ptxdist.run.environment import environment
from ptxdist.run.plan import OnProgress, Plan, plan_run
from ptxdist.run.tracking import Tracker
from ptxdist.rundir import (
    BEST_WEIGHTS,
    CHECKPOINTS,
    ENVIRONMENT,
    EVALUATION,
    LOCK,
    RESULT,
    SETTINGS,
    TABLES,
    read_evaluation,
    read_result,
    read_stage_result,
    stage_folder,
)
from ptxdist.storage.remote import is_remote
from ptxdist.storage.runs import stage_part, working_run


def train(
    settings: Settings,
    run: Path | str,
    *,
    engine: OpenEngine | None = None,
    on_event: OnEvent = lambda event: None,
    on_progress: OnProgress = lambda what, done, total: None,
) -> PipelineResult:
    """Train all stages of `settings.pipeline`, evaluate the last one, and write the report; returns RUN/result.json.

    `settings` come from `load_settings`; `settings.data.cache` is a cache that `preprocess` wrote. `run` is a folder or
    s3://…; `ptxdist.rundir` lists what is written there. The report is RUN/report/index.html. Called again with the
    same arguments, `train` skips finished stages and resumes an unfinished one.

    `engine` does the work. None is this process; under torchrun, whose processes all call `train`, it is all of them.
    `ptxdist.cluster.engine.ray_engine` starts `settings.train.workers` workers with Ray. `on_event` is called with each
    `events.Event`, possibly in another thread; an exception in it is logged and does not stop the training.
    `on_progress` is called with (what, done, total) while the cache is checked.

    Raises SettingsError, StoreError, CheckpointError or RunError when something does not fit, before training starts;
    BusyError when another process trains this run; TrainingError when a stage fails for good.
    """
    is_first = _is_first(engine)
    if engine is None:
        _refuse_other_processes(settings, run)
    sizes = [stage.size_px for stage in settings.pipeline.stages]

    def on_check(what: str, done: int, total: int) -> None:
        if is_first:
            on_progress(f"check of {what}", done, total)

    with (
        working_run(run, sizes, settings.data) as mirror,
        only_training(mirror.folder) if is_first else nullcontext(),
    ):
        plan = plan_run(settings, mirror, writes=is_first, on_progress=on_check)
        result = run_pipeline(plan, engine, on_event=on_event)
        if is_first:
            write_report(mirror.folder)
    return result


@contextmanager
def only_training(run: Path) -> Iterator[None]:
    """Make the folder of a run and lock it for one training; BusyError when another process, on any machine, has it.

    If the folder has not become a run when the block ends, it is removed.
    """
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{run} cannot be made: {system_says(error, 'give another folder with --run')}") from error
    with locks.only(run / LOCK, f"another `ptxdist train` works on {run}; wait for it or stop it"):
        try:
            yield
        finally:
            if not (run / SETTINGS).is_file():
                with suppress(OSError):
                    (run / LOCK).unlink()
                    for folder in made:
                        folder.rmdir()


def run_pipeline(
    plan: Plan, engine: OpenEngine | None = None, *, on_event: OnEvent = lambda event: None
) -> PipelineResult:
    """Train the stages that are not finished yet, evaluate the last one, and write the results into the run folder.

    `engine`, `on_event` and errors as for `train`. Every process of torchrun returns the result.
    """
    started, is_first = time.perf_counter(), _is_first(engine)
    show = _surviving(on_event)
    tracker = Tracker(plan.run, plan.settings, show) if is_first else None

    def emit(event: Event) -> None:
        if tracker:
            tracker.add(event)
            show(event)

    with tracker or nullcontext():
        if former := _unchanged(plan):
            for stage in former.stages:
                emit(stage)
            emit(former.evaluation)
            return former
        emit(plan.start)
        with _opened(engine, plan, emit) as opened:
            if is_first:
                files.write_json(plan.run / ENVIRONMENT, environment(opened.nodes()))
                if parent := plan.origin.parent:
                    emit(Message(text=("warning: " if parent.finding else "") + " ".join(made_from(parent))))
            results: list[StageResult] = []
            for number in range(1, len(plan.fingerprints) + 1):
                result = _stage(plan, number, results, opened, emit)
                results.append(result)
                if is_first:
                    shutil.rmtree(plan.run / Path(result.weights).parent / CHECKPOINTS, ignore_errors=True)
                    plan.mirror.push(stage_part(number, result.size_px))
                emit(result)
            last = plan.task(len(results), results[:-1])
            evaluation = opened.evaluate(last.model_copy(update={"result": results[-1]}))
            emit(evaluation)
    pipeline = PipelineResult(
        pipeline=plan.settings.pipeline.name,
        stages=tuple(results),
        evaluation=evaluation,
        seconds=time.perf_counter() - started,
    )
    if is_first:
        files.write_json(plan.run / RESULT, pipeline)
    return pipeline


def _opened(engine: OpenEngine | None, plan: Plan, emit: OnEvent) -> AbstractContextManager[Engine]:
    """The engine of the run; None: that of this process."""
    if engine is None:
        from ptxdist.run.local import local_engine  # loads torch

        engine = local_engine
    return engine(plan.settings, plan.mirror, emit)


def _unchanged(plan: Plan) -> PipelineResult | None:
    """The result of a run in which nothing is left to do, so that no engine has to start; RunError as `_own_stage`."""
    stages = tuple(_own_stage(plan, number) for number in range(1, len(plan.fingerprints) + 1))
    with suppress(RunError):  # what else is missing or wrong is made or refused later
        former = read_result(plan.run)
        if stages == former.stages and read_evaluation(plan.run / EVALUATION, *TABLES) == former.evaluation:
            return former
    return None


def _stage(plan: Plan, number: int, former: list[StageResult], engine: Engine, emit: OnEvent) -> StageResult:
    """The result of a stage: of this run, of another run beside it, or of the engine."""
    find = partial(_finished_stage, plan, number, emit)
    if "RANK" in os.environ:  # of torchrun's processes
        from ptxdist.train.distributed import first  # loads torch

        find = partial(first, find)
    finished = find()
    return finished or engine.train(plan.task(number, former))


def _finished_stage(plan: Plan, number: int, emit: OnEvent) -> StageResult | None:
    """The stage as this run or a run beside it has finished it, with the same fingerprint and intact weights."""
    if (own := _own_stage(plan, number)) is not None:
        return own
    if not plan.settings.train.reuse:
        return None
    folder, wanted = _folder(plan, number), plan.fingerprints[number - 1]
    for path in sorted(plan.run.parent.glob(f"*/stages/*/{RESULT}")):
        try:
            other = read_stage_result(path.parent)
            if other is None or other.fingerprint != wanted:
                continue
            source = path.parents[2]
            _check_weights(source / other.weights, other.weights_sha256)
        except PtxdistError as error:
            emit(Message(text=f"{path.parent} is not reused: {error}"))
            continue
        emit(Message(text=f"stage {number} is taken from {source}, which trained the same; --no-reuse trains it anew"))
        return _take_over(other, source, plan.run, number, folder)
    return None


def _own_stage(plan: Plan, number: int) -> StageResult | None:
    """The stage as this run has finished it; RunError when it is another one or its weights are not intact."""
    folder = _folder(plan, number)
    own = read_stage_result(folder)
    if own is None:
        return None
    if own.fingerprint != plan.fingerprints[number - 1]:
        raise RunError(
            f"stage {number} of {plan.run} was trained on other data or by another version of ptxdist; "
            f"give another folder with --run, or remove {folder}"
        )
    _check_weights(plan.run / own.weights, own.weights_sha256)
    return own


def _folder(plan: Plan, number: int) -> Path:
    return stage_folder(plan.run, number, plan.settings.pipeline.stages[number - 1].size_px)


def _take_over(other: StageResult, source: Path, run: Path, number: int, folder: Path) -> StageResult:
    """Copy a finished stage of the run `source` into the `folder` of stage `number`; returns its new result."""
    weights = folder / BEST_WEIGHTS
    files.copy(source / other.weights, weights)
    mine = other.model_copy(
        update={
            "stage": number,
            "history": tuple(item.model_copy(update={"stage": number}) for item in other.history),
            "best": other.best.model_copy(update={"stage": number}),
            "weights": weights.relative_to(run).as_posix(),
            "reused_from": other.reused_from or source.name,
        }
    )
    files.write_json(folder / RESULT, mine)
    return mine


def _check_weights(path: Path, sha256: str) -> None:
    files.refuse_damaged(path, sha256, f"remove {path.parent} to retrain this stage", RunError)


def _is_first(engine: OpenEngine | None) -> bool:
    """Whether this process writes the run: the only one, or the first of torchrun's."""
    return engine is not None or os.environ.get("RANK", "0") == "0"


def _refuse_other_processes(settings: Settings, run: Path | str) -> None:
    refuse_other_workers(settings)
    if is_remote(run) and settings.train.workers > 1:
        raise SettingsError(f"{run} is written by one process or with Ray; leave out --without-ray")


def _surviving(on_event: OnEvent) -> OnEvent:
    """`on_event`, whose exceptions are logged: a display that fails must not end the training."""

    def call(event: Event) -> None:
        try:
            on_event(event)
        except Exception:
            logging.getLogger(__name__).exception("an event could not be shown")

    return call
