"""A run, stage by stage: chains checkpoints, collects results, goes on where an interrupted run stood.

Owns: the order of the stages, which finished stage is used again, the run's results. Refuses: caches that lack a size,
run folders of other settings, two trainings of one run at once. Called by: `cli`. Who does the work is an engine's,
which the caller opens: `cluster.engine` with Ray, else `local`.

Two steps inside `only_training`: `plan_run` checks everything that can be wrong before anything starts, `run_pipeline`
does the work.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ptxdist import files
from ptxdist.cache.catalog import read_catalog
from ptxdist.cache.split import split_indices
from ptxdist.cache.store import open_store
from ptxdist.cache.verify import refuse_damaged
from ptxdist.config import Settings, fingerprint, snapshot
from ptxdist.errors import BusyError, CheckpointError, PtxdistError, RunError, SettingsError, StoreError
from ptxdist.records import EpochMetrics, EvaluationResult, PipelineResult, StageHistory, StageResult, Step
from ptxdist.run.environment import environment
from ptxdist.run.tracking import Tracker, refuse_missing_mlflow
from ptxdist.rundir import (
    BEST_WEIGHTS,
    CHECKPOINTS,
    ENVIRONMENT,
    LOCK,
    RESULT,
    SETTINGS,
    read_stage_result,
    stage_folder,
    start_run,
)
from ptxdist.storage.caches import local_cache
from ptxdist.storage.remote import is_remote
from ptxdist.storage.runs import Mirror, stage_part

TRAINING = 3  # counts changes of the code that change what a stage learns: stages of another number are trained anew

Event = str | EpochMetrics | StageHistory | StageResult | Step


class Engine(Protocol):
    """Who does the work of a run."""

    def nodes(self) -> list[dict[str, float]]:
        """CPUs, GPUs and kinds of accelerator of each living node; [] on this machine alone."""

    def train(self, task: dict[str, Any]) -> StageResult:
        """Train one stage; `task` as `stage.run_stage` takes it."""

    def evaluate(self, task: dict[str, Any]) -> EvaluationResult:
        """Evaluate the last stage, whose StageResult as JSON is `task["result"]`."""


OpenEngine = Callable[[Settings, Mirror, Callable[[Event], None]], AbstractContextManager[Engine]]


@dataclass(frozen=True)
class Plan:
    """A run that can start: its settings, its absolute folder, and the fingerprint of each stage.

    `mirror` sends what is written there, if the run is in an object store; `token` is that under which a copy of the
    cache has been checked.
    """

    settings: Settings
    mirror: Mirror
    token: str
    fingerprints: tuple[str, ...]

    @property
    def run(self) -> Path:
        """The folder of the run on this node."""
        return self.mirror.folder


@contextmanager
def only_training(run: Path) -> Iterator[None]:
    """The only training of a run, whose folder is made; BusyError when there is another one, on any machine.

    The lock is the kernel's: it goes with the process, however that ends. A file system without locks has none.
    """
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise RunError(f"{run} cannot be made: {error.strerror}; give another folder with --run") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"another `ptxdist train` works on {run}; wait for it or stop it") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise RunError(f"{run} cannot be locked: {error.strerror}; give another folder with --run") from error
        try:
            yield
        finally:
            if not (run / SETTINGS).is_file():  # refused before it became a run
                with suppress(OSError):
                    (run / LOCK).unlink()
                    for folder in made:
                        folder.rmdir()
    finally:
        os.close(lock)


def plan_run(
    settings: Settings,
    run: Path | Mirror,
    *,
    writes: bool = True,
    on_progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> Plan:
    """Check cache (every byte of it), split, weights file and run folder, and make the folder; nothing heavy starts.

    Of torchrun's processes only one `writes` into the folder. Raises StoreError, CheckpointError or RunError with what
    to do.
    """
    refuse_missing_mlflow(settings)
    place, token = settings.data.cache, secrets.token_hex(8)
    sizes = {stage.size_px for stage in settings.pipeline.stages}
    if not is_remote(place):
        place = str(Path(place).absolute())
    cache = local_cache(place, sizes, data=settings.data, token=token, on_progress=on_progress)
    catalog = read_catalog(cache)
    fold = settings.pipeline.fold
    if fold >= catalog.folds:
        raise SettingsError(
            f"no fold {fold}: {cache} has folds 0 to {catalog.folds - 1} (`ptxdist preprocess --folds`)"
        )
    for side, indices in zip(("train", "val"), split_indices(catalog.labelled, fold), strict=True):
        if not len(indices):
            raise StoreError(
                f"{cache} has no {side} cases for fold {fold}; a split needs images of at least two patients"
            )
    weights = settings.pipeline.model.encoder_weights
    if weights not in ("imagenet", "none") and not Path(weights).is_file():
        raise CheckpointError(f"no encoder weights at {weights}; give imagenet, none, or the path of a file")
    source = files.sha256(Path(weights)) if Path(weights).is_file() else weights
    fingerprints: list[str] = []
    for stage in settings.pipeline.stages:
        store = open_store(cache, stage.size_px)
        if store.cases != len(catalog.labelled):
            raise StoreError(f"{store.path} and the catalog of {cache} differ; run `ptxdist preprocess` again")
        model = settings.pipeline.model.model_copy(update={"encoder_weights": source})
        parent = fingerprints[-1] if fingerprints else None
        seed = settings.pipeline.seed
        fingerprints.append(fingerprint(TRAINING, store.fingerprint, stage, model, seed, fold, parent))
    if not is_remote(place):  # the copy of a remote one has just been compared
        refuse_damaged(cache, sorted(sizes), on_progress=on_progress)
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"cache": place})})
    mirror = run if isinstance(run, Mirror) else Mirror(run)
    if writes:
        start_run(mirror.folder, settings)
    return Plan(settings, mirror, token, tuple(fingerprints))


def run_pipeline(
    plan: Plan, open_engine: OpenEngine | None = None, *, on_event: Callable[[Event], None] = lambda event: None
) -> PipelineResult:
    """Train what is not finished yet, stage by stage, evaluate, and write the results into the run folder.

    `open_engine` opens who does the work. Without it that is this process, or those of torchrun, each of which calls
    this; only rank 0 returns, the others end the process (SystemExit) after the evaluation. Raises TrainingError when a
    stage fails for good; the run folder stays, and the same call goes on from there.
    """
    from ptxdist.run.local import engine_here  # loads torch
    from ptxdist.train.distributed import first, rank

    started = time.perf_counter()
    results: list[StageResult] = []
    first_rank = open_engine is not None or os.environ.get("RANK", "0") == "0"
    tracker = Tracker(plan.run, plan.settings, on_event) if first_rank else None

    def tell(event: Event) -> None:
        if tracker:
            tracker.show(event)
        try:
            on_event(event)
        except Exception:  # what is shown must not end what is trained
            logging.getLogger(__name__).exception("an event could not be shown")

    open_engine = open_engine or engine_here
    with tracker or nullcontext(), open_engine(plan.settings, plan.mirror, tell) as engine:
        if rank() == 0:
            files.write_json(plan.run / ENVIRONMENT, environment(engine.nodes()))
        for number in range(1, len(plan.fingerprints) + 1):
            finished = first(partial(_finished_stage, plan, number, tell))
            result = finished or engine.train(_task(plan, number, results))
            results.append(result)
            if rank() == 0:
                shutil.rmtree(plan.run / Path(result.weights).parent / CHECKPOINTS, ignore_errors=True)
                plan.mirror.push(stage_part(number, result.size_px))
                tell(result)
        last = results[-1].model_dump(mode="json")
        evaluation = engine.evaluate({**_task(plan, len(results), results), "result": last})
        if tracker:
            tracker.show(evaluation)
    pipeline = PipelineResult(
        pipeline=plan.settings.pipeline.name,
        stages=tuple(results),
        evaluation=evaluation,
        seconds=time.perf_counter() - started,
    )
    files.write_json(plan.run / RESULT, pipeline)
    return pipeline


def _finished_stage(plan: Plan, number: int, on_event: Callable[[Event], None]) -> StageResult | None:
    """The stage as this run or a run beside it has finished it, with the same fingerprint and whole weights."""
    size, wanted = plan.settings.pipeline.stages[number - 1].size_px, plan.fingerprints[number - 1]
    folder = stage_folder(plan.run, number, size)
    own = read_stage_result(folder)
    if own is not None:
        if own.fingerprint != wanted:
            raise RunError(
                f"stage {number} of {plan.run} was trained on other data or by another version of ptxdist; "
                f"give another folder with --run, or remove {folder}"
            )
        _check_weights(plan.run / own.weights, own.weights_sha256)
        return own
    for path in sorted(plan.run.parent.glob(f"*/stages/*/{RESULT}")):
        try:
            other = read_stage_result(path.parent)
            if other is None or other.fingerprint != wanted:
                continue
            source = path.parents[2]
            _check_weights(source / other.weights, other.weights_sha256)
        except PtxdistError as error:
            on_event(f"{path.parent} is not used again: {error}")
            continue
        weights = folder / BEST_WEIGHTS
        files.copy(source / other.weights, weights)
        history = tuple(item.model_copy(update={"stage": number}) for item in other.history)
        mine = other.model_copy(
            update={
                "stage": number,
                "history": history,
                "best": other.best.model_copy(update={"stage": number}),
                "weights": weights.relative_to(plan.run).as_posix(),
                "reused_from": other.reused_from or source.name,
            }
        )
        files.write_json(folder / RESULT, mine)
        return mine
    return None


def _check_weights(path: Path, sha256: str) -> None:
    if not path.is_file() or files.sha256(path) != sha256:
        raise RunError(f"{path} is missing or was altered; remove {path.parent} to train this stage again")


def _task(plan: Plan, number: int, former: list[StageResult]) -> dict[str, Any]:
    """What a rank has to know to train a stage, as it crosses Ray's border."""
    return {
        "settings": snapshot(plan.settings),
        "token": plan.token,
        "run": plan.mirror.remote.url if plan.mirror.remote else str(plan.run),
        "number": number,
        "fingerprint": plan.fingerprints[number - 1],
        "parent": former[-1].model_dump(mode="json") if former else None,
    }
