"""`preprocess` killed at any moment: the former store stays readable, and a rerun ends in the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_files import SIZES, Renewal, digests

from ptxdist.cache.manifest import read_manifest
from ptxdist.cache.outlines import draw_contact_sheet
from ptxdist.cache.preprocess import preprocess
from ptxdist.cache.store import open_store
from ptxdist.cache.verify import verify
from ptxdist.errors import StoreError

FORKS = multiprocessing.get_context("forkserver")  # starts processes quickly


def run_until(dicom: Path, labels: Path, patients: Path, out: Path, stop_at: int, log: Path) -> None:
    """In a process of its own: `preprocess`, killed before its `stop_at`-th operation on files below `out`.

    `log` gets a line for each operation, and at the end the word "done".
    """
    done = 0
    with open(log, "w", buffering=1) as file:

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal done
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(out) in str(arguments[0]):
                done += 1
                if done == stop_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                file.write(f"{event} {' '.join(map(str, arguments[:2]))}\n")

        sys.addaudithook(watch)
        preprocess(dicom, labels, out, patients=patients, sizes_px=SIZES)
        file.write("done\n")


def killed_run(renewal: Renewal, stop_at: int = 0, after_s: float = 60.0) -> list[str]:
    """Log of a run that is killed at one of these moments, if it is not over before."""
    log = renewal.cache.with_name("log")
    paths = (renewal.dicom, renewal.labels, renewal.patients, renewal.cache)
    process = FORKS.Process(target=run_until, args=(*paths, stop_at, log))
    process.start()
    process.join(after_s)
    process.kill()
    process.join()
    lines = log.read_text().splitlines() if log.is_file() else []
    assert process.exitcode == (0 if lines[-1:] == ["done"] else -signal.SIGKILL)
    return lines


def first_removal_of_the_former(log: list[str]) -> int:
    """Number of the operation by which the former store may begin to be replaced: the last manifest before it."""
    placed = next(n for n, line in enumerate(log) if line.startswith("os.rename") and line.split()[1].endswith(".new"))
    return max(n for n in range(placed) if log[n].startswith("os.rename") and "manifest.json" in log[n])


def moments(log: list[str], count: int, seed: int) -> list[int]:
    """Numbers of operations of a whole run, one from each of `count` equal parts."""
    number, total = random.Random(seed), len(log)
    return [number.randint(1 + part * total // count, (part + 1) * total // count) for part in range(count)]


@pytest.mark.slow
def test_first_build_killed_at_any_moment_ends_in_the_same_bytes(many_cache, many_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    build = Renewal(many_cache[0], many_dataset, tmp_path)
    expected = digests(many_cache[0])

    def reset() -> None:
        shutil.rmtree(build.cache)
        build.cache.mkdir()
        shutil.copy(many_cache[0] / "salt", build.cache)  # the hashes in the cache depend on it

    reset()
    started = time.monotonic()
    log = killed_run(build)
    whole_s = time.monotonic() - started
    assert log[-1] == "done"
    assert digests(build.cache) == expected
    kills: list[dict[str, Any]] = [{"stop_at": moment} for moment in moments(log, 6, seed=1)]
    kills += [{"after_s": random.Random(2).uniform(0, whole_s)}]
    for kill in kills:
        reset()
        killed_run(build, **kill)
        if not read_manifest(build.cache).sizes.get(48) or not read_manifest(build.cache).sizes[48].complete:
            with pytest.raises(StoreError):
                open_store(build.cache, 48)
        killed_run(build, stop_at=40)  # and once more, soon after its start
        build.run()
        assert digests(build.cache) == expected, kill


@pytest.mark.slow
def test_renewal_killed_at_any_moment_keeps_the_old_or_ends_in_the_new(renewal: Renewal, tmp_path: Path) -> None:
    """Until all that is new has been written, the store that was there is there; then it says that it is unfinished."""
    former = Path(shutil.copytree(renewal.cache, tmp_path / "former"))
    images = {size: [image.copy() for image in open_store(former, size).images] for size in SIZES}
    renewal.relabel("1.2.3.10001,-1", "1.2.3.10001,0 64")
    renewal.relabel("1.2.3.10151,-1", "1.2.3.10151,0 64")
    renewal.file(290).unlink()
    started = time.monotonic()
    log = killed_run(renewal)
    whole_s = time.monotonic() - started
    expected, begun = digests(renewal.cache), first_removal_of_the_former(log)
    assert expected != digests(former)
    before, after = moments(log[:begun], 4, seed=3), [begun + moment for moment in moments(log[begun:], 5, seed=4)]
    kills: list[dict[str, Any]] = [{"stop_at": moment} for moment in (*before, begun, *after)]
    kills += [{"after_s": random.Random(5).uniform(0, whole_s)}]
    readable, refusals = 0, set()
    for kill in kills:
        shutil.rmtree(renewal.cache)
        shutil.copytree(former, renewal.cache)
        log = killed_run(renewal, **kill)
        try:
            assert verify(renewal.cache) == [], kill
            if len(log) <= begun:
                readable += 1
                for size in SIZES:
                    store = open_store(renewal.cache, size)
                    assert all(map(np.array_equal, store.images, images[size]))
                    assert not store.sample(1)[1].any()
        except StoreError as error:
            said = str(error)
            assert len(log) > begun, (kill, said)
            refusals.add(said.removeprefix(str(renewal.cache)))
        renewal.run()
        assert digests(renewal.cache) == expected, kill
    assert readable >= 5
    assert refusals == {"/32.zarr is not finished; rerun `ptxdist preprocess`"}


@pytest.mark.slow
def test_killed_while_only_tables_are_renewed_the_cache_stays_whole(renewal: Renewal, tmp_path: Path) -> None:
    """The stores need nothing; a table that is new already must not look like a damaged one."""
    former = Path(shutil.copytree(renewal.cache, tmp_path / "former"))
    renewal.labels.write_text(renewal.labels.read_text() + "1.2.3.55555,-1\n")  # an id without a file
    log = killed_run(renewal)
    expected = digests(renewal.cache)
    renewed = [n for n, line in enumerate(log) if line.startswith("os.rename") and line.split()[1].endswith(".tmp")]
    assert len(renewed) == 4  # the manifest, the two tables that change, and the manifest
    for moment in renewed:
        shutil.rmtree(renewal.cache)
        shutil.copytree(former, renewal.cache)
        killed_run(renewal, stop_at=moment + 2)  # after that one
        assert verify(renewal.cache) == []
        assert open_store(renewal.cache, 48).cases == 300
        renewal.run()
        assert digests(renewal.cache) == expected


@pytest.mark.slow
@pytest.mark.parametrize("event", [".tmp", ".new"])
def test_change_that_is_taken_back_after_a_kill_leaves_nothing(renewal: Renewal, tmp_path: Path, event: str) -> None:
    former = Path(shutil.copytree(renewal.cache, tmp_path / "former"))
    before = digests(former)
    renewal.relabel("1.2.3.10151,-1", "1.2.3.10151,0 64")
    log = killed_run(renewal)
    moment = next(n for n, line in enumerate(log) if re.match(r"open \S+/1/0/0\.new\.ptxdist-\w+\.tmp", line))
    if event == ".new":
        moment = next(n for n, line in enumerate(log) if n > moment and "manifest.json.ptxdist-" in line)
    shutil.rmtree(renewal.cache)
    shutil.copytree(former, renewal.cache)
    killed_run(renewal, stop_at=moment + 2)
    assert list(renewal.cache.rglob(f"*/1/0/0*{event}"))
    renewal.relabel("1.2.3.10151,0 64", "1.2.3.10151,-1")
    assert renewal.changed() == set()
    assert digests(renewal.cache) == before


def start(data: Any, out: Path, workers: int = 2) -> subprocess.Popen[bytes]:
    """`preprocess` in a process group of its own."""
    call = (
        "from pathlib import Path; from ptxdist.cache.preprocess import preprocess; "
        f"preprocess(Path({str(data.dicom)!r}), Path({str(data.labels)!r}), Path({str(out)!r}), "
        f"patients=Path({str(data.patients)!r}), sizes_px=(32, 48), workers={workers})"
    )
    return subprocess.Popen([sys.executable, "-c", call], start_new_session=True, stderr=subprocess.DEVNULL)


def group_alive(group: int) -> list[str]:
    """Processes of a group that still run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, member = status.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(member) == group and state != "Z":
            found.append(status.parent.name)
    return found


