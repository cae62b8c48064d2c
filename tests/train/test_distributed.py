"""Ranks that reach a barrier at different times; what torchrun's processes say when they do not meet or one goes."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ptxdist.errors import LabelError, TrainingError
from ptxdist.train import distributed
from ptxdist.train.distributed import barrier, process_group, sum_over_ranks


def torchrun_gives(rank: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets for one of two processes."""
    return {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@pytest.fixture
def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_processes_that_do_not_meet(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in torchrun_gives(1, port).items():
        monkeypatch.setenv(name, value)
    expected = r"do not reach each other; .* in GLOO_SOCKET_IFNAME \("
    with pytest.raises(TrainingError, match=expected), process_group("cpu", 2, timeout_s=1):
        pass


def test_variables_of_torchrun_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(TrainingError, match="variable RANK expected"), process_group("cpu", 2, timeout_s=1):
        pass


def one_leaves(rank: int, port: int, folder: Path, leaves: int) -> None:
    os.environ.update(torchrun_gives(rank, port), GLOO_SOCKET_IFNAME="lo")
    try:
        with process_group("cpu", 2, timeout_s=30):
            sum_over_ranks(torch.ones(2))
            if rank == leaves:
                os._exit(0)
            barrier() if leaves == 0 else sum_over_ranks(torch.ones(2))
            sum_over_ranks(torch.ones(2))
    except TrainingError as error:
        (folder / "said.txt").write_text(str(error))


@pytest.mark.parametrize(
    ("leaves", "expected"),
    [
        (1, r"stopped: a worker lost its connection to the one on 127\.0\.0\.1, which died or was cut off"),
        (0, r"stopped: the communication between the workers failed \(.+\)"),  # rank 0 has the store of the barrier
    ],
    ids=["in a sum", "in a barrier"],
)
def test_a_process_that_goes_is_told_by_the_others(leaves: int, expected: str, port: int, tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(one_leaves, (port, tmp_path, leaves), nprocs=2, start_method="forkserver")
    assert re.fullmatch(expected + "; rerun the same command", (tmp_path / "said.txt").read_text())


def test_other_errors_keep_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with two ranks; the second one is not needed for it."""
    monkeypatch.setattr(dist, "init_process_group", lambda *given, **more: None)
    for error in (RuntimeError("of something else"), torch.OutOfMemoryError("CUDA out of memory"), LabelError("x")):
        with pytest.raises(type(error), match=str(error)), process_group("cpu", 2, timeout_s=1):
            raise error


def test_ranks_wait_at_each_barrier_for_the_slowest(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    passed: list[tuple[int, int]] = []  # (barrier, rank)

    def work(rank: int) -> None:
        for number in range(4):
            time.sleep(0.03 if rank == number % 3 else 0)
            barrier()
            passed.append((number, rank))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [number for number, _ in passed] == [number for number in range(4) for _ in range(3)]


def test_one_process_waits_for_nobody() -> None:
    barrier()
