"""The lock of a cache: one writer at a time, and one behaviour in every command where locks do not work."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cache_files import digests
from locking import NO_LOCKS, failing, held

from ptxdist import locks
from ptxdist.cache.preprocess import preprocess
from ptxdist.cache.verify import repair, verify
from ptxdist.errors import BusyError, StoreError

Command = Callable[[], object]


@pytest.fixture
def cache(small_cache, tmp_path: Path) -> Path:  # type: ignore[no-untyped-def]
    """A copy of the cache of `small_dataset` with the temporary file of a killed writer."""
    copy = Path(shutil.copytree(small_cache[0], tmp_path / "cache"))
    (copy / "manifest.json.ptxdist-0123abcd.tmp").touch()
    return copy


@pytest.fixture(params=["preprocess", "verify --repair"])
def command(request: pytest.FixtureRequest, cache: Path, small_dataset) -> Command:  # type: ignore[no-untyped-def]
    """A command that writes to `cache`."""
    data = small_dataset
    if request.param == "preprocess":
        return lambda: preprocess(data.dicom, data.labels, cache, patients=data.patients, sizes_px=(64, 96))
    return lambda: repair(cache, data.dicom)


def test_cache_that_another_process_writes_is_refused_and_left_alone(cache: Path, command: Command) -> None:
    before = digests(cache)
    with held(cache / locks.LOCK) as process:
        with pytest.raises(BusyError) as caught:
            command()
        said = f"another `ptxdist preprocess` is writing to {cache}; wait for it or stop it"
        assert (str(caught.value), caught.value.exit_code) == (said, 12)
        assert digests(cache) == before
        process.communicate()
        command()
    assert not list(cache.glob("*.tmp")), "what a killed writer has left is removed"
    assert verify(cache) == []


@pytest.mark.parametrize("name", NO_LOCKS)
def test_without_locks_the_work_is_done(
    cache: Path, command: Command, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing(monkeypatch, name)
    (cache / "96.zarr/zarr.json").unlink()
    command()
    assert verify(cache) == []
    assert [record.getMessage() for record in caplog.records] == [
        f"{cache} is on a file system without locks; do not write there with two commands at the same time"
    ]


def test_lock_that_fails_is_no_conflict(cache: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "EIO")
    with pytest.raises(
        StoreError, match=f"^{re.escape(str(cache / locks.LOCK))} cannot be locked: Input/output error; check that disk"
    ):
        command()


def test_new_cache_is_made_without_locks(small_dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    failing(monkeypatch, "ENOSYS")
    preprocess(small_dataset.dicom, small_dataset.labels, tmp_path / "cache", sizes_px=(32,))
    assert verify(tmp_path / "cache") == []


def test_run_holds_the_cache_from_its_first_moment(small_dataset, cache: Path) -> None:  # type: ignore[no-untyped-def]
    """Not only while it writes: what it has read of the cache must still be true."""
    data, refused = small_dataset, []

    def run_beside(step: str, done: int, total: int) -> None:
        with pytest.raises(BusyError, match="another `ptxdist preprocess`"):
            preprocess(data.dicom, data.labels, cache, sizes_px=(64, 96))
        refused.append(step)

    preprocess(data.dicom, data.labels, cache, patients=data.patients, sizes_px=(64, 96), on_progress=run_beside)
    assert {"headers", "check of 64 px"} <= set(refused)


def test_run_that_began_before_another_made_the_cache_is_refused(small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Its groups are hashed with a salt of its own."""
    out = tmp_path / "cache"

    def other_run(step: str, done: int, total: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "salt").write_bytes(b"of the other run")

    with pytest.raises(BusyError, match="rerun the command"):
        preprocess(small_dataset.dicom, small_dataset.labels, out, sizes_px=(32,), on_progress=other_run)
