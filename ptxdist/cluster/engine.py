"""Ray as the engine of a run: one TorchTrainer for each stage and for the evaluation, on this machine or on a cluster.

Owns: the workers and what is done when they are lost, and the way of their events. Refuses: clusters whose nodes are
not fit (ClusterError). Called by: `run.pipeline`. `run.local` is the same without Ray.
"""

from __future__ import annotations

import errno
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptxdist.cluster.connection import on_cluster, ray_for_training
from ptxdist.cluster.doctor import ray_nodes, refuse_unfit
from ptxdist.config import Settings
from ptxdist.errors import PtxdistError, TrainingError
from ptxdist.records import EpochMetrics, EvaluationResult, StageHistory, StageResult
from ptxdist.rundir import EVALUATION, read_evaluation, read_stage_result, stage_folder
from ptxdist.storage.runs import EVALUATION_PART, Mirror, stage_part

_POLL_S = 0.2
_log = logging.getLogger(__name__)

OnEvent = Callable[[Any], None]
Task = dict[str, Any]


class _LostError(Exception):
    """Workers died, hung or were cut off, which another start may mend; `announced` when their node was taken away."""

    def __init__(self, message: str, *, announced: bool = False) -> None:
        super().__init__(message)
        self.announced = announced


@contextmanager
def ray_engine(settings: Settings, mirror: Mirror, on_event: OnEvent) -> Iterator[RayEngine]:
    """The engine, while Ray runs: in a Ray job its cluster, whose nodes are looked at first, else one of its own."""
    with ray_for_training(settings.train) as use_gpu:
        if on_cluster():
            with ray_nodes() as nodes:
                place = mirror.remote.url if mirror.remote else mirror.folder
                refuse_unfit(place, settings.data.cache, nodes)
        yield RayEngine(settings, mirror, use_gpu, on_event)


@dataclass(frozen=True)
class RayEngine:
    """Does the work of a run with Ray Train's workers; `task` is as `stage.run_stage` takes it."""

    settings: Settings
    mirror: Mirror
    use_gpu: bool
    on_event: OnEvent

    def nodes(self) -> list[dict[str, float]]:
        """CPUs, GPUs and kinds of accelerator of each living node of Ray."""
        import ray

        shown = ("CPU", "GPU", "accelerator_type:")
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return [{key: value for key, value in sorted(item.items()) if key.startswith(shown)} for item in alive]

    def train(self, task: Task) -> StageResult:
        """Train one stage; the result is what rank 0 wrote into the stage's folder."""
        from ptxdist.cluster.worker import train_stage

        number = int(task["number"])
        size_px = self.settings.pipeline.stages[number - 1].size_px
        folder = stage_folder(self.mirror.folder, number, size_px)
        self._work(train_stage, task, folder, f"stage {number}", "goes on from its last checkpoint")
        self.mirror.pull(stage_part(number, size_px))  # rank 0 may have been on another node
        result = read_stage_result(folder)
        if result is None:
            raise TrainingError(
                f"stage {number} ended without a result in {folder}; is it on storage that all nodes share?"
            )
        return result

    def evaluate(self, task: Task) -> EvaluationResult:
        """Evaluate the last stage; the result is what rank 0 wrote into the run."""
        from ptxdist.cluster.worker import evaluate_run

        folder = self.mirror.folder / EVALUATION
        self._work(evaluate_run, task, folder, "the evaluation", "starts again")
        self.mirror.pull(EVALUATION_PART)
        return read_evaluation(folder)

    def _work(self, work: Callable[[Task], None], task: Task, folder: Path, what: str, again: str) -> None:
        """Have workers do `work`, starting them again when they are lost; what they raise themselves is final."""
        limit, failures = self.settings.train.max_worker_failures, 0
        while True:
            try:
                return self._work_once(work, task, folder, what)
            except _LostError as error:
                if error.announced:  # what a cloud takes back is nobody's failure
                    self.on_event(f"{error}; {what} {again} with new workers")
                    continue
                failures += 1
                if failures > limit:
                    raise TrainingError(f"{what} stopped: {error}") from error
                self.on_event(f"{error}; {what} {again} with new workers ({failures} of {limit})")

    def _work_once(self, work: Callable[[Task], None], task: Task, folder: Path, what: str) -> None:
        """One TorchTrainer over the workers."""
        import ray
        from ray.exceptions import RayError
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.exceptions import (
            ControllerError,
            PreemptionError,
            TrainingFailedError,
            WorkerGroupError,
        )

        train, use_gpu = self.settings.train, self.use_gpu
        room = int(ray.cluster_resources().get("GPU" if use_gpu else "CPU", 0))
        if room < train.workers:
            self.on_event(
                f"the cluster has room for {room} of {train.workers} workers, {train.min_workers or 'all'} are needed"
            )
        with _listen(self.on_event) as inbox:
            trainer = TorchTrainer(
                work,
                train_loop_config={**task, "inbox": inbox},
                torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
                scaling_config=ScalingConfig(
                    num_workers=(train.min_workers, train.workers) if train.min_workers else train.workers,
                    use_gpu=use_gpu,
                    resources_per_worker={"CPU": 1},
                    elastic_resize_monitor_interval_s=train.resize_every_s,
                ),
                run_config=RunConfig(
                    name=f"{folder.name}-{time.time_ns()}",
                    storage_path=str(folder / "ray"),
                    failure_config=FailureConfig(max_preemption_failures=0),  # said here, not repeated in silence
                ),
            )
            try:
                trainer.fit()
            except PreemptionError as error:
                raise _LostError("a node was taken away, as announced", announced=True) from error
            except WorkerGroupError as error:
                _log.error("%s", error)  # with the workers' tracebacks
                causes = [_cause(failure) for _, failure in sorted(error.worker_failures.items())]
                raise _verdict(causes, what) from error
            except (ControllerError, TrainingFailedError) as error:
                cause = getattr(error, "controller_failure", error)
                raise TrainingError(f"{what} stopped: {_brief(cause)}") from error
            except RayError as error:  # what watches over the workers was killed, as where memory runs out
                raise _LostError(f"the workers were lost: {_brief(error)}") from error
            finally:
                _free_room()
                shutil.rmtree(folder / "ray", ignore_errors=True)


