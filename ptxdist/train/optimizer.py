"""The optimiser of a stage, and the exponential moving average (EMA) of the weights that it makes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ptxdist.config import StageSettings


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


class EMA:
    """Exponential moving average of a model's parameters and batch-norm statistics over the optimiser steps.

    After n steps the decay is min(decay, (1 + n) / (10 + n)), so that the first weights are forgotten early. The
    statistics are averaged as the weights are (as in timm): those of the latest weights belong to other activations,
    and re-estimating them would take a pass over the training cases each epoch.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._live = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
        self.state = {key: value.clone() for key, value in self._live.items()}  # strides as the model's

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the model's present weights, before which there were `steps` updates."""
        decay = min(self._decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(list(self.state.values()), list(self._live.values()), 1 - decay)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the `state` of another one; KeyError if it is of another model."""
        for key, value in self.state.items():
            value.copy_(state[key])

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Inside, the model has the averages, and `state` its own weights; both are exchanged in place."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for key, value in self._live.items():
            own = value.clone()
            value.copy_(self.state[key])
            self.state[key].copy_(own)
