"""Files: whole or as before, whatever goes wrong; and the bytes that each caller's files always had."""

from __future__ import annotations

import ast
import csv
import errno
import hashlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from safetensors.numpy import load_file, save_file

from ptxdist.errors import BusyError, CheckpointError, PtxdistError, RunError, SettingsError, StorageError, StoreError
from ptxdist.files import (
    below,
    copy,
    move,
    parse_json,
    read_json,
    read_table,
    remove_leftovers,
    replacing,
    replacing_folder,
    require_extra,
    sha256,
    write_json,
    write_table,
    write_whole,
)

np = pytest.importorskip("numpy")
PACKAGE = Path(__file__).resolve().parents[1] / "ptxdist"
FORKS = multiprocessing.get_context("fork")


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def fill(path: Path, size: int, *, error: Any = RunError) -> None:
    write_whole(path, bytes(size), error=error)


def fill_in_steps(path: Path, size: int, *, error: Any = RunError) -> None:
    with replacing(path, error=error) as temporary, open(temporary, "wb") as file:
        for _ in range(0, size, 4096):
            file.write(bytes(4096))


def fill_folder(path: Path, size: int, *, error: Any = RunError) -> None:
    with replacing_folder(path, error=error) as draft:
        (draft / "a").write_bytes(b"a")
        (draft / "b").write_bytes(bytes(size))


def fill_copy(path: Path, size: int, *, error: Any = RunError) -> None:
    copy(path.with_name("source"), path, error=error)


# --- whole, or as before --------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can be mounted by root only")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("write", [fill, fill_in_steps])
def test_a_full_disk_leaves_the_former_file_and_nothing_else(small_disk: Path, write: Callable[..., None]) -> None:
    path = small_disk / "in" / "file"
    write_whole(path, "former")
    with pytest.raises(CheckpointError) as caught:
        write(path, 2**21, error=CheckpointError)
    found = f"{path} cannot be written: No space left on device; free some space there; what was saved before is kept"
    assert str(caught.value) == found
    with pytest.raises(OSError, match="No space left") as plain:
        write(path, 2**21, error=None)
    assert plain.value.errno == errno.ENOSPC
    assert (path.read_text(), names(small_disk)) == ("former", ["in", "in/file"])
    write(path, 4096)
    assert path.read_bytes() == bytes(4096)


def test_a_full_disk_leaves_the_former_folder_and_nothing_else(small_disk: Path) -> None:
    fill_folder(small_disk / "out", 10)
    with pytest.raises(
        CheckpointError, match="out cannot be written: No space left on device; free some space there; what was"
    ):
        fill_folder(small_disk / "out", 2**21, error=CheckpointError)
    assert names(small_disk) == ["out", "out/a", "out/b"]
    assert (small_disk / "out" / "b").read_bytes() == bytes(10)


