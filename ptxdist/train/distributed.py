"""Communication between the ranks of a training; with one process each function does nothing.

Owns: every call of torch.distributed's collectives. Each rank must call `sum_over_ranks` and `barrier` equally often
and in the same order, or all of them hang. A collective ends after the timeout of the process group. Where ranks may
reach one minutes apart, because each has done work of its own or one of them has, they meet at a `barrier` first, which
has no time limit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ptxdist.errors import TrainingError, lost_rank, reason
from ptxdist.train.device import Device, choose_device

Result = TypeVar("Result")
_LONGEST_PAUSE_S = 0.05  # between two looks at whether all ranks have come


@contextmanager
def process_group(device: Device, ranks: int, timeout_s: float) -> Iterator[torch.device]:
    """The process group of so many processes of torchrun, if there are several; yields this rank's device.

    A collective that takes longer than `timeout_s` raises RuntimeError, or with NCCL ends the process. Raises
    TrainingError when `device` is gpu and this rank has none, when the processes do not find each other, and for an
    error inside that is the loss of another one or of their meeting point.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    missing = TrainingError(f"rank {local} of this machine has no GPU; use --set train.device=cpu or fewer workers")
    own = choose_device(device, local, missing=missing)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if ranks > 1:
        backend = "nccl" if own.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        except (RuntimeError, OSError, ValueError) as error:  # ValueError: a variable of torchrun's is missing
            raise TrainingError(
                f"the processes of torchrun do not reach each other; on several machines, name the network interface "
                f"between them in {backend.upper()}_SOCKET_IFNAME ({reason(error)[:200]})"
            ) from error
    try:
        yield own
    except RuntimeError as error:
        found = lost_rank(error, "a worker")
        if not found and isinstance(error, dist.DistError):  # of the store, or another one of NCCL
            found = f"the communication between the workers failed ({reason(error)[:200]})"
        if ranks == 1 or not found:
            raise
        raise TrainingError(f"stopped: {found}; rerun the same command") from error
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
    """Wait until every rank has called it, however long that takes.

    It uses the group's store, not a collective: a rank that copies a cache or writes the tables of an evaluation may
    take longer than the group's timeout. Raises RuntimeError when rank 0, which has the store, is gone; that another
    rank is gone is noticed by who has started the processes.
    """
    if world_size() == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    arrived = store.add("ptxdist/arrived", 1)  # at all barriers so far
    number = -(-arrived // world_size())  # of this one, from 1
    everyone, pause_s = f"ptxdist/barrier-{number}", 0.001
    if arrived == number * world_size():
        store.set(everyone, "")
    while not store.check([everyone]):
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


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
