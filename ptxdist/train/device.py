"""The device and the number format of a forward pass, chosen in one place for training, evaluation and prediction."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

import torch

from ptxdist.errors import PtxdistError, SettingsError
from ptxdist.executor import ahead

Device = Literal["auto", "cpu", "gpu"]
Item = TypeVar("Item")
Result = TypeVar("Result")

_PX_AT_ONCE = 2**24  # in the network: eight passes of eight images of 512 pixels, about 6 GB

_NO_GPU = SettingsError("no GPU on this machine that torch can use; give --device cpu or auto")


def choose_device(name: Device, number: int = 0, *, missing: PtxdistError = _NO_GPU) -> torch.device:
    """The CPU, or the GPU of this number; `auto` takes the GPU if there is one. Raises `missing` for `gpu` without."""
    is_there = torch.cuda.device_count() > number
    if name == "gpu" and not is_there:
        raise missing
    return torch.device("cuda", number) if is_there and name != "cpu" else torch.device("cpu")


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The number format of the forward pass; auto takes bf16 only where the hardware multiplies it."""
    if name == "auto":
        name = "bf16" if _has_bf16(device) else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Context in which a forward pass computes in `precision`; with float32 it changes nothing."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def one_thread_each(
    function: Callable[[Item], Result], items: Iterable[Item], device: torch.device, item_px: int
) -> Iterator[Result]:
    """Results of `function`, a forward pass of `item_px` pixels, for the items, in order.

    On a CPU each is computed by one thread, several at a time, as many as torch uses: threads that share a convolution
    divide its sums, so that the result would depend on their number. The caller has one thread too, until the end.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield from map(function, items)
        return

    def alone(item: Item) -> Result:
        torch.set_num_threads(1)  # of this thread
        return function(item)

    at_once = max(1, min(threads, _PX_AT_ONCE // item_px))
    try:
        torch.set_num_threads(1)  # several would wait for cores that the others use
        yield from ahead(alone, items, threads=at_once, most=at_once + 1)
    finally:
        torch.set_num_threads(threads)


def keep_freed_memory(device: torch.device) -> None:
    """Let this process keep freed memory for the next tensors, where `device` is a CPU and the C library is glibc.

    Otherwise glibc returns every tensor above 32 MiB to the system, and each new one is cleared page by page: half of
    the time of a training step at 512 pixels. The process then takes about a tenth more memory at its peak.
    """
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        change = ctypes.CDLL(None).mallopt
        for parameter, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            change(parameter, value)


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
