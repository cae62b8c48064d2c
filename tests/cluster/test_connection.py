"""Connecting to Ray, and what it leaves when it ends."""

from __future__ import annotations

import json
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
def test_ray_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """It listens on loopback only, starts no idle processes, and its workers have our priority.

    Signals are handled when it has ended: its core leaves the system's default for SIGTERM, by which a command would
    end without a word.
    """
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_worker_niceness", raising=False)
    program = """
import json, os, psutil, signal, sys, time
from ptxdist import interrupts
from ptxdist.cluster.connection import connection
interrupts.install()
with connection(None, cpus=1):
    import ray
    niceness = ray.get(ray.remote(lambda: os.nice(0)).remote()) - os.nice(0)
    me = psutil.Process()
    below = me.children(recursive=True)
    heard = {one.laddr.ip for each in (me, *below) for one in each.net_connections("inet") if one.status == "LISTEN"}
    print(json.dumps([niceness, sorted(heard), [" ".join(each.cmdline()) for each in below]]))
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
except KeyboardInterrupt as error:
    sys.exit(error.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 143, done.stderr
    niceness, heard, processes = json.loads(done.stdout)
    assert niceness == 0
    assert heard
    assert {*heard} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert any("gcs_server" in words for words in processes)
    assert not any(name in words for words in processes for name in ("monitor.py", "dashboard.py")), processes
