"""The optimiser of a stage."""

from __future__ import annotations

import torch
from torch import nn

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
