"""Ray as the engine of a run: a trainer of Ray Train for each stage and for the evaluation, here or on a cluster.

Owns: the workers, when lost ones are replaced, and how their events reach this process. Refuses: clusters whose nodes
are not fit (ClusterError). `run.local` is the engine without Ray.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptxdist.cluster.connection import need, on_cluster, ray_for_training
from ptxdist.cluster.doctor import refuse_unfit
from ptxdist.cluster.failures import LostError, brief, cause_of, loss_of, verdict
from ptxdist.cluster.inbox import Inbox
from ptxdist.cluster.nodes import ray_nodes
from ptxdist.cluster.waiting import Waiting, placement_groups
from ptxdist.config import Settings, TrainSettings
from ptxdist.errors import ClusterError, TrainingError
from ptxdist.events import Message, OnEvent, decode_event
from ptxdist.records import EvaluationResult, Record, StageResult
from ptxdist.run.engine import StageTask
from ptxdist.rundir import EVALUATION, read_evaluation, read_stage_result, stage_folder
from ptxdist.storage.runs import EVALUATION_PART, Mirror, stage_part

if TYPE_CHECKING:
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from ptxdist.run.evaluation import EvaluationTask

_POLL_S = 0.2
_ANSWER_S = 5.0
_REQUESTS = "AutoscalingCoordinator"  # name of Ray's actor that has the requests of all trainers
_log = logging.getLogger(__name__)

Work = Callable[[dict[str, Any]], None]  # a function of `worker`


@contextmanager
def ray_engine(settings: Settings, mirror: Mirror, on_event: OnEvent) -> Iterator[RayEngine]:
    """The engine, while Ray runs; a `run.engine.OpenEngine`.

    With RAY_ADDRESS, as in a Ray job, it checks the nodes of that cluster and uses it; else it starts Ray on this
    machine.
    """
    place = mirror.remote.url if mirror.remote else mirror.folder
    with _started(settings.train, place, settings.data.cache, on_event) as workers:
        yield RayEngine(mirror, workers)


def evaluate_on_workers(task: EvaluationTask, train: TrainSettings, on_event: OnEvent) -> EvaluationResult:
    """Evaluate finished models on `train.workers` workers; the result is what rank 0 wrote into the task's folder."""
    from ptxdist.cluster.worker import evaluate_finished

    with _started(train, task.folder, task.data, on_event) as workers:
        workers.work(evaluate_finished, task, task.folder, "the evaluation", "restarts")
    return read_evaluation(task.folder)


@contextmanager
def _started(train: TrainSettings, place: Path | str, cache: str | None, on_event: OnEvent) -> Iterator[Workers]:
    """Ray's workers, which write to `place`."""
    on_event(Message(text="Ray starts"))
    with ray_for_training(train) as use_gpu:
        if on_cluster():
            with ray_nodes() as nodes:
                refuse_unfit(place, cache, nodes)
        yield Workers(train, use_gpu, on_event)


@dataclass(frozen=True)
class RayEngine:
    """Trains and evaluates a run with Ray Train's workers."""

    mirror: Mirror
    workers: Workers

    def nodes(self) -> list[dict[str, float]]:
        """CPUs, GPUs and kinds of accelerator of each living node of Ray."""
        import ray

        shown = ("CPU", "GPU", "accelerator_type:")
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return [{key: value for key, value in sorted(item.items()) if key.startswith(shown)} for item in alive]

    def train(self, task: StageTask) -> StageResult:
        """Train one stage; the result is what rank 0 wrote into the stage's folder."""
        from ptxdist.cluster.worker import train_stage

        number, size_px = task.number, task.stage.size_px
        folder = stage_folder(self.mirror.folder, number, size_px)
        self.workers.work(train_stage, task, folder, f"stage {number}", "resumes from its last checkpoint")
        self.mirror.pull(stage_part(number, size_px))  # rank 0 may have been on another node
        result = read_stage_result(folder)
        if result is None:
            raise TrainingError(
                f"stage {number} ended without a result in {folder}; is it on storage that all nodes share?"
            )
        return result

    def evaluate(self, task: StageTask) -> EvaluationResult:
        """Evaluate the last stage; the result is what rank 0 wrote into the run."""
        from ptxdist.cluster.worker import evaluate_run

        folder = self.mirror.folder / EVALUATION
        self.workers.work(evaluate_run, task, folder, "the evaluation", "restarts")
        self.mirror.pull(EVALUATION_PART)
        return read_evaluation(folder)


