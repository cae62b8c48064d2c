"""No identifier of a patient is in a cache or in what commands print, but for the path of a reject."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from cache_files import rejects_of
from click.testing import CliRunner

from ptxdist.cli import cli

SECRETS = ("Quagmire", "Zebulon", "QX7-HOSPITAL", "19391207", "MAPPED-PERSON")  # of conftest


def secrets_in(content: bytes) -> list[str]:
    return [secret for secret in SECRETS if secret.encode() in content]


def assert_files_keep_secrets(cache: Path, but: str = "") -> None:
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert len(files) > 25
    for path in files:
        assert not secrets_in(str(path.relative_to(cache)).encode()), path
        if path.name != but:
            assert not secrets_in(path.read_bytes()), path


def test_no_identifier_of_a_patient_is_in_the_cache(small_cache, small_dataset) -> None:  # type: ignore[no-untyped-def]
    files = [*small_dataset.dicom.rglob("*.dcm"), small_dataset.patients]
    source = b"".join(path.read_bytes() + str(path.relative_to(small_dataset.dicom.parent)).encode() for path in files)
    assert secrets_in(source) == list(SECRETS)
    assert all("Quagmire_Zebulon" in path for path in small_cache[1].paths.values())
    assert_files_keep_secrets(small_cache[0])
    assert (small_cache[0] / "salt").stat().st_mode & 0o077 == 0


def test_commands_show_no_identifier_but_the_path_of_a_reject(small_dataset, tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    """Folders are named after patients; a person must be able to find the files that could not be used."""
    dicom, cache = Path(shutil.copytree(small_dataset.dicom, tmp_path / "dicom")), tmp_path / "cache"
    files = sorted(dicom.rglob("*.dcm"))
    files[1].write_bytes(files[1].read_bytes()[:-600])
    write_dicom(files[2].with_name("other.dcm"), np.zeros((32, 32), np.uint8), files[2].stem)  # the id of another file
    rejected = {files[1].relative_to(dicom).as_posix(), files[2].with_name("other.dcm").relative_to(dicom).as_posix()}

    def call(*arguments: object) -> str:
        done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        assert done.exit_code == 0, (done.output, done.exception)
        return done.stdout + done.stderr

    inputs = ["--dicom", dicom, "--labels", small_dataset.labels, "--patients", small_dataset.patients]
    build = ["preprocess", *inputs, "--out", cache, "--size", 64, "--workers", 2]
    said = [call(*build, *json) for json in ([], ["--json"])]
    assert set(rejects_of(cache)) == rejected
    assert all(any(path in text for path in rejected) for text in said)
    for text in said:
        for path in rejected:
            text = text.replace(path, "")
        assert not secrets_in(text.encode()), text
    for json in ([], ["--json"]):
        for command in (["inspect", cache], ["verify", cache], ["verify", cache, "--source", dicom, "--workers", 1]):
            assert not secrets_in(call(*command, *json).encode())
    assert_files_keep_secrets(cache, but="rejects.csv")

    shard = cache / "64.zarr" / "image" / "c" / "0" / "0" / "0"
    shard.write_bytes(bytes(4096) + shard.read_bytes()[4096:])
    files[0].unlink()
    for options in ([], ["--json"], ["--source", dicom, "--repair"]):
        done = CliRunner().invoke(cli, ["verify", str(cache), *map(str, options)])
        assert done.exit_code == 7
        assert not secrets_in((done.stdout + done.stderr).encode())
