"""One rank's part of a stage: open, build, call loop.fit, write the result. Knows no Ray.

Owns: the dict that says what to do, which crosses Ray's border, and the rate at which progress is told. Refuses:
nothing of its own. Called by: `worker` on Ray's workers, `local` without Ray.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ptxdist import files
from ptxdist.cache.catalog import Catalog, read_catalog
from ptxdist.cache.split import split_indices
from ptxdist.cache.store import open_store
from ptxdist.config import Settings, restore
from ptxdist.records import EpochMetrics, EvaluationResult, StageHistory, StageResult, Step
from ptxdist.rundir import BEST_WEIGHTS, CHECKPOINTS, EVALUATION, RESULT, stage_folder
from ptxdist.storage.caches import local_cache
from ptxdist.storage.runs import EVALUATION_PART, Mirror, stage_part
from ptxdist.train.checkpoint import load_weights
from ptxdist.train.distributed import rank, world_size
from ptxdist.train.evaluate import Member, evaluate
from ptxdist.train.loop import OnStep, StageData, fit
from ptxdist.train.unet import build_unet

_SHOW_EVERY_S = 0.2


def stage_data(catalog: Catalog, cache: Path, size_px: int, fold: int) -> StageData:
    """Store of one size with the cases of the catalog in its order, and both sides of the split."""
    return StageData(open_store(cache, size_px), catalog.labelled, *split_indices(catalog.labelled, fold))


def run_stage(
    task: dict[str, Any],
    *,
    device: torch.device,
    ranks_here: int,
    on_epoch: Callable[[EpochMetrics], None],
    on_step: OnStep,
    on_message: Callable[[str], None],
    on_start: Callable[[StageHistory], None],
    leaving: Callable[[], bool] = lambda: False,
) -> None:
    """Train one stage as one rank; rank 0 writes what `loop.fit` leaves and, last, the StageResult.

    `task` holds `settings` (a snapshot, with the cache's place), `token` (under which a copy of the cache has been
    checked), `run` (an absolute path, or s3://…), `number`, `fingerprint` and `parent` (a StageResult as JSON, or
    None). All ranks call `on_epoch`, only rank 0 the others; `ranks_here` share this machine. `leaving` is as for
    `loop.fit`.
    """
    settings, number = restore(task["settings"]), int(task["number"])
    stage = settings.pipeline.stages[number - 1]
    share_cores(device, ranks_here)
    torch.manual_seed(settings.pipeline.seed)
    is_first = rank() == 0
    with _run_of(settings, task, stage_part(number, stage.size_px)) as run:
        started, folder = time.perf_counter(), stage_folder(run, number, stage.size_px)
        cache = _cache_of(settings, task, stage.size_px)
        parent = StageResult.model_validate(task["parent"]) if task["parent"] else None
        # A later stage's weights are replaced at once: no need to read pre-trained ones again.
        model_settings = settings.pipeline.model
        model = build_unet(model_settings.model_copy(update={"encoder_weights": "none"}) if parent else model_settings)
        if parent:
            load_weights(model, run / parent.weights, parent.weights_sha256)
        result = fit(
            model,
            stage_data(read_catalog(cache), cache, stage.size_px, settings.pipeline.fold),
            stage,
            settings.train,
            number=number,
            seed=settings.pipeline.seed,
            device=device,
            folder=folder / CHECKPOINTS,
            on_epoch=on_epoch,
            on_step=on_step if is_first else (lambda step, epoch, done, total: None),
            on_message=on_message if is_first else (lambda message: None),
            on_start=on_start if is_first else (lambda history: None),
            leaving=leaving,
        )
        if is_first:
            weights = folder / BEST_WEIGHTS
            # A copy: killed before the result is written, a resumed stage still finds what its checkpoint names.
            files.copy(result.weights, weights)
            files.write_json(
                folder / RESULT,
                StageResult(
                    stage=number,
                    size_px=stage.size_px,
                    fingerprint=task["fingerprint"],
                    epochs=stage.epochs,
                    workers=world_size(),
                    seconds=time.perf_counter() - started,
                    best=result.best,
                    history=result.history,
                    weights=weights.relative_to(run).as_posix(),
                    weights_sha256=result.sha256,
                ),
            )


def run_evaluation(
    task: dict[str, Any], *, device: torch.device, ranks_here: int, tell: Callable[[Step], object]
) -> EvaluationResult:
    """Evaluate the last stage as one rank; `task` as for `run_stage`, with its StageResult as JSON in `result`."""
    share_cores(device, ranks_here)
    on_step = Throttled(tell, 0)
    settings, result = restore(task["settings"]), StageResult.model_validate(task["result"])

    def on_cases(done: int, total: int) -> None:
        if rank() == 0:
            on_step("evaluate", 0, done, total)

    with _run_of(settings, task, EVALUATION_PART) as run:
        return evaluate(
            [Member(run, settings, result)],
            _cache_of(settings, task, result.size_px),
            run / EVALUATION,
            device=device,
            on_cases=on_cases,
        )


@contextmanager
def _run_of(settings: Settings, task: dict[str, Any], part: str) -> Iterator[Path]:
    """The run on this node; of one in an object store a copy of its stages, and rank 0 sends what it writes."""
    mirror = Mirror(task["run"], data=settings.data)
    mirror.pull(*(stage_part(number, stage.size_px) for number, stage in enumerate(settings.pipeline.stages, start=1)))
    with mirror.sending(part) if rank() == 0 else nullcontext():
        yield mirror.folder


def _cache_of(settings: Settings, task: dict[str, Any], size_px: int) -> Path:
    """The cache on this node, which for one in an object store the first rank here copies while the others wait."""
    return local_cache(settings.data.cache, [size_px], data=settings.data, token=task["token"])


def share_cores(device: torch.device, ranks_here: int) -> None:
    """Give each of the ranks on this machine its part of the cores."""
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_here))


class Throttled:
    """Tells progress a few times a second; the last step always."""

    def __init__(self, tell: Callable[[Step], object], stage: int) -> None:
        self._tell, self._stage, self._told = tell, stage, 0.0

    def __call__(self, step: str, epoch: int, done: int, total: int) -> None:
        """Tell the step, unless one was told just before."""
        now = time.perf_counter()
        if now - self._told >= _SHOW_EVERY_S or done >= total:
            self._told = now
            self._tell((self._stage, step, epoch, done, total))
