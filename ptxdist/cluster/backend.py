"""Ray Train's workers: how many, and how they become one process group, each on its node's interface, with a timeout.

Ray's own backend leaves the interface to gloo and NCCL, and torch's store listens on all addresses of rank 0. Nor need
the driver and Ray's controller load torch for this one, which takes seconds at each start.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.ray_constants import env_integer
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig
from ray.train.constants import (
    DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S,
    TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S,
)
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

from ptxdist.cluster import network


class _Backend(Backend):  # type: ignore[misc]  # Ray has no types
    share_cuda_visible_devices = True  # as Ray's for torch

    def on_start(self, worker_group: Any, backend_config: GroupConfig) -> None:
        """Let all workers join the group; returns when it exists."""
        host, port = worker_group.execute_single(0, network.free_port)
        ranks = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _join, backend_config.backend, host, port, rank, ranks, backend_config.timeout_s
                )
                for rank in range(ranks)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: GroupConfig) -> None:
        """Let all workers leave the group, and go on without those that hang."""
        left = worker_group.execute_async(_leave, len(worker_group) > 1)
        timeout_s = env_integer(TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S, DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S)
        with suppress(GetTimeoutError):
            ray.get(left, timeout=timeout_s)


def _join(backend: str, host: str, port: int, rank: int, ranks: int, timeout_s: float) -> None:
    from ray.train.torch.config import _set_torch_distributed_env_vars

    _set_torch_distributed_env_vars()
    network.choose_interface(network.own_address())
    network.join(backend, host, port, rank, ranks, timeout_s)


def _leave(several: bool) -> None:
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=several)


def _on_device() -> AbstractContextManager[None]:
    """In a worker with a GPU, that GPU is torch's while the training function runs."""
    from ray.train.torch.config import TorchConfigContextManager

    context: AbstractContextManager[None] = TorchConfigContextManager()
    return context


@dataclass
class GroupConfig(BackendConfig):  # type: ignore[misc]
    """The process group: its backend, gloo or nccl, and after how many seconds its collectives end."""

    backend: str
    timeout_s: float

    @property
    def backend_cls(self) -> type[_Backend]:
        """What makes the group."""
        return _Backend

    @property
    def train_func_context(self) -> Callable[[], AbstractContextManager[None]]:
        """What surrounds the training function."""
        return _on_device


class FixedWorkers(FixedScalingPolicy):  # type: ignore[misc]
    """Always the same number of workers, for which nobody is asked to start nodes; for Ray on one machine.

    Ray's own policy starts an actor for that, and waits until it has loaded Ray Data.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ask nobody."""

    def _maybe_send_resource_request(self) -> None:
        """Ask nobody."""
