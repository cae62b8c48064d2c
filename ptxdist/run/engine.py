"""The interface of an engine, which does the work of a run, and StageTask, its unit of work.

An engine is opened for one run, trains its stages one after the other and evaluates the last one. `run.local` has the
engine for this process and for those of torchrun, `cluster.engine` the one for Ray.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from ptxdist.config import Settings, StageSettings
from ptxdist.errors import SettingsError
from ptxdist.events import OnEvent
from ptxdist.records import EvaluationResult, Record, StageResult
from ptxdist.storage.runs import Mirror


class StageTask(Record):
    """All that a rank needs to train or evaluate a stage; it crosses Ray's border as JSON.

    `settings`      with `data.cache` as an absolute path or s3://…
    `token`         of the check that a copy of this cache has passed, so that nodes do not repeat it
    `run`           an absolute path or s3://…
    `number`        of the stage, from 1
    `fingerprint`   of the stage
    `parent`        result of the stage before, whose weights it starts from
    `result`        result of the stage itself, for the evaluation
    `init_sha256`   of the weights that `model.init` names
    """

    settings: Settings
    token: str
    run: str
    number: int
    fingerprint: str
    parent: StageResult | None
    result: StageResult | None = None
    init_sha256: str | None = None

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


def refuse_other_workers(settings: Settings) -> None:
    """Raise SettingsError when torchrun has started another number of processes than the settings say."""
    started, wanted = int(os.environ.get("WORLD_SIZE", "1")), settings.train.workers
    if started != wanted:
        raise SettingsError(
            f"{wanted} workers without Ray are processes of torchrun, which has started {started}: "
            f"torchrun --nproc-per-node {wanted} -m -- ptxdist train --without-ray --workers {wanted} …"
        )
