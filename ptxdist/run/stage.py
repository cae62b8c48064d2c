"""One rank's part of a stage: open the cache, build the network, call loop.fit, write the result. Knows no Ray.

`run.local` calls it without Ray, `cluster.worker` on Ray's workers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ptxdist import files
from ptxdist.cache.catalog import Catalog, read_catalog
from ptxdist.cache.split import split_indices
from ptxdist.cache.store import open_store
from ptxdist.events import Event, OnEvent, Progress
from ptxdist.phantoms.samples import draw_samples, is_positive
from ptxdist.records import EvaluationResult, StageResult
from ptxdist.run.engine import StageTask
from ptxdist.run.origin import load_init
from ptxdist.rundir import BEST_WEIGHTS, CHECKPOINTS, EVALUATION, RESULT, stage_folder
from ptxdist.storage.caches import local_cache
from ptxdist.storage.runs import EVALUATION_PART, Mirror, stage_part
from ptxdist.train.checkpoint import load_weights
from ptxdist.train.distributed import barrier, rank, world_size
from ptxdist.train.evaluate import Member, evaluate
from ptxdist.train.loop import StageData, Training, fit
from ptxdist.train.unet import build_unet

_SHOW_EVERY_S = 0.2


def run_stage(
    task: StageTask,
    *,
    device: torch.device,
    ranks_here: int | None,
    on_event: OnEvent,
    preempted: Callable[[], bool] = lambda: False,
) -> None:
    """Train one stage as one rank, of which `ranks_here` share this machine; None: this process keeps its threads.

    Rank 0 writes the weights and, last, the StageResult. Every rank calls `on_event`, as `loop.fit` does, with fewer
    Progress events; `preempted` is as for `loop.fit`.
    """
    settings, stage = task.settings, task.stage
    share_cores(device, ranks_here)
    torch.manual_seed(settings.pipeline.seed)
    with _run_of(task, stage_part(task.number, stage.size_px)) as run:
        started, folder = time.perf_counter(), stage_folder(run, task.number, stage.size_px)
        on_event = Throttled(on_event)
        cache = _cache_of(task, on_event)
        # A stage that starts from weights of the whole network reads none of the encoder.
        model_settings = settings.pipeline.model
        if task.parent or task.init_sha256:
            model_settings = model_settings.model_copy(update={"encoder_weights": "none"})
        model = build_unet(model_settings)
        if task.parent:
            load_weights(model, run / task.parent.weights, task.parent.weights_sha256)
        elif task.init_sha256:
            load_init(model, str(model_settings.init), task.init_sha256)
        data = stage_data(read_catalog(cache), cache, stage.size_px, settings.pipeline.fold)
        if stage.phantoms:
            data = replace(data, instead=_phantoms(data, task, ranks_here, on_event))
        barrier()  # a node may have copied the cache, or drawn phantoms, minutes longer than another one
        result = fit(
            model,
            data,
            stage,
            settings.train,
            number=task.number,
            seed=settings.pipeline.seed,
            device=device,
            folder=folder / CHECKPOINTS,
            on_event=on_event,
            preempted=preempted,
        )
        if rank() == 0:
            weights = folder / BEST_WEIGHTS
            # A copy: killed before the result is written, a resumed stage still finds what its checkpoint names.
            files.copy(result.weights, weights)
            files.write_json(
                folder / RESULT,
                StageResult(
                    stage=task.number,
                    size_px=stage.size_px,
                    fingerprint=task.fingerprint,
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
    task: StageTask, *, device: torch.device, ranks_here: int | None, on_event: OnEvent
) -> EvaluationResult:
    """Evaluate the stage of `task.result` as one rank; every rank calls `on_event` with Progress, and returns."""
    assert task.result is not None
    share_cores(device, ranks_here)
    on_event = Throttled(on_event)

    def on_cases(done: int, total: int) -> None:
        on_event(Progress(stage=task.number, step="evaluate", epoch=0, done=done, total=total))

    with _run_of(task, EVALUATION_PART) as run:
        member = Member(run, task.settings, task.result)
        return evaluate([member], _cache_of(task, on_event), run / EVALUATION, device=device, on_cases=on_cases)


def stage_data(catalog: Catalog, cache: Path, size_px: int, fold: int) -> StageData:
    """Store of one size with the cases of the catalog in its order, and both sides of the split."""
    return StageData(open_store(cache, size_px), catalog.labelled, *split_indices(catalog.labelled, fold))


def _phantoms(data: StageData, task: StageTask, ranks_here: int | None, on_event: OnEvent) -> Training:
    """Phantoms with the masks of the training cases; each rank draws all of them."""
    stage = task.stage

    def on_image(done: int, total: int) -> None:
        on_event(Progress(stage=task.number, step="draw", epoch=0, done=done, total=total))

    cases = [data.cases[index] for index in data.train]
    store = draw_samples(
        cases,
        stage.phantoms,
        stage.size_px,
        seed=task.settings.pipeline.seed,
        threads=max(1, (os.cpu_count() or 1) // (ranks_here or 1)),
        on_image=on_image,
    )
    names = [f"phantom {number}" for number in range(stage.phantoms)]
    positive = np.array([is_positive(number) for number in range(stage.phantoms)], bool)
    return Training(store, names, positive, np.arange(stage.phantoms))


@contextmanager
def _run_of(task: StageTask, part: str) -> Iterator[Path]:
    """The run on this node; of one in an object store a copy of its stages, and rank 0 sends what it writes."""
    mirror = Mirror(task.run, data=task.settings.data)
    stages = task.settings.pipeline.stages
    mirror.pull(*(stage_part(number, stage.size_px) for number, stage in enumerate(stages, start=1)))
    with mirror.sending(part) if rank() == 0 else nullcontext():
        yield mirror.folder


def _cache_of(task: StageTask, on_event: OnEvent) -> Path:
    """The cache on this node; one in an object store is copied by the first rank of the node while the others wait."""
    data = task.settings.data

    def on_file(step: str, done: int, total: int) -> None:
        on_event(Progress(stage=task.number, step="copy", epoch=0, done=done, total=total))

    return local_cache(data.cache, [task.stage.size_px], data=data, token=task.token, on_progress=on_file)


def share_cores(device: torch.device, ranks_here: int | None) -> None:
    """Give each of the ranks on this machine its part of the cores, since Ray and torchrun give each one thread."""
    if device.type == "cpu" and ranks_here:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_here))


class Throttled:
    """Passes events on, of Progress only a few a second and always the last of a step."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event, self._passed_at = on_event, 0.0

    def __call__(self, event: Event) -> None:
        """Pass the event on, unless it is Progress that follows another one too soon."""
        if isinstance(event, Progress):
            now = time.perf_counter()
            if now - self._passed_at < _SHOW_EVERY_S and event.done < event.total:
                return
            self._passed_at = now
        self._on_event(event)
