"""Locks for tests: an flock that fails, and a lock that another process holds."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ptxdist import locks

NO_LOCKS = ["ENOLCK", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EINVAL"]


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
