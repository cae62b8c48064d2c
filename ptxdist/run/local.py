"""The engine without Ray: training in this process, or in those that torchrun has started.

All ranks run the same commands. Rank 0 writes and reports events, the others only take part in the training.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ptxdist.config import Settings
from ptxdist.events import Message, OnEvent
from ptxdist.records import EvaluationResult, StageResult
from ptxdist.run.engine import StageTask, refuse_other_workers
from ptxdist.run.stage import run_evaluation, run_stage
from ptxdist.rundir import read_stage_result, stage_folder
from ptxdist.storage.runs import Mirror
from ptxdist.train.distributed import barrier, process_group


@contextmanager
def local_engine(settings: Settings, mirror: Mirror, on_event: OnEvent) -> Iterator[LocalEngine]:
    """The engine, while its process group exists; a `run.engine.OpenEngine`."""
    refuse_other_workers(settings)
    train = settings.train
    with process_group(train.device, train.workers, train.collective_timeout_s) as device:
        on_event(Message(text="training starts"))
        yield LocalEngine(device, mirror.folder, on_event)


@dataclass(frozen=True)
class LocalEngine:
    """Does the work of a run as this process's rank."""

    device: torch.device
    run: Path
    on_event: OnEvent

    def nodes(self) -> list[dict[str, float]]:
        """[]: `run.environment` describes this machine."""
        return []

    def train(self, task: StageTask) -> StageResult:
        """Train one stage; every rank returns the result of rank 0."""
        run_stage(task, device=self.device, ranks_here=_ranks_here(), on_event=self.on_event)
        barrier()  # the result is written
        result = read_stage_result(stage_folder(self.run, task.number, task.stage.size_px))
        assert result is not None
        return result

    def evaluate(self, task: StageTask) -> EvaluationResult:
        """Evaluate the last stage; every rank returns the result."""
        return run_evaluation(task, device=self.device, ranks_here=_ranks_here(), on_event=self.on_event)


def _ranks_here() -> int | None:
    """Number of torchrun's processes on this machine; None without torchrun, where OMP_NUM_THREADS is the user's."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or None
