"""This machine, and how fast it trains a pipeline: measured by a few real steps of each stage."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ptxdist.cache.catalog import read_catalog
from ptxdist.config import Settings
from ptxdist.events import Event, Progress
from ptxdist.run.advice import Machine
from ptxdist.run.stage import stage_data
from ptxdist.train.dataset import VAL_BLOCK
from ptxdist.train.device import choose_device, choose_precision
from ptxdist.train.loop import fit
from ptxdist.train.pretrained import offline_encoders
from ptxdist.train.unet import build_unet

# Steps that are not counted, and that are; and as many blocks of validation. A GPU is waited for every ten steps.
_STEPS = {"cpu": (1, 3), "cuda": (10, 20)}

OnProgress = Callable[[str, int, int], None]  # what, done, total


@dataclass(frozen=True)
class Speed:
    """Measured speed of one stage: images a second in training and in validation, and the minutes of the stage.

    `is_busy` says that other programs had more to do than this machine has cores, so that the speed is too low.
    """

    stage: int
    size_px: int
    train_images_s: float
    val_images_s: float
    minutes: float
    is_busy: bool = False

    @property
    def sentence(self) -> str:
        """The speed for people."""
        return (
            f"Measured here, stage {self.stage}: {self.train_images_s:,.3g} images/s in training, "
            f"{self.val_images_s:,.3g} in validation: about {self.minutes:,.0f} minutes"
            + (", less on an idle machine." if self.is_busy else ".")
        )


def this_machine() -> Machine:
    """Cores, memory, GPUs and pre-trained weights of this machine."""
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return Machine(
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        gpus=tuple((gpu.name, round(gpu.total_memory / 2**30, 1)) for gpu in gpus),
        bf16=choose_precision("auto", choose_device("auto")) == torch.bfloat16,
        encoders=tuple(offline_encoders()),
    )


def measure(settings: Settings, cache: Path, on_progress: OnProgress = lambda what, done, total: None) -> list[Speed]:
    """Train and validate each stage for a few steps on one device, from random weights, and keep nothing.

    The training cases of the fold are used in their order, as often as needed. Raises what `train.loop.fit` raises.
    """
    device = choose_device(settings.train.device)
    if device.type == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    is_busy = os.getloadavg()[0] > (os.cpu_count() or 1)
    warm_up, counted = _STEPS[device.type]
    few = warm_up + counted
    catalog, found = read_catalog(cache), []
    model = settings.pipeline.model.model_copy(update={"encoder_weights": "none", "init": None})
    for number, stage in enumerate(settings.pipeline.stages, start=1):
        torch.manual_seed(settings.pipeline.seed)
        data = stage_data(catalog, cache, stage.size_px, settings.pipeline.fold)  # as fast as phantoms of this size
        part = replace(data, train=data.train[: few * stage.batch_size], val=data.val[: few * VAL_BLOCK])
        clock = _Clock(warm_up, f"steps of stage {number}", 2 * few, on_progress)
        with tempfile.TemporaryDirectory(prefix="ptxdist-plan-") as folder:
            fit(
                build_unet(model),
                part,
                stage.model_copy(update={"epochs": 1, "swa_epochs": 0, "phantoms": 0}),
                settings.train,
                number=number,
                seed=settings.pipeline.seed,
                device=device,
                folder=Path(folder),
                on_event=clock,
            )
        train, val = clock.speed("train"), clock.speed("validate")
        seconds = stage.epochs * ((stage.phantoms or len(data.train)) / train + len(data.val) / val)
        found.append(Speed(number, stage.size_px, train, val, seconds / 60, is_busy))
    return found


class _Clock:
    """Receives the events of a stage and notes when how many images were done."""

    def __init__(self, warm_up: int, what: str, total: int, on_progress: OnProgress) -> None:
        self._warm_up, self._what, self._total, self._on_progress = warm_up, what, total, on_progress
        self._started = time.perf_counter()
        self._marks: dict[str, list[tuple[float, int]]] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress):
            self._marks.setdefault(event.step, []).append((time.perf_counter(), event.done))
            self._on_progress(self._what, sum(map(len, self._marks.values())), self._total)

    def speed(self, step: str) -> float:
        """Images a second after the warm-up; over all steps where there are too few."""
        marks = [(self._started, 0), *self._marks[step]]
        start, end = marks[min(self._warm_up, len(marks) - 2)], marks[-1]
        return (end[1] - start[1]) / max(1e-9, end[0] - start[0])
