"""Locks: one holder at a time, free after any end of the holder, and one behaviour on file systems without locks."""

from __future__ import annotations

import ast
import errno
import fcntl
import logging
import multiprocessing
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from locking import NO_LOCKS, failing, held

from ptxdist.errors import BusyError, PtxdistError, RunError, StoreError
from ptxdist.locks import only, shared

PACKAGE = Path(__file__).resolve().parents[1] / "ptxdist"
BUSY = "another `ptxdist x` is writing to here; wait for it or stop it"


@pytest.fixture
def holder() -> Iterator[Callable[[str, Path], subprocess.Popen[bytes]]]:
    """Starts a process that holds a lock until its input ends."""
    with ExitStack() as ends:
        yield lambda kind, path: ends.enter_context(held(path, kind))


def open_files() -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor of this very listing
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return found


# --- one holder -----------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path, holder: Any) -> None:
    path = tmp_path / "lock"
    process = holder("only", path)
    for kind in (only, shared):
        with pytest.raises(BusyError) as caught, kind(path, BUSY):
            pass
        assert str(caught.value) == BUSY
    process.communicate()
    with only(path, BUSY) as is_locked:
        assert is_locked
    assert path.read_bytes() == b""


def test_a_killed_holder_leaves_no_lock(tmp_path: Path, holder: Any) -> None:
    path = tmp_path / "lock"
    process = holder("only", path)
    process.kill()
    process.wait()
    with only(path, BUSY) as is_locked:
        assert is_locked


def test_an_exception_in_the_block_releases_the_lock_and_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="of the block"), only(tmp_path / "lock", BUSY):
        raise OSError("of the block")
    with only(tmp_path / "lock", BUSY):
        pass


def test_one_process_does_not_lock_twice(tmp_path: Path) -> None:
    with only(tmp_path / "lock", BUSY), pytest.raises(BusyError), only(tmp_path / "lock", BUSY):
        pass


def test_readers_share_and_exclude_a_writer(tmp_path: Path, holder: Any) -> None:
    path = tmp_path / "lock"
    process = holder("shared", path)
    with shared(path, BUSY) as is_locked:
        assert is_locked
        with pytest.raises(BusyError), only(path, BUSY):
            pass
    with pytest.raises(BusyError), only(path, BUSY):  # the other reader is still there
        pass
    process.communicate()
    with only(path, BUSY):
        pass


@pytest.mark.parametrize("kind", [only, shared])
def test_without_a_text_it_waits(tmp_path: Path, holder: Any, kind: Any) -> None:
    path = tmp_path / "lock"
    process, entered = holder("only", path), threading.Event()

    def wait() -> None:
        with kind(path) as is_locked:
            assert is_locked
            entered.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not entered.wait(0.3)
    process.communicate()
    assert entered.wait(10)
    thread.join()


def test_end_of_a_forked_worker_does_not_release_the_lock(tmp_path: Path) -> None:
    def end() -> None:
        pass

    def leave(context: Any) -> None:
        context.__exit__(None, None, None)

    fork = multiprocessing.get_context("fork")
    holding = only(tmp_path / "lock", BUSY)
    with holding:
        for target, arguments in ((end, ()), (leave, (holding,))):
            worker = fork.Process(target=target, args=arguments)
            worker.start()
            worker.join()
            assert worker.exitcode == 0
            with pytest.raises(BusyError), only(tmp_path / "lock", BUSY):
                pass


def test_the_holder_may_delete_the_file_and_nobody_is_alone_twice(tmp_path: Path) -> None:
    """Threads take the lock and delete its file; the counter would show two of them inside at once."""
    path, inside, most = tmp_path / "lock", 0, 0
    counting = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        for _ in range(60):
            with only(path):
                with counting:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.0002)
                with counting:
                    inside -= 1
                path.unlink()  # from now on another thread may hold the lock of a new file

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, inside) == (1, 0)
    assert not path.exists()


def test_no_descriptor_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    with only(path), pytest.raises(BusyError), only(path, BUSY):
        pass
    for name in ("ENOLCK", "EIO"):
        failing(monkeypatch, name)
        for kind in (only, shared):
            with pytest.raises(RuntimeError if name == "ENOLCK" else RunError), kind(path, BUSY):
                raise RuntimeError
    assert str(path) not in open_files()


