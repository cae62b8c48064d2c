"""The catalog: files and tables are joined and reconciled, patients kept apart, bad input refused in a sentence."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ptxdist.data.catalog import FILE_NAME, Catalog, build_catalog, find_files, read_catalog, write_catalog
from ptxdist.errors import CatalogError, LabelError, StoreError

IMAGE = np.arange(64, dtype=np.uint8).reshape(8, 8)


def table(folder: Path, *rows: str) -> Path:
    path = folder / "labels.csv"
    path.write_text("\n".join(["ImageId,EncodedPixels", *rows]) + "\n")
    return path


@pytest.fixture(scope="session")
def small_catalog(small_dataset) -> Catalog:  # type: ignore[no-untyped-def]
    return build_catalog(small_dataset.dicom, small_dataset.labels, patients=small_dataset.patients, salt=b"s")


@pytest.fixture(scope="session")
def real_catalog(real_data: Path) -> Catalog:
    siim = real_data / "siim-real"
    return build_catalog(siim / "dicom-images", siim / "train-rle.csv.gz", patients=siim / "nih_id.csv", salt=b"s")


def test_files_and_table_are_reconciled(small_catalog: Catalog) -> None:
    counts = small_catalog.reconciliation
    assert (counts.table_rows, counts.table_images, counts.table_positive) == (27, 25, 9)
    assert (counts.table_several_masks, counts.table_overlapping) == (2, 1)
    assert (counts.files, counts.other_files, counts.duplicates) == (24, 0, 0)
    assert (counts.labelled, counts.positive, counts.unlabelled, counts.ids_without_file) == (23, 8, 1, 2)
    assert small_catalog.missing == ("1.2.826.0.1.9001", "1.2.826.0.1.9002")
    assert small_catalog.rejects == ()


def test_cases_know_their_mask_and_size(small_catalog: Catalog, small_dataset) -> None:  # type: ignore[no-untyped-def]
    assert [case.case_id for case in small_catalog.cases] == sorted(small_dataset.images)
    for case in small_catalog.cases:
        assert (case.rows, case.columns) == small_dataset.images[case.case_id].shape
        assert case.area_px == small_dataset.masks[case.case_id].sum()
        assert (small_dataset.dicom / case.path).name == f"{case.case_id}.dcm"


def test_file_without_a_row_is_unlabelled_and_in_no_fold(small_catalog: Catalog) -> None:
    [unlabelled] = [case for case in small_catalog.cases if case.masks is None]
    assert (unlabelled.split, unlabelled.fold) == ("unlabelled", -1)
    assert unlabelled not in small_catalog.labelled
    assert {case.split for case in small_catalog.labelled} == {"train", "val"}


def test_patients_stay_on_one_side_and_nothing_names_them(small_catalog: Catalog) -> None:
    sides: dict[str, set[str]] = {}
    for case in small_catalog.labelled:
        sides.setdefault(case.group, set()).add(case.split)
    assert len(sides) == 12
    assert all(len(side) == 1 for side in sides.values())
    assert small_catalog.leakage.grouped_by == "patient map"
    assert small_catalog.leakage.shared_cases == 0


def test_split_is_the_same_whatever_the_folder_names_and_the_salt(
    small_catalog: Catalog, small_dataset, tmp_path
) -> None:  # type: ignore[no-untyped-def]
    for number, path in enumerate(sorted(small_dataset.dicom.rglob("*.dcm"), reverse=True)):
        shutil.copy(path, tmp_path / f"{number:02}")
    moved = build_catalog(tmp_path, small_dataset.labels, patients=small_dataset.patients, salt=b"other")
    assert [replace(case, path="", group="") for case in moved.cases] == [
        replace(case, path="", group="") for case in small_catalog.cases
    ]
    assert all(a.group != b.group for a, b in zip(moved.cases, small_catalog.cases, strict=True))


def test_patient_id_groups_nothing_when_it_is_one_per_image(small_dataset) -> None:  # type: ignore[no-untyped-def]
    assert build_catalog(small_dataset.dicom, small_dataset.labels).leakage.grouped_by == "nothing"


def test_patient_id_groups_when_images_share_it(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    for number in range(6):
        write_dicom(tmp_path / f"{number}.dcm", IMAGE, f"1.{number}", PatientID=f"person {number // 2}")
    catalog = build_catalog(tmp_path, table(tmp_path, *(f"1.{number},-1" for number in range(6))))
    assert (catalog.leakage.grouped_by, catalog.leakage.groups) == ("PatientID", 3)


def test_image_that_the_map_lacks_is_a_group_of_its_own(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    for number in range(4):
        write_dicom(tmp_path / f"{number}.dcm", IMAGE, f"1.{number}", PatientID="the same for all")
    patients = tmp_path / "patients.csv"
    patients.write_text("id,patient\n1.0,P\n1.1,P\n")
    catalog = build_catalog(tmp_path, table(tmp_path, *(f"1.{n},-1" for n in range(4))), patients=patients)
    assert catalog.leakage.groups == 3


def test_copies_are_counted_and_other_content_of_the_same_id_is_rejected(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    first = write_dicom(tmp_path / "a.dcm", IMAGE, "1.1")
    shutil.copy(first, tmp_path / "b.dcm")
    write_dicom(tmp_path / "c.dcm", IMAGE[::-1], "1.1")
    catalog = build_catalog(tmp_path, table(tmp_path, "1.1,-1"))
    assert catalog.reconciliation.duplicates == 1
    assert [(reject.path, reject.reason) for reject in catalog.rejects] == [
        ("c.dcm", "has the SOPInstanceUID of a.dcm, with another content")
    ]


def test_table_id_without_a_file_may_have_an_image_of_another_size(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    write_dicom(tmp_path / "a.dcm", IMAGE, "1.1")
    catalog = build_catalog(tmp_path, table(tmp_path, "1.1,-1", "1.2,5000 10", "1.2,5005 10"))
    assert catalog.missing == ("1.2",)
    assert catalog.reconciliation.table_overlapping == 1


def test_candidates_are_found_by_suffix_and_the_rest_is_counted(tmp_path: Path) -> None:
    for name in ("a.dcm", "b.DCM", "sub/c.dicom", "sub/1.2.840.99", "sub/noext", "x.png", ".hidden", "sub/t.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    found, others = find_files(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "a.dcm",
        "b.DCM",
        "sub/1.2.840.99",
        "sub/c.dicom",
        "sub/noext",
    ]
    assert others == 3


def test_folder_that_may_not_be_read_is_no_silent_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)  # (root may read every folder, so the mode bits would not show it)
    with pytest.raises(CatalogError, match=f"{tmp_path}: this folder cannot be read: Permission denied"):
        find_files(tmp_path)


# --- bad input ----------------------------------------------------------------------------------------------------


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    labels = table(tmp_path, "1.1,-1")
    with pytest.raises(CatalogError, match="nowhere: no such folder; give the folder") as caught:
        build_catalog(tmp_path / "nowhere", labels)
    assert caught.value.exit_code == 6
    (tmp_path / "png").mkdir()
    (tmp_path / "png" / "a.png").touch()
    with pytest.raises(CatalogError, match=r"png: no DICOM files \(\*.dcm\) in it or below it \(1 other files\)"):
        build_catalog(tmp_path / "png", labels)


def test_folder_of_files_that_are_all_unusable_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_text("nothing")
    with pytest.raises(CatalogError, match=r"none of 1 files is usable; the first one is not a DICOM file"):
        build_catalog(tmp_path, table(tmp_path, "1.1,-1"))


def test_table_of_another_data_set_is_refused(small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(CatalogError, match=r"none of the 24 images in .* has a row in .*labels.csv"):
        build_catalog(small_dataset.dicom, table(tmp_path, "1.1,-1"))


def test_mask_past_its_image_is_refused_with_file_line_and_id(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    write_dicom(tmp_path / "a.dcm", IMAGE, "1.1")
    labels = table(tmp_path, "1.2,-1", "1.1,0 64", "1.1,60 5")
    with pytest.raises(LabelError) as caught:
        build_catalog(tmp_path, labels)
    assert str(caught.value) == (
        f"{labels}, line 4: the mask of 1.1 does not fit its image: a run ends at px 65, past the 8x8 image (64 px)"
    )
    assert caught.value.exit_code == 4


def test_patient_map_without_any_known_id_is_refused_with_its_path(small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    patients = tmp_path / "patients.csv"
    patients.write_text("patient,id\nJones,1.2.3\n")
    with pytest.raises(
        LabelError, match=r"patients.csv: none of the 24 images in it; its first column must be"
    ) as caught:
        build_catalog(small_dataset.dicom, small_dataset.labels, patients=patients)
    assert caught.value.exit_code == 4


# --- the file -----------------------------------------------------------------------------------------------------


def test_catalog_survives_write_and_read(small_catalog: Catalog, tmp_path: Path) -> None:
    write_catalog(small_catalog, tmp_path / FILE_NAME)
    assert read_catalog(tmp_path) == small_catalog
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    summary = json.loads(json.dumps(small_catalog.summary()))
    assert summary["split"]["train"]["cases"] + summary["split"]["val"]["cases"] == 23


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda lines: lines[:-1], "is damaged (23 cases instead of 24)"),
        (lambda lines: [*lines[:-1], lines[-1][:20]], "is damaged"),
        (
            lambda lines: [lines[0].replace('"schema": 1', '"schema": 9'), *lines[1:]],
            "has schema 9, this ptxdist reads 1",
        ),
        (lambda lines: ["[]"], "is damaged"),
        (lambda lines: [""], "is damaged"),
    ],
)
def test_damaged_or_newer_catalog_is_refused(small_catalog: Catalog, tmp_path: Path, damage, expected: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / FILE_NAME
    write_catalog(small_catalog, path)
    path.write_text("\n".join(damage(path.read_text().splitlines())))
    with pytest.raises(StoreError) as caught:
        read_catalog(tmp_path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)
    assert caught.value.exit_code == 7


def test_folder_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is not a ptxdist cache .* make one with `ptxdist preprocess`"):
        read_catalog(tmp_path)


# --- the real data (numbers of data-facts) ---------------------------------------------------------------------------


def test_real_table_and_files_have_the_known_numbers(real_catalog: Catalog) -> None:
    counts = real_catalog.reconciliation
    assert (counts.table_rows, counts.table_images, counts.table_positive) == (12_954, 12_047, 2_669)
    assert (counts.table_several_masks, counts.table_overlapping) == (624, 183)
    assert (counts.files, counts.labelled, counts.positive, counts.unlabelled) == (853, 848, 191, 5)
    assert counts.ids_without_file == len(real_catalog.missing) == 11_199
    assert real_catalog.rejects == ()
    assert {(case.rows, case.columns) for case in real_catalog.cases} == {(1024, 1024)}


def test_real_patients_share_nothing_in_the_grouped_split(real_catalog: Catalog) -> None:
    leakage = real_catalog.leakage
    assert (leakage.groups, leakage.positive_groups) == (695, 130)
    assert (leakage.shared_cases, leakage.shared_positive) == (0, 0)
    assert leakage.random_shared > 0.2
    assert leakage.random_shared_positive > leakage.random_shared
    assert abs(leakage.val_cases - 84.8) < 5
    assert abs(leakage.val_positive - 19.1) < 4


def test_real_patient_id_groups_nothing(real_catalog: Catalog, real_data: Path, tmp_path: Path) -> None:
    for case in real_catalog.labelled[:40]:
        (tmp_path / f"{case.case_id}.dcm").symlink_to(real_data / "siim-real" / "dicom-images" / case.path)
    catalog = build_catalog(tmp_path, real_data / "siim-real" / "train-rle.csv.gz")
    assert (catalog.leakage.grouped_by, catalog.leakage.groups) == ("nothing", 40)
