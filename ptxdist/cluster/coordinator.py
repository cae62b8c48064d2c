"""One TorchTrainer per stage: chains checkpoints, collects results, goes on where an interrupted run stood.

Owns: Ray on this machine, the order of the stages, which finished stage is used again, the run's results. Refuses:
caches that lack a size, run folders of other settings, more GPUs than there are. Called by: `cli`.

Two steps: `plan_run` checks everything that can be wrong before Ray starts, `run_pipeline` does the work.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ptxdist.config import PACKAGE, DataSettings, Settings, fingerprint, snapshot
from ptxdist.data.catalog import read_catalog
from ptxdist.data.store import open_store
from ptxdist.errors import CheckpointError, ClusterError, PtxdistError, RunError, StoreError, TrainingError
from ptxdist.rundir import (
    BEST_WEIGHTS,
    CHECKPOINTS,
    ENVIRONMENT,
    RESULT,
    EpochMetrics,
    EvaluationResult,
    PipelineResult,
    StageResult,
    file_sha256,
    read_stage_result,
    stage_folder,
    start_run,
    write_json,
    write_metrics,
)

TRAINING = 1  # counts changes of the code that change what a stage learns: stages of another number are trained anew
_POLL_S = 0.2

Step = tuple[int, str, int, int, int]  # stage, "train", "validate" or "evaluate", epoch, images done, images
Event = str | EpochMetrics | StageResult | Step


@dataclass(frozen=True)
class Plan:
    """A run that can start: its settings, absolute folders, and the fingerprint of each stage."""

    settings: Settings
    run: Path
    cache: Path
    fingerprints: tuple[str, ...]


def plan_run(settings: Settings, run: Path) -> Plan:
    """Check cache, split, weights file and run folder, and make the folder; nothing heavy starts.

    Raises StoreError, CheckpointError or RunError with what to do.
    """
    cache = Path(settings.data.cache).absolute()
    catalog = read_catalog(cache)
    for side in ("train", "val"):
        if not any(case.split == side for case in catalog.cases):
            raise StoreError(f"{cache} has no {side} cases; a split needs images of at least two patients")
    weights = settings.pipeline.model.encoder_weights
    if weights not in ("imagenet", "none") and not Path(weights).is_file():
        raise CheckpointError(f"no encoder weights at {weights}; give imagenet, none, or the path of a file")
    source = file_sha256(Path(weights)) if Path(weights).is_file() else weights
    fingerprints: list[str] = []
    for stage in settings.pipeline.stages:
        store = open_store(cache, stage.size_px)
        if store.cases != len(catalog.labelled):
            raise StoreError(f"{store.path} and the catalog of {cache} differ; run `ptxdist preprocess` again")
        model = settings.pipeline.model.model_copy(update={"encoder_weights": source})
        parent = fingerprints[-1] if fingerprints else None
        fingerprints.append(fingerprint(TRAINING, store.fingerprint, stage, model, settings.pipeline.seed, parent))
    settings = settings.model_copy(update={"data": DataSettings(cache=str(cache))})
    start_run(run, settings)
    return Plan(settings, run.absolute(), cache, tuple(fingerprints))


def run_pipeline(plan: Plan, *, on_event: Callable[[Event], None] = lambda event: None) -> PipelineResult:
    """Train what is not finished yet, stage by stage, evaluate, and write the results into the run folder.

    Raises TrainingError when a stage fails for good; the run folder stays, and the same call goes on from there.
    """
    started = time.perf_counter()
    write_json(plan.run / ENVIRONMENT, environment())
    results: list[StageResult] = []
    with _ray(plan.settings) as use_gpu:
        for number in range(1, len(plan.fingerprints) + 1):
            result = _finished_stage(plan, number, on_event) or _train(plan, number, results, use_gpu, on_event)
            results.append(result)
            write_metrics(plan.run, [item for done in results for item in done.history])
            shutil.rmtree(plan.run / Path(result.weights).parent / CHECKPOINTS, ignore_errors=True)
            on_event(result)
        evaluation = _evaluate(plan, results[-1], use_gpu, on_event)
    pipeline = PipelineResult(
        pipeline=plan.settings.pipeline.name,
        stages=tuple(results),
        evaluation=evaluation,
        seconds=time.perf_counter() - started,
    )
    write_json(plan.run / RESULT, pipeline)
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
        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / BEST_WEIGHTS
        shutil.copyfile(source / other.weights, weights.with_suffix(".tmp"))
        weights.with_suffix(".tmp").replace(weights)
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
        write_json(folder / RESULT, mine)
        return mine
    return None


def _check_weights(path: Path, sha256: str) -> None:
    if not path.is_file() or file_sha256(path) != sha256:
        raise RunError(f"{path} is missing or was altered; remove {path.parent} to train this stage again")


def _train(
    plan: Plan, number: int, former: list[StageResult], use_gpu: bool, on_event: Callable[[Event], None]
) -> StageResult:
    """One TorchTrainer over the workers; the result is what rank 0 wrote into the stage's folder."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

    from ptxdist.cluster.worker import train_stage

    train = plan.settings.train
    folder = stage_folder(plan.run, number, plan.settings.pipeline.stages[number - 1].size_px)
    with _listen(on_event) as inbox:
        trainer = TorchTrainer(
            train_stage,
            train_loop_config={
                "settings": snapshot(plan.settings),
                "cache": str(plan.cache),
                "run": str(plan.run),
                "number": number,
                "fingerprint": plan.fingerprints[number - 1],
                "parent": former[-1].model_dump(mode="json") if former else None,
                "inbox": inbox,
            },
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=train.workers, use_gpu=use_gpu, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                name=f"{folder.name}-{time.time_ns()}",
                storage_path=str(folder / "ray"),
                failure_config=FailureConfig(max_failures=train.max_worker_failures),
            ),
        )
        try:
            trainer.fit()
        except WorkerGroupError as error:
            causes = [_cause(failure) for failure in error.worker_failures.values()]
            for cause in causes:
                if isinstance(cause, PtxdistError):
                    raise cause from error
            raise TrainingError(f"stage {number} stopped: a worker failed with {_brief(causes[0])}") from error
        except (ControllerError, TrainingFailedError) as error:
            cause = getattr(error, "controller_failure", error)
            raise TrainingError(f"stage {number} stopped: {_brief(cause)}") from error
        finally:
            shutil.rmtree(folder / "ray", ignore_errors=True)
    result = read_stage_result(folder)
    if result is None:
        raise TrainingError(
            f"stage {number} ended without a result in {folder}; is it on storage that all nodes share?"
        )
    return result


