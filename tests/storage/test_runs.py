"""Runs in an object store: trained, killed, taken up on another machine, read; against a real S3 server."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import cv2
import numpy as np
import pytest
from object_store import BUCKET, SECRET, Proxy

from ptxdist.errors import BusyError, RunError, StorageError
from ptxdist.rundir import read_metrics, read_result
from ptxdist.storage import runs
from ptxdist.storage.caches import working_cache
from ptxdist.storage.lease import LEASE
from ptxdist.storage.remote import Remote
from ptxdist.storage.runs import REST, Mirror, local_run, stage_part, working_run


@pytest.fixture
def url() -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/runs/exp"


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
    monkeypatch.setattr(runs, "_EVERY_S", 0.05)
    monkeypatch.setenv("PTXDIST_STORAGE_PATIENCE_S", "2")
    here = Mirror(url)
    with here.sending(REST):
        s3.fail("500", 10_000)
        (here.folder / "a").write_text("one")
        end = time.monotonic() + 60
        while len(s3.written()) < 3:
            assert time.monotonic() < end
            time.sleep(0.01)
        s3.heal()
    assert Remote(url).read("a") == b"one"
    s3.fail("500", 10_000)
    (here.folder / "b").write_text("two")
    with pytest.raises(StorageError, match="rerun the same command"), here.sending(REST):
        pass
    s3.heal()
    here.push(REST)
    assert Remote(url).read("b") == b"two"


def test_a_second_training_of_a_run_is_refused(
    s3: Proxy, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptxdist.storage.lease._LEASE_S", 1.0)
    with working_run(url, [64]):
        with pytest.raises(BusyError, match="on this machine"), working_run(url, [64]):
            pass
        monkeypatch.setenv("PTXDIST_STAGING", str(tmp_path / "another"))
        with pytest.raises(BusyError, match="another ptxdist is writing to s3://"), working_run(url, [64]):
            pass


def test_who_was_taken_over_sends_no_more(s3: Proxy, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptxdist.storage.lease._LEASE_S", 0.4)

    def train() -> None:
        with working_run(url, [64]) as here:
            Remote(url).write(LEASE, b'{"token": "another", "count": 1, "released": false}')
            (here.folder / "settings.json").write_text("{}")
            time.sleep(1)
            here.push(REST)

    with pytest.raises(BusyError):
        train()
    assert b"another" in (Remote(url).read(LEASE) or b"")


def test_a_mirror_leaves_no_empty_checkpoint_behind(s3: Proxy, url: str) -> None:
    here, part = Mirror(url), stage_part(1, 64)
    (here.folder / part / "checkpoints/epoch-0001-step-000000").mkdir(parents=True)
    (here.folder / part / "checkpoints/epoch-0001-step-000000/state.json").write_text("never sent")
    here.pull(part)
    assert not (here.folder / part / "checkpoints/epoch-0001-step-000000").exists()


def test_what_is_no_run_is_told(s3: Proxy, url: str) -> None:
    with pytest.raises(RunError, match=f"{url} is not a run"):
        local_run(url)


# --- a training -----------------------------------------------------------------------------------------------------

PIPELINE = """
[model]
encoder = "small"
encoder_weights = "none"
decoder_channels = [32, 16, 16, 8, 8]

[[stages]]
size_px = 64
epochs = 6
batch_size = 2
augmentation = "none"
"""


@pytest.fixture
def words(s3: Proxy, url: str, small_cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:  # type: ignore[no-untyped-def]
    """A training of one stage with a small network; cache and run are in the store."""
    cache = url.replace("/runs/exp", "/cache")
    with working_cache(cache) as folder:
        shutil.copytree(small_cache[0], folder, dirs_exist_ok=True)
    (tmp_path / "tiny.toml").write_text(PIPELINE)
    return ["train", "--pipeline", tmp_path / "tiny.toml", "--data", cache, "--run", url]


def started(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ptxdist", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finished(*words: object) -> str:
    process = started(*words)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def in_turn(*commands: list[object]) -> list[tuple[int, str]]:
    """Exit code and output of several commands, in one process that is not this one."""
    script = (
        "import json, sys; from click.testing import CliRunner; from ptxdist.cli import cli\n"
        "done = [CliRunner().invoke(cli, words) for words in json.loads(sys.argv[1])]\n"
        "print(json.dumps([(one.exit_code, one.output + repr(one.exception or '')) for one in done]))"
    )
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", script, words], capture_output=True, text=True, timeout=300, check=True
    )
    return [(code, output) for code, output in json.loads(done.stdout.splitlines()[-1])]


def test_a_killed_run_goes_on_on_another_machine_with_the_same_weights(
    s3: Proxy, url: str, words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOW_S", "0.2")  # so that there is time for a kill
    training, end = started(*words, "--without-ray"), time.monotonic() + 240
    while not any("/epoch-" in name and name.endswith("state.json") for name in Remote(url).list()):
        assert training.poll() is None, training.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)
    training.send_signal(signal.SIGKILL)
    training.communicate()
    monkeypatch.delenv("SLOW_S")
    assert "result.json" not in Remote(url).list()
    Remote(url).write(LEASE, (Remote(url).read(LEASE) or b"").replace(b"false", b"true"))  # as if 30 s had gone by
    monkeypatch.setenv("PTXDIST_STAGING", str(tmp_path / "another machine"))
    unbroken, image = tmp_path / "unbroken", tmp_path / "images" / "a.png"
    image.parent.mkdir()
    cv2.imwrite(str(image), np.full((64, 64), 90, np.uint8))
    done = in_turn(
        [*words, "--without-ray"],
        [*words, "--without-ray", "--run", unbroken],
        ["inspect", url, "--json"],
        ["report", url, "--json"],
        ["compare", url, unbroken, "--json"],
        ["evaluate", url, "--out", tmp_path / "again", "--json"],
        ["predict", url, image, "--out", tmp_path / "predictions", "--json"],
        ["evaluate", url],
    )
    assert [code for code, _ in done] == [*[0] * (len(done) - 1), RunError.exit_code], done
    assert "resumes after epoch" in done[0][1]
    copy, listed = local_run(url), set(Remote(url).list())
    assert weights_of(copy) == weights_of(unbroken)
    assert read_result(copy).evaluation.scores == read_result(unbroken).evaluation.scores
    assert listed >= {"settings.json", "environment.json", "metrics.jsonl", "result.json", "report/index.html", LEASE}
    assert listed >= {"evaluation/result.json", "evaluation/cases.csv", "stages/1-64px/result.json"}
    assert not [name for name in listed if "/checkpoints/" in name or name.endswith(".tmp")]
    assert len(read_metrics(copy)) == 6


@pytest.mark.slow
def test_two_ray_workers_train_from_a_store_into_a_store(s3: Proxy, url: str, words: list[object]) -> None:
    s3.fail("500", 3)
    s3.fail("cut", 3, method="GET", name="/c/0")
    output = finished(*words, "--workers", 2, "--set", "stages.*.epochs=1")
    fetched = [path for method, path in s3.requests if method == "GET" and "64.zarr/image/c" in path]
    assert 1 <= len(fetched) <= 9, "one copy for two workers and the driver, and what was tried again"
    assert weights_of(local_run(url))
    assert SECRET not in output
