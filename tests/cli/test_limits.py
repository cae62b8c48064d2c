"""A limit of the machine that a command reaches midway ends it with a sentence; no image is rejected for it."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from ptxdist.cache import scan
from ptxdist.cache.verify import verify
from ptxdist.cli import cli
from ptxdist.dicom.guard import PassingError, guarded
from ptxdist.errors import CatalogError, CheckpointError, DicomError, StoreError
from ptxdist.predict.inputs import find_inputs
from ptxdist.train import checkpoint, encoders

SENTENCE = "Too many open files; raise the limit of open files (`ulimit -n`)"


@contextmanager
def no_more_files(but: int = 0) -> Iterator[None]:
    """This process can open nothing in the block, or only so many files at once."""
    number = os.open("/dev/null", os.O_RDONLY)
    os.close(number)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number + but, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def limited(words: list[object], is_time: Callable[[], bool]) -> subprocess.CompletedProcess[str]:
    """Run a command; from some time on neither it nor its processes can open any more files."""
    command = [sys.executable, "-m", "ptxdist", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not is_time():
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        me = psutil.Process(process.pid)
        for each in (me, *me.children(recursive=True)):
            resource.prlimit(each.pid, resource.RLIMIT_NOFILE, (6, 4096))  # each has as many; poll() needs some
        out, error = process.communicate(timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, out, error)


def unlimited(words: list[object]) -> None:
    """Run a command to its end, in this process."""
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exit_code == 0, done.output


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_predict_that_runs_out_of_files_rejects_none(
    finished_run: Path,
    many_dataset,  # type: ignore[no-untyped-def]
    tmp_path: Path,
) -> None:
    images, undisturbed = tmp_path / "images", tmp_path / "undisturbed"
    images.mkdir()
    for path in sorted(many_dataset.dicom.iterdir())[:16]:
        (images / path.name).symlink_to(path)
    words = ["predict", finished_run, images, "--device", "cpu", "--write", "masks", "--out"]
    unlimited([*words, undisturbed, "--workers", 1])
    out = tmp_path / "out"
    done = limited([*words, out, "--workers", 2], lambda: any((out / "findings").glob("*.json")))
    assert done.returncode in (1, 8), done.stderr
    assert SENTENCE in done.stderr
    assert "Traceback" not in done.stderr
    assert not (out / "rejects.csv").exists()
    unlimited([*words, out, "--workers", 1])
    assert digests(out) == digests(undisturbed)


def test_preprocess_that_runs_out_of_files_rejects_none(many_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data, out, key = many_dataset, tmp_path / "out", tmp_path / "key"
    key.write_text("a secret of a site, which is long enough for all of them")
    words = ["preprocess", "--dicom", data.dicom, "--labels", data.labels, "--patient-key", key, "--size", 256]
    words += ["--workers", 1, "--out"]
    done = limited([*words, out], lambda: (out / ".lock").exists())
    assert done.returncode in (1, 7), done.stderr  # 1: a library could not be loaded
    assert SENTENCE in done.stderr
    assert "Traceback" not in done.stderr
    unlimited([*words, out])
    unlimited([*words, tmp_path / "undisturbed"])
    assert digests(out) == digests(tmp_path / "undisturbed")


def test_no_file_is_rejected_skipped_or_called_damaged(small_cache, many_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder, names = many_dataset.dicom, [path.name for path in sorted(many_dataset.dicom.iterdir())[:2]]
    (tmp_path / "no-suffix").write_bytes((folder / names[0]).read_bytes())
    inputs = find_inputs([folder])
    for call in (
        lambda: scan._scan_files(names, folder, b""),
        lambda: verify(small_cache[0]),
        lambda: inputs[0].start(),
        lambda: scan.choose_images(["no-suffix"], lambda name: scan.read_start(tmp_path / name, 200)),
    ):
        with pytest.raises((OSError, StoreError), match="Too many open files"), no_more_files():
            call()
    with pytest.raises(CatalogError, match="ulimit -n"), no_more_files():
        find_inputs([folder])


def test_weights_are_not_called_missing_or_damaged(finished_run: Path, tmp_path: Path) -> None:
    """safetensors opens the file twice, and says that there is none; torch says it in its own words."""
    weights = next(finished_run.glob("stages/2-*/best.safetensors"))
    for read in (checkpoint.read_weights, encoders.read_weights):
        for but in (0, 1):
            with pytest.raises(OSError, match="Too many open files"), no_more_files(but):
                read(weights)
        assert read(weights)
    with pytest.raises(CheckpointError, match=r"none\.safetensors is missing or damaged"):
        checkpoint.read_weights(tmp_path / "none.safetensors")


def test_a_limit_is_found_behind_what_a_decoder_made_of_it() -> None:
    def decode(error: Exception) -> None:
        try:
            raise error
        except Exception as cause:
            raise DicomError("has pixel data that cannot be decoded") from cause

    library = ImportError("libjpeg.so: cannot open shared object file: Too many open files")
    for error in (OSError(24, "Too many open files", "/Quagmire/1.dcm"), library):
        with pytest.raises(OSError, match="Too many open files") as caught, guarded():
            decode(error)
        assert "Quagmire" not in str(caught.value)
    with pytest.raises(PassingError, match="needs more memory"), guarded():
        decode(MemoryError())
    with pytest.raises(DicomError, match="cannot be decoded"), guarded():
        decode(OSError(5, "Input/output error"))
