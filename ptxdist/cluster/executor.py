"""An executor whose tasks run on the nodes of a Ray cluster; what they write is the same as with local processes.

Images, tables and cache must be on storage that all nodes share, under the same paths.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ptxdist.cluster.connection import connection
from ptxdist.errors import ClusterError, PtxdistError, reason
from ptxdist.executor import Executor, Result

_END_S = 30.0  # running tasks have this long to end after an error; then their processes are killed
_AGAIN_S = 1.0
_AHEAD = 4  # tasks submitted for each CPU of the cluster: no CPU waits, and few tasks have to be cancelled


@contextmanager
def ray_tasks(address: str) -> Iterator[Executor]:
    """Executor over the cluster at `address` (`host:6379`, `ray://host:10001`, or `auto` for that of this node).

    Ray retries a task on another node when its node dies. Raises ClusterError when no cluster can be reached.
    """
    with connection(address):
        import ray

        yield _Tasks(_AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1))))


class _Tasks:
    def __init__(self, limit: int) -> None:
        self._limit = limit

    def __call__(
        self, function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], *, light: bool = False
    ) -> Iterator[Result]:
        import ray

        remote = ray.remote(num_cpus=1, max_retries=3, scheduling_strategy="SPREAD")(function)
        left, running = iter(tasks), list[Any]()
        try:
            while True:
                while len(running) < self._limit and (task := next(left, None)) is not None:
                    running.append(remote.remote(*task))
                if not running:
                    return
                done, running = ray.wait(running, num_returns=1)
                try:
                    yield ray.get(done[0])
                except ray.exceptions.RayTaskError as error:
                    cause = error.cause
                    if isinstance(cause, PtxdistError | OSError):
                        raise cause from error
                    raise
                except ray.exceptions.RayError as error:
                    raise ClusterError(f"a task failed after all retries: {reason(error)}") from error
        finally:
            # The caller may release its lock after this, so no task may still be writing.
            end = time.monotonic() + _END_S
            while running:  # a task that is just starting may miss the first request
                for task in running:
                    ray.cancel(task, force=time.monotonic() > end)
                running = ray.wait(running, num_returns=len(running), timeout=_AGAIN_S)[1]

    def prepare(self, module: str) -> None:
        pass  # Ray starts its own workers
