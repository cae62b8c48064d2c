"""fit(): one stage of training, on one process or on many that share a torch.distributed group.

Owns: epochs, steps, averaging, validation, the choice of the best weights, resuming. Knows no Ray: who calls it passes
`on_epoch` and `on_step`. Refuses: a loss that is not finite. Called by: `cluster.worker`, tests, benchmarks.

The global batch decides: order, augmentation and optimiser steps are the same for any number of ranks, and with
`sync_batch_norm` so are the results, up to rounding. All ranks call `on_epoch` equally often.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ptxdist.config import StageSettings, TrainSettings
from ptxdist.data.catalog import Case
from ptxdist.data.store import Store
from ptxdist.errors import TrainingError
from ptxdist.learn import batchnorm
from ptxdist.learn.augment import Augmentation
from ptxdist.learn.averaging import WeightAverage, reestimate_batch_norm
from ptxdist.learn.checkpoint import (
    TrainingState,
    load_checkpoint,
    match_device,
    save_checkpoint,
    save_weights,
)
from ptxdist.learn.dataset import Batch, Indices, batches, epoch_order, training_shares
from ptxdist.learn.distributed import barrier, rank, sum_over_ranks, world_size
from ptxdist.learn.losses import bce_dice_per_image
from ptxdist.learn.metrics import scores
from ptxdist.learn.schedule import learning_rate
from ptxdist.learn.scoring import score_cases
from ptxdist.rundir import EpochMetrics

_CHECK_EVERY = 10  # steps between two looks at the loss, each of which waits for a GPU

Step = Callable[[str, int, int, int], None]


@dataclass(frozen=True)
class StageData:
    """What a stage learns from: a store, its cases in the same order, and the positions of both sides of the split."""

    store: Store
    cases: tuple[Case, ...]
    train: Indices
    val: Indices


@dataclass(frozen=True)
class FitResult:
    """A finished stage: its epochs in order, the best one, and its weights in `best` (rank 0 wrote them)."""

    history: tuple[EpochMetrics, ...]
    best: EpochMetrics
    weights: Path
    sha256: str


def fit(
    model: nn.Module,
    data: StageData,
    stage: StageSettings,
    train: TrainSettings,
    *,
    number: int,
    seed: int,
    device: torch.device,
    folder: Path,
    on_epoch: Callable[[EpochMetrics], None] = lambda metrics: None,
    on_step: Step = lambda step, epoch, done, total: None,
    on_message: Callable[[str], None] = lambda message: None,
) -> FitResult:
    """Train `model` on one stage and keep its best weights below `folder`, going on from a checkpoint if there is one.

    `number` is the stage's place in the pipeline, from 1. `on_step` hears ("train" or "validate", epoch, images done,
    images) of this rank's view of the global work. Raises TrainingError when the loss is not finite, naming the
    epoch and cases; CheckpointError when weights cannot be written or read.
    """
    trainer = _Trainer(model, data, stage, train, number, seed, device, folder, on_step)
    trainer.resume(on_message)
    if trainer.history and not trainer.history[-1].averaged:
        on_message(f"stage {number} goes on after epoch {trainer.history[-1].epoch} of {stage.epochs}")
    for epoch in range(len(trainer.history) + 1, stage.epochs + 1):
        on_epoch(trainer.run_epoch(epoch))
    if stage.swa_epochs:
        on_epoch(trainer.finish_average())
    return trainer.result()


class _Trainer:
    """The state of one stage: model, optimiser, average, history."""

    def __init__(
        self,
        model: nn.Module,
        data: StageData,
        stage: StageSettings,
        train: TrainSettings,
        number: int,
        seed: int,
        device: torch.device,
        folder: Path,
        on_step: Step,
    ) -> None:
        self.data, self.stage, self.train_settings = data, stage, train
        self.number, self.seed, self.device, self.on_step = number, seed, device, on_step
        self.folder = folder
        self.precision = choose_precision(train.precision, device)
        self.model = model.to(device).to(memory_format=torch.channels_last)
        if world_size() > 1 and train.sync_batch_norm:
            self.model = batchnorm.convert(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=stage.learning_rate, fused=True)
        self.average = WeightAverage()
        self.history: list[EpochMetrics] = []
        self.best: EpochMetrics | None = None
        self.sha256 = ""
        self.parallel: nn.Module = self.model
        if world_size() > 1:
            self.parallel = DistributedDataParallel(
                self.model,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )

    def resume(self, on_message: Callable[[str], None]) -> None:
        """Take up the newest whole checkpoint, if there is one."""
        state = load_checkpoint(self.folder, on_message if rank() == 0 else lambda message: None)
        if state is None:
            return
        self.model.load_state_dict(state.model)
        self.optimizer.load_state_dict(dict(state.optimizer))
        for parameter, moments in self.optimizer.state.items():  # the fused kernel walks memory, not indices
            for name, value in moments.items():
                if value.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter).copy_(value)
        self.history = [EpochMetrics.model_validate(item) for item in state.progress["history"]]
        self.best = EpochMetrics.model_validate(state.progress["best"])
        self.sha256 = state.progress["best_sha256"]
        self.average.count = state.progress["averaged"]
        self.average.state = match_device(state.average, self.device)

    def run_epoch(self, epoch: int) -> EpochMetrics:
        """Train and validate one epoch, then save."""
        rate = learning_rate(self.stage, [item.val_loss for item in self.history])
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        started = time.perf_counter()
        train_loss = self._train(epoch)
        train_seconds = time.perf_counter() - started
        if epoch > self.stage.epochs - self.stage.swa_epochs:
            self.average.update(self.model)
        metrics = self._validate(epoch, rate, train_loss, train_seconds)
        self._keep(metrics)
        return metrics

    def finish_average(self) -> EpochMetrics:
        """Validate the averaged weights as a candidate of their own."""
        self.model.load_state_dict(match_device(self.average.state, self.device))
        if self.stage.swa_update_batch_norm:
            reestimate_batch_norm(self.model, self._training_batches(self.stage.epochs), self.precision)
        metrics = self._validate(self.stage.epochs, self.history[-1].learning_rate, None, 0.0, averaged=True)
        self._keep(metrics, checkpoint=False)
        return metrics

    def result(self) -> FitResult:
        """What the stage leaves; the model holds its last weights."""
        assert self.best is not None
        barrier()  # rank 0 has written the weights
        return FitResult(tuple(self.history), self.best, self._best_path(self.best), self.sha256)

    def _training_batches(self, epoch: int) -> Any:
        order = epoch_order(self.data.train, seed=self.seed, epoch=epoch)
        shares = training_shares(order, self.stage.batch_size, rank(), world_size())
        augmentation = Augmentation(self.stage.augmentation, self.seed)
        return batches(self.data.store, shares, augmentation=augmentation, epoch=epoch, device=self.device)

    def _train(self, epoch: int) -> float:
        """Mean loss per case of one epoch of optimiser steps."""
        total, done = len(self.data.train), 0
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        unchecked: list[tuple[Tensor, Batch]] = []
        for step, batch in enumerate(self._training_batches(epoch), start=1):
            loss = self._step(batch)
            loss_sum += loss.double()
            done += batch.global_size
            unchecked.append((loss, batch))
            if step % _CHECK_EVERY == 0 or done == total:
                self._check_finite(unchecked, epoch)
                unchecked.clear()
            self.on_step("train", epoch, done, total)
        return float(sum_over_ranks(loss_sum)) / total

    def _step(self, batch: Batch) -> Tensor:
        """One optimiser step; returns the sum of this rank's losses."""
        self.parallel.train()
        if not len(batch.image) and not self.train_settings.sync_batch_norm:
            self.parallel.eval()  # plain batch norm has no statistics of an empty batch
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            logits = self.parallel(batch.image)
        loss = bce_dice_per_image(logits, batch.mask.float() / 255).sum()
        # DDP averages gradients over ranks; this makes it the mean over the cases of the global batch.
        torch.autograd.backward(loss * world_size() / batch.global_size)
        self.optimizer.step()
        return loss.detach()

    def _check_finite(self, steps: list[tuple[Tensor, Batch]], epoch: int) -> None:
        for loss, batch in steps:
            if not math.isfinite(float(loss)):
                cases = ", ".join(self.data.cases[index].case_id for index in batch.index.tolist()[:4])
                raise TrainingError(
                    f"the loss of stage {self.number}, epoch {epoch} is {float(loss)} on the cases {cases}, …; "
                    f"weights up to epoch {epoch - 1} are kept; a lower learning_rate or precision fp32 may help"
                )

    def _validate(
        self, epoch: int, rate: float, train_loss: float | None, train_seconds: float, *, averaged: bool = False
    ) -> EpochMetrics:
        started = time.perf_counter()
        total = len(self.data.val)
        counts = score_cases(
            self.model,
            self.data.store,
            self.data.cases,
            self.data.val,
            thresholds=[self.stage.threshold],
            device=self.device,
            precision=self.precision,
            on_cases=lambda done: self.on_step("validate", epoch, min(total, done * world_size()), total),
        )
        val_loss = float(counts.loss.mean())
        if not math.isfinite(val_loss):
            raise TrainingError(f"the validation loss of stage {self.number}, epoch {epoch} is {val_loss}")
        return EpochMetrics(
            stage=self.number,
            epoch=epoch,
            averaged=averaged,
            learning_rate=rate,
            train_loss=train_loss,
            val_loss=val_loss,
            at_stage=scores(counts.at_stage),
            at_full=scores(counts.at_full[0]),
            train_seconds=train_seconds,
            val_seconds=time.perf_counter() - started,
            images_per_second=len(self.data.train) / train_seconds if train_seconds else None,
        )

    def _keep(self, metrics: EpochMetrics, *, checkpoint: bool = True) -> None:
        """Add to the history; rank 0 saves the weights if they are the best so far, and a checkpoint."""
        self.history.append(metrics)
        if self.best is None or self._merit(metrics) > self._merit(self.best):
            self.best = metrics
            if rank() == 0:
                self.sha256 = save_weights(self.model.state_dict(), self._best_path(metrics))
        if checkpoint and rank() == 0:
            assert self.best is not None
            progress = {
                "history": [item.model_dump(mode="json") for item in self.history],
                "best": self.best.model_dump(mode="json"),
                "best_sha256": self.sha256,
                "averaged": self.average.count,
            }
            state = TrainingState(
                metrics.epoch, self.model.state_dict(), self.optimizer.state_dict(), self.average.state, progress
            )
            save_checkpoint(self.folder, state, keep=self.train_settings.keep_checkpoints)
        if rank() == 0:  # weights that no kept checkpoint refers to any more
            ends = range(len(self.history), max(0, len(self.history) - self.train_settings.keep_checkpoints), -1)
            needed = {self._best_path(max(self.history[:end], key=self._merit)) for end in ends}
            for path in set(self.folder.glob("best-*.safetensors")) - needed:
                path.unlink()

    def _best_path(self, metrics: EpochMetrics) -> Path:
        return self.folder / f"best-{metrics.epoch:04d}{'-average' if metrics.averaged else ''}.safetensors"

    def _merit(self, metrics: EpochMetrics) -> tuple[float, float]:
        """Larger is better; the lower validation loss decides between equal scores."""
        if self.stage.best_by == "loss":
            return -metrics.val_loss, 0.0
        return getattr(metrics.at_full, self.stage.best_by) or 0.0, -metrics.val_loss


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The number format of the forward pass; auto takes bf16 only where the hardware multiplies it."""
    if name == "auto":
        name = "bf16" if _has_bf16(device) else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