# --- what the file system says --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [only, shared])
@pytest.mark.parametrize("busy", ["", BUSY])
@pytest.mark.parametrize("name", NO_LOCKS)
def test_a_file_system_without_locks_is_used_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: Any, busy: str, name: str
) -> None:
    failing(monkeypatch, name)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with kind(tmp_path / "lock", busy) as is_locked:
                assert is_locked is False
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path} is on a file system without locks; do not write there with two commands at the same time"
    ]


@pytest.mark.parametrize("name", ["EWOULDBLOCK", "EAGAIN", "EACCES"])
def test_a_conflict_is_a_conflict_by_any_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    failing(monkeypatch, name)
    with pytest.raises(BusyError, match="another `ptxdist x`"), only(tmp_path / "lock", BUSY):
        pass


@pytest.mark.parametrize("kind", [only, shared])
@pytest.mark.parametrize("name", ["EIO", "ESTALE", "EBADF", "EPERM"])
def test_any_other_failure_says_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, name: str
) -> None:
    path, number = tmp_path / "lock", getattr(errno, name)
    failing(monkeypatch, name)
    with pytest.raises(StoreError) as caught, kind(path, BUSY, error=StoreError):
        pass
    assert str(caught.value).startswith(f"{path} cannot be locked: {os.strerror(number)}")
    with pytest.raises(OSError, match=os.strerror(number)) as plain, kind(path, BUSY, error=None):
        pass
    assert plain.value.errno == number


def test_a_file_that_cannot_be_made_is_no_conflict(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none" / "lock", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(RunError, match=f"cannot be locked: {words}"), only(path, BUSY):
            pass


def test_the_file_is_open_for_reading_and_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS answers EBADF to any other: flock becomes a lock of bytes there, which needs the access that it protects."""
    modes = []

    def flock(descriptor: int, operation: int) -> None:
        modes.append(
            (fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE, os.path.isfile(f"/proc/self/fd/{descriptor}"))
        )

    monkeypatch.setattr(fcntl, "flock", flock)
    for kind in (only, shared):
        with kind(tmp_path / "lock"):
            pass
    assert modes == [(os.O_RDWR, True)] * 2


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder of a file system that is mounted read-only, with the file `old` in it; root can write anywhere else."""
    below, above = tmp_path / "below", tmp_path / "above"
    below.mkdir()
    above.mkdir()
    (below / "old").touch()
    if (
        not shutil.which("mount")
        or subprocess.run(["mount", "--bind", str(below), str(above)], capture_output=True, check=False).returncode
    ):
        pytest.skip("root only can mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(above)], check=True)
        yield above
    finally:
        subprocess.run(["umount", "-l", str(above)], check=True)


def test_what_is_mounted_read_only_can_be_read_and_not_written(read_only: Path) -> None:
    with shared(read_only / "new", BUSY) as is_locked:
        assert is_locked is False
    with shared(read_only / "old", BUSY) as is_locked:
        assert is_locked is True
        with pytest.raises(BusyError), only(read_only.with_name("below") / "old", BUSY):
            pass
    for name in ("new", "old"):
        with pytest.raises(RunError, match="Read-only file system"), only(read_only / name, BUSY):
            pass


def test_who_may_not_write_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for somebody else's folder; root is not stopped by permissions, so opening is."""
    path, opening = tmp_path / "lock", os.open
    path.touch()

    def denied(name: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opening(name, flags, mode)

    monkeypatch.setattr(os, "open", denied)
    with shared(path, BUSY) as is_locked:
        assert is_locked is True
    with pytest.raises(PtxdistError, match="cannot be locked: Permission denied") as caught, only(path, BUSY):
        pass
    assert not isinstance(caught.value, BusyError)


# --- one copy -------------------------------------------------------------------------------------------------------


def uses_flock(text: str) -> bool:
    return any(
        (isinstance(node, ast.Attribute) and node.attr in {"flock", "lockf"})
        or (isinstance(node, ast.ImportFrom) and node.module == "fcntl")
        for node in ast.walk(ast.parse(text))
    )


def test_a_call_of_flock_is_found() -> None:
    for text in ("from fcntl import flock", "x.flock(1, 2)", "fcntl.lockf(1, 2)"):
        assert uses_flock(text)
    for text in ("'flock'", "import fcntl; fcntl.ioctl(1, 2)"):
        assert not uses_flock(text)


def test_flock_is_called_in_one_module() -> None:
    assert [path.name for path in sorted(PACKAGE.rglob("*.py")) if uses_flock(path.read_text())] == ["locks.py"]
