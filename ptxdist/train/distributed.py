"""Communication between the ranks of a training; with one process each function does nothing.

Owns: every call of torch.distributed's collectives. Each rank must call `sum_over_ranks` and `barrier` equally often
and in the same order, or all of them hang.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ptxdist.errors import TrainingError
from ptxdist.train.device import Device, choose_device

Result = TypeVar("Result")


@contextmanager
def process_group(device: Device, ranks: int) -> Iterator[torch.device]:
    """The process group of so many processes of torchrun, if there are several; yields this rank's device.

    Raises TrainingError when `device` is gpu and this rank has none.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    missing = TrainingError(f"rank {local} of this machine has no GPU; use --set train.device=cpu or fewer workers")
    own = choose_device(device, local, missing=missing)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if ranks > 1:
        dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield own
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, from 0; 0 when undistributed."""
    return dist.get_rank() if _initialised() else 0


def world_size() -> int:
    """Number of processes; 1 when undistributed."""
    return dist.get_world_size() if _initialised() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Replace the tensor, in place, by the sum of all ranks' tensors of the same shape and dtype, and return it."""
    if _initialised():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def barrier() -> None:
    """Wait until every rank has called it."""
    if _initialised():
        dist.barrier()


def first(action: Callable[[], Result]) -> Result:
    """The result of `action`, which rank 0 runs before the others: they find its files on disk."""
    if rank() == 0:
        result = action()
        barrier()
        return result
    barrier()
    return action()


def gather_texts(text: str) -> list[str]:
    """The texts of all ranks, in the order of the ranks."""
    texts: list[str] = [text] * world_size()
    if _initialised():
        dist.all_gather_object(texts, text)
    return texts
