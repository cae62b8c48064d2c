"""The scan: which files are candidates, and what is kept of each."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from ptxdist.cache.scan import ScannedFile, choose_images, digest_of, find_files, scan
from ptxdist.errors import CatalogError
from ptxdist.executor import processes

IMAGE = np.arange(64, dtype=np.uint8).reshape(8, 8)


def relative(root: Path, skip: tuple[Path, ...] = ()) -> tuple[list[str], int]:
    return find_files(root, skip)


# --- candidates -----------------------------------------------------------------------------------------------------


def test_candidates_are_found_by_name_and_content_and_the_rest_is_counted(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    dicom = write_dicom(tmp_path / "sub" / "noext", IMAGE, "1.1").read_bytes()
    named = ("a.dcm", "b.DCM", "sub/c.dicom", "sub/1.2.840.99", "d.ima")  # their content is not looked at
    for name in (*named, "x.png", ".hidden", "sub/t.csv", "LICENSE", "LOCKFILE", "libz.so.1"):
        (tmp_path / name).write_bytes(b"" if name in (*named, "LOCKFILE") else b"CC BY 4.0" * 99)
    (tmp_path / "sub" / "im.0001").write_bytes(dicom)
    (tmp_path / "sub" / "im.dc3").write_bytes(dicom)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")  # cannot be looked at, so it is reported
    (tmp_path / "sub" / "itself.dcm").symlink_to(tmp_path / "sub" / "itself.dcm")
    found, others = relative(tmp_path)
    assert found == sorted([*named, "gone", "sub/im.0001", "sub/im.dc3", "sub/itself.dcm", "sub/noext"])
    assert others == 8, "a picture, a hidden file, a table, texts, a library, a pipe, and a link to a folder"


def test_png_images_are_candidates_only_where_there_is_no_dicom_image(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    for name in ("b.png", "a.PNG", "LICENSE", "table.csv"):
        (tmp_path / name).touch()
    Image.fromarray(IMAGE).save(tmp_path / "c", "PNG")
    assert relative(tmp_path) == (["a.PNG", "b.png", "c"], 2)
    (tmp_path / "empty.dcm").touch()
    assert relative(tmp_path) == (["a.PNG", "b.png", "c", "empty.dcm"], 2)
    write_object(tmp_path / "report.dcm", "1.2.840.10008.5.1.4.1.1.88.11")
    assert relative(tmp_path) == (["a.PNG", "b.png", "c", "empty.dcm", "report.dcm"], 2)
    write_dicom(tmp_path / "image", IMAGE, "1.1")
    assert relative(tmp_path) == (["empty.dcm", "image", "report.dcm"], 5)


def test_nothing_hidden_counts_and_no_object_that_only_looks_like_an_image(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    for name in (".Trash-1000/b.dcm", "sub/.ipynb_checkpoints/c.dcm", ".hidden.dcm"):
        write_dicom(tmp_path / name, IMAGE, "1.2")
    assert choose_images(["./a.dcm", "../b.dcm", "./.c.dcm"], lambda path: b"") == (["../b.dcm", "./a.dcm"], 1)
    file = dcmread(write_dicom(tmp_path / "a.dcm", IMAGE, "1.1"))
    file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.66.7"  # a label map
    file.save_as(tmp_path / "mask.dcm")
    found, others = scan(tmp_path)
    assert ([file.path for file in found], others) == (["a.dcm"], 4)


def test_a_cd_is_read_without_its_directory_its_reports_and_its_other_files(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    for number in range(3):
        write_dicom(tmp_path / "DICOM" / f"IM{number}", IMAGE, f"1.{number}")
    for name in ("VERSION", "LOCKFILE", "autorun.inf"):
        (tmp_path / name).write_text("1.0\n" * (name != "LOCKFILE"))
    write_object(tmp_path / "DICOMDIR", "1.2.840.10008.1.3.10")
    write_object(tmp_path / "DICOM" / "SR0", "1.2.840.10008.5.1.4.1.1.88.67")
    write_object(tmp_path / "DICOM" / "state.dcm", "1.2.840.10008.5.1.4.1.1.11.1")
    write_object(tmp_path / "DICOM" / "broken.dcm", "1.2.840.10008.5.1.4.1.1.1")
    found, others = scan(tmp_path)
    assert others == 6
    assert [file.path for file in found if not file.reason] == [f"DICOM/IM{number}" for number in range(3)]
    assert [file.reason for file in found if file.reason] == ["contains no image (Rows or Columns is missing)"]
    (tmp_path / "reports").mkdir()
    write_object(tmp_path / "reports" / "one.dcm", "1.2.840.10008.5.1.4.1.1.88.11")
    with pytest.raises(CatalogError, match=r"no DICOM files .* \(1 other files: "):
        scan(tmp_path / "reports")


def write_object(path: Path, sop_class: str) -> None:
    """A DICOM file without an image."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, "1.2.3"
    file = Dataset()
    file.file_meta, file.PatientName = meta, "Quagmire^Zebulon"
    file.save_as(path, implicit_vr=False, little_endian=True, enforce_file_format=True)


