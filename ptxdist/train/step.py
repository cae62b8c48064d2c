"""The optimiser, and a step of it over a global batch, of which each rank has a share; the check for finite numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ptxdist.config import StageSettings, TrainSettings
from ptxdist.errors import TrainingError
from ptxdist.train.dataset import Batch
from ptxdist.train.device import autocast
from ptxdist.train.distributed import gather_texts, rank, sum_over_ranks, world_size
from ptxdist.train.losses import chosen, over_ranks
from ptxdist.train.unet import Output


def make_optimizer(model: nn.Module, stage: StageSettings) -> torch.optim.Optimizer:
    """Adam, or with `weight_decay` AdamW (Loshchilov and Hutter 2019): biases and batch norm do not decay."""
    if not stage.weight_decay:
        return torch.optim.Adam(model.parameters(), lr=stage.learning_rate, fused=True)
    parameters = list(model.parameters())
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": stage.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=stage.learning_rate, fused=True)


class Stepper:
    """Takes optimiser steps with a model that may be wrapped by DistributedDataParallel."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        stage: StageSettings,
        train: TrainSettings,
        precision: torch.dtype,
    ) -> None:
        self._model, self._optimizer, self._loss_function, self._train = model, optimizer, chosen(stage), train
        self._precision = precision
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        share = len(range(rank(), stage.batch_size, world_size()))  # cases of this rank in a whole global batch
        self._usual = min(share, train.micro_batch or share)
        self._compiled = _compile(model, graphs=self._usual == share) if train.compile else None

    def step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One step; sum of the losses of this rank's cases and norm of the gradient, device scalars.

        DDP averages gradients over the ranks; scaled by the number of ranks and divided by the global batch, they are
        those of the mean over its cases, however these are divided among ranks and passes.
        """
        self._model.train()
        if not len(batch.image) and not self._train.sync_batch_norm:
            self._model.eval()  # plain batch norm has no statistics of an empty batch
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=batch.image.device)
        passes = list(self._passes(batch))
        for number, (image, mask) in enumerate(passes, start=1):
            waits = number < len(passes) and isinstance(self._model, DistributedDataParallel)
            with cast(DistributedDataParallel, self._model).no_sync() if waits else nullcontext():
                with autocast(image.device, self._precision):
                    output = self._network(len(image))(image)
                objective, loss = self._loss(output, mask.float() / 255, batch.global_size)
                torch.autograd.backward(objective * world_size() / batch.global_size)
            total += loss.detach()
        norm = torch.nn.utils.get_total_norm(
            [parameter.grad for parameter in self._parameters if parameter.grad is not None], foreach=True
        )
        self._optimizer.step()
        return total, norm

    def _network(self, cases: int) -> nn.Module:
        """The network for so many cases: compiled for the usual number, as it is for others, such as a last batch's."""
        if self._compiled is None or cases != self._usual:
            return self._model
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return self._compiled

    def _passes(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """The batch in parts of `micro_batch`; every rank has equally many, the last ones of some may be empty."""
        most = -(-batch.global_size // world_size())  # cases of the rank that has most
        size = self._train.micro_batch or max(1, most)
        for start in range(0, max(1, most), size):
            yield batch.image[start : start + size], batch.mask[start : start + size]

    def _loss(self, output: Output, target: Tensor, global_size: int) -> tuple[Tensor, Tensor]:
        """What to differentiate, and this rank's part of the sum of the losses over the global batch."""
        loss = self._loss_function.of_cases(output, target).sum()
        sums = self._loss_function.of_all(output, target)
        if sums is None or self._loss_function.whole is None:
            return loss, loss
        whole = self._loss_function.whole(over_ranks(sums))
        return loss + global_size * whole, loss + len(target) * whole


def _compile(model: nn.Module, *, graphs: bool) -> nn.Module:
    """The network compiled for one batch size; on a GPU as CUDA graphs, if gradients of no other pass have to be kept.

    Its parameters are the model's own; only training passes go through it.
    """
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    return cast(nn.Module, torch.compile(model, mode="reduce-overhead" if graphs and on_gpu else None, dynamic=False))


@dataclass
class FiniteCheck:
    """Losses and gradients of the last steps, looked at together: each look waits for a GPU and for all ranks."""

    stage: int
    names: Callable[[list[int]], list[str]]
    steps: list[tuple[int, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def add(self, step: int, loss: Tensor, norm: Tensor, batch: Batch) -> None:
        """Remember a step, and of its batch the positions only."""
        self.steps.append((step, loss, norm, batch.index))

    def sum_losses(self, epoch: int, last_good: Callable[[], str]) -> float:
        """Sum of the remembered losses over all ranks, in float64; then forget them.

        Raises TrainingError, on all ranks, naming step, cases and the last good checkpoint.
        """
        steps, self.steps = self.steps, []
        device = steps[0][1].device
        losses = torch.stack([loss.double() for _, loss, _, _ in steps])
        norms = torch.stack([norm.double() for _, _, norm, _ in steps])
        bad = ~(losses.isfinite() & norms.isfinite())
        total = sum_over_ranks(torch.stack((losses.sum(), bad.sum().double().to(device))))
        if not float(total[1]):
            return float(total[0])
        found = ""
        if bad.any():
            step, loss, norm, index = steps[int(bad.nonzero()[0])]
            what = f"loss of {float(loss)}" if not loss.isfinite() else f"gradient of norm {float(norm)}"
            cases = ", ".join(self.names(index.tolist()[:4]))
            found = f"{what} in step {step} on the cases {cases}, …"
        texts = sorted(text for text in gather_texts(found) if text)
        raise TrainingError(
            f"stage {self.stage}, epoch {epoch}: {texts[0]}; {last_good()}; "
            "a lower learning_rate or precision fp32 may help, or an image may be damaged"
        )
