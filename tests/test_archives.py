"""Zip files of others: none takes more memory than its members say."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from ptxdist import archives
from ptxdist.archives import Archive, ArchiveError
from ptxdist.errors import CatalogError, LabelError
from ptxdist.labels.tables import read_labels
from ptxdist.predict.inputs import find_inputs, read_headers


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_unpacks_more_than_its_member_says_is_refused(tmp_path: Path, method: int) -> None:
    """4 kB of bzip2 became gigabytes, of a member that says 1,000 bytes."""
    for name in ("images.zip", "labels.csv.zip"):
        with zipfile.ZipFile(tmp_path / name, "w", method) as archive:
            archive.writestr("a.dcm" if name == "images.zip" else "a.csv", bytes(2**20))
    [found] = read_headers(find_inputs([tmp_path / "images.zip"]))
    assert found.reason == "is compressed in its zip file by a method that is not supported; unpack it first"
    with pytest.raises(LabelError, match="its table cannot be unpacked; unpack it with another tool"):
        read_labels(tmp_path / "labels.csv.zip")


def test_a_list_of_members_that_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("images.zip", "labels.csv.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for number in range(100):
                archive.writestr(f"{number:03}.csv", b"")
    with Archive(tmp_path / "images.zip") as archive:
        assert len(archive.namelist()) == 100
    monkeypatch.setattr(archives, "MAX_LIST", 5000)
    monkeypatch.setattr(archives._Start, "most", 5000)
    reason = "has a list of its members of 5,300 bytes; at most 5,000 are accepted"
    with pytest.raises(CatalogError, match=f"images.zip: this zip file {reason}"):
        find_inputs([tmp_path / "images.zip"])
    with pytest.raises(LabelError, match=f"labels.csv.zip {reason}"):
        read_labels(tmp_path / "labels.csv.zip")


def test_members_that_share_bytes_are_refused(tmp_path: Path) -> None:
    """Each of them would be unpacked: a zip file of 10 MB has petabytes."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.dcm", bytes(1000))
        archive.filelist *= 3
    with pytest.raises(ArchiveError, match="has members that share bytes"):
        Archive(path)


def test_a_file_that_cannot_be_opened_is_one_error(tmp_path: Path) -> None:
    """The destructor raised another one, which Python printed with its traceback."""
    with pytest.raises(FileNotFoundError):
        Archive(tmp_path / "a.zip")
