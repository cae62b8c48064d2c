"""Training without Ray: in this process, or in those that torchrun has started, through the same loop.

Owns: torch.distributed's process group. Refuses: a number of workers that torchrun did not start (SettingsError).
Called by: `pipeline`. All ranks run the same commands; rank 0 writes and speaks, the others keep step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ptxdist.config import Settings, restore
from ptxdist.errors import SettingsError, TrainingError
from ptxdist.records import EvaluationResult, StageResult
from ptxdist.run.stage import Throttled, run_evaluation, run_stage
from ptxdist.rundir import read_stage_result, stage_folder
from ptxdist.storage.runs import Mirror
from ptxdist.train.distributed import barrier, rank


def refuse_other_workers(settings: Settings) -> None:
    """SettingsError when torchrun has started another number of processes than the settings say."""
    started, wanted = int(os.environ.get("WORLD_SIZE", "1")), settings.train.workers
    if started != wanted:
        raise SettingsError(
            f"{wanted} workers without Ray are processes of torchrun, which has started {started}: "
            f"torchrun --nproc-per-node {wanted} -m -- ptxdist train --without-ray --workers {wanted} …"
        )


@contextmanager
def process_group(settings: Settings) -> Iterator[torch.device]:
    """torch.distributed over torchrun's processes, if there are several; yields this rank's device."""
    refuse_other_workers(settings)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    enough = torch.cuda.device_count() > local
    if settings.train.device == "gpu" and not enough:
        raise TrainingError(f"rank {local} of this machine has no GPU; use --set train.device=cpu or fewer workers")
    use_gpu = enough and settings.train.device != "cpu"
    device = torch.device("cuda", local) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    if settings.train.workers > 1:
        dist.init_process_group("nccl" if use_gpu else "gloo")
    try:
        yield device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def engine_here(settings: Settings, mirror: Mirror, on_event: Callable[[Any], None]) -> Iterator[EngineHere]:
    """The engine, while its process group stands."""
    with process_group(settings) as device:
        yield EngineHere(device, mirror.folder, on_event)


@dataclass(frozen=True)
class EngineHere:
    """Does the work of a run as this process's rank; `task` is as `stage.run_stage` takes it."""

    device: torch.device
    run: Path
    on_event: Callable[[Any], None]

    def nodes(self) -> list[dict[str, float]]:
        """None: this machine is asked directly."""
        return []

    def train(self, task: dict[str, Any]) -> StageResult:
        """Train one stage; every rank returns the result of rank 0."""
        number = int(task["number"])

        def tell(event: Any) -> None:
            if rank() == 0:
                self.on_event(event)

        run_stage(
            task,
            device=self.device,
            ranks_here=_ranks_here(),
            on_epoch=tell,
            on_step=Throttled(self.on_event, number),
            on_message=self.on_event,
            on_start=self.on_event,
        )
        barrier()  # the result is written
        stage = restore(task["settings"]).pipeline.stages[number - 1]
        result = read_stage_result(stage_folder(self.run, number, stage.size_px))
        assert result is not None
        return result

    def evaluate(self, task: dict[str, Any]) -> EvaluationResult:
        """Evaluate the last stage; all ranks but the first end after it."""
        result = run_evaluation(task, device=self.device, ranks_here=_ranks_here(), tell=self.on_event)
        barrier()
        if rank() != 0:
            raise SystemExit(0)
        return result


def _ranks_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