def test_skipped_folders_are_passed_over_whatever_way_they_are_named(tmp_path: Path) -> None:
    """A cache below the images may have files without a suffix that look like DICOM."""
    for name in ("a.dcm", "cache/1.2.840.1/0", "cache/1.2.840.1/1.2.840.2"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(128) + b"DICM")
    assert relative(tmp_path) == (["a.dcm", "cache/1.2.840.1/0", "cache/1.2.840.1/1.2.840.2"], 0)
    assert relative(tmp_path, (tmp_path / "a" / ".." / "cache",)) == (["a.dcm"], 0)
    assert relative(tmp_path, (tmp_path / "elsewhere",))[0][0] == "a.dcm"


def test_folder_that_may_not_be_read_is_no_silent_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)  # (root may read every folder, so the mode bits would not show it)
    with pytest.raises(CatalogError, match=f"{tmp_path}: this folder cannot be read: Permission denied"):
        find_files(tmp_path)


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="nowhere: no such folder; give the folder") as caught:
        scan(tmp_path / "nowhere")
    assert caught.value.exit_code == 6
    (tmp_path / "table.csv").touch()
    with pytest.raises(CatalogError, match=r"no DICOM files \(\*.dcm\) and no PNG images in it .* \(1 other files: "):
        scan(tmp_path)


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_a_file_is_known_by_a_hash_of_its_bytes(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    path = write_dicom(tmp_path / "Jones" / "a.dcm", IMAGE, "1.1")
    [found], others = scan(tmp_path, salt=b"s")
    assert (found.path, found.reason, others) == ("Jones/a.dcm", "", 0)
    assert found.digest == digest_of(path.read_bytes()) == hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    assert found.header is not None
    assert (found.header.case_id, found.header.rows) == ("1.1", 8)
    assert scan(tmp_path, salt=b"t")[0][0].header.patient != found.header.patient  # type: ignore[union-attr]


def test_unusable_files_have_a_reason_each_and_stop_nothing(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    write_dicom(tmp_path / "good.dcm", IMAGE, "1.1")
    (tmp_path / "empty.dcm").touch()
    (tmp_path / "text.dcm").write_text("nothing of the kind")
    (tmp_path / "gone.dcm").symlink_to(tmp_path / "nowhere")
    (tmp_path / "itself.dcm").symlink_to(tmp_path / "itself.dcm")
    found = {file.path: file for file in scan(tmp_path)[0]}
    assert {name for name, file in found.items() if not file.reason} == {"good.dcm"}
    assert all(file.header is None for file in found.values() if file.reason)
    assert found["empty.dcm"].reason == "is empty (0 bytes)"
    assert found["gone.dcm"].reason == "cannot be read: No such file or directory"
    assert "cannot be read" in found["itself.dcm"].reason
    assert "DICOM" in found["text.dcm"].reason
    assert (found["text.dcm"].digest != "", found["empty.dcm"].digest) == (True, "")


def test_file_name_that_is_no_utf8_is_read_as_any_other(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    name = os.fsdecode(b"J\xf6rg.dcm")
    shutil.move(write_dicom(tmp_path / "a.dcm", IMAGE, "1.1"), tmp_path / name)
    write_dicom(tmp_path / "b.dcm", IMAGE, "1.2")
    expected = scan(tmp_path, salt=b"s")[0]
    assert [file.path for file in expected] == [name, "b.dcm"]
    assert all(file.header for file in expected)


def test_png_whose_name_is_no_utf8_is_rejected(tmp_path: Path) -> None:
    for name in (b"J\xf6rg.png", b"other.png"):
        Image.fromarray(IMAGE).save(tmp_path / os.fsdecode(name))
    found = {file.path: file.reason for file in scan(tmp_path)[0]}
    assert found.pop("other.png") == ""
    assert [reason[:43] for reason in found.values()] == ["is a PNG whose name cannot be an image id: "]


def test_spread_over_processes_the_scan_is_the_same(many_dataset) -> None:  # type: ignore[no-untyped-def]
    heard: list[tuple[int, int]] = []
    alone, others = scan(many_dataset.dicom, salt=b"s")
    with processes(2) as executor:
        together = scan(many_dataset.dicom, salt=b"s", executor=executor, on_file=lambda *step: heard.append(step))
    assert together == (alone, others)
    assert [file.path for file in alone] == sorted(path.name for path in many_dataset.dicom.iterdir())
    assert all(isinstance(file, ScannedFile) and file.header for file in alone)
    assert heard[-1] == (300, 300)
    assert sorted(heard) == heard
