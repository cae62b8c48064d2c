"""Runs in an object store: trained, killed, taken up on another machine, read; against a real S3 server."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from object_store import BUCKET, Proxy

from ptxdist.cli import cli
from ptxdist.data import mirror, staging
from ptxdist.data.lease import LEASE
from ptxdist.data.mirror import REST, Mirror, local_run, stage_part, working_run
from ptxdist.data.remote import Remote
from ptxdist.data.staging import working_cache
from ptxdist.errors import BusyError, RunError, StorageError
from ptxdist.rundir import read_result, read_stage_result, stage_folder


@pytest.fixture
def url() -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/runs/exp"


@pytest.fixture(autouse=True)
def _let_go() -> Iterator[None]:
    yield
    for lock in staging._held.values():
        lock.close()
    staging._held.clear()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def weights_of(folder: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("stages/*/best.safetensors"))]


# --- the mirror alone -----------------------------------------------------------------------------------------------


def test_a_mirror_sends_what_is_finished_and_removes_what_is_gone(s3: Proxy, url: str) -> None:
    here, part = Mirror(url), stage_part(1, 64)
    folder = here.folder / part
    for name in ("checkpoints/a/model", "checkpoints/a/state.json", "checkpoints/b.tmp/model", "ray/x", "result.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (here.folder / "settings.json").write_text("{}")
    here.push(part, REST)
    names = [path.rpartition("/exp/")[2] for path in s3.written()]
    assert names[0] == f"{part}checkpoints/a/model"
    assert sorted(names[1:3]) == [f"{part}checkpoints/a/state.json", f"{part}result.json"], "what says finished is last"
    assert names[3:] == ["settings.json"]
    s3.requests.clear()
    here.push(part, REST)
    assert not s3.written(), "nothing is sent again"
    (folder / "checkpoints/a/model").unlink()
    (folder / "checkpoints/a/state.json").unlink()
    here.push(part)
    assert set(Remote(url).list()) == {f"{part}result.json", "settings.json"}


def test_a_mirror_takes_over_what_is_in_the_store_and_nothing_else(
    s3: Proxy, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = stage_part(1, 64)
    Remote(url).write(f"{part}a", b"one")
    here = Mirror(url)
    here.pull(part)
    (here.folder / part / "never sent").write_text("x")
    (here.folder / part / "a").write_text("altered here")
    s3.requests.clear()
    here.pull(part)
    assert [path.name for path in (here.folder / part).iterdir()] == ["a"]
    assert (here.folder / part / "a").read_text() == "one"
    s3.requests.clear()
    here.pull(part)
    assert not [path for method, path in s3.requests if path.endswith(f"{part}a")], "what is the same is not read again"


def test_while_the_store_is_gone_work_goes_on_and_is_sent_afterwards(
    s3: Proxy, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "_EVERY_S", 0.05)
    monkeypatch.setenv("PTXDIST_STORAGE_PATIENCE_S", "0.3")
    here = Mirror(url)
    with here.sending(REST):
        s3.fail("500", 10_000)
        (here.folder / "a").write_text("one")
        end = time.monotonic() + 60
        while len(s3.written()) < 3:
            assert time.monotonic() < end
            time.sleep(0.05)
        s3.heal()
    assert Remote(url).read("a") == b"one"
    s3.fail("500", 10_000)
    (here.folder / "b").write_text("two")
    with pytest.raises(StorageError, match="same command again"), here.sending(REST):
        pass
    s3.heal()
    here.push(REST)
    assert Remote(url).read("b") == b"two"


def test_a_second_training_of_a_run_is_refused(
    s3: Proxy, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptxdist.data.lease._LEASE_S", 1.0)
    with working_run(url, [64]):
        with pytest.raises(BusyError, match="on this machine"), working_run(url, [64]):
            pass
        monkeypatch.setenv("PTXDIST_STAGING", str(tmp_path / "another"))
        with pytest.raises(BusyError, match="another ptxdist is writing to s3://"), working_run(url, [64]):
            pass


def test_what_is_no_run_is_told(s3: Proxy, url: str) -> None:
    with pytest.raises(RunError, match=f"{url} is not a run"):
        local_run(url)


# --- a training -----------------------------------------------------------------------------------------------------


@pytest.fixture
def words(s3: Proxy, url: str, small_cache) -> list[object]:  # type: ignore[no-untyped-def]
    """The smoke pipeline with three epochs in its first stage, cache and run in the store."""
    import shutil

    cache = url.replace("/runs/exp", "/cache")
    with working_cache(cache) as folder:
        shutil.copytree(small_cache[0], folder, dirs_exist_ok=True)
    return [
        "train",
        "--pipeline",
        "smoke",
        "--without-ray",
        "--data",
        cache,
        "--run",
        url,
        "--set",
        "stages.1.epochs=3",
    ]


def start(words: list[object]) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "ptxdist", *map(str, words)], stderr=subprocess.PIPE, text=True)


def test_a_killed_run_goes_on_on_another_machine_with_the_same_weights(
    s3: Proxy, url: str, words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = start([*words, "--set", "train.checkpoint_every_s=0.001"])
    end = time.monotonic() + 120
    while not any("epoch-0001" in name and name.endswith("state.json") for name in Remote(url).list()):
        assert training.poll() is None, training.stderr and training.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)
    training.send_signal(signal.SIGKILL)
    training.communicate()
    assert "result.json" not in Remote(url).list()
    monkeypatch.setenv("PTXDIST_STAGING", str(tmp_path / "another machine"))
    monkeypatch.setattr("ptxdist.data.lease._LEASE_S", 0.5)
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "goes on after epoch" in done.output
    unbroken = tmp_path / "unbroken"
    assert run(*["train", *words[1:], "--run", unbroken]).exit_code == 0
    copy = local_run(url)
    assert weights_of(copy) == weights_of(unbroken)
    assert read_result(copy).evaluation.scores == read_result(unbroken).evaluation.scores
    listed = Remote(url).list()
    assert {"settings.json", "environment.json", "metrics.jsonl", "result.json", "report/index.html", LEASE} <= set(
        listed
    )
    assert {"evaluation/result.json", "evaluation/cases.csv"} <= set(listed)
    assert not [name for name in listed if "/checkpoints/" in name or name.endswith(".tmp")]
    result = read_stage_result(stage_folder(copy, 1, 64))
    assert result is not None
    assert len(result.history) == 3
    # And whoever has neither cache nor run here reads them.
    monkeypatch.setenv("PTXDIST_STAGING", str(tmp_path / "a third"))
    image = next(iter(Path(small_image(tmp_path)).iterdir()))
    for command in (
        ["inspect", url, "--json"],
        ["report", url, "--json"],
        ["compare", url, unbroken, "--json"],
        ["evaluate", url, "--out", tmp_path / "again", "--json"],
        ["predict", url, image, "--out", tmp_path / "predictions", "--json"],
    ):
        done = run(*command)
        assert done.exit_code == 0, (command, done.output)
        assert json.loads(done.stdout)
    done = run("evaluate", url)
    assert (done.exit_code, "give --out" in done.output) == (RunError.exit_code, True)


def small_image(tmp_path: Path) -> Path:
    import cv2
    import numpy as np

    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), np.full((64, 64), 90, np.uint8))
    return tmp_path / "images"


@pytest.mark.slow
def test_two_ray_workers_train_from_a_store_into_a_store(s3: Proxy, url: str, words: list[object]) -> None:
    s3.fail("500", 5)
    s3.fail("cut", 3, method="GET", name="/c/0")
    done = run(*[word for word in words if word != "--without-ray"], "--workers", 2, "--set", "stages.*.epochs=1")
    assert done.exit_code == 0, done.output
    shards = {path for method, path in s3.requests if method == "GET" and "64.zarr/image/c" in path}
    assert len(shards) == 1
    assert weights_of(local_run(url))
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in done.output