def _free_room() -> None:
    """Remove the placement groups of this job, and with them the actors inside, when no trainer of it runs any more.

    A trainer whose workers were killed for want of memory may leave its own, and the next one would wait for that room
    for ever.
    """
    import ray
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    try:
        job = ray.get_runtime_context().get_job_id()  # the last part of the ids of what it made
        for name, entry in placement_group_table().items():
            if name.endswith(job) and entry["state"] != "REMOVED":
                remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))
    except Exception:  # as when the head is gone; what ended the trainer is what has to be told
        _log.exception("the room of a trainer that has ended could not be freed")


def _cause(error: BaseException) -> BaseException:
    """The exception that user code raised, or the loss of its process, out of Ray's wrappings."""
    inner = getattr(error, "cause", None) or getattr(error, "health_check_failure", None)
    return _cause(inner) if isinstance(inner, BaseException) and inner is not error else error


def _verdict(causes: Sequence[BaseException], what: str) -> Exception:
    """What to raise when workers have failed: _LostError, which is tried again, or what is final.

    A refusal of ours is final. So is what Python code raises by itself (a missing key, no memory on the GPU), which
    would come again, unless a process was lost too: ranks that are cut off from another one fail in many ways. Errors
    of torch.distributed and of CUDA are RuntimeErrors, those of networks and storage OSErrors; both may pass, a full
    disk does not.
    """
    import torch
    from ray.exceptions import RayError
    from ray.train.v2._internal.exceptions import RayTrainError

    refusals = [cause for cause in causes if isinstance(cause, PtxdistError)]
    if refusals:
        return refusals[0]
    lost = [cause for cause in causes if isinstance(cause, (RayError, RayTrainError))]
    passing = [
        cause
        for cause in causes
        if (isinstance(cause, RuntimeError) and not isinstance(cause, torch.OutOfMemoryError))
        or (isinstance(cause, OSError) and cause.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS))
    ]
    if lost or len(passing) == len(causes):
        announced = any(getattr(cause, "preempted", False) for cause in lost)
        return _LostError(f"a worker failed with {_brief((lost or passing)[0])}", announced=announced)
    cause = next(cause for cause in causes if cause not in passing)
    advice = "; use a smaller train.micro_batch" if isinstance(cause, torch.OutOfMemoryError) else ""
    return TrainingError(f"{what} stopped: a worker failed with {_brief(cause)}{advice}")


def _brief(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300]}" if lines else type(error).__name__


@contextmanager
def _listen(on_event: OnEvent) -> Iterator[Any]:
    """An Inbox for workers, emptied by a thread that passes its events on in order."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from ptxdist.cluster.worker import Inbox

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    inbox = Inbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    ended = threading.Event()

    def pass_on() -> None:
        try:
            for event in ray.get(inbox.take.remote()):
                on_event(_record(event) if isinstance(event, dict) else event)
        except Exception:  # what is heard of the training must not end it
            _log.exception("the workers' events could not be taken")

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


def _record(event: dict[str, Any]) -> EpochMetrics | StageHistory:
    return (StageHistory if "epochs" in event else EpochMetrics).model_validate(event)
