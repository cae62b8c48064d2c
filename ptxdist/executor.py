"""Work over processes: the same function on many tasks, results as they come.

Owns: the pool of spawned processes. Refuses: nothing; a worker that dies is a StoreError. Called by: `preprocess`,
`verify`. `cluster.executor` has the same shape over Ray tasks, so what is written does not depend on who does the work.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from ptxdist.errors import StoreError

Result = TypeVar("Result")


class Spread(Protocol):
    """Who does the work."""

    def __call__(
        self, function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], *, light: bool = False
    ) -> Iterator[Result]:
        """Call `function` with the arguments of each task, somewhere; yield the results in the order of their ends.

        `light` tasks are so quick that on one machine no process is started for them.
        """

    def prepare(self, module: str) -> None:
        """Get ready, beside what the caller does, for tasks that need a module."""


class Here:
    """In this process, one after the other."""

    def __call__(
        self, function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], *, light: bool = False
    ) -> Iterator[Result]:
        """As Spread."""
        return (function(*task) for task in tasks)

    def prepare(self, module: str) -> None:
        """Nothing to do."""


here = Here()


class _Processes:
    def __init__(self, workers: int) -> None:
        self._workers = workers
        self.pool: ProcessPoolExecutor | None = None

    def __call__(
        self, function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], *, light: bool = False
    ) -> Iterator[Result]:
        if self._workers == 1 or len(tasks) <= 1 or light:
            yield from here(function, tasks)
            return
        pool = self._start()
        waiting: set[Future[Result]] = set()
        try:
            waiting.update(pool.submit(function, *task) for task in tasks)
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise StoreError(
                "a worker process was killed, perhaps because memory ran out: try fewer --workers; "
                "what is finished stays, and the same command goes on from there"
            ) from error
        finally:
            # Whatever ended it: when the caller goes on, and perhaps lets go of its lock, nobody writes any more.
            wait([future for future in waiting if not future.cancel()])

    def prepare(self, module: str) -> None:
        if self._workers > 1:
            pool = self._start()
            for _ in range(self._workers):
                pool.submit(_load, module)

    def _start(self) -> ProcessPoolExecutor:
        if self.pool is None:
            self.pool = ProcessPoolExecutor(
                self._workers, multiprocessing.get_context("spawn"), initializer=_start_worker
            )
        return self.pool


def _load(module: str) -> None:
    importlib.import_module(module)


@contextmanager
def processes(workers: int) -> Iterator[Spread]:
    """A Spread over spawned processes, started at the first use; one worker, or a single task, needs none."""
    work = _Processes(workers)
    try:
        yield work
    except BaseException:
        if work.pool is not None:
            work.pool.shutdown(wait=False, cancel_futures=True)
        raise
    if work.pool is not None:
        work.pool.shutdown()


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this a worker outlives a killed parent, and writes where the next run writes."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
