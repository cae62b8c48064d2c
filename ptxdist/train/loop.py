"""fit(): one stage of training, on one process or on many that share a torch.distributed group.

Owns: epochs, SWA, validation, resuming. It does not know Ray; its caller receives events. `saving` decides
what is kept.

The global batch decides: order, augmentation and optimiser steps are the same for any number of ranks, and with
`sync_batch_norm` so are the results, up to rounding. A run that is killed and resumes from a checkpoint, between
epochs or inside one, ends with the same bits on the CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ptxdist.cache.catalog import Case
from ptxdist.cache.store import Store
from ptxdist.config import StageSettings, TrainSettings
from ptxdist.errors import TrainingError
from ptxdist.events import Message, OnEvent, Progress
from ptxdist.records import EpochMetrics, StageHistory
from ptxdist.scores.metrics import scores
from ptxdist.train import batchnorm, collapse
from ptxdist.train.augment import Augmentation
from ptxdist.train.checkpoint import TrainingState, match_device
from ptxdist.train.dataset import Batch, Indices, Share, batches, epoch_order, positives_order, training_shares
from ptxdist.train.device import choose_precision, keep_freed_memory
from ptxdist.train.distributed import barrier, rank, world_size
from ptxdist.train.losses import chosen
from ptxdist.train.on_device import OnDeviceStore, hold
from ptxdist.train.saving import Saver
from ptxdist.train.schedule import learning_rate, positive_share, warm_up
from ptxdist.train.scoring import score_cases
from ptxdist.train.step import FiniteCheck, Stepper, make_optimizer
from ptxdist.train.swa import SWA, reestimate_batch_norm

_CHECK_EVERY = 10  # steps between two looks at the losses, after which a checkpoint may be written


@dataclass(frozen=True)
class Training:
    """What a stage learns from: positions in a store, with the name and whether it is positive of each of its samples.

    `indices` int64 (N,), `names` and `positive` bool, one for each sample of the store.
    """

    store: Store
    names: Sequence[str]
    positive: npt.NDArray[np.bool_]
    indices: Indices


@dataclass(frozen=True)
class StageData:
    """A store, its cases in the same order, and the positions of both sides of the split.

    `instead` is what the stage learns from instead of the training cases.
    """

    store: Store
    cases: tuple[Case, ...]
    train: Indices
    val: Indices
    instead: Training | None = None

    @property
    def training(self) -> Training:
        """What the stage learns from."""
        names = [case.case_id for case in self.cases]
        positive = np.array([bool(case.masks) for case in self.cases], bool)
        return self.instead or Training(self.store, names, positive, self.train)


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
    Raises TrainingError when a loss or gradient is not finite, naming the step and cases, and when the stage has
    collapsed with `train.stop_on_collapse`; CheckpointError when weights cannot be written or read.
    """
    keep_freed_memory(device)
    saver = Saver(folder, stage, train, preempted)
    trainer = _Trainer(model, data, stage, train, number, seed, device, on_event, saver)
    with saver.writer:  # however the stage ends, a checkpoint that is being written is finished first
        trainer.resume()
        on_event(StageHistory(stage=number, epochs=tuple(trainer.history)))
        for epoch in range(len(trainer.history) + 1, stage.epochs + 1):
            trainer.watch()
            on_event(trainer.run_epoch(epoch))
        trainer.watch()
        if stage.swa_epochs:
            on_event(trainer.finish_swa())
        return trainer.result()


@dataclass
class _Position:
    """Place inside an epoch: optimiser steps done, the sum of their losses, their seconds; the epoch's cases."""

    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    cases: int = 0


