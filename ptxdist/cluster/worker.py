"""What runs on Ray's workers: a stage's rank, the evaluation, and the inbox through which they tell of themselves.

Owns: what comes back over Ray's border: progress tuples, epochs and histories as JSON, messages. Refuses: nothing of
its own. Called by: `run.pipeline`, through Ray.
"""

from __future__ import annotations

from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train.v2._internal.execution.context import get_train_context

from ptxdist.records import EpochMetrics
from ptxdist.run.stage import Throttled, run_evaluation, run_stage
from ptxdist.scores.names import DICES


@ray.remote(num_cpus=0)
class Inbox:
    """Where workers put events for the coordinator: progress tuples, epochs and messages."""

    def __init__(self) -> None:
        self._events: list[Any] = []

    def put(self, event: Any) -> None:
        """Add one event."""
        self._events.append(event)

    def take(self) -> list[Any]:
        """Remove and return all events, oldest first."""
        events, self._events = self._events, []
        return events


def train_stage(task: dict[str, Any]) -> None:
    """On a Ray Train worker: train one stage as one rank. `task` is that of `run_stage`, and the `inbox`."""
    context, inbox, warned = ray.train.get_context(), task["inbox"], False

    def on_epoch(metrics: EpochMetrics) -> None:
        if context.get_world_rank() == 0:
            inbox.put.remote(metrics.model_dump(mode="json"))
            leaving()  # says so, where an epoch is too short for a checkpoint inside it
        dices = {score.field: score.of(metrics.at_full) for score in DICES}  # as Ray's dashboard shows them
        ray.train.report({"epoch": metrics.epoch, "val_loss": metrics.val_loss, **dices})

    def leaving() -> bool:
        """Whether a node of this training was announced to go. (Ray's public question makes all ranks wait.)"""
        nonlocal warned
        if get_train_context().preemption_context.preemption_info is None:
            return False
        if not warned:
            warned = True
            inbox.put.remote("a node will be taken away: until then training goes on, and checkpoints are written")
        return True

    run_stage(
        task,
        device=ray.train.torch.get_device(),
        ranks_here=context.get_local_world_size(),
        on_epoch=on_epoch,
        on_step=Throttled(inbox.put.remote, int(task["number"])),
        on_message=lambda message: inbox.put.remote(message),
        on_start=lambda history: inbox.put.remote(history.model_dump(mode="json")),
        leaving=leaving,
    )


def evaluate_run(task: dict[str, Any]) -> None:
    """On a Ray Train worker: evaluate a run's last stage as one rank; `task` as for `train_stage`, and the `result`."""
    run_evaluation(
        task,
        device=ray.train.torch.get_device(),
        ranks_here=ray.train.get_context().get_local_world_size(),
        tell=task["inbox"].put.remote,
    )
