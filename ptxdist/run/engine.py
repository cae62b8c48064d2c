"""What does the work of a run: the interface of an engine, and the record that tells it which stage to train.

An engine is opened for one run, trains its stages one after the other and evaluates the last one. `run.local` has the
one for this process and for those of torchrun, `cluster.engine` the one for Ray.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from ptxdist.config import Settings, StageSettings
from ptxdist.records import EvaluationResult, OnEvent, Record, StageResult
from ptxdist.storage.runs import Mirror


class StageTask(Record):
    """All that a rank needs to train or evaluate a stage. As JSON it can be sent to other machines.

    `settings` with the place of the cache as an absolute path or s3://…; `token`, under which a copy of that cache has
    been checked; `run`, an absolute path or s3://…; `number` of the stage, from 1, and its `fingerprint`; `parent`, the
    result of the stage before it; `result`, that of the stage itself, for the evaluation.
    """

    settings: Settings
    token: str
    run: str
    number: int
    fingerprint: str
    parent: StageResult | None
    result: StageResult | None = None

    @property
    def stage(self) -> StageSettings:
        """Settings of the stage."""
        return self.settings.pipeline.stages[self.number - 1]


class Engine(Protocol):
    """Does the work of one run."""

    def nodes(self) -> list[dict[str, float]]:
        """CPUs, GPUs and kinds of accelerator of each living node; [] on this machine alone."""

    def train(self, task: StageTask) -> StageResult:
        """Train one stage; TrainingError when that fails for good."""

    def evaluate(self, task: StageTask) -> EvaluationResult:
        """Evaluate the stage of `task.result`."""


OpenEngine = Callable[[Settings, Mirror, OnEvent], AbstractContextManager[Engine]]