@dataclass(eq=False)
class _Trainer:
    """The state of one stage: model, optimiser, averages, history, place in the epoch."""

    model: nn.Module
    data: StageData
    stage: StageSettings
    train: TrainSettings
    number: int
    seed: int
    device: torch.device
    on_event: OnEvent
    saver: Saver

    def __post_init__(self) -> None:
        self.augmentation = Augmentation(self.stage.augmentation, self.seed, self.stage.mix)
        on_device = self.train.data_on_device
        if on_device == "auto" and not self.augmentation.by_table:
            on_device = "off"  # the CPU augments, so most batches would not come from the device

        def on_images(done: int, total: int) -> None:  # of a slow storage, for minutes
            self.on_event(Progress(stage=self.number, step="load", epoch=0, done=done, total=total))

        self.data = replace(self.data, store=hold(self.data.store, self.device, on_device, on_images))
        self.training = self.data.training
        self.precision = choose_precision(self.train.precision, self.device)
        self.model = self.model.to(self.device).to(memory_format=torch.channels_last)
        if world_size() > 1 and self.train.sync_batch_norm:
            self.model = batchnorm.convert(self.model)
        self.optimizer = make_optimizer(self.model, self.stage)
        parallel: nn.Module = self.model
        if world_size() > 1:
            parallel = DistributedDataParallel(
                self.model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
        self.stepper = Stepper(parallel, self.optimizer, self.stage, self.train, self.precision)
        self.swa = SWA()
        self.steps = 0  # of the optimiser, over all epochs
        self.history: list[EpochMetrics] = []
        self.best: EpochMetrics | None = None
        self.position = _Position()
        self.positive = self.training.positive[self.training.indices]

    def resume(self) -> None:
        """Load the newest whole checkpoint, if there is one; rank 0 chooses it for all ranks."""
        if isinstance(self.data.store, OnDeviceStore) and not self.augmentation.by_table:
            self._say(
                f"stage {self.number}: the augmentation does more than flip images and change grey levels, so the CPU "
                "prepares the training batches; the data set on the device is used for validation only"
            )
        state = self.saver.load(self._say)
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
        self.swa.count = state.progress["averaged"]
        self.swa.state = match_device(state.average, self.device)
        self.steps = state.progress.get("steps", 0)  # older checkpoints have none, nor settings that need it
        self.position = _Position(state.step, state.progress["loss_sum"], state.progress["seconds"])
        where = f" and {state.step} steps of the next" if state.step else ""
        self._say(f"stage {self.number} resumes after epoch {state.epoch} of {self.stage.epochs}{where}")

    def run_epoch(self, epoch: int) -> EpochMetrics:
        """Train and validate one epoch, or what is left of it, then save."""
        rate = learning_rate(self.stage, [item.val_loss for item in self.history])
        self._train(epoch, rate)
        done, self.position = self.position, _Position()
        if epoch > self.stage.epochs - self.stage.swa_epochs:
            self.swa.update(self.model)
        metrics = self._validate(epoch, rate, done)
        self._keep(metrics)
        return metrics

    def watch(self) -> None:
        """Say when the stage has collapsed to empty masks, or stop it there; all ranks find the same."""
        found = collapse.find(self.history, self.stage, self.number)
        if found is None:
            return
        text = f"stage {self.number} has collapsed to empty masks. {found.words}"
        if self.train.stop_on_collapse and not found.over:
            assert self.best is not None
            raise TrainingError(
                f"{text} train.stop_on_collapse stops it: {self.saver.last_good()}, the best weights are "
                f"{self.saver.best_path(self.best)}. {found.cure}"
            )
        if found.epoch == self.history[-1].epoch:
            self._say(f"warning: {text} {found.cure}")

    def finish_swa(self) -> EpochMetrics:
        """Validate the SWA weights, as a further candidate for the best ones."""
        self.model.load_state_dict(match_device(self.swa.state, self.device))
        if self.stage.swa_update_batch_norm:
            shares = self._shares(self.stage.epochs)
            reestimate_batch_norm(self.model, self._told(shares), self.precision)
        metrics = self._validate(self.stage.epochs, self.history[-1].learning_rate, _Position(), averaged=True)
        self._keep(metrics, checkpoint=False)
        return metrics

    def result(self) -> FitResult:
        """The result of the stage; the model holds its last weights, those of SWA or of the last step."""
        assert self.best is not None
        self.saver.wait()
        barrier()  # rank 0 has written the weights
        return FitResult(tuple(self.history), self.best, self.saver.best_path(self.best), self.saver.sha256)

    def _shares(self, epoch: int) -> list[Share]:
        share, cases, positive = positive_share(self.stage, epoch), self.training.indices, self.positive
        if self.stage.epoch == "positives":
            shares = cast(list[float], [positive_share(self.stage, number) for number in range(1, epoch + 1)])
            order = positives_order(cases, seed=self.seed, positive=positive, positive_shares=shares)
        else:
            order = epoch_order(cases, seed=self.seed, epoch=epoch, positive=positive, positive_share=share)
        return training_shares(order, self.stage.batch_size, rank(), world_size())

    def _batches(self, shares: list[Share], epoch: int) -> Iterator[Batch]:
        return batches(
            self.training.store,
            shares,
            augmentation=self.augmentation,
            names=self.training.names,
            others=self.training.indices,
            epoch=epoch,
            device=self.device,
        )

    def _told(self, shares: list[Share]) -> Iterator[Batch]:
        """The batches for the batch norm of the averaged weights; emits Progress after each."""
        done, total = 0, sum(share.global_size for share in shares)
        for batch in self._batches(shares, self.stage.epochs):
            yield batch
            done += batch.global_size
            self.on_event(Progress(stage=self.number, step="average", epoch=0, done=done, total=total))

    def _train(self, epoch: int, rate: float) -> None:
        """Optimiser steps from the present position to the end of the epoch."""
        place, started, shares = self.position, time.perf_counter(), self._shares(epoch)
        place.cases = sum(share.global_size for share in shares)
        done = saved = sum(share.global_size for share in shares[: place.step])
        check = FiniteCheck(self.number, lambda indices: [self.training.names[index] for index in indices])
        seconds = place.seconds
        for step, batch in enumerate(self._batches(shares[place.step :], epoch), start=place.step + 1):
            for group in self.optimizer.param_groups:
                group["lr"] = rate * warm_up(self.stage, self.steps)
            loss, norm = self.stepper.step(batch)
            self.steps += 1
            done += batch.global_size
            check.add(step, loss, norm, batch)
            if step % _CHECK_EVERY == 0 or step == len(shares):
                # The sums grow by the same pieces whether or not the epoch is interrupted at one of these places.
                place.loss_sum += check.sum_losses(epoch, self.saver.last_good)
                place.step, place.seconds = step, seconds + time.perf_counter() - started
                if step < len(shares) and self.saver.is_due(done - saved):
                    self._save()
                    saved = done
            self.on_event(Progress(stage=self.number, step="train", epoch=epoch, done=done, total=place.cases))

    def _say(self, text: str) -> None:
        self.on_event(Message(text=text))

    def _validate(self, epoch: int, rate: float, done: _Position, *, averaged: bool = False) -> EpochMetrics:
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
                f"the validation loss of stage {self.number}, epoch {epoch} is {val_loss}; {self.saver.last_good()}"
            )
        return EpochMetrics(
            stage=self.number,
            epoch=epoch,
            averaged=averaged,
            learning_rate=rate,
            train_loss=done.loss_sum / done.cases if done.cases else None,
            val_loss=val_loss,
            at_stage=scores(counts.at_stage),
            at_full=scores(counts.at_full[0]),
            train_seconds=done.seconds,
            val_seconds=time.perf_counter() - started,
            images_per_second=done.cases / done.seconds if done.seconds else None,
        )

    def _keep(self, metrics: EpochMetrics, *, checkpoint: bool = True) -> None:
        """Add to the history; rank 0 saves the weights if they are the best so far, and a checkpoint."""
        self.history.append(metrics)
        is_best = self.best is None or self.saver.merit(metrics) > self.saver.merit(self.best)
        if is_best:
            self.best = metrics
        self._save(best=metrics if is_best else None, checkpoint=checkpoint)

    def _save(self, *, best: EpochMetrics | None = None, checkpoint: bool = True) -> None:
        progress = {
            "history": [item.model_dump(mode="json") for item in self.history],
            "best": self.best.model_dump(mode="json") if self.best else None,
            "averaged": self.swa.count,
            "steps": self.steps,
            "loss_sum": self.position.loss_sum,
            "seconds": self.position.seconds,
        }
        state = TrainingState(
            sum(not item.averaged for item in self.history),
            self.position.step,
            self.model.state_dict(),
            self.optimizer.state_dict() if checkpoint else {"state": {}, "param_groups": []},
            self.swa.state if checkpoint else {},
            progress,
        )
        self.saver.save(state, self.history, best=best, checkpoint=checkpoint)
