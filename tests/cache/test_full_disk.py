"""Writing that fails, as on a full disk, stops with a sentence and spoils nothing."""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cache_files import SIZES, Renewal, digests

from ptxdist.cache.preprocess import preprocess
from ptxdist.cache.store import open_store
from ptxdist.cache.verify import verify
from ptxdist.errors import PtxdistError, StoreError

FORKS = multiprocessing.get_context("forkserver")  # starts processes quickly


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 5 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can be mounted by root only")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_full_disk_leaves_the_old_store_and_the_next_run_ends_well(renewal: Renewal, small_disk: Path) -> None:
    """Two stores of 32 and 48 px take 2 MB; that of 128 px has no room."""
    shutil.copytree(renewal.cache, small_disk / "cache")
    renewal.run(sizes_px=(*SIZES, 128))
    expected, renewal.cache = digests(renewal.cache), small_disk / "cache"
    before = digests(renewal.cache)
    with pytest.raises(
        StoreError, match=r"writing stopped: No space left on device; free some space there; finished work"
    ) as caught:
        renewal.run(sizes_px=(*SIZES, 128))
    assert caught.value.exit_code == 7
    assert not list(renewal.cache.rglob("*.tmp"))
    assert verify(renewal.cache, sizes_px=SIZES) == []
    now = digests(renewal.cache)
    assert {name: now[name] for name in before if name != "manifest.json"} == {
        name: digest for name, digest in before.items() if name != "manifest.json"
    }
    assert [open_store(renewal.cache, size).cases for size in SIZES] == [300, 300]
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    renewal.run(sizes_px=(*SIZES, 128))
    assert digests(renewal.cache) == expected


def run_with_small_files(dicom: Path, labels: Path, out: Path, limit_bytes: int, answer: Any) -> None:
    """In a process of its own: `preprocess` where no file may be longer than so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    try:
        preprocess(dicom, labels, out, sizes_px=(64,))
        answer.put("no error")
    except PtxdistError as error:
        answer.put(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("limit_bytes", [5_000, 80_000])
def test_write_that_fails_at_any_length_stops_with_a_sentence(small_dataset, tmp_path: Path, limit_bytes: int) -> None:  # type: ignore[no-untyped-def]
    """As a full disk, where nobody may mount one; the shards have 94 kB, the catalog 9."""
    out, data, answer = tmp_path / "cache", small_dataset, FORKS.Queue()
    process = FORKS.Process(target=run_with_small_files, args=(data.dicom, data.labels, out, limit_bytes, answer))
    process.start()
    message = answer.get(timeout=60)
    process.join()
    assert message == (
        f"StoreError: {out}: writing stopped: File too large; finished work is kept, rerun the same command to continue"
    )
    assert not list(out.rglob("*.tmp"))
    result = preprocess(data.dicom, data.labels, out, sizes_px=(64,))
    assert (result.written, verify(out)) == (1, [])


def test_folder_that_cannot_be_written_to_stops_with_a_sentence(small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "cache"
    out.mkdir()
    (out / "32.zarr").write_text("a file where a folder has to be")
    with pytest.raises(StoreError, match=r"writing stopped: .*; finished work is kept") as caught:
        preprocess(small_dataset.dicom, small_dataset.labels, out, sizes_px=(32,))
    assert caught.value.exit_code == 7
