"""Caches in an object store: sent, copied, renewed, evicted, against a real S3 server with faults between."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from object_store import BUCKET, KEY, SECRET, Proxy
from tiny_caches import column

from ptxdist import files
from ptxdist.cache.manifest import MANIFEST
from ptxdist.cache.store import open_store
from ptxdist.cache.verify import verify
from ptxdist.cli import cli
from ptxdist.config import DataSettings
from ptxdist.errors import BusyError, StorageError, StoreError
from ptxdist.storage import caches
from ptxdist.storage.caches import local_cache, remote_digest, working_cache
from ptxdist.storage.lease import LEASE, Lease
from ptxdist.storage.remote import Remote
from ptxdist.storage.runs import local_run


@pytest.fixture
def url() -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/cache"


@pytest.fixture(scope="module")
def three_shards(many_dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    """A cache of three shards at 32 px; nothing may write to it."""
    from ptxdist.cache.preprocess import preprocess

    out = tmp_path_factory.mktemp("three") / "cache"
    preprocess(many_dataset.dicom, many_dataset.labels, out, sizes_px=(32,))
    return out


def send(cache: Path, url: str) -> None:
    """Send a cache that is there already."""
    with working_cache(url) as folder:
        shutil.copytree(cache, folder, dirs_exist_ok=True)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


# --- the way there and back -----------------------------------------------------------------------------------------


def test_preprocess_writes_to_a_store_what_it_writes_to_a_folder(
    s3: Proxy, url: str, small_dataset, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    words = [
        "--dicom",
        small_dataset.dicom,
        "--labels",
        small_dataset.labels,
        "--size",
        64,
        "--size",
        96,
        "--workers",
        1,
    ]
    done = run("preprocess", *words, "--out", url)
    assert done.exit_code == 0, done.output
    assert f"{url} is ready at 64, 96 pixels: 2 shards written" in " ".join(done.output.split())
    copy = local_cache(url)
    (work,) = (path for path in (tmp_path / "staging").glob("work-*") if path.is_dir())
    assert digests(copy) == digests(work)
    assert verify(copy) == []
    assert [open_store(copy, size).cases for size in (64, 96)] == [23, 23]
    assert set(Remote(url).list()) == {*digests(copy), LEASE}
    s3.requests.clear()
    done = run("preprocess", *words, "--out", url)
    assert "nothing had to be done" in " ".join(done.output.split())
    assert {path.rpartition("/")[2] for path in s3.written()} == {LEASE}, "nothing is sent again"
    for command in (["verify", url], ["inspect", url, "--json"]):
        done = run(*command)
        assert done.exit_code == 0, done.output


def test_only_the_sizes_that_are_asked_for_are_copied(s3: Proxy, url: str, small_cache) -> None:  # type: ignore[no-untyped-def]
    send(small_cache[0], url)
    copy = local_cache(url, [64])
    assert not (copy / "96.zarr").exists()
    assert column(open_store(copy, 64), "case_id").shape == (23,)
    assert local_cache(url, [96]) == copy
    assert verify(copy) == []
    with pytest.raises(StoreError, match=f"{url} has no finished store of 128 px"):
        local_cache(url, [128])


def test_a_copy_takes_up_where_it_stopped_and_mends_what_is_damaged(
    s3: Proxy, url: str, three_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(three_shards, url)
    monkeypatch.setenv("PTXDIST_STORAGE_PATIENCE_S", "4")  # as long as a busy machine may need for an answer
    s3.fail("500", 10_000, method="GET", name="mask/c/1")
    with pytest.raises(StorageError, match="500 Internal"):
        local_cache(url)
    s3.heal()
    s3.requests.clear()
    copy = local_cache(url)
    again = [path for method, path in s3.requests if method == "GET" and "/c/" in path and ".zarr/image" in path]
    assert len(again) < 3, "whole files that were there are kept"
    assert digests(copy) == digests(three_shards)
    shard = copy / "32.zarr/image/c/0/0/0"
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    (copy / "catalog.jsonl").unlink()
    s3.requests.clear()
    assert digests(local_cache(url)) == digests(three_shards)
    fetched = {path.rpartition("/cache/")[2] for method, path in s3.requests if method == "GET"}
    assert fetched == {MANIFEST, "catalog.jsonl", "32.zarr/image/c/0/0/0"}


@pytest.mark.parametrize("kind", ["cut", "500", "flip", "hang"])
def test_faults_on_the_way_here_lose_and_tear_nothing(
    s3: Proxy, url: str, three_shards: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(three_shards, url)
    monkeypatch.setattr("ptxdist.storage.remote._SILENCE_S", 0.5)
    s3.fail(kind, 2, method="GET", name="image/c")
    s3.fail(kind, 1, method="GET", name="catalog")
    assert digests(local_cache(url)) == digests(three_shards)


@pytest.mark.parametrize("kind", ["cut upload", "500", "lost"])
def test_faults_on_the_way_there_lose_and_tear_nothing(
    s3: Proxy, url: str, three_shards: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptxdist.storage.remote._SILENCE_S", 0.5)
    s3.fail(kind, 3, method="PUT", name="image/c")
    s3.fail(kind, 2, method="PUT", name=MANIFEST)
    send(three_shards, url)
    assert digests(local_cache(url)) == digests(three_shards)


def test_damage_in_the_store_is_told_with_its_name_and_mended_by_sending_again(
    s3: Proxy, url: str, three_shards: Path
) -> None:
    send(three_shards, url)
    name = "32.zarr/mask/c/2/0/0"
    Remote(url).write(name, bytes((three_shards / name).stat().st_size))
    done = run("verify", url)
    assert done.exit_code == 7
    assert name in done.output.replace("\n", "")
    Remote(url).delete([name])
    send(three_shards, url)
    assert verify(local_cache(url)) == []


def test_a_manifest_that_names_a_file_outside_of_the_cache_writes_nowhere(
    s3: Proxy, url: str, three_shards: Path, tmp_path: Path
) -> None:
    """Anybody can compute the checksum of a manifest."""
    send(three_shards, url)
    outside, remote = tmp_path / "outside", Remote(url)
    outside.write_text("mine")
    whole = json.loads((three_shards / MANIFEST).read_text())
    for name in (
        str(outside),
        "../../outside",
        "32.zarr/../../../outside",
        "C:\\outside",
        "32.zarr/a\x1b[2Jb",
        ".lock",
    ):
        plain = {**whole, "files": {**whole["files"], name: hashlib.sha256(b"hostile").hexdigest()}}
        plain["sha256"] = files.content_sum({key: value for key, value in plain.items() if key != "sha256"})
        remote.write(MANIFEST, json.dumps(plain).encode())
        remote._store.put("outside", b"hostile")
        done = run("verify", url)
        assert done.exit_code == 7, done.output
        assert f"it lists {name!r}, which is no file of a cache" in done.output.replace("\n", "")
        assert outside.read_text() == "mine"
    assert [path.name for path in (tmp_path / "staging").glob("cache-*")] == []


@pytest.mark.parametrize("key", ["..%2f..%2foutside", "%2foutside", "C:%5coutside", "a%1b%5b2Jb", ".%2foutside"])
def test_an_object_whose_name_leads_out_of_the_folder_writes_nowhere(
    s3: Proxy, url: str, three_shards: Path, tmp_path: Path, key: str
) -> None:
    send(three_shards, url)
    _forget(tmp_path / "staging", "work-*")
    connection = http.client.HTTPConnection(s3.url.removeprefix("http://"))
    connection.request("PUT", f"{url.removeprefix('s3:/')}/{key}", b"hostile")
    assert connection.getresponse().status == 200
    Remote(url).write("settings.json", b"{}")
    for read in (lambda: local_run(url), lambda: working_cache(url).__enter__()):
        with pytest.raises(StorageError, match=r"is not the name of a file in|has an empty part, '.' or '..'"):
            read()
    assert not list(tmp_path.rglob("outside*"))


# --- many at once ---------------------------------------------------------------------------------------------------


def test_one_process_of_a_node_copies_while_the_others_wait(s3: Proxy, url: str, three_shards: Path) -> None:
    send(three_shards, url)
    s3.requests.clear()
    script = (
        "import sys; from ptxdist.storage.caches import local_cache; from ptxdist.cache.store import open_store;"
        "print(open_store(local_cache(sys.argv[1], [32], token='one'), 32).cases)"
    )
    ranks = [subprocess.Popen([sys.executable, "-c", script, url], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == ["300"] * 2
    shards = [path for method, path in s3.requests if method == "GET" and "/c/" in path and "/c/0/0/0" in path]
    assert len(shards) == 2, "one image shard, one mask shard"


def test_the_second_writer_is_refused(s3: Proxy, url: str, three_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptxdist.storage.lease._LEASE_S", 1.0)
    send(three_shards, url)
    before = Remote(url).read(MANIFEST)
    with Lease(Remote(url)), pytest.raises(BusyError, match="another ptxdist is writing to s3://"):
        send(three_shards, url)
    assert Remote(url).read(MANIFEST) == before
    # A store that lets both in, or a writer whose lease was taken: the manifest is replaced by one of them only.
    overtaken = working_cache(url)
    overtaken.__enter__()
    Remote(url).write(MANIFEST, (before or b"") + b"\n")
    with pytest.raises(BusyError, match="has written"):
        overtaken.__exit__(None, None, None)


# --- renewed, interrupted -------------------------------------------------------------------------------------------


def preprocess_words(data, labels: Path, url: str) -> list[object]:  # type: ignore[no-untyped-def]
    return ["preprocess", "--dicom", data.dicom, "--labels", labels, "--out", url, "--size", 32, "--workers", 1]


def test_a_renewed_cache_sends_what_changed_and_keeps_its_split_on_another_machine(
    s3: Proxy, url: str, many_dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    assert run(*preprocess_words(many_dataset, many_dataset.labels, url)).exit_code == 0
    former = local_cache(url)
    was = digests(former)
    rows = many_dataset.labels.read_text().splitlines()
    case = json.loads((former / "catalog.jsonl").read_text().splitlines()[1])["case_id"]
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join(row if not row.startswith(case) else f"{case},-1" for row in rows) + "\n")
    monkeypatch.setenv("PTXDIST_STAGING", str(tmp_path / "another machine"))
    s3.requests.clear()
    done = run(*preprocess_words(many_dataset, labels, url), "--json")
    assert (done.exit_code, json.loads(done.stdout)["written"]) == (0, 1 if was else 0), done.output
    sent = {path.rpartition("/cache/")[2] for path in s3.written()}
    assert len([name for name in sent if "/c/" in name and name.startswith(("32.zarr/image", "32.zarr/mask"))]) == 2
    assert s3.written()[-2].endswith(MANIFEST), "the manifest last, but for the lease"
    now = local_cache(url)
    splits = [column(open_store(path, 32), "split").tolist() for path in (former, now)]
    assert splits[0] == splits[1]
    assert digests(former) == was, "who reads the former version goes on reading it"


def test_a_killed_sender_leaves_no_torn_cache_and_goes_on_where_it_was(
    s3: Proxy, url: str, three_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import shutil, sys; from ptxdist.storage import caches; caches._REPORT_S = 0;"
        "from ptxdist.storage.caches import working_cache\n"
        "with working_cache(sys.argv[2]) as folder: shutil.copytree(sys.argv[1], folder, dirs_exist_ok=True)"
    )
    s3.fail("hang", 10_000, method="PUT", name="mask/c/2")
    sender = subprocess.Popen([sys.executable, "-c", script, str(three_shards), url])
    end = time.monotonic() + 60
    while not (len(s3.written()) >= 7 and (Remote(url).read(MANIFEST) or b"").count(b'"image_crc32c"') >= 2):
        assert time.monotonic() < end
        time.sleep(0.01)
    sender.send_signal(signal.SIGKILL)
    sender.wait()
    with pytest.raises(StoreError, match="no finished store"):
        local_cache(url)
    with pytest.raises(StoreError):
        remote_digest(url)
    s3.heal()
    s3.requests.clear()
    monkeypatch.setattr("ptxdist.storage.lease._LEASE_S", 0.2)
    send(three_shards, url)
    sent = [path.rpartition("/cache/")[2] for path in s3.written() if "image/c/" in path or "mask/c/" in path]
    assert "32.zarr/mask/c/2/0/0" in sent
    assert len(sent) <= 4, "what was told as sent is not sent again"
    assert digests(local_cache(url)) == digests(three_shards)


# --- room -----------------------------------------------------------------------------------------------------------


def test_copies_nobody_uses_go_when_there_are_too_many_the_oldest_first(
    s3: Proxy, url: str, three_shards: Path, small_cache, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    for number, cache in enumerate((three_shards, small_cache[0], three_shards)):
        send(cache, f"{url}-{number}")
    _forget(tmp_path / "staging", "work-*")
    size = 10**-9 * caches._bytes(three_shards)
    first, second = local_cache(f"{url}-0"), local_cache(f"{url}-1")
    caches._held.pop(caches._beside(first, "use")).close()
    os.utime(caches._beside(first, "use"), (1, 1))
    third = local_cache(f"{url}-2", data=DataSettings(staging_gb=2.2 * size))
    assert not first.exists(), "the oldest that nobody uses"
    assert second.exists(), "this process uses it"
    assert verify(third) == []
    fourth = local_cache(f"{url}-0", data=DataSettings(staging_gb=0.1 * size))
    assert second.exists()
    assert third.exists(), "what is used stays, whatever the limit"
    assert verify(fourth) == []


def _forget(root: Path, pattern: str) -> None:
    for folder in root.glob(pattern):
        if folder.is_dir():
            caches._held.pop(caches._beside(folder, "use")).close()
            shutil.rmtree(folder)


def test_a_copy_that_does_not_fit_the_disk_is_refused_before_it_begins(
    s3: Proxy, url: str, three_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(three_shards, url)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match=r"PTXDIST_STAGING to a folder on a larger disk"):
        local_cache(url)


# --- what people see ------------------------------------------------------------------------------------------------


def test_nothing_that_is_printed_holds_a_credential(s3: Proxy, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTXDIST_STORAGE_PATIENCE_S", "3")
    for kind in ("403", "500"):
        s3.fail(kind, 10_000)
        done = run("verify", url)
        assert done.exit_code == 13, done.output
        assert KEY not in done.output
        assert SECRET not in done.output
        s3.heal()
    done = run("verify", url)
    assert done.exit_code == 7
    assert "is not a ptxdist cache" in " ".join(done.output.split())


def test_doctor_reads_a_cache_in_a_store(s3: Proxy, url: str, three_shards: Path) -> None:
    from ptxdist.cluster.probe import examine

    assert "is not a finished ptxdist cache" in examine(url, None)["cache"]["wrong"]
    send(three_shards, url)
    found = examine(url, None, full=True)["cache"]
    assert found == {"digest": hashlib.sha256((three_shards / MANIFEST).read_bytes()).hexdigest(), "wrong": ""}


def test_doctor_writes_where_a_run_will_be(s3: Proxy, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ptxdist.cluster.probe import try_store

    assert try_store(url) == ""
    assert Remote(url).list() == {}
    monkeypatch.setenv("PTXDIST_STORAGE_PATIENCE_S", "10")
    s3.fail("403", 10_000)
    assert "access is refused" in try_store(url)


def test_submit_leaves_addresses_as_they_are() -> None:
    from ptxdist.cli.submit import absolute_paths

    words = ["train", "--data", "s3://bucket/cache", "--run=s3://bucket/runs/a", "--pipeline", "smoke"]
    assert absolute_paths(cli.commands, words) == words  # type: ignore[attr-defined]


def test_waiting_threads_share_one_copy(s3: Proxy, url: str, three_shards: Path) -> None:
    send(three_shards, url)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(local_cache(url, token="t"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(found)) == 1
    assert digests(found[0]) == digests(three_shards)
