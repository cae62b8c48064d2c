"""The locks of cached copies and of a run's only driver, on this node; no object store is needed."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from locking import NO_LOCKS, failing, held

from ptxdist.config import DataSettings
from ptxdist.errors import BusyError, RunError, StoreError
from ptxdist.storage import caches, runs


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of cached copies, in which this process uses nothing yet."""
    monkeypatch.setenv("PTXDIST_STAGING", str(tmp_path / "copies"))
    monkeypatch.setattr(caches, "_held", {})
    return tmp_path / "copies"


def copy_in(root: Path, name: str) -> Path:
    """A cached copy that nobody uses, long ago."""
    (root / name).mkdir(parents=True)
    (root / name / "shard").write_bytes(bytes(10_000))
    (root / f"{name}.use").touch()
    os.utime(root / f"{name}.use", (1, 1))
    return root / name


def test_copies_that_a_process_uses_are_kept_and_others_deleted(root: Path) -> None:
    unused, used = copy_in(root, "unused"), copy_in(root, "used")
    folder = caches.use("mine")
    with held(root / "used.use", "shared"):
        caches._free_space(folder, 1000, DataSettings(staging_gb=1e-12))
    assert not unused.exists()
    assert used.exists()
    caches._free_space(folder, 1000, DataSettings(staging_gb=1e-12))
    assert not used.exists()


@pytest.mark.parametrize("name", [*NO_LOCKS, "EIO", "EACCES"])
def test_copies_that_cannot_be_locked_are_kept(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, other = caches.use("mine"), copy_in(root, "other")
    failing(monkeypatch, name)
    caches._free_space(folder, 1000, DataSettings(staging_gb=1e-12))
    assert other.exists()


@pytest.mark.parametrize("name", NO_LOCKS)
def test_without_locks_copies_and_runs_are_used(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, name)
    folder = caches.use("mine")
    with caches.alone(folder) as is_locked, runs._only_driver(root):
        assert is_locked is False


def test_lock_that_fails_is_no_conflict(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root.mkdir()
    failing(monkeypatch, "EIO")
    with pytest.raises(StoreError, match=r"mine\.use cannot be locked: Input/output error"):
        caches.use("mine")
    with pytest.raises(StoreError, match=r"mine\.lock cannot be locked"), caches.alone(root / "mine"):
        pass
    with pytest.raises(RunError, match="driver cannot be locked"), runs._only_driver(root):
        pass


def test_second_driver_of_a_run_is_refused(root: Path) -> None:
    root.mkdir()
    with held(root / "driver") as process:
        with pytest.raises(BusyError, match="another ptxdist trains this run on this machine"), runs._only_driver(root):
            pass
        process.communicate()
    with runs._only_driver(root) as is_locked:
        assert is_locked


def test_who_fills_a_copy_waits_for_the_process_that_fills_it(root: Path) -> None:
    folder, entered = caches.use("mine"), threading.Event()

    def fill() -> None:
        with caches.alone(folder):
            entered.set()

    with held(root / "mine.lock") as process:
        thread = threading.Thread(target=fill)
        thread.start()
        assert not entered.wait(0.1)
        process.communicate()
        assert entered.wait(10)
    thread.join()


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("what", ["new", "own", "link", "open", "file"])
def test_where_everybody_may_write_copies_are_in_a_folder_that_is_only_ours(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, given: bool
) -> None:
    shared, own = tmp_path / "shared", tmp_path / "shared" / f"ptxdist-{os.getuid()}"
    shared.mkdir()
    shared.chmod(0o777)
    if given:
        monkeypatch.setenv("PTXDIST_STAGING", str(shared))
    else:
        monkeypatch.delenv("PTXDIST_STAGING")
        monkeypatch.setattr("tempfile.tempdir", str(shared))
    if what in ("own", "open"):
        own.mkdir()
        own.chmod(0o700 if what == "own" else 0o777)
    elif what == "link":
        (tmp_path / "of somebody else").mkdir()
        own.symlink_to(tmp_path / "of somebody else")
    elif what == "file":
        own.touch()
    if what in ("new", "own"):
        assert caches.use("mine") == own / "mine"
        assert own.stat().st_mode & 0o777 == 0o700
    else:
        with pytest.raises(StoreError, match=r"ptxdist-\d+ is a link, or another user has made it or may write to it"):
            caches.use("mine")
        assert not list((tmp_path / "of somebody else").glob("*"))
