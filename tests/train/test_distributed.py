"""What a training with torchrun says when its processes do not meet, and when one of them goes."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch

from ptxdist.errors import TrainingError
from ptxdist.train.distributed import process_group, sum_over_ranks


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


def one_leaves(rank: int, port: int, folder: Path) -> None:
    os.environ.update(torchrun_gives(rank, port), GLOO_SOCKET_IFNAME="lo")
    try:
        with process_group("cpu", 2, timeout_s=30):
            sum_over_ranks(torch.ones(2))
            if rank == 1:
                os._exit(0)
            for _ in range(2):
                sum_over_ranks(torch.ones(2))
    except TrainingError as error:
        (folder / "said.txt").write_text(str(error))


def test_a_process_that_goes_is_told_by_the_others(port: int, tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(one_leaves, (port, tmp_path), nprocs=2, start_method="forkserver")
    said = (tmp_path / "said.txt").read_text()
    assert said.startswith("training stopped: a worker lost its connection to the one on 127.0.0.1, which died")
    assert said.endswith("the same command resumes it")


def test_other_errors_keep_their_kind() -> None:
    with pytest.raises(RuntimeError, match="of something else"), process_group("cpu", 1, timeout_s=1):
        raise RuntimeError("of something else")
