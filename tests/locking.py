"""Locks for tests: what is made once for all test processes, an flock that fails, a lock that another process holds."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ptxdist import locks

NO_LOCKS = ["ENOLCK", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EINVAL"]


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name`; the first of the test processes that needs it makes what is in it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with locks.only(folder / "made.lock"):
        if not (folder / "made").exists():
            make(folder)
            (folder / "made").touch()
    return folder


def failing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let every flock fail with the error of this name."""
    number = getattr(errno, name)

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    locks._warn.cache_clear()


@contextmanager
def held(path: Path, kind: str = "only") -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds a lock until its input ends or the block does."""
    call = (
        f"import sys; from pathlib import Path; from ptxdist.locks import {kind}\n"
        f"with {kind}(Path(sys.argv[1])):\n    print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", call, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            yield process
        finally:
            process.kill()
