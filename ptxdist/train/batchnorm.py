"""Batch normalisation over the global batch of all ranks, so that results do not depend on the number of workers.

On GPUs, PyTorch's own SyncBatchNorm does the same and is used; it does not run on CPUs.

With N the global count of values per channel, x̂ = (x - mean) / sqrt(var + eps) and g the gradient of y = w x̂ + b:

    dL/dx = w / sqrt(var + eps) · (g - sum(g) / N - x̂ sum(g x̂) / N),  both sums over all ranks.

Forward and backward each cost one collective (2 C + 1 and 2 C numbers) per layer. Ranks may have batches of different
sizes, or none at all. The gradients of w and b are this rank's sums, as DistributedDataParallel expects of any layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ptxdist.train import distributed


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose batch statistics run over all ranks; exactly nn.BatchNorm2d in eval mode and with one rank.

    Input (B, C, H, W) in any memory format, B = 0 allowed. Every rank must run it equally often, forward and backward.
    Raises ValueError on all ranks when there is a single value per channel over all of them, as nn.BatchNorm2d does.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalised input; updates the running statistics, identically on every rank."""
        if not self.training or distributed.world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        mean, var, count = _global_statistics(input)
        if count == 1:
            raise ValueError(f"expected more than 1 value per channel over all ranks, found {tuple(input.shape)}")
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            if count:
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(var * (count / (count - 1)), momentum)
        output: Tensor = _Normalise.apply(input, self.weight, self.bias, mean, var, count, self.eps)
        return output


class _GlobalBatchNormAct2d(GlobalBatchNorm2d):
    """timm's BatchNormAct2d, a batch norm with the activation after it, whose batch statistics run over all ranks."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.act(self.drop(super().forward(input)))
        return output


@torch.no_grad()
def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, int]:
    # Each rank's mean and variance come from one kernel and are joined in float64, in which mean² may be 1e8 times the
    # variance before `square - mean²` loses what float32 holds; so one collective is enough.
    channels = x.shape[1]
    moments = torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
    if x.numel():
        mean, var = (moment.double() for moment in torch.batch_norm_update_stats(x, None, None, 0.0))  # var is biased
        count = x.numel() // channels
        moments = torch.cat((mean, var + mean.square(), moments.new_ones(1))) * count
    total = int(distributed.sum_over_ranks(moments)[-1])
    mean, square = (moments[:-1] / max(total, 1)).view(2, channels)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return mean.to(dtype), (square - mean.square()).clamp_(min=0).to(dtype), total


class _Normalise(torch.autograd.Function):
    """Normalisation by statistics that are themselves functions of all ranks' inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: int,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.count, ctx.eps = count, eps
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        if x.numel():
            # With train=False the kernel takes mean and var as constants: it sums g x̂ and g in one pass.
            _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
            )
        else:
            grad_weight, grad_bias = torch.zeros_like(mean), torch.zeros_like(mean)
        sum_gx, sum_g = distributed.sum_over_ranks(torch.stack((grad_weight, grad_bias)))
        scale = torch.rsqrt(var + ctx.eps) if weight is None else weight * torch.rsqrt(var + ctx.eps)
        per_value = -scale / max(ctx.count, 1)
        grad_x = F.batch_norm(x, mean, var, per_value * sum_gx, per_value * sum_g, training=False, eps=ctx.eps)
        grad_x.addcmul_(grad, scale.view(-1, 1, 1))
        own = (grad_weight, grad_bias) if weight is not None else (None, None)
        return grad_x, *own, None, None, None, None


def convert(module: nn.Module) -> nn.Module:
    """Make every nn.BatchNorm2d and every BatchNormAct2d of timm in the module global, and return the module.

    Parameters, buffers and state dict keys stay the same. In place on the CPU; on a GPU torch's SyncBatchNorm takes
    over the parameters and buffers of each layer. To be called before DistributedDataParallel wraps the module.
    """
    of_timm = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d) and hasattr(layer, "act")]
    if any(parameter.is_cuda for parameter in module.parameters()):
        if of_timm:
            from timm.layers import convert_sync_batchnorm as convert_on_gpu
        else:
            convert_on_gpu = nn.SyncBatchNorm.convert_sync_batchnorm
        converted: nn.Module = convert_on_gpu(module)
        return converted
    for norm in of_timm:
        norm.__class__ = _GlobalBatchNormAct2d
    for layer in module.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = GlobalBatchNorm2d  # the same state, another forward
    return module
