"""What runs on Ray's workers: one rank of a stage or of the evaluation, and the inbox through which events come back.

Events and tasks cross Ray's border as JSON (`records.encode_event`, `StageTask`). `cluster.engine` starts all of this.
"""

from __future__ import annotations

from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train.v2._internal.execution.context import get_train_context

from ptxdist.records import EpochMetrics, Event, Message, encode_event
from ptxdist.run.engine import StageTask
from ptxdist.run.stage import run_evaluation, run_stage
from ptxdist.scores.names import DICES

Config = dict[str, Any]  # what Ray Train hands to a worker: `task`, a StageTask as JSON text, and `inbox`, an Inbox


@ray.remote(num_cpus=0)
class Inbox:
    """Where workers put encoded events for the driver."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []

    def put(self, event: dict[str, Any]) -> None:
        """Add one event."""
        self._events.append(event)

    def take(self) -> list[dict[str, Any]]:
        """Remove and return all events, oldest first."""
        events, self._events = self._events, []
        return events


def train_stage(config: Config) -> None:
    """On a Ray Train worker: train one stage as one rank."""
    context, send, warned = ray.train.get_context(), _Sender(config["inbox"]), False

    def on_event(event: Event) -> None:
        send(event)
        if isinstance(event, EpochMetrics):
            preempted()  # logs the notice where an epoch is too short for a checkpoint inside it
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
        device=ray.train.torch.get_device(),
        ranks_here=context.get_local_world_size(),
        on_event=on_event,
        preempted=preempted,
    )


def evaluate_run(config: Config) -> None:
    """On a Ray Train worker: evaluate the stage of `task.result` as one rank."""
    run_evaluation(
        StageTask.model_validate_json(config["task"]),
        device=ray.train.torch.get_device(),
        ranks_here=ray.train.get_context().get_local_world_size(),
        on_event=_Sender(config["inbox"]),
    )


class _Sender:
    """Sends the events of rank 0 to an inbox; those of the other ranks say the same and are dropped."""

    def __init__(self, inbox: Any) -> None:
        self._inbox = inbox if ray.train.get_context().get_world_rank() == 0 else None

    def __call__(self, event: Event) -> None:
        if self._inbox is not None:
            self._inbox.put.remote(encode_event(event))
