"""What runs on each Ray Train worker: open, build, call loop.fit, report.

Owns: the dict that crosses Ray's border to the workers, and the events that come back. Refuses: nothing of its own.
Called by: `coordinator`, through Ray.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from ptxdist.config import restore
from ptxdist.data.catalog import Catalog, read_catalog
from ptxdist.data.store import open_store
from ptxdist.learn.checkpoint import load_weights
from ptxdist.learn.evaluate import evaluate
from ptxdist.learn.loop import StageData, fit
from ptxdist.learn.unet import build_unet
from ptxdist.rundir import (
    BEST_WEIGHTS,
    CHECKPOINTS,
    RESULT,
    EpochMetrics,
    EvaluationResult,
    StageResult,
    stage_folder,
    write_json,
)

_SHOW_EVERY_S = 0.2


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


def stage_data(catalog: Catalog, cache: Path, size_px: int) -> StageData:
    """Store of one size with the cases of the catalog in its order, and both sides of the split."""
    cases = catalog.labelled
    sides = {side: [i for i, case in enumerate(cases) if case.split == side] for side in ("train", "val")}
    return StageData(open_store(cache, size_px), cases, *(torch.tensor(sides[s]).numpy() for s in ("train", "val")))


def train_stage(task: dict[str, Any]) -> None:
    """Train one stage as one rank; rank 0 writes what `loop.fit` leaves and, last, the StageResult.

    `task` holds `settings` (a snapshot), `cache` and `run` (absolute paths), `number`, `fingerprint`, `parent` (a
    StageResult as JSON, or None) and `inbox`.
    """
    started = time.perf_counter()
    context = ray.train.get_context()
    settings, number, run = restore(task["settings"]), int(task["number"]), Path(task["run"])
    stage = settings.pipeline.stages[number - 1]
    folder = stage_folder(run, number, stage.size_px)
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    torch.manual_seed(settings.pipeline.seed)
    is_first, inbox = context.get_world_rank() == 0, task["inbox"]
    tell = _Throttled(inbox, number) if is_first else None

    parent = StageResult.model_validate(task["parent"]) if task["parent"] else None
    # A later stage's weights are replaced at once: no need to read pre-trained ones again.
    model_settings = settings.pipeline.model
    model = build_unet(model_settings.model_copy(update={"encoder_weights": "none"}) if parent else model_settings)
    if parent:
        load_weights(model, run / parent.weights, parent.weights_sha256)

    def on_epoch(metrics: EpochMetrics) -> None:
        if is_first:
            inbox.put.remote(metrics.model_dump(mode="json"))
        ray.train.report({"epoch": metrics.epoch, "val_loss": metrics.val_loss, **dice_scores(metrics)})

    result = fit(
        model,
        stage_data(read_catalog(Path(task["cache"])), Path(task["cache"]), stage.size_px),
        stage,
        settings.train,
        number=number,
        seed=settings.pipeline.seed,
        device=device,
        folder=folder / CHECKPOINTS,
        on_epoch=on_epoch,
        on_step=tell or (lambda step, epoch, done, total: None),
        on_message=(lambda message: inbox.put.remote(message)) if is_first else (lambda message: None),
    )
    if is_first:
        weights = folder / BEST_WEIGHTS
        # A copy: killed before the result is written, a resumed stage still finds what its checkpoint names.
        shutil.copyfile(result.weights, weights)
        write_json(
            folder / RESULT,
            StageResult(
                stage=number,
                size_px=stage.size_px,
                fingerprint=task["fingerprint"],
                epochs=stage.epochs,
                workers=context.get_world_size(),
                seconds=time.perf_counter() - started,
                best=result.best,
                history=result.history,
                weights=weights.relative_to(run).as_posix(),
                weights_sha256=result.sha256,
            ),
        )


def dice_scores(metrics: EpochMetrics) -> dict[str, float | None]:
    """The three Dice scores at the original resolution, as Ray's dashboard shows them."""
    scores = metrics.at_full
    return {name: getattr(scores, name) for name in ("kaggle_dice", "positive_dice", "pooled_dice")}


def evaluate_run(task: dict[str, Any]) -> dict[str, Any]:
    """As a Ray task: evaluate a run's last stage; `task` as for `train_stage`, with its StageResult in `result`."""
    tell = _Throttled(task["inbox"], 0)
    result: EvaluationResult = evaluate(
        Path(task["run"]),
        restore(task["settings"]),
        StageResult.model_validate(task["result"]),
        Path(task["cache"]),
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        on_cases=lambda done, total: tell("evaluate", 0, done, total),
    )
    return result.model_dump(mode="json")


class _Throttled:
    """Sends progress to the inbox a few times a second; the last step always."""

    def __init__(self, inbox: Any, stage: int) -> None:
        self._inbox, self._stage, self._sent = inbox, stage, 0.0

    def __call__(self, step: str, epoch: int, done: int, total: int) -> None:
        now = time.perf_counter()
        if now - self._sent >= _SHOW_EVERY_S or done >= total:
            self._sent = now
            self._inbox.put.remote((self._stage, step, epoch, done, total))