@dataclass(frozen=True)
class Workers:
    """Ray Train's workers, which are started for each piece of work."""

    train: TrainSettings
    use_gpu: bool
    on_event: OnEvent

    def work(self, work: Work, task: Record, folder: Path, what: str, again: str) -> None:
        """Call `work` on workers, and on new ones when they are lost; an exception of their own is a TrainingError."""
        limit, failures = self.train.max_worker_failures, 0
        while True:
            try:
                return self._once(work, task, folder, what)
            except LostError as error:
                if error.preempted:  # does not count as a failure
                    self._say(f"{error}; {what} {again} with new workers")
                    continue
                failures += 1
                if failures > limit:
                    raise TrainingError(f"{what} stopped: {error}") from error
                self._say(f"{error}; {what} {again} with new workers ({failures} of {limit})")

    def _say(self, text: str) -> None:
        self.on_event(Message(text=text))

    def _once(self, work: Work, task: Record, folder: Path, what: str) -> None:
        """Call `work` on the workers of one trainer; LostError when they are lost, else TrainingError."""
        import ray
        from ray.exceptions import RayError
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.v2._internal.exceptions import InsufficientClusterResourcesError
        from ray.train.v2.api.exceptions import (
            ControllerError,
            PreemptionError,
            TrainingFailedError,
            WorkerGroupError,
        )

        from ptxdist.cluster.backend import GroupConfig

        train, use_gpu = self.train, self.use_gpu
        capacity = int(ray.cluster_resources().get("GPU" if use_gpu else "CPU", 0))
        if train.min_workers and train.min_workers <= capacity < train.workers:
            self._say(
                f"the cluster has room for {capacity} of {train.workers} workers; {what} works with so many until "
                f"there is room for more (train.min_workers = {train.min_workers})"
            )
        # An evaluation of finished models may copy a cache for long, and says nothing of that.
        silence_s = 2 * train.collective_timeout_s if isinstance(task, StageTask) else None
        waiting = Waiting(train, use_gpu, self._say, silence_s)
        with _listen(self.on_event, waiting) as inbox:
            trainer = _trainer(waiting)(
                work,
                train_loop_config={"task": task.model_dump_json(), "inbox": inbox},
                backend_config=GroupConfig("nccl" if use_gpu else "gloo", train.collective_timeout_s),
                scaling_config=ScalingConfig(
                    num_workers=(train.min_workers, train.workers) if train.min_workers else train.workers,
                    use_gpu=use_gpu,
                    resources_per_worker={"CPU": 1},
                    elastic_resize_monitor_interval_s=train.resize_every_s,
                ),
                run_config=RunConfig(
                    name=f"{folder.name}-{time.time_ns()}",
                    storage_path=str(folder / "ray"),
                    failure_config=FailureConfig(max_preemption_failures=0),  # `work` restarts the workers and logs it
                ),
            )
            try:
                trainer.fit()
            except PreemptionError as error:
                raise LostError("a node was preempted", preempted=True) from error
            except WorkerGroupError as error:
                _log.error("%s", error)  # with the workers' tracebacks
                causes = [cause_of(failure) for _, failure in sorted(error.worker_failures.items())]
                raise verdict(causes, what) from error
            except (ControllerError, TrainingFailedError) as error:
                cause = getattr(error, "controller_failure", error)
                if isinstance(cause, InsufficientClusterResourcesError):
                    fewest, kind = train.min_workers or train.workers, "GPU and a CPU" if use_gpu else "CPU"
                    raise ClusterError(
                        f"{need(fewest, kind)}, and the cluster never has so many; use fewer --workers, or raise the "
                        "largest number of its nodes"
                    ) from error
                raise TrainingError(f"{what} stopped: {brief(cause)}") from error
            except RayError as error:  # the controller was killed, for example when memory runs out
                waiting.refuse()
                raise LostError(f"the workers were lost: {loss_of(error, 'their controller')}") from error
            finally:
                _free_capacity(trainer.train_run_context.run_id, waiting.controller)
                shutil.rmtree(folder / "ray", ignore_errors=True)


def _trainer(waiting: Waiting) -> type[DataParallelTrainer]:
    """Ray's trainer without its handler of SIGINT, which ends the driver with exit code 0 or after a long wait.

    In the main thread, `waiting` gets its controller; in others, a training waits for nodes without a limit. It starts
    no processes for Ray's data sets, which are not used, for what `_free_capacity` does, and, on this machine alone,
    for new nodes.
    """
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from ptxdist.cluster.backend import FixedWorkers

    class Trainer(DataParallelTrainer):  # type: ignore[misc]  # Ray has no types
        def _initialize_and_run_controller(self, **words: Any) -> Any:
            """With our own policy where no nodes can be had."""
            if not on_cluster() and not self.scaling_config.elasticity_enabled:
                words["scaling_policy"] = FixedWorkers(self.scaling_config)
            return super()._initialize_and_run_controller(**words)

        def _create_default_callbacks(self) -> list[Any]:
            """Those of Ray that do something here."""
            idle = ("DatasetsCallback", "PlacementGroupCleanerCallback")  # by name: another Ray may not have them
            return [each for each in super()._create_default_callbacks() if type(each).__name__ not in idle]

        def _register_sigint_handler(self, controller: Any) -> None:
            """`ptxdist.interrupts` handles it."""
            waiting.controller = controller

    return Trainer


def _free_capacity(run_id: str, controller: Any) -> None:
    """Remove the placement groups of this job, and with them the actors inside, after its trainer has ended.

    A trainer whose workers were killed because memory ran out may leave its own, and the next trainer would wait
    forever for its resources. On a cluster, the request for workers of an interrupted trainer, `run_id`, is withdrawn
    too: Ray would keep room for them for three minutes, in which no trainer with `min_workers` would start.
    """
    import ray
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    try:
        for name, entry in placement_groups().items():
            if entry["state"] != "REMOVED":
                remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))
        if on_cluster():
            if controller is not None:  # else it would ask again
                ray.kill(controller)
            requests = ray.get_actor(_REQUESTS, namespace=_REQUESTS)
            ray.get(requests.cancel_request.remote(f"train-{run_id}"), timeout=_ANSWER_S)
    except Exception:  # for example when the head is gone; the error that ended the trainer matters more
        _log.exception("the resources of a trainer that has ended could not be freed")


@contextmanager
def _listen(on_event: OnEvent, waiting: Waiting) -> Iterator[Any]:
    """An `Inbox` actor on this node, and a thread that passes its events to `on_event` in order.

    When there are none, `waiting` looks at the cluster.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    inbox = ray.remote(num_cpus=0)(Inbox).options(scheduling_strategy=this_node).remote()
    ended = threading.Event()

    def pass_on() -> None:
        try:
            events = ray.get(inbox.take.remote())
            for event in events:
                if event:
                    on_event(decode_event(event))
            if not ended.is_set():
                waiting.look(bool(events))
        except Exception:  # a lost event must not end the training
            _log.exception("the workers' events could not be received")

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
