"""Connecting to Ray, without starting it."""

from __future__ import annotations

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
