"""Communication between the ranks of a training; with one process each function does nothing.

Owns: every call of torch.distributed's collectives. Each rank must call `sum_over_ranks` and `barrier` equally often
and in the same order, or all of them hang.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")


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
