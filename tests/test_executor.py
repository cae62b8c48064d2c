"""Work over processes: all results, errors of the work as they are, dead workers as a sentence, nobody left behind."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from ptxdist.errors import DicomError, StoreError
from ptxdist.executor import processes, serial


def square(number: int) -> tuple[int, int, int]:
    return number, number**2, os.getpid()


def refuse(number: int) -> int:
    if number == 3:
        raise DicomError(f"number {number} is not wanted")
    return number


def die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def mark_begin_and_end(folder: Path, number: int) -> None:
    """Task 0 fails at once; the others leave one file when they begin and one when they end."""
    if number == 0:
        while not any(folder.iterdir()):  # the other worker is in the midst of its task
            time.sleep(0.01)
        raise DicomError("the first task fails")
    (folder / f"begin {number}").touch()
    time.sleep(0.1)
    (folder / f"end {number}").touch()


def is_running(process: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(process, 0)
        return True
    return False


def test_serial_and_processes_give_the_same_results() -> None:
    tasks = [(number,) for number in range(40)]
    expected = {(number, number**2) for number in range(40)}
    alone = list(serial(square, tasks))
    assert {found[:2] for found in alone} == expected
    assert {found[2] for found in alone} == {os.getpid()}
    with processes(2) as executor:
        found = list(executor(square, tasks))
        assert len(found) == 40
        assert {item[:2] for item in found} == expected
        workers = {item[2] for item in found}
        assert os.getpid() not in workers
        assert 1 <= len(workers) <= 2
        again = {item[2] for item in executor(square, tasks)}  # the processes are started once
        assert again | workers == workers or len(again | workers) <= 2
    assert not any(map(is_running, workers | again))


def test_no_tasks_give_no_results() -> None:
    assert list(serial(square, [])) == []
    with processes(2) as executor:
        assert list(executor(square, [])) == []


@pytest.mark.parametrize(("workers", "tasks"), [(1, 5), (2, 1)])
def test_one_worker_or_one_task_starts_no_process(workers: int, tasks: int) -> None:
    with processes(workers) as executor:
        assert {item[2] for item in executor(square, [(number,) for number in range(tasks)])} == {os.getpid()}


@pytest.mark.parametrize("workers", [1, 2])
def test_error_of_a_task_reaches_the_caller(workers: int) -> None:
    with pytest.raises(DicomError, match="number 3 is not wanted"), processes(workers) as executor:
        list(executor(refuse, [(number,) for number in range(8)]))


def test_killed_worker_is_a_refusal_that_says_what_to_do() -> None:
    with pytest.raises(StoreError, match=r"worker process was killed.*fewer --workers.*is kept") as caught:  # noqa: SIM117
        with processes(2) as executor:
            list(executor(die, [(number,) for number in range(8)]))
    assert caught.value.exit_code == 7


@pytest.mark.parametrize("stop", ["a task fails", "the caller stops"])
def test_when_it_is_over_nobody_works_any_more(tmp_path: Path, stop: str) -> None:
    """Else a worker would write into a cache that the next run has already locked."""
    tasks = [(tmp_path, number) for number in range(0 if stop == "a task fails" else 1, 40)]
    with processes(2) as executor:
        with pytest.raises(DicomError if stop == "a task fails" else KeyError):  # noqa: PT012
            for _ in executor(mark_begin_and_end, tasks):
                if stop == "the caller stops":
                    raise KeyError(stop)
        begun, ended = (len(list(tmp_path.glob(f"{what} *"))) for what in ("begin", "end"))
        assert 1 <= begun == ended < 30
        time.sleep(0.25)
        assert len(list(tmp_path.glob("begin *"))) == begun