def _evaluate(plan: Plan, last: StageResult, use_gpu: bool, on_event: Callable[[Event], None]) -> EvaluationResult:
    import ray

    from ptxdist.cluster.worker import evaluate_run

    with _listen(on_event) as inbox:
        task = ray.remote(num_cpus=1, num_gpus=1 if use_gpu else 0)(evaluate_run).remote(
            {
                "settings": snapshot(plan.settings),
                "cache": str(plan.cache),
                "run": str(plan.run),
                "result": last.model_dump(mode="json"),
                "inbox": inbox,
            }
        )
        try:
            return EvaluationResult.model_validate(ray.get(task))
        except ray.exceptions.RayTaskError as error:
            cause = _cause(error)
            raise (
                cause if isinstance(cause, PtxdistError) else TrainingError(f"the evaluation stopped: {_brief(cause)}")
            ) from error


def _cause(error: BaseException) -> BaseException:
    """The exception that user code raised, out of Ray's wrappings."""
    inner = getattr(error, "cause", None)
    return _cause(inner) if isinstance(inner, BaseException) and inner is not error else error


def _brief(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300]}" if lines else type(error).__name__


@contextmanager
def _listen(on_event: Callable[[Event], None]) -> Iterator[Any]:
    """An Inbox for workers, emptied by a thread that passes its events on in order."""
    import ray

    from ptxdist.cluster.worker import Inbox

    inbox = Inbox.remote()  # type: ignore[attr-defined]
    ended = threading.Event()

    def pass_on() -> None:
        for event in ray.get(inbox.take.remote()):
            on_event(EpochMetrics.model_validate(event) if isinstance(event, dict) else event)

    def poll() -> None:
        while not ended.wait(_POLL_S):
            pass_on()

    thread = threading.Thread(target=poll, name="ptxdist-events", daemon=True)
    thread.start()
    try:
        yield inbox
    finally:
        ended.set()
        thread.join()
        pass_on()
        ray.kill(inbox)


@contextmanager
def _ray(settings: Settings) -> Iterator[bool]:
    """Ray, connected: inside a Ray job its cluster, else one on this machine. Yields whether workers get a GPU."""
    # Without this `report()` waits for the controller's two-second poll (see performance notes in ARCHITECTURE.md).
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    train = settings.train
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=False, logging_level="ERROR")
        else:
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, train.workers),
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise ClusterError(f"Ray could not be started or reached: {_brief(error)}") from error
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if train.device == "gpu" and gpus < train.workers and not os.environ.get("RAY_ADDRESS"):
            raise ClusterError(
                f"{train.workers} workers need a GPU each, and there are {gpus}; "
                "use fewer --workers or --set train.device=cpu"
            )
        use_gpu = train.device == "gpu" or (train.device == "auto" and gpus >= train.workers)
        if cpus < train.workers and os.environ.get("RAY_ADDRESS") and not use_gpu:
            raise ClusterError(
                f"{train.workers} workers need a CPU each, and the cluster has {cpus}; use fewer --workers"
            )
        yield use_gpu
    finally:
        ray.shutdown()


def environment() -> dict[str, Any]:
    """Versions, commit and hardware of this machine, for environment.json."""
    packages = {}
    for name in ("ptxdist", "torch", "torchvision", "ray", "zarr", "numpy", "albumentations", "pydicom", "safetensors"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    commit = subprocess.run(
        ["git", "-C", str(PACKAGE), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": packages,
        "commit": commit or None,
    }