def limited(write: Callable[..., None], path: Path, answer: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        write(path, 2**16)
        answer.put("no error")
    except PtxdistError as error:
        answer.put(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("write", [fill, fill_in_steps, fill_copy])
def test_a_write_that_fails_in_the_middle_leaves_the_former_file(tmp_path: Path, write: Callable[..., None]) -> None:
    """As a full disk, where nobody may mount one."""
    (tmp_path / "source").write_bytes(bytes(2**16))
    path, answer = tmp_path / "file", FORKS.Queue()
    path.write_text("former")
    process = FORKS.Process(target=limited, args=(write, path, answer))
    process.start()
    message = answer.get(timeout=60)
    process.join()
    assert message == f"RunError: {path} cannot be written: File too large; what was saved before is kept"
    assert (path.read_text(), names(tmp_path)) == ("former", ["file", "source"])


@pytest.mark.parametrize("function", ["fsync", "replace", "open"])
def test_a_failure_at_any_step_leaves_the_former_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    path = tmp_path / "file"
    path.write_text("former")

    def fail(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(
            RunError, match=r"file cannot be written: Input/output error; check .*; what was saved before"
        ):
            write_whole(path, "new")
    assert (path.read_text(), names(tmp_path)) == ("former", ["file"])


@pytest.mark.parametrize("failure", [ValueError("of the block"), KeyboardInterrupt(), StoreError("of the block")])
def test_any_exception_in_the_block_passes_and_leaves_nothing(tmp_path: Path, failure: BaseException) -> None:
    (tmp_path / "file").write_text("former")
    with pytest.raises(type(failure)), replacing(tmp_path / "file") as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise failure
    with pytest.raises(type(failure)), replacing_folder(tmp_path / "folder") as draft:  # noqa: PT012
        (draft / "half").write_text("half")
        raise failure
    assert ((tmp_path / "file").read_text(), names(tmp_path)) == ("former", ["file"])


def test_a_place_where_no_file_can_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "inside", tmp_path / "folder", Path("/proc/none")):
        with pytest.raises(RunError, match=f"{path} cannot be written: "):
            write_whole(path, "x")
    assert names(tmp_path) == ["file", "folder"]


def killed_half_way(path: Path, started: Any) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(bytes(100))
        file.flush()
        with replacing_folder(path.with_name("folder")) as draft:
            (draft / "x").touch()
            started.set()
            signal.pause()


def test_a_killed_process_leaves_one_file_that_is_no_data_and_can_be_removed(tmp_path: Path) -> None:
    path, deep, started = tmp_path / "deep" / "a.csv", tmp_path / "deep", FORKS.Event()
    write_whole(path, "former")
    process = FORKS.Process(target=killed_half_way, args=(path, started))
    process.start()
    assert started.wait(60)
    process.kill()
    process.join()
    assert path.read_text() == "former"
    left = [name for name in os.listdir(deep) if name != "a.csv"]
    assert len(left) == 2
    assert all(name.endswith(".tmp") and not Path(name).match("*.csv") for name in left)  # `.tmp` is never sent
    remove_leftovers(tmp_path, deep=False)
    assert len(os.listdir(deep)) == 3
    for name in ("a.tmp", "b.csv.ptxdist-123.tmp", "c.new"):  # other people's files
        (deep / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(deep)) == ["a.csv", "a.tmp", "b.csv.ptxdist-123.tmp", "c.new"]
    remove_leftovers(tmp_path / "none")


def write_again_and_again(path: Path, letter: bytes, failed: Any) -> None:
    try:
        for _ in range(150):
            write_whole(path, letter * 50_000, sync=False)
    except BaseException:
        failed.set()


def test_two_writers_of_one_file_never_mix(tmp_path: Path) -> None:
    path, failed, seen = tmp_path / "file", FORKS.Event(), set()
    path.write_bytes(b"c" * 50_000)
    writers = [FORKS.Process(target=write_again_and_again, args=(path, letter, failed)) for letter in (b"a", b"b")]
    for writer in writers:
        writer.start()
    running = True
    while running:
        running = any(writer.is_alive() for writer in writers)
        content = path.read_bytes()
        assert len(content) == 50_000
        assert len(set(content)) == 1
        seen.add(content[0])
    assert not failed.is_set()
    assert seen & set(b"ab")
    assert names(tmp_path) == ["file"]


def test_sync_flushes_file_and_folder_and_a_folder_that_cannot_be_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []

    def fsync(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        if Path(flushed[-1]).is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(tmp_path / "a", "a", sync=False)
    assert flushed == []
    write_whole(tmp_path / "a", "b")
    assert Path(flushed[0]).name.startswith("a.ptxdist-")
    assert flushed[1:] == [str(tmp_path)]
    assert (tmp_path / "a").read_text() == "b"


def test_the_longest_names_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127, os.fsdecode(b"\xff" * 255)):
        write_whole(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    """Also where a library leaves a file that only its owner can read."""
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "a", "a")
        write_whole(tmp_path / "key", b"key", mode=0o600)
        with replacing(tmp_path / "tensors") as temporary:
            save_file({"x": np.zeros(3)}, temporary)
    finally:
        os.umask(before)
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in tmp_path.iterdir()}
    assert modes == {"a": "0o640", "key": "0o600", "tensors": "0o640"}
    assert load_file(tmp_path / "tensors")["x"].shape == (3,)


# --- folders, copies, renames ---------------------------------------------------------------------------------------


def test_a_folder_replaces_the_former_one_whole(tmp_path: Path) -> None:
    (tmp_path / "in" / "out" / "old").mkdir(parents=True)
    fill_folder(tmp_path / "in" / "out", 3)
    assert names(tmp_path) == ["in", "in/out", "in/out/a", "in/out/b"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, replace = tmp_path / "out", os.replace
    fill_folder(out, 3)

    def fail(source: Path, target: Path) -> None:
        if target == out and (source / "b").stat().st_size == 4:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RunError, match="out cannot be written: Input/output error"):
        fill_folder(out, 4)
    assert (out / "b").read_bytes() == bytes(3)
    assert names(tmp_path) == ["out", "out/a", "out/b"]


def write_folders(path: Path, number: int, busy: str | None, failed: Any) -> None:
    try:
        for _ in range(40):
            with replacing_folder(path, busy=busy) as draft:
                for name in "ab":
                    (draft / name).write_text(str(number))
    except BaseException as error:
        failed.put(repr(error))


def texts_in(folder: Path) -> tuple[str, str]:
    """What is in `a` and `b` of a folder, also when another one is renamed to its place meanwhile."""
    place = os.open(folder, os.O_RDONLY)
    try:
        with (
            open("a", opener=lambda name, flags: os.open(name, flags, dir_fd=place)) as first,
            open("b", opener=lambda name, flags: os.open(name, flags, dir_fd=place)) as second,
        ):
            return first.read(), second.read()
    finally:
        os.close(place)


@pytest.mark.parametrize("busy", [None, ""])
def test_two_writers_of_one_folder_never_mix_and_none_fails(tmp_path: Path, busy: str | None) -> None:
    out, failed, seen = tmp_path / "out", FORKS.Queue(), set()
    fill_folder(out, 3)
    writers = [FORKS.Process(target=write_folders, args=(out, number, busy, failed)) for number in (1, 2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        with suppress(FileNotFoundError):  # between two renames
            seen.add(texts_in(out))
    assert failed.empty(), failed.get()
    assert seen <= {("a", "\0\0\0"), ("1", "1"), ("2", "2")}
    assert names(tmp_path) == ["out", "out/a", "out/b"]


def test_a_folder_that_is_written_alone_takes_away_what_a_killed_process_left(tmp_path: Path) -> None:
    out = tmp_path / ("x" * 255)
    others = ("other.ptxdist-01234567.tmp", f"{'x' * 229}.ptxdist-01234567.tmp", "x.tmp")
    for name in (f"{'x' * 230}.ptxdist-01234567.tmp", *others):
        (tmp_path / name).mkdir()
    with replacing_folder(out, busy="it is written already") as draft:
        assert len(os.listdir(tmp_path)) == len([draft, "lock", *others])
        with (
            pytest.raises(BusyError, match="it is written already"),
            replacing_folder(out, busy="it is written already"),
        ):
            pass
    assert sorted(os.listdir(tmp_path)) == sorted([out.name, *others])


def test_only_an_empty_folder_is_replaced_where_nothing_may_be_lost(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with replacing_folder(tmp_path / "out", over=False) as draft:
        (draft / "a").write_text("first")
    with (
        pytest.raises(RunError, match="out cannot be written: Directory not empty"),
        replacing_folder(tmp_path / "out", over=False) as draft,
    ):
        (draft / "a").write_text("second")
    assert ((tmp_path / "out" / "a").read_text(), names(tmp_path)) == ("first", ["out", "out/a"])


def test_copy_names_the_file_that_is_missing(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "in" / "b"
    with pytest.raises(RunError) as caught:
        copy(source, target)
    assert str(caught.value) == f"{source} cannot be read: No such file or directory"
    assert names(tmp_path) == []
    source.write_bytes(os.urandom(3_000_000))
    copy(source, target)
    assert sha256(source) == sha256(target)
    assert names(tmp_path) == ["a", "in", "in/b"]


def test_move_makes_the_folder_and_replaces(tmp_path: Path) -> None:
    for text in ("one", "two"):
        (tmp_path / "a.new").write_text(text)
        move(tmp_path / "a.new", tmp_path / "in" / "a")
        assert (tmp_path / "in" / "a").read_text() == text
    with pytest.raises(FileNotFoundError):
        move(tmp_path / "a.new", tmp_path / "in" / "a")


# --- the same bytes as before ---------------------------------------------------------------------------------------


class Model(BaseModel):
    name: str
    values: tuple[float, ...]
    nothing: int | None = None


def test_json_is_what_it_always_was_and_a_checksum(tmp_path: Path) -> None:
    model = Model(name="é\udcff"[:1], values=(0.1, 1e-9, -0.0))
    for content, plain in (({"b": 1, "a": ["é", None]},) * 2, (model, model.model_dump(mode="json")), ({}, {})):
        write_json(tmp_path / "x.json", content)
        found = json.loads((tmp_path / "x.json").read_bytes())
        assert (tmp_path / "x.json").read_bytes() == (json.dumps(found, indent=2) + "\n").encode()
        assert list(found.pop("sha256")) == ["x.json"]
        assert found == plain == read_json(tmp_path / "x.json", "")


def test_what_is_no_json_is_not_written(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    for value, kind in ((object(), TypeError), (float("nan"), ValueError), (float("inf"), ValueError)):
        with pytest.raises(kind):
            write_json(tmp_path / "x.json", {"a": value})
    assert names(tmp_path) == ["x.json"]


def test_json_that_was_altered_is_refused_and_other_blanks_are_not(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    (tmp_path / "table.csv").write_bytes(b"a\n1\n2\n")
    write_json(path, {"a": 0.5, "b": [1, "é"]}, beside=["table.csv"])
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole)))
    assert read_json(path, "") == {"a": 0.5, "b": [1, "é"]}
    path.write_text(whole.replace("0.5", "0.6"))
    with pytest.raises(
        StoreError, match=r"x.json is damaged \(it has another checksum than when it was .*; do it again"
    ):
        read_json(path, "do it again", error=StoreError)
    path.write_text(whole)
    for content, words in ((b"a\n1\n", "has another checksum than when it was written"), (None, "is missing")):
        (tmp_path / "table.csv").unlink()
        if content:
            (tmp_path / "table.csv").write_bytes(content)
        with pytest.raises(RunError, match=f"table.csv {words}; do it again"):
            read_json(path, "do it again", "table.csv")
        assert read_json(path, "") == read_json(path, "", "another.csv") == {"a": 0.5, "b": [1, "é"]}
        (tmp_path / "table.csv").touch()


def test_json_of_an_older_version_is_read_without_a_checksum(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "x.json", "") == {"a": 1}


NO_JSON = {
    "": "Expecting value",
    "{": "Expecting property name",
    '{"a": NaN}': "NaN is no number",
    '{"a": -Infinity}': "-Infinity is no number",
    '{"a": 1e999}': "1e999 is no number",
    "\xff": "can't decode byte 0xff",
    "[" * 100_000: "nested too deeply",
    '{"a": ' * 100_000: "nested too deeply",
    '{"a": ' + "9" * 10_000 + "}": "limit .* for integer string conversion",
}


@pytest.mark.parametrize("text", NO_JSON, ids=lambda text: text[:20])
def test_what_is_no_json_is_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=NO_JSON[text]):
        parse_json(text.encode("latin-1"))
    with pytest.raises(RunError, match=r"x.json is damaged \(.*\); do it again"):
        read_json(tmp_path / "x.json", "do it again")


@pytest.mark.parametrize("text", ['{"sha256": 1}', '{"sha256": {}}', '{"sha256": {"y.json": "0"}}', "[]", "1", "null"])
def test_json_with_another_form_is_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(RunError, match=r"x.json is damaged \(.*\); do it again"):
        read_json(tmp_path / "x.json", "do it again")
    for missing in (tmp_path / "y.json", tmp_path):
        with pytest.raises(RunError, match=f"{missing} cannot be read: .*; do it again"):
            read_json(missing, "do it again")


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its remedy may be to remove it."""
    write_json(tmp_path / "x.json", {"a": 1})

    def refuse(path: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr("ptxdist.files.open_at_once", refuse)
    with pytest.raises(RunError, match=r"x.json cannot be read: Permission denied; give this user the permission"):
        read_json(tmp_path / "x.json", "remove it")


OUTSIDE = (
    "", "/etc/passwd", "//x", "..", "../x", "a/../../x", "a/..", ".", "./x", "a//b", "a/", "C:/x", "c:x", "a\\..\\x",
    "\\\\host\\x", "a\0b", "a\nb", "a\x1b[31mb", "\udcff", None, 7, ["a"],
)  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_names_that_lead_out_of_a_folder_are_refused(tmp_path: Path, name: Any) -> None:
    with pytest.raises(StoreError, match="is not the name of a file in"):
        below(tmp_path, name, error=StoreError)


def test_names_below_a_folder_stay_there_whatever_its_links(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "a").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (folder / "out").symlink_to(tmp_path / "other")
    (folder / "file").symlink_to(tmp_path / "other" / "file")
    (tmp_path / "link").symlink_to(folder)
    for name in ("x", "a/x", "a/new/x", "256.zarr/c/0", "é ö", "...", "a..b", ".hidden", "file"):
        for base in (folder, tmp_path / "link"):  # a write to `file` replaces the link
            assert below(base, name) == base / name
    for name in ("out/x", "out/new/x"):
        with pytest.raises(RunError, match=f"'{name}' leads out of .* through a link; remove that link"):
            below(folder, name)


@pytest.mark.parametrize("end", ["\r\n", "\n"])
def test_tables_are_what_they_always_were(tmp_path: Path, end: str) -> None:
    header = ("path", "reason")
    rows = [("a,b", 'say "x"'), ("", 1.5), (os.fsdecode(b"\xff\xe9.dcm"), "line\nbreak"), ("é", None)]
    write_table(tmp_path / "x.csv", header, iter(rows), lineterminator=end)
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=end).writerows([header, *rows])
    assert (tmp_path / "x.csv").read_bytes() == text.getvalue().encode("utf-8", "surrogateescape")
    with open(tmp_path / "x.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert list(csv.reader(file))[3][0] == rows[2][0]


FORMULAS = ("=1+1", "@x", "+1", "-2+3", "-x", "\t=1", "\r=1", "'=1", "''=1", "\uff1d1", "-1e5x", "-", "--1")
NO_FORMULAS = ("", "a", "1 2", "-1", "-0.5", "-1e-05", "1.2.3", "'", "'a", "it's", "a=1", " =1", "é")


def test_formulas_are_made_harmless_for_spreadsheets_and_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    rows = [(text, number) for number, text in enumerate((*FORMULAS, *NO_FORMULAS))]
    write_table(path, ("text", "number"), [*rows, ("end", -1)])
    assert read_table(path) == [{"text": text, "number": str(number)} for text, number in [*rows, ("end", -1)]]
    with open(path, newline="", encoding="utf-8") as file:
        shown = [row["text"] for row in csv.DictReader(file)]
    assert shown == [*(f"'{text}" for text in FORMULAS), *NO_FORMULAS, "end"]


def test_a_mask_may_have_more_characters_than_pythons_limit(tmp_path: Path) -> None:
    write_table(tmp_path / "x.csv", ("mask",), [("1 2 " * 50_000,)])
    assert read_table(tmp_path / "x.csv") == [{"mask": "1 2 " * 50_000}]


@pytest.mark.parametrize("text", ["a,b\n1\n", "a,b\n1,2,3\n", 'a,b\n1,"2\n', "a,b\n1,\xff\n"])
def test_a_table_that_is_damaged_is_no_table(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"."):
        read_table(tmp_path / "x.csv")


def test_text_keeps_its_line_ends(tmp_path: Path) -> None:
    write_whole(tmp_path / "x", "a\r\nb\n\ré")
    assert (tmp_path / "x").read_bytes() == "a\r\nb\n\ré".encode()


def test_sha256_of_bytes_and_of_a_file(tmp_path: Path) -> None:
    content = os.urandom(1_000_000)
    (tmp_path / "x").write_bytes(content)
    assert sha256(tmp_path / "x") == sha256(content) == hashlib.sha256(content).hexdigest()
    with pytest.raises(FileNotFoundError):
        sha256(tmp_path / "y")


# --- extras ---------------------------------------------------------------------------------------------------------


def test_a_missing_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    require_extra("s3", "an object store", "json", "csv")
    with pytest.raises(StorageError) as caught:
        require_extra("s3", "an object store", "json", "no_such_package", error=StorageError)
    assert str(caught.value) == (
        "an object store needs a package that is not installed (no_such_package): pip install 'ptxdist[s3]'"
    )
    monkeypatch.setitem(sys.modules, "sqlite3", None)  # as tests of callers take a package away
    with pytest.raises(SettingsError) as caught:
        require_extra("export", "ONNX", "sqlite3", "no_such_package", otherwise=".pt2 needs torch alone")
    assert str(caught.value) == (
        "ONNX needs packages that are not installed (sqlite3, no_such_package): pip install 'ptxdist[export]'; "
        ".pt2 needs torch alone"
    )
    monkeypatch.setitem(sys.modules, "made_up", types.ModuleType("made_up"))  # and put one there
    require_extra("x", "x", "made_up")


def test_the_module_is_light() -> None:
    call = "import sys; old = set(sys.modules); import ptxdist.files, ptxdist.locks; print(*sys.modules.keys() - old)"
    loaded = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True).stdout.split()
    assert {name.split(".")[0] for name in loaded} - sys.stdlib_module_names == {"ptxdist"}
    assert {name for name in loaded if name.startswith("ptxdist.")} == {
        "ptxdist.errors",
        "ptxdist.files",
        "ptxdist.locks",
        "ptxdist.report",  # a docstring, see ptxdist/__init__.py
        "ptxdist.train",
    }


# --- one copy -------------------------------------------------------------------------------------------------------


def renames(text: str) -> list[int]:
    """Lines that rename a file: os.replace, os.rename, and Path's methods, which have one argument (str's have two)."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_os = isinstance(node.func.value, ast.Name) and node.func.value.id == "os"
            count = len(node.args) + len(node.keywords)
            if node.func.attr in {"replace", "rename", "renames"} and (of_os or (count == 1 and node.args)):
                found.append(node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            found += [node.lineno for alias in node.names if alias.name in {"replace", "rename", "renames"}]
    return found


def test_a_rename_is_found() -> None:
    for text in ("os.replace(a, b)", "os.rename(a, b)", "(a / 'x').replace(b)", "a.rename(b)", "from os import rename"):
        assert renames(text) == [1]
    for text in ("'a'.replace('b', 'c')", "replace(case, fold=1)", "now.replace(tzinfo=UTC)"):
        assert renames(text) == []


def test_files_are_renamed_in_one_module() -> None:
    assert {path.name for path in PACKAGE.rglob("*.py") if renames(path.read_text())} == {"files.py"}


def test_missing_extras_are_reported_in_one_module() -> None:
    said = {path.name for path in PACKAGE.rglob("*.py") if "pip install 'ptxdist[" in path.read_text()}
    assert said == {"files.py"}
