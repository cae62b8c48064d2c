"""How Ray Train's workers become the ranks of one process group: each on the interface of its node, with a timeout.

Ray's own backend leaves the interface to gloo and NCCL, and torch's store listens on all addresses of rank 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray.train.torch.config import TorchConfig, _set_torch_distributed_env_vars, _TorchBackend

from ptxdist.cluster import network


class _Backend(_TorchBackend):  # type: ignore[misc]  # Ray has no types
    def on_start(self, worker_group: Any, backend_config: GroupConfig) -> None:
        """Let all workers join the group; returns when it exists."""
        worker_group.execute(_set_torch_distributed_env_vars)
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


def _join(backend: str, host: str, port: int, rank: int, ranks: int, timeout_s: float) -> None:
    network.choose_interface(network.own_address())
    network.join(backend, host, port, rank, ranks, timeout_s)


@dataclass
class GroupConfig(TorchConfig):  # type: ignore[misc]
    """TorchConfig with a backend, gloo or nccl, whose group is made by `network.join`."""

    @property
    def backend_cls(self) -> type[_Backend]:
        """What makes the group."""
        return _Backend
