"""An evaluation of finished models as a task: here, by the processes of torchrun, or on Ray's workers.

`evaluate_models` is called by each rank. `cluster.engine` does so on Ray's workers, `evaluate_here` without Ray.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from ptxdist.config import TrainSettings
from ptxdist.predict.elsewhere import Split, evaluate_elsewhere
from ptxdist.records import EvaluationResult, Record
from ptxdist.rundir import EVALUATION
from ptxdist.scores.working import NO_POINTS, Wanted
from ptxdist.storage.runs import local_run
from ptxdist.train.distributed import process_group
from ptxdist.train.evaluate import evaluate_runs


class EvaluationTask(Record):
    """All that a rank needs to evaluate models; it crosses Ray's border as JSON.

    `models`    runs and bundles; these and all other places are absolute paths or s3://…
    `data`      another cache to evaluate on, of which `split` is scored; None: the cases that each run has held out
    `out`       the folder of the evaluation; None: that of the only run
    `patients`  a table of image ids and patients, for a cache that was made without one
    `working`   the working points to find
    """

    models: tuple[str, ...]
    data: str | None = None
    split: Split = "all"
    out: str | None = None
    patients: str | None = None
    working: Wanted = NO_POINTS

    @property
    def folder(self) -> Path:
        """Where the files of the evaluation are written."""
        return Path(self.out) if self.out is not None else Path(self.models[0]) / EVALUATION


def evaluate_here(
    task: EvaluationTask, *, on_cases: Callable[[int, int], None] = lambda done, total: None
) -> EvaluationResult:
    """Evaluate in this process, or under torchrun in all of its processes, each of which returns the result."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun
    with process_group("auto", ranks, TrainSettings().collective_timeout_s) as device:
        return evaluate_models(task, device=device if ranks > 1 else None, on_cases=on_cases)


def evaluate_models(
    task: EvaluationTask,
    *,
    device: torch.device | None = None,
    on_cases: Callable[[int, int], None] = lambda done, total: None,
) -> EvaluationResult:
    """Evaluate as one rank; all ranks call it, divide the cases, and return the result that rank 0 has written.

    `device` is chosen by default. Errors as for `evaluate_runs` and `evaluate_elsewhere`.
    """
    models = [local_run(place) for place in task.models]
    out, patients = (None if place is None else Path(place) for place in (task.out, task.patients))
    if task.data is None:
        return evaluate_runs(
            models, folder=out, patients=patients, working=task.working, device=device, on_cases=on_cases
        )
    return evaluate_elsewhere(
        models,
        task.data,
        folder=task.folder,
        split=task.split,
        patients=patients,
        working=task.working,
        device=device,
        on_cases=on_cases,
    )
