"""Stochastic weight averaging (SWA): the mean of the weights after each of the last epochs (Izmailov et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ptxdist.train.dataset import Batch
from ptxdist.train.device import autocast
from ptxdist.train.distributed import sum_over_ranks, world_size


class SWA:
    """Running mean of a model's parameters; its buffers are those of the latest model."""

    def __init__(self) -> None:
        self.count = 0
        self.state: dict[str, Tensor] = {}

    def update(self, model: nn.Module) -> None:
        """Add the model's present weights to the mean."""
        self.count += 1
        parameters = dict(model.named_parameters())
        for key, value in model.state_dict().items():
            if self.count == 1 or key not in parameters:
                self.state[key] = value.detach().clone()
            else:
                self.state[key] += (value.detach() - self.state[key]) / self.count


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Batch], precision: torch.dtype) -> None:
    """Replace the running statistics of batch norm by the mean of the batches' statistics, over all ranks.

    After SWA the running statistics belong to other weights, those of the last epoch (pytorch#59363).
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
    model.train()
    for batch in batches:
        if len(batch.image) or world_size() > 1:
            with autocast(batch.image.device, precision):
                model(batch.image)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        for statistic in (norm.running_mean, norm.running_var):
            if statistic is not None:
                statistic.copy_(sum_over_ranks(statistic.clone()) / world_size())
