"""A folder in an object store, against a real S3 server, with faults between."""

from __future__ import annotations

import os
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
from object_store import BUCKET, KEY, SECRET, Proxy

from ptxdist.errors import BusyError, StorageError
from ptxdist.storage import lease
from ptxdist.storage.lease import LEASE, Lease
from ptxdist.storage.remote import ConflictError, Remote


@pytest.fixture
def url() -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/folder"


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.bin"
    path.write_bytes(os.urandom(3_000_000))
    return path


def test_files_come_back_as_they_went_with_names_and_sizes(s3: Proxy, url: str, tmp_path: Path, large: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    remote = Remote(url)
    remote.send({"a/b/large.bin": large, "empty": tmp_path / "empty"})
    remote.write("small", b"text")
    sizes = {name: size for name, (size, _) in remote.list().items()}
    assert sizes == {"a/b/large.bin": 3_000_000, "empty": 0, "small": 4}
    remote.fetch([*remote.list(), "not there"], tmp_path / "back")
    assert (tmp_path / "back/a/b/large.bin").read_bytes() == large.read_bytes()
    assert (tmp_path / "back/empty").read_bytes() == b""
    assert sorted(path.name for path in (tmp_path / "back").rglob("*") if path.is_file()) == [
        "empty", "large.bin", "small",
    ]  # fmt: skip
    assert (remote.read("small"), remote.read("not there")) == (b"text", None)
    remote.delete(["small", "not there"])
    assert "small" not in remote.list()


def test_a_conditional_write_succeeds_for_one_of_many(s3: Proxy, url: str) -> None:
    remote, won = Remote(url), []

    def write(number: int) -> None:
        with suppress(ConflictError):
            won.append(remote.write("name", b"by %d" % number, version=""))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    version = remote.write("name", b"second", version=won[0])
    with pytest.raises(ConflictError):
        remote.write("name", b"late", version=won[0])
    assert remote.read_version("name") == (b"second", version)


@pytest.mark.parametrize("kind", ["500", "503", "cut upload", "lost", "hang"])
def test_a_write_that_fails_is_done_again(
    s3: Proxy, url: str, large: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptxdist.storage.remote._SILENCE_S", 0.5)
    monkeypatch.setattr("ptxdist.storage.remote._REQUEST_S", 1.0)
    remote = Remote(url)
    s3.fail(kind, 2, method="PUT", name="large")
    remote.send({"large.bin": large})
    s3.fail(kind, method="PUT", name="small")
    version = remote.write("small", b"text", version="")
    assert (remote.read("large.bin"), remote.read_version("small")) == (large.read_bytes(), (b"text", version))


@pytest.mark.parametrize("kind", ["500", "cut", "hang", "slow"])
def test_a_read_that_fails_is_done_again_and_never_torn(
    s3: Proxy, url: str, large: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptxdist.storage.remote._SILENCE_S", 0.5)
    monkeypatch.setattr("ptxdist.storage.remote._PIECE_BYTES", 1_000_000)
    Remote(url).send({"large.bin": large})
    s3.fail(kind, 2, method="GET", name="large")
    Remote(url).fetch(["large.bin"], tmp_path / "back")
    assert (tmp_path / "back/large.bin").read_bytes() == large.read_bytes()
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["large.bin"]


def test_an_object_that_is_written_while_it_is_read_is_read_anew(
    s3: Proxy, url: str, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptxdist.storage.remote._PIECE_BYTES", 1_000_000)
    other = os.urandom(2_500_000)

    class Replaced(Remote):
        pieces = 0

        def _insist(self, name, action):  # type: ignore[no-untyped-def]
            self.pieces += 1
            if self.pieces == 3:  # after its size and its first piece
                Remote(self.url).write(name, other)
            return super()._insist(name, action)

    Remote(url).send({"large.bin": large})
    remote = Replaced(url)
    remote.fetch(["large.bin"], tmp_path / "back")
    assert (tmp_path / "back/large.bin").read_bytes() == other


@pytest.mark.parametrize("kind", ["500", "hang", "cut"])
def test_a_fault_that_stays_ends_in_bounded_time_with_what_to_do(
    s3: Proxy, url: str, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, large: Path
) -> None:
    Remote(url).send({"large.bin": large})
    monkeypatch.setenv("PTXDIST_STORAGE_PATIENCE_S", "1")
    s3.fail(kind, 10_000, method="GET")
    started = time.monotonic()
    with pytest.raises(StorageError, match="rerun the same command") as caught:
        Remote(url).fetch(["large.bin"], tmp_path / "back")
    assert time.monotonic() - started < 15
    assert KEY not in str(caught.value)
    assert not list((tmp_path / "back").iterdir())


def test_a_store_that_is_not_there_is_told_in_bounded_time(
    s3: Proxy, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PTXDIST_STORAGE_PATIENCE_S", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"cannot be reached.*AWS_ENDPOINT_URL"):
        Remote(url).read("name")
    assert time.monotonic() - started < 15


def test_refusals_are_final_and_name_neither_key_nor_secret(s3: Proxy, url: str) -> None:
    s3.fail("403", method="GET")
    with pytest.raises(StorageError, match="access is refused") as caught:
        Remote(url).read("name")
    assert KEY not in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    with pytest.raises(StorageError, match="no such bucket"):
        Remote("s3://nobody-has-this/folder").list()


@pytest.mark.parametrize("place", ["s3://", "s3://bucket", "s3:///folder", "gs://bucket/folder", "s3://bucket/a/../b"])
def test_what_is_no_folder_of_a_store_is_refused(place: str) -> None:
    with pytest.raises(StorageError, match="give s3://BUCKET/FOLDER"):
        Remote(place)


def test_the_second_writer_is_refused_and_a_dead_one_gives_way(
    s3: Proxy, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_LEASE_S", 1.0)
    with Lease(Remote(url)) as first:
        with pytest.raises(BusyError, match="another ptxdist is writing"), Lease(Remote(url)):
            pass
        first.check()
        assert not first._lost
        # As if the writer's machine had been switched off: its object stays as it is.
        monkeypatch.setattr(Lease, "_renew", lambda self: None)
        dead = Lease(Remote(url + "-2"))
        dead.__enter__()
        with Lease(Remote(url + "-2")) as second:
            assert second.former == dead.token
    assert b'"released": true' in (Remote(url).read(LEASE) or b"")
    with Lease(Remote(url)) as third:
        assert third.former == first.token


def test_who_was_taken_over_is_told(s3: Proxy, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_LEASE_S", 0.4)
    with Lease(Remote(url)) as first:
        Remote(url).write(LEASE, b'{"token": "another", "count": 1, "released": false}')
        first._thread.join(10)
        with pytest.raises(BusyError):
            first.check()
    assert b"another" in (Remote(url).read(LEASE) or b"")
