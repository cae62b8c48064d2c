"""What runs on Ray's workers: one rank of a stage or of an evaluation.

Tasks come and events are sent as JSON (`StageTask`, `EvaluationTask`, `events.encode_event`). `cluster.engine`
starts the workers. It imports this module too, so torch is loaded inside the functions.
"""

from __future__ import annotations

import time
from typing import Any

import ray.train
from ray.train.v2._internal.execution.context import get_train_context

from ptxdist.events import Event, Message, Progress, encode_event
from ptxdist.records import EpochMetrics
from ptxdist.run.engine import StageTask
from ptxdist.scores.names import DICES

Config = dict[str, Any]  # from `cluster.engine`: `task` as JSON text, and `inbox`, an actor `Inbox`


def train_stage(config: Config) -> None:
    """Train one stage as one rank, on a Ray Train worker."""
    from ray.train.torch import get_device

    from ptxdist.run.stage import run_stage

    context, send, warned = ray.train.get_context(), _Sender(config["inbox"]), False

    def on_event(event: Event) -> None:
        send(event)
        if isinstance(event, EpochMetrics):
            preempted()  # logs the notice, also when an epoch is too short for a checkpoint inside it
            # A barrier: `fit` calls this on every rank, after every epoch.
            dices = {score.field: score.of(event.at_full) for score in DICES}  # as Ray's dashboard shows them
            ray.train.report({"epoch": event.epoch, "val_loss": event.val_loss, **dices})

    def preempted() -> bool:
        """Whether a node of this training has a preemption notice. (Ray's public function waits for all ranks.)"""
        nonlocal warned
        if get_train_context().preemption_context.preemption_info is None:
            return False
        if not warned:
            warned = True
            send(Message(text="preemption notice: a node will be taken away; until then training writes checkpoints"))
        return True

    run_stage(
        StageTask.model_validate_json(config["task"]),
        device=get_device(),
        ranks_here=context.get_local_world_size(),
        on_event=on_event,
        preempted=preempted,
    )


def evaluate_run(config: Config) -> None:
    """Evaluate the stage of `task.result` as one rank, on a Ray Train worker."""
    from ray.train.torch import get_device

    from ptxdist.run.stage import run_evaluation

    run_evaluation(
        StageTask.model_validate_json(config["task"]),
        device=get_device(),
        ranks_here=ray.train.get_context().get_local_world_size(),
        on_event=_Sender(config["inbox"]),
    )


def evaluate_finished(config: Config) -> None:
    """Evaluate finished models as one rank, on a Ray Train worker; the `task` is an EvaluationTask."""
    from ray.train.torch import get_device

    from ptxdist.run.evaluation import EvaluationTask, evaluate_models
    from ptxdist.run.stage import Throttled, share_cores

    device, send = get_device(), Throttled(_Sender(config["inbox"]))
    share_cores(device, ray.train.get_context().get_local_world_size())

    def on_cases(done: int, total: int) -> None:
        send(Progress(stage=0, step="evaluate", epoch=0, done=done, total=total))

    evaluate_models(EvaluationTask.model_validate_json(config["task"]), device=device, on_cases=on_cases)


class _Sender:
    """Sends the events of rank 0 to an inbox; of the other ranks, which have the same, a sign of life each second."""

    def __init__(self, inbox: Any) -> None:
        self._inbox, self._is_first, self._sent_at = inbox, ray.train.get_context().get_world_rank() == 0, 0.0

    def __call__(self, event: Event) -> None:
        if self._is_first:
            self._inbox.put.remote(encode_event(event))
        elif time.monotonic() - self._sent_at > 1:
            self._sent_at = time.monotonic()
            self._inbox.put.remote({})