def wait_for(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_beside_its_workers_it_leaves_none_of_them(many_dataset, many_cache, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Or they would write beside the next run, which is to end in the same bytes."""
    out = tmp_path / "cache"
    out.mkdir()
    shutil.copy(many_cache[0] / "salt", out)  # groups are hashed with it
    running = start(many_dataset, out)
    wait_for(lambda: list(out.glob("*/image/c/*/0/0.*")) or running.poll() is not None)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    try:
        wait_for(lambda: not group_alive(running.pid))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    assert start(many_dataset, out).wait() == 0
    assert digests(out) == digests(many_cache[0])


def drawn_until(cache: Path, stop_at: int) -> None:
    """In a process of its own: the picture of `inspect`, killed before its `stop_at`-th operation on that file."""
    done = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if event in ("open", "os.rename", "os.chmod") and "contact-sheet" in str(arguments[0]):
            done += 1
            if done == stop_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    draw_contact_sheet(cache)


def test_inspect_killed_at_any_moment_leaves_the_cache_as_it_was(renewal: Renewal) -> None:
    before, codes, sheet = digests(renewal.cache), [], renewal.cache / "contact-sheet.png"
    while not codes or codes[-1]:
        process = FORKS.Process(target=drawn_until, args=(renewal.cache, len(codes) + 1))
        process.start()
        process.join(60)
        codes.append(process.exitcode)
        assert sheet.is_file() == (codes[-1] == 0), "whole, or not there"
        assert verify(renewal.cache) == []
    assert codes[:-1] == [-signal.SIGKILL] * (len(codes) - 1)
    assert len(codes) > 3
    assert sheet.read_bytes().startswith(b"\x89PNG")
    preprocess(renewal.dicom, renewal.labels, renewal.cache, patients=renewal.patients, sizes_px=SIZES)
    sheet.unlink()
    assert digests(renewal.cache) == before, "leftovers are gone"
