"""fit(): one stage of training, on one process or on many that share a torch.distributed group.

Owns: epochs, SWA, validation, the choice of the best weights, when a checkpoint is due, resuming. It does not
know Ray; its caller receives events.

The global batch decides: order, augmentation and optimiser steps are the same for any number of ranks, and with
`sync_batch_norm` so are the results, up to rounding. A run that is killed and resumes from a checkpoint, between
epochs or inside one, ends with the same bits on the CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ptxdist import files
from ptxdist.cache.catalog import Case
from ptxdist.cache.store import Store
from ptxdist.config import StageSettings, TrainSettings
from ptxdist.errors import TrainingError
from ptxdist.records import EpochMetrics, Message, OnEvent, Progress, StageHistory
from ptxdist.scores.metrics import scores
from ptxdist.train import batchnorm
from ptxdist.train.augment import Augmentation
from ptxdist.train.checkpoint import (
    TrainingState,
    await_checkpoint,
    checkpoints,
    load_checkpoint,
    match_device,
    save_checkpoint,
    save_weights,
    snapshot,
)
from ptxdist.train.dataset import Batch, Indices, Share, batches, epoch_order, training_shares
from ptxdist.train.device import choose_precision
from ptxdist.train.distributed import barrier, gather_texts, rank, world_size
from ptxdist.train.losses import chosen
from ptxdist.train.on_device import OnDeviceStore, hold
from ptxdist.train.schedule import learning_rate, positive_share
from ptxdist.train.scoring import score_cases
from ptxdist.train.step import FiniteCheck, Stepper
from ptxdist.train.swa import SWA, reestimate_batch_norm

_CHECK_EVERY = 10  # steps between two looks at the losses, after which a checkpoint may be written
_PREEMPTED_S = 1.0  # seconds between checkpoints after a preemption notice


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
    on_event: OnEvent = lambda event: None,
    preempted: Callable[[], bool] = lambda: False,
) -> FitResult:
    """Train `model` on one stage and keep its best weights below `folder`; resumes from a checkpoint if there is one.

    `number` is the stage's place in the pipeline, from 1. `on_event` is called with one StageHistory, with Progress
    after each step, with EpochMetrics after each epoch and after SWA, and with Messages. **Every rank calls
    it**, with StageHistory and EpochMetrics equally often, so that it may wait for the other ranks there. Rank 0 calls
    `preempted`; while it returns True, since this node or that of another rank has a preemption notice, rank 0 writes a
    checkpoint about every second.
    Raises TrainingError when a loss or gradient is not finite, naming the step and cases; CheckpointError when weights
    cannot be written or read.
    """
    trainer = _Trainer(model, data, stage, train, number, seed, device, folder, on_event, preempted)
    with trainer.writer:  # however the stage ends, a checkpoint that is being written is finished first
        trainer.resume()
        on_event(StageHistory(stage=number, epochs=tuple(trainer.history)))
        for epoch in range(len(trainer.history) + 1, stage.epochs + 1):
            on_event(trainer.run_epoch(epoch))
        if stage.swa_epochs:
            on_event(trainer.finish_swa())
        return trainer.result()


@dataclass
class _Position:
    """Place inside an epoch: optimiser steps done, the sum of their losses, and the seconds they took."""

    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0


@dataclass(eq=False)
class _Trainer:
    """The state of one stage: model, optimiser, SWA, history, place in the epoch."""

    model: nn.Module
    data: StageData
    stage: StageSettings
    train: TrainSettings
    number: int
    seed: int
    device: torch.device
    folder: Path
    on_event: OnEvent
    preempted: Callable[[], bool]

    def __post_init__(self) -> None:
        self.augmentation, on_device = Augmentation(self.stage.augmentation, self.seed), self.train.data_on_device
        if on_device == "auto" and not self.augmentation.by_table:
            on_device = "off"  # the CPU augments, so most batches would not come from the device
        self.data = replace(self.data, store=hold(self.data.store, self.device, on_device))
        self.precision = choose_precision(self.train.precision, self.device)
        self.model = self.model.to(self.device).to(memory_format=torch.channels_last)
        if world_size() > 1 and self.train.sync_batch_norm:
            self.model = batchnorm.convert(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.stage.learning_rate, fused=True)
        parallel: nn.Module = self.model
        if world_size() > 1:
            parallel = DistributedDataParallel(
                self.model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
        self.stepper = Stepper(parallel, self.optimizer, self.stage, self.train, self.precision)
        self.swa = SWA()
        self.history: list[EpochMetrics] = []
        self.best: EpochMetrics | None = None
        self.sha256 = ""
        self.position = _Position()
        self.writer = ThreadPoolExecutor(1, "ptxdist-checkpoints")
        self.writing: Future[None] | None = None
        self.saved_at = time.monotonic()
        self.saved: TrainingState | None = None
        self.names = [case.case_id for case in self.data.cases]
        self.positive = np.array([bool(self.data.cases[index].masks) for index in self.data.train], bool)

    def resume(self) -> None:
        """Load the newest whole checkpoint, if there is one; rank 0 chooses it for all ranks."""
        if isinstance(self.data.store, OnDeviceStore) and not self.augmentation.by_table:
            self._say(
                f"stage {self.number}: the augmentation does more than flip images and change grey levels, so the CPU "
                "prepares the training batches; the data set on the device is used for validation only"
            )
        state = None
        if rank() == 0:
            files.remove_leftovers(self.folder)  # of a killed trainer; only rank 0 writes there
            state = load_checkpoint(self.folder, self._say)
        name = gather_texts(state.name if state else "")[0]
        if name and rank() != 0:
            state = await_checkpoint(self.folder / name)
        if state is None:
            return
        self.model.load_state_dict(state.model)
        self.optimizer.load_state_dict(dict(state.optimizer))
        for parameter, moments in self.optimizer.state.items():  # the fused kernel walks memory, not indices
            for name, value in moments.items():
                if value.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter).copy_(value)
        self.history = [EpochMetrics.model_validate(item) for item in state.progress["history"]]
        best = state.progress["best"]
        self.best = EpochMetrics.model_validate(best) if best else None
        self.sha256 = state.progress["best_sha256"]
        self.swa.count = state.progress["averaged"]
        self.swa.state = match_device(state.average, self.device)
        self.position = _Position(state.step, state.progress["loss_sum"], state.progress["seconds"])
        where = f" and {state.step} steps of the next" if state.step else ""
        self._say(f"stage {self.number} resumes after epoch {state.epoch} of {self.stage.epochs}{where}")

    def run_epoch(self, epoch: int) -> EpochMetrics:
        """Train and validate one epoch, or what is left of it, then save."""
        rate = learning_rate(self.stage, [item.val_loss for item in self.history])
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._train(epoch)
        done, self.position = self.position, _Position()
        if epoch > self.stage.epochs - self.stage.swa_epochs:
            self.swa.update(self.model)
        metrics = self._validate(epoch, rate, done.loss_sum / len(self.data.train), done.seconds)
        self._keep(metrics)
        return metrics

    def finish_swa(self) -> EpochMetrics:
        """Validate the SWA weights, as a further candidate for the best ones."""
        self.model.load_state_dict(match_device(self.swa.state, self.device))
        if self.stage.swa_update_batch_norm:
            shares = self._shares(self.stage.epochs)
            reestimate_batch_norm(self.model, self._batches(shares, self.stage.epochs), self.precision)
        metrics = self._validate(self.stage.epochs, self.history[-1].learning_rate, None, 0.0, averaged=True)
        self._keep(metrics, checkpoint=False)
        return metrics

    def result(self) -> FitResult:
        """The result of the stage; the model holds its last weights."""
        assert self.best is not None
        self._wait()
        barrier()  # rank 0 has written the weights
        return FitResult(tuple(self.history), self.best, self._best_path(self.best), self.sha256)

    def _shares(self, epoch: int) -> list[Share]:
        share = positive_share(self.stage, epoch)
        order = epoch_order(self.data.train, seed=self.seed, epoch=epoch, positive=self.positive, positive_share=share)
        return training_shares(order, self.stage.batch_size, rank(), world_size())

    def _batches(self, shares: list[Share], epoch: int) -> Iterator[Batch]:
        return batches(
            self.data.store, shares, augmentation=self.augmentation, names=self.names, epoch=epoch, device=self.device
        )

    def _train(self, epoch: int) -> None:
        """Optimiser steps from the present position to the end of the epoch."""
        total, place, started = len(self.data.train), self.position, time.perf_counter()
        shares = self._shares(epoch)
        done = saved = sum(share.global_size for share in shares[: place.step])
        check = FiniteCheck(self.number, lambda indices: [self.names[index] for index in indices])
        seconds = place.seconds
        for step, batch in enumerate(self._batches(shares[place.step :], epoch), start=place.step + 1):
            loss, norm = self.stepper.step(batch)
            done += batch.global_size
            check.add(step, loss, norm, batch)
            if step % _CHECK_EVERY == 0 or step == len(shares):
                # The sums grow by the same pieces whether or not the epoch is interrupted at one of these places.
                place.loss_sum += check.sum_losses(epoch, self._last_good)
                place.step, place.seconds = step, seconds + time.perf_counter() - started
                if step < len(shares) and self._is_due(done - saved):
                    self._save()
                    saved = done
            self.on_event(Progress(stage=self.number, step="train", epoch=epoch, done=done, total=total))

    def _is_due(self, images: int) -> bool:
        """Whether to write a checkpoint, this many images after the last one; True on rank 0 only."""
        if rank() != 0:
            return False
        seconds = time.monotonic() - self.saved_at
        return (
            0 < self.train.checkpoint_every_s <= seconds
            or 0 < self.train.checkpoint_every_images <= images
            or (seconds >= _PREEMPTED_S and self.preempted())
        )

    def _say(self, text: str) -> None:
        self.on_event(Message(text=text))

    def _last_good(self) -> str:
        self._wait()
        found = checkpoints(self.folder)
        return f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"

    def _validate(
        self, epoch: int, rate: float, train_loss: float | None, train_seconds: float, *, averaged: bool = False
    ) -> EpochMetrics:
        started = time.perf_counter()
        total, loss = len(self.data.val), chosen(self.stage)

        def on_cases(done: int) -> None:
            done = min(total, done * world_size())  # of all ranks, which are about equally far
            self.on_event(Progress(stage=self.number, step="validate", epoch=epoch, done=done, total=total))

        counts = score_cases(
            self.model,
            self.data.store,
            self.data.cases,
            self.data.val,
            thresholds=[self.stage.threshold],
            device=self.device,
            precision=self.precision,
            loss=loss,
            on_cases=on_cases,
        )
        val_loss = loss.total(counts.loss)
        if not math.isfinite(val_loss):
            raise TrainingError(
                f"the validation loss of stage {self.number}, epoch {epoch} is {val_loss}; {self._last_good()}"
            )
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
        is_best = self.best is None or self._merit(metrics) > self._merit(self.best)
        if is_best:
            self.best = metrics
        self._save(best=metrics if is_best else None, checkpoint=checkpoint)

    def _save(self, *, best: EpochMetrics | None = None, checkpoint: bool = True) -> None:
        """On rank 0: copy the state, and write it in the background after the former one."""
        self.saved_at = time.monotonic()
        if rank() != 0:
            return
        self._wait()
        progress = {
            "history": [item.model_dump(mode="json") for item in self.history],
            "best": self.best.model_dump(mode="json") if self.best else None,
            "averaged": self.swa.count,
            "loss_sum": self.position.loss_sum,
            "seconds": self.position.seconds,
        }
        epochs = sum(not item.averaged for item in self.history)
        self.saved = state = snapshot(
            TrainingState(
                epochs,
                self.position.step,
                self.model.state_dict(),
                self.optimizer.state_dict() if checkpoint else {"state": {}, "param_groups": []},
                self.swa.state if checkpoint else {},
                progress,
            ),
            self.saved,
        )
        ends = range(len(self.history), max(0, len(self.history) - self.train.keep_checkpoints - 1), -1)
        needed = {self._best_path(max(self.history[:end], key=self._merit)) for end in ends}

        def write() -> None:
            if best is not None:
                self.sha256 = save_weights(state.model, self._best_path(best))
            state.progress["best_sha256"] = self.sha256
            if checkpoint:
                save_checkpoint(self.folder, state, keep=self.train.keep_checkpoints)
            for path in set(self.folder.glob("best-*.safetensors")) - needed:  # no kept checkpoint refers to them
                path.unlink()

        self.writing = self.writer.submit(write)

    def _wait(self) -> None:
        """Wait until the checkpoint in the background is written; raises its error."""
        if self.writing is not None:
            self.writing.result()
            self.writing = None

    def _best_path(self, metrics: EpochMetrics) -> Path:
        return self.folder / f"best-{metrics.epoch:04d}{'-average' if metrics.averaged else ''}.safetensors"

    def _merit(self, metrics: EpochMetrics) -> tuple[float, float]:
        """Larger is better; the lower validation loss decides between equal scores."""
        if self.stage.best_by == "loss":
            return -metrics.val_loss, 0.0
        return getattr(metrics.at_full, self.stage.best_by) or 0.0, -metrics.val_loss
