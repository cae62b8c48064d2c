"""Executors: call one function for many tasks and yield the results as they come.

`serial` works in this process, `processes` in spawned ones, `cluster.executor` in Ray tasks. The results are the same.
`in_chunks` and `ahead`, which uses threads of this process, keep the order.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ptxdist import interrupts
from ptxdist.errors import StoreError

if TYPE_CHECKING:
    from concurrent.futures import Future, ProcessPoolExecutor

_PATIENCE_S = 2.0
OnProgress = Callable[[str, int, int], None]  # what is done, how much of it, of how much
OnCount = Callable[[int, int], None]  # how much is done, of how much
Item = TypeVar("Item")
Result = TypeVar("Result")


class Executor(Protocol):
    """Calls a function for many tasks."""

    def __call__(
        self, function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], *, light: bool = False
    ) -> Iterator[Result]:
        """Call `function` with the arguments of each task and yield the results in order of completion.

        An exception of a task is raised. When iteration ends, for whatever reason, no task is running any more. `light`
        tasks are so quick that no process is started for them on this machine.
        """

    def prepare(self, module: str) -> None:
        """Start workers in the background and import a module there that the tasks will need."""


class _Serial:
    def __call__(
        self, function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], *, light: bool = False
    ) -> Iterator[Result]:
        return (function(*task) for task in tasks)

    def prepare(self, module: str) -> None:
        pass  # this process imports the module when it needs it


serial = _Serial()


class _Processes:
    def __init__(self, workers: int) -> None:
        self._workers = workers
        self.pool: ProcessPoolExecutor | None = None

    def __call__(
        self, function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], *, light: bool = False
    ) -> Iterator[Result]:
        if self._workers == 1 or len(tasks) <= 1 or light:
            yield from serial(function, tasks)
            return
        from concurrent.futures import FIRST_COMPLETED, wait  # late: a rerun without changes starts no process
        from concurrent.futures.process import BrokenProcessPool

        waiting: set[Future[Result]] = set()
        try:
            with starting():
                pool = self._start()
                waiting.update(pool.submit(function, *task) for task in tasks)
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise StoreError(
                "a worker process was killed, perhaps because memory ran out; rerun the command with fewer --workers: "
                "finished work is kept"
            ) from error
        finally:
            if waiting:
                self.end()

    def prepare(self, module: str) -> None:
        if self._workers > 1:
            with starting():
                pool = self._start()
                for _ in range(self._workers):
                    pool.submit(_load, module)

    def end(self) -> None:
        """End the workers, which finish their task first, but not long after an interruption."""
        if self.pool is None:
            return
        with interrupts.deferred():  # half freed, its semaphores would be reported as lost
            pool, self.pool = self.pool, None
            # It waits: the caller may release its lock next, and no worker may still write. Nor may this process end
            # while a thread of the pool still frees its semaphores.
            ending = threading.Thread(target=pool.shutdown, kwargs={"cancel_futures": True})
            ending.start()
            if interrupts.arrived():
                from multiprocessing import active_children

                end = time.monotonic() + _PATIENCE_S
                for process in active_children():
                    process.join(max(0.0, end - time.monotonic()))
                    process.kill()
                    process.join()
            ending.join()

    def _start(self) -> ProcessPoolExecutor:
        if self.pool is None:
            import multiprocessing
            from concurrent.futures import ProcessPoolExecutor

            self.pool = ProcessPoolExecutor(
                self._workers, multiprocessing.get_context("spawn"), initializer=start_worker
            )
        return self.pool


def _load(module: str) -> None:
    importlib.import_module(module)


@contextmanager
def processes(workers: int) -> Iterator[Executor]:
    """Executor over spawned processes, which start at the first use; one worker, or a single task, needs none."""
    executor = _Processes(workers)
    try:
        yield executor
    finally:
        executor.end()


def in_chunks(
    executor: Executor,
    function: Callable[..., Sequence[Result]],
    items: Sequence[Any],
    size: int,
    *more: Any,
    light: bool = False,
    on_done: OnCount = lambda done, total: None,
) -> list[Result]:
    """Call `function` with `size` items at a time and the arguments `more`; the results of all items, in their order.

    `on_done` is called with (items done, items); `light` as for an Executor.
    """
    tasks = [(function, start, items[start : start + size], *more) for start in range(0, len(items), size)]
    found: dict[int, Sequence[Result]] = {}
    done = 0
    for start, results in executor(_numbered, tasks, light=light):
        found[start] = results
        done += len(results)
        on_done(done, len(items))
    return [result for start in sorted(found) for result in found[start]]


def _numbered(function: Callable[..., Result], start: int, *arguments: Any) -> tuple[int, Result]:
    return start, function(*arguments)


def ahead(function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, most: int) -> Generator[Result]:
    """Results of `function` for the items, in their order, computed in threads at most `most` items ahead.

    An error is raised in its item's place; when the caller stops, so do the threads.
    """
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(threads, thread_name_prefix="ptxdist-ahead")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def starting() -> Iterator[None]:
    """Spawned processes that the block starts leave what a terminal sends to this process, which ends them."""
    from multiprocessing import resource_tracker

    with interrupts.only_here():
        resource_tracker.ensure_running()  # it lets SIGINT through again
    with interrupts.only_here():
        yield


def start_worker() -> None:
    """Make this spawned process end when its parent does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent is killed: it must not write beside the next run."""
    from multiprocessing import parent_process

    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
