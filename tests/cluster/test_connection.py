"""Connecting to Ray, and what it leaves when it ends."""

from __future__ import annotations

import subprocess
import sys

import pytest
import ray

from ptxdist.cluster.connection import connection
from ptxdist.errors import ClusterError


def test_a_ray_of_the_caller_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(1))
    with pytest.raises(ClusterError, match="is connected to Ray already"), connection(None):
        pass
    assert not ended


@pytest.mark.slow
def test_workers_have_our_priority_and_signals_are_handled_when_ray_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's core leaves the system's default for SIGTERM, by which a command would end without a word."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_worker_niceness", raising=False)
    program = """
import os, signal, sys, time
from ptxdist import interrupts
from ptxdist.cluster.connection import connection
interrupts.install()
with connection(None, cpus=1):
    import ray
    print(ray.get(ray.remote(lambda: os.nice(0)).remote()) - os.nice(0))
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
except KeyboardInterrupt as error:
    sys.exit(error.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (143, "0\n"), done.stderr
