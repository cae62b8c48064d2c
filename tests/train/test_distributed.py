"""Ranks that reach a barrier at different times, as threads with one store."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from ptxdist.train import distributed


def test_ranks_wait_at_each_barrier_for_the_slowest(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    passed: list[tuple[int, int]] = []  # (barrier, rank)

    def work(rank: int) -> None:
        for number in range(4):
            time.sleep(0.03 if rank == number % 3 else 0)
            distributed.barrier()
            passed.append((number, rank))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [number for number, _ in passed] == [number for number in range(4) for _ in range(3)]


def test_one_process_waits_for_nobody() -> None:
    distributed.barrier()
