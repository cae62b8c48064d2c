"""The events that a run reports while it trains.

Owns: the events, and their JSON form for another process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from ptxdist.records import EpochMetrics, EvaluationResult, Record, StageHistory, StageResult


class Message(Record):
    """A sentence for people, such as a warning or that a stage resumes."""

    text: str


class Progress(Record):
    """`done` of `total` images of one step are processed, by all ranks together; `epoch` is 0 outside of epochs.

    In the step "copy", which copies the cache to this node, they are files.
    """

    stage: int
    step: Literal["copy", "draw", "load", "train", "average", "validate", "evaluate"]
    epoch: int
    done: int
    total: int


class RunStart(Record):
    """A run starts, after all checks: what it trains on, and with what.

    `images` are those of an epoch of each stage; `positive` of the `train` cases show `shown`. `held_out` cases are
    those of `fold`, the first of `folds_left` that are trained one after the other. `cores` are those of this machine.
    """

    run: str
    train: int
    positive: int
    shown: str
    held_out: int
    images: tuple[int, ...]
    fold: int
    folds_left: int = 1
    workers: int
    cores: int


Event = RunStart | Message | Progress | StageHistory | EpochMetrics | StageResult | EvaluationResult
OnEvent = Callable[[Event], None]
_EVENTS: dict[str, type[Event]] = {kind.__name__: kind for kind in get_args(Event)}


def encode_event(event: Event) -> dict[str, Any]:
    """The event as JSON values, for another process; `decode_event` is the inverse."""
    return {"event": type(event).__name__, "content": event.model_dump(mode="json")}


def decode_event(content: Mapping[str, Any]) -> Event:
    """The event that `encode_event` encoded."""
    return _EVENTS[content["event"]].model_validate(content["content"])
