"""The catalog: files and tables are joined and reconciled, patients kept apart, bad input refused in a sentence."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from ptxdist.cache.build import build_catalog
from ptxdist.cache.catalog import FILE_NAME, REMOVED, Catalog, hold_out, read_catalog, write_catalog
from ptxdist.cache.scan import digest_of
from ptxdist.cache.summary import split_doubts
from ptxdist.errors import CatalogError, LabelError, SettingsError, StoreError

IMAGE = np.arange(64, dtype=np.uint8).reshape(8, 8)


def built(*arguments: Any, **options: Any) -> Catalog:
    return build_catalog(*arguments, **options)[0]


def paths_of(*arguments: Any, **options: Any) -> dict[str, str]:
    return build_catalog(*arguments, **options)[1]


def table(folder: Path, *rows: str) -> Path:
    path = folder / "labels.csv"
    path.write_text("\n".join(["ImageId,EncodedPixels", *rows]) + "\n")
    return path


@pytest.fixture(scope="session")
def small_catalog(small_dataset) -> Catalog:  # type: ignore[no-untyped-def]
    return built(small_dataset.dicom, small_dataset.labels, patients=small_dataset.patients, salt=b"s")


@pytest.fixture(scope="session")
def real_catalog(real_data: Path) -> Catalog:
    siim = real_data / "siim-real"
    return built(siim / "dicom-images", siim / "train-rle.csv.gz", patients=siim / "nih_id.csv", salt=b"s")


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
    paths = paths_of(small_dataset.dicom, small_dataset.labels)
    for case in small_catalog.cases:
        assert (case.rows, case.columns) == small_dataset.images[case.case_id].shape
        assert case.area_px == small_dataset.masks[case.case_id].sum()
        path = small_dataset.dicom / paths[case.case_id]
        assert path.name == f"{case.case_id}.dcm"
        assert case.digest == digest_of(path.read_bytes())
        assert case.decoder


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


def test_split_is_the_same_whatever_the_folder_names_and_the_salt(small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    small_catalog = built(small_dataset.dicom, small_dataset.labels, patients=small_dataset.patients, salt=b"s")
    for number, path in enumerate(sorted(small_dataset.dicom.rglob("*.dcm"), reverse=True)):
        shutil.copy(path, tmp_path / f"{number:02}")
    moved = built(tmp_path, small_dataset.labels, patients=small_dataset.patients, salt=b"other")
    salted: dict[str, Any] = {"group": ""}
    assert [replace(case, **salted) for case in moved.cases] == [
        replace(case, **salted) for case in small_catalog.cases
    ]
    assert all(a.group != b.group for a, b in zip(moved.cases, small_catalog.cases, strict=True))


def test_patient_id_groups_nothing_when_it_is_one_per_image(small_dataset) -> None:  # type: ignore[no-untyped-def]
    assert built(small_dataset.dicom, small_dataset.labels).leakage.grouped_by == "nothing"


def test_patient_id_groups_when_images_share_it(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    for number in range(6):
        write_dicom(tmp_path / f"{number}.dcm", IMAGE, f"1.{number}", PatientID=f"person {number // 2}")
    catalog = built(tmp_path, table(tmp_path, *(f"1.{number},-1" for number in range(6))))
    assert (catalog.leakage.grouped_by, catalog.leakage.groups) == ("PatientID", 3)


def test_image_that_the_map_lacks_is_a_group_of_its_own(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    for number in range(4):
        write_dicom(tmp_path / f"{number}.dcm", IMAGE, f"1.{number}", PatientID="the same for all")
    patients = tmp_path / "patients.csv"
    patients.write_text("id,patient\n1.0,P\n1.1,P\n")
    catalog = built(tmp_path, table(tmp_path, *(f"1.{n},-1" for n in range(4))), patients=patients)
    assert catalog.leakage.groups == 3
    assert catalog.reconciliation.without_patient == 2
    assert split_doubts(catalog) == ("2 of 4 images have no patient by patient map; each counts as one of its own",)


def people(folder: Path, write_dicom: Any, *ids: str) -> tuple[Path, Path]:
    """Images with these PatientIDs, and a table in which every third one is positive."""
    for number, name in enumerate(ids):
        write_dicom(folder / "dicom" / f"{number}.dcm", IMAGE, f"1.{number}", PatientID=name)
    return folder / "dicom", table(folder, *(f"1.{n},{'-1' if n % 3 else '9 2 6 2'}" for n in range(len(ids))))


def test_images_that_are_all_of_one_patient_by_a_map_cannot_be_split(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    dicom, labels = people(tmp_path, write_dicom, *["QX7"] * 12)
    patients = tmp_path / "map.csv"
    patients.write_text("id,patient\n" + "".join(f"1.{number},QX7\n" for number in range(12)))
    with pytest.raises(CatalogError, match=r"^all 12 images .* one patient by patient map, .* for training") as caught:
        built(dicom, labels, patients=patients)
    assert "QX7" not in str(caught.value)


def test_a_patient_id_that_all_images_share_is_a_placeholder(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    catalog = built(*people(tmp_path, write_dicom, *["ANONYMOUS"] * 12))
    assert catalog.leakage.grouped_by == "nothing"
    assert {case.split for case in catalog.cases} == {"train", "val"}
    assert len({case.group for case in catalog.cases}) == 12


def test_the_only_image_cannot_be_split(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(
        CatalogError, match="the only image with a label would be on one side of the split, as of one pa"
    ):
        built(*people(tmp_path, write_dicom, "P"))


def test_a_few_images_are_on_both_sides(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    catalog = built(*people(tmp_path, write_dicom, "P", "Q"))
    assert sorted(case.split for case in catalog.cases) == ["train", "val"]
    assert split_doubts(catalog) == ("no image for training has a pneumothorax",)


def test_masks_without_any_negative_image_are_doubted_and_unlisted_images_can_be_negative(
    tmp_path: Path, write_dicom: Any
) -> None:
    dicom, _ = people(tmp_path, write_dicom, *map(str, range(6)))
    labels = table(tmp_path, "1.0,9 2 6 2", "1.3,9 2 6 2", "1.4,9 2 6 2")
    [doubt] = split_doubts(built(dicom, labels))
    assert doubt == (
        "no image without a pneumothorax has a label, so a model cannot learn what is none; "
        "if the 3 images without a label have none, give --unlisted negative"
    )
    catalog = built(dicom, labels, unlisted_negative=True)
    assert split_doubts(catalog) == ()
    counts = catalog.reconciliation
    assert (counts.table_images, counts.labelled, counts.positive, counts.unlabelled) == (3, 6, 3, 0)
    assert "3 images without a label are negative, as --unlisted negative says" in catalog.evidence


def test_a_patient_with_too_many_images_is_doubted(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    catalog = built(*people(tmp_path, write_dicom, *["QX7"] * 10, *map(str, range(20))))
    assert [doubt[:70] for doubt in split_doubts(catalog)] == [
        "10 of 30 images are of one patient by PatientID, all on one side of th"
    ]


def test_a_map_that_groups_nothing_is_doubted(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    patients = tmp_path / "map.csv"
    patients.write_text("id,patient\n" + "".join(f"1.{number},p{number}\n" for number in range(12)))
    catalog = built(*people(tmp_path, write_dicom, *["P"] * 12), patients=patients)
    assert split_doubts(catalog) == (
        "the patient map gives every image a patient of its own, so it keeps nothing together",
    )


def test_images_without_a_patient_id_are_counted(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    catalog = built(*people(tmp_path, write_dicom, *"aabbccdd", "", ""))
    assert catalog.reconciliation.without_patient == 2
    assert split_doubts(catalog) == ("2 of 10 images have no patient by PatientID; each counts as one of its own",)


def test_a_former_split_whose_validation_images_are_gone_is_refused(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    dicom, labels = people(tmp_path, write_dicom, *map(str, range(12)))
    former = built(dicom, labels)
    for case in former.cases:
        if case.split == "val":
            (dicom / f"{case.case_id[2:]}.dcm").unlink()
    with pytest.raises(CatalogError, match="no image would be left for validation; give another number of --folds"):
        built(dicom, labels, former=former)
    assert built(dicom, labels, former=former, seed=1).leakage.val_cases


def test_copies_are_counted_and_other_content_of_the_same_id_is_rejected(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    first = write_dicom(tmp_path / "a.dcm", IMAGE, "1.1")
    shutil.copy(first, tmp_path / "b.dcm")
    write_dicom(tmp_path / "c.dcm", IMAGE[::-1], "1.1")
    write_dicom(tmp_path / "d.dcm", IMAGE, "1.0")
    catalog = built(tmp_path, table(tmp_path, "1.1,-1", "1.0,-1"))
    assert catalog.reconciliation.duplicates == 1
    assert [(reject.path, reject.reason) for reject in catalog.rejects] == [
        ("c.dcm", "has another content than the file used for its id 1.1")
    ]


def test_table_id_without_a_file_may_have_an_image_of_another_size(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    write_dicom(tmp_path / "a.dcm", IMAGE, "1.1")
    write_dicom(tmp_path / "b.dcm", IMAGE, "1.0")
    catalog = built(tmp_path, table(tmp_path, "1.0,-1", "1.1,-1", "1.2,5000 10", "1.2,5005 10"))
    assert catalog.missing == ("1.2",)
    assert catalog.reconciliation.table_overlapping == 1


# --- renewed on a former one ----------------------------------------------------------------------------------------


def cases_of(folder: Path, write_dicom: Any, *numbers: int, **tags: Any) -> None:
    for number in numbers:
        write_dicom(folder / "dicom" / f"{number:02}.dcm", IMAGE, f"1.3{number:02}", **tags)


def build(folder: Path, former: Catalog | None, *rows: str, **options: Any) -> Catalog:
    return built(folder / "dicom", table(folder, *rows), former=former, salt=b"s", folds=4, **options)


def rows_of(catalog: Catalog) -> list[str]:
    return [case.case_id for case in catalog.labelled]


def folds_of(catalog: Catalog) -> dict[str, int]:
    return {case.case_id: case.fold for case in catalog.labelled if case.split != "removed"}


NEGATIVE = [f"1.3{number:02},-1" for number in range(30)]


def test_nothing_changed_gives_the_same_catalog(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    cases_of(tmp_path, write_dicom, *range(12))
    first = build(tmp_path, None, *NEGATIVE)
    assert build(tmp_path, first, *NEGATIVE) == first
    write_catalog(first, tmp_path / FILE_NAME)
    assert build(tmp_path, read_catalog(tmp_path), *NEGATIVE) == first
    paths = paths_of(tmp_path / "dicom", table(tmp_path, *NEGATIVE), former=first)
    assert paths == {f"1.3{number:02}": f"{number:02}.dcm" for number in range(12)}


def test_cases_that_come_stand_behind_those_that_are_there(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    cases_of(tmp_path, write_dicom, *range(5, 15))
    first = build(tmp_path, None, *NEGATIVE)
    cases_of(tmp_path, write_dicom, 0, 1, 20)
    second = build(tmp_path, first, *NEGATIVE)
    assert rows_of(second) == [*rows_of(first), "1.300", "1.301", "1.320"]
    assert folds_of(first).items() <= folds_of(second).items()


def test_rows_of_removed_cases_are_kept_free_and_then_taken(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    cases_of(tmp_path, write_dicom, *range(10))
    first = build(tmp_path, None, *NEGATIVE)
    for number in (3, 6):
        (tmp_path / "dicom" / f"{number:02}.dcm").unlink()
    second = build(tmp_path, first, *NEGATIVE)
    assert rows_of(second) == [name if name not in ("1.303", "1.306") else "" for name in rows_of(first)]
    assert [case for case in second.labelled if not case.case_id] == [REMOVED, REMOVED]
    assert second.sides()["removed"]["cases"] == 2
    assert {name: fold for name, fold in folds_of(first).items() if name not in ("1.303", "1.306")} == folds_of(second)
    write_catalog(second, tmp_path / FILE_NAME)
    assert read_catalog(tmp_path) == second

    cases_of(tmp_path, write_dicom, 6, 20)
    third = build(tmp_path, read_catalog(tmp_path), *NEGATIVE)
    assert rows_of(third) == [
        {"": "1.306"}.get(name, name) if index == 3 else name or "1.320" for index, name in enumerate(rows_of(second))
    ]
    cases_of(tmp_path, write_dicom, 3)
    assert rows_of(build(tmp_path, third, *NEGATIVE)) == [*rows_of(third), "1.303"]


def test_last_rows_of_removed_cases_are_given_up(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    cases_of(tmp_path, write_dicom, *range(10))
    first = build(tmp_path, None, *NEGATIVE)
    (tmp_path / "dicom" / "09.dcm").unlink()
    assert rows_of(build(tmp_path, first, *NEGATIVE)) == rows_of(first)[:9]


def test_with_more_than_a_quarter_removed_all_are_put_in_order_anew(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    cases_of(tmp_path, write_dicom, *range(2, 14))
    first = build(tmp_path, None, *NEGATIVE)
    cases_of(tmp_path, write_dicom, 0)
    second = build(tmp_path, first, *NEGATIVE)
    assert rows_of(second)[-1] == "1.300"
    for number in (3, 4, 5):
        (tmp_path / "dicom" / f"{number:02}.dcm").unlink()
    third = build(tmp_path, second, *NEGATIVE)
    assert rows_of(third).count("") == 3  # of 13: less than a quarter
    (tmp_path / "dicom" / "06.dcm").unlink()
    fourth = build(tmp_path, third, *NEGATIVE)
    assert rows_of(fourth) == sorted(set(rows_of(third)) - {"", "1.306"})
    assert folds_of(fourth).items() <= folds_of(third).items()


def test_labels_that_come_and_go_make_cases_labelled_and_unlabelled(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    cases_of(tmp_path, write_dicom, *range(8))
    first = build(tmp_path, None, *NEGATIVE[:7])
    assert [case.case_id for case in first.cases if case.masks is None] == ["1.307"]
    second = build(tmp_path, first, *NEGATIVE[:2], *NEGATIVE[3:8])
    assert rows_of(second) == ["1.307" if name == "1.302" else name for name in rows_of(first)]
    assert [case.case_id for case in second.cases if case.masks is None] == ["1.302"]
    third = build(tmp_path, second, *NEGATIVE[:8])
    assert rows_of(third) == [*rows_of(second), "1.302"]
    kept = {name: fold for name, fold in folds_of(first).items() if name != "1.302"}
    assert kept.items() <= folds_of(second).items() <= folds_of(third).items()


def test_map_that_joins_patients_of_two_sides_leaves_nothing_shared(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    cases_of(tmp_path, write_dicom, *range(12))
    patients = tmp_path / "patients.csv"
    patients.write_text("id,patient\n" + "".join(f"1.3{number:02},p{number // 2}\n" for number in range(12)))
    first = build(tmp_path, None, *NEGATIVE, patients=patients)
    [some] = [case for case in first.labelled if case.split == "val"][:1]
    [other] = [case for case in first.labelled if case.split == "train"][:1]
    lines = {case.case_id: f"{case.case_id},{case.group}" for case in first.labelled}
    joined = {some.group: "same", other.group: "same"}
    text = "".join(f"{name},{joined.get(line.split(',')[1], line.split(',')[1])}\n" for name, line in lines.items())
    patients.write_text("id,patient\n" + text)
    second = build(tmp_path, first, *NEGATIVE, patients=patients)
    assert (second.leakage.groups, second.leakage.shared_cases) == (first.leakage.groups - 1, 0)
    moved = {case.case_id for case in first.labelled if folds_of(second)[case.case_id] != case.fold}
    assert len(moved) == 2  # the two images of one of the two patients
    assert rows_of(second) == rows_of(first)


def test_second_image_of_a_patient_joins_the_first_and_moves_nobody(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    """Until it came, PatientID grouped nothing; this is no reason to split anew."""
    for number in range(16):
        cases_of(tmp_path, write_dicom, number, PatientID=f"person {number}")
    first = build(tmp_path, None, *NEGATIVE)
    cases_of(tmp_path, write_dicom, 20, PatientID="person 7")
    second = build(tmp_path, first, *NEGATIVE)
    assert (first.leakage.grouped_by, second.leakage.grouped_by) == ("nothing", "PatientID")
    assert folds_of(second) == {**folds_of(first), "1.320": folds_of(first)["1.307"]}


@pytest.mark.parametrize("change", [{"seed": 1}, {"folds": 5}])
def test_other_seed_or_number_of_folds_splits_anew(tmp_path: Path, write_dicom, change: dict[str, Any]) -> None:  # type: ignore[no-untyped-def]
    cases_of(tmp_path, write_dicom, *range(20))
    labels = table(tmp_path, *NEGATIVE)
    first = built(tmp_path / "dicom", labels, salt=b"s")
    renewed = built(tmp_path / "dicom", labels, salt=b"s", former=first, **change)
    assert renewed == built(tmp_path / "dicom", labels, salt=b"s", **change)
    assert folds_of(renewed) != folds_of(first)


def test_changed_file_keeps_its_row_and_its_fold(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    cases_of(tmp_path, write_dicom, *range(8))
    first = build(tmp_path, None, *NEGATIVE)
    write_dicom(tmp_path / "dicom" / "03.dcm", IMAGE[::-1], "1.303", PatientSex="M")
    second = build(tmp_path, first, *NEGATIVE)
    differing = [(a, b) for a, b in zip(first.cases, second.cases, strict=True) if a != b]
    [(before, after)] = differing
    assert after == replace(before, digest=after.digest, sex="M")
    assert after.digest != before.digest


def test_moved_file_is_the_same_case(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    cases_of(tmp_path, write_dicom, *range(8))
    first = build(tmp_path, None, *NEGATIVE)
    shutil.move(tmp_path / "dicom" / "03.dcm", tmp_path / "dicom" / "elsewhere.dcm")
    second = build(tmp_path, first, *NEGATIVE)
    assert second.cases == first.cases
    assert paths_of(tmp_path / "dicom", table(tmp_path, *NEGATIVE))["1.303"] == "elsewhere.dcm"


# --- bad input ----------------------------------------------------------------------------------------------------


def test_folder_of_files_that_are_all_unusable_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_text("nothing")
    with pytest.raises(CatalogError, match=r"none of 1 files is usable; the first one is not a DICOM file"):
        built(tmp_path, table(tmp_path, "1.1,-1"))


def test_table_of_another_data_set_is_refused(small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(CatalogError, match=r"none of the 24 images in .* has a label in .*labels.csv"):
        built(small_dataset.dicom, table(tmp_path, "1.1,-1"))


def test_mask_past_its_image_is_refused_with_file_line_and_id(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    write_dicom(tmp_path / "a.dcm", IMAGE, "1.1")
    labels = table(tmp_path, "1.2,-1", "1.1,0 64", "1.1,60 5")
    with pytest.raises(LabelError) as caught:
        built(tmp_path, labels)
    assert str(caught.value) == (
        f"{labels}, line 4: the mask of 1.1 does not fit its image: a run ends at pixel 65, past the 8x8 image "
        "(64 pixels) (read as relative-columns, which fits 1 of 2 masks; correct the mask, or give another encoding "
        "with --dialect)"
    )
    assert caught.value.exit_code == 4


def test_patient_map_without_any_known_id_is_refused_with_its_path(small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    patients = tmp_path / "patients.csv"
    patients.write_text("patient,id\nJones,1.2.3\n")
    with pytest.raises(
        LabelError, match=r"patients.csv: none of the 24 images in it; its image ids are others"
    ) as caught:
        built(small_dataset.dicom, small_dataset.labels, patients=patients)
    assert caught.value.exit_code == 4


# --- the file -----------------------------------------------------------------------------------------------------


def test_catalog_survives_write_and_read(small_catalog: Catalog, small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write_catalog(small_catalog, tmp_path / FILE_NAME)
    assert read_catalog(tmp_path) == small_catalog
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    paths = paths_of(small_dataset.dicom, small_dataset.labels).values()
    assert not any(path in (tmp_path / FILE_NAME).read_text() for path in paths)
    summary = json.loads(json.dumps(small_catalog.summary()))
    assert summary["split"]["train"]["cases"] + summary["split"]["val"]["cases"] == 23


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda lines: lines[:-1], "is damaged (23 cases instead of 24)"),
        (lambda lines: [*lines[:-1], lines[-1][:20]], "is damaged"),
        (
            lambda lines: [lines[0].replace('"schema": 2', '"schema": 9'), *lines[1:]],
            "has schema 9, this ptxdist reads 2: update ptxdist",
        ),
        (
            lambda lines: [lines[0].replace('"schema": 2', '"schema": 1'), *lines[1:]],
            "has schema 1, this ptxdist reads 2: rerun `ptxdist preprocess`",
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


# --- another fold ----------------------------------------------------------------------------------------------------


def test_another_fold_is_held_out_as_the_first_one_is(small_catalog: Catalog) -> None:
    first, other = (hold_out(small_catalog, fold, ()) for fold in (0, 3))
    assert first == small_catalog
    assert {case.case_id for case in other.cases if case.split == "val"} == {
        case.case_id for case in small_catalog.cases if case.fold == 3
    }
    assert [case.split for case in other.cases if case.masks is None] == ["unlabelled"]
    assert (other.leakage.val_cases, other.leakage.shared_cases) == (other.sides()["val"]["cases"], 0)
    assert other.sides()["val"]["cases"] + other.sides()["train"]["cases"] == 23


def test_near_duplicates_are_counted_across_the_fold_that_is_held_out(small_catalog: Catalog) -> None:
    [val, *_], [train, also, *_] = (
        [case.case_id for case in small_catalog.labelled if (case.fold == 3) == held] for held in (True, False)
    )
    pairs = [(val, train), (train, also), (also, val), (val, "of a rejected file")]
    listed = replace(small_catalog, leakage=replace(small_catalog.leakage, near_duplicates=4))
    leakage = hold_out(listed, 3, pairs).leakage
    assert (leakage.near_duplicates, leakage.near_duplicates_shared) == (4, 2)


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
    files = {path.stem: path for path in (real_data / "siim-real" / "dicom-images").rglob("*.dcm")}
    for case in real_catalog.labelled[:40]:
        (tmp_path / f"{case.case_id}.dcm").symlink_to(files[case.case_id])
    catalog = built(tmp_path, real_data / "siim-real" / "train-rle.csv.gz")
    assert (catalog.leakage.grouped_by, catalog.leakage.groups) == ("nothing", 40)


# --- folders of mask images -----------------------------------------------------------------------------------------


def mask_folder(tmp_path: Path, write_dicom) -> tuple[Path, Path]:  # type: ignore[no-untyped-def]
    """Two images of 8x8 px; the first has a mask, the second none."""
    (tmp_path / "masks").mkdir()
    for number in range(2):
        write_dicom(tmp_path / "dicom" / f"{number}.dcm", IMAGE, f"1.{number}")
        mask = np.zeros((8, 8), np.uint8)
        mask[1:3, 4:8] = 0 if number else 255
        assert cv2.imwrite(str(tmp_path / "masks" / f"1.{number}.png"), mask)
    return tmp_path / "dicom", tmp_path / "masks"


def test_mask_images_are_labels(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    catalog = built(*mask_folder(tmp_path, write_dicom))
    assert [(case.case_id, case.area_px, bool(case.masks)) for case in catalog.cases] == [
        ("1.0", 8, True),
        ("1.1", 0, False),
    ]
    assert (catalog.dialect, catalog.dialect_proven) == ("mask images", False)
    assert catalog.evidence[0] == "2 mask images have the size of their radiographs"
    assert catalog.evidence[-1] == "not ruled out: transposed"


def test_inverted_mask_images_are_refused(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    dicom, masks = mask_folder(tmp_path, write_dicom)
    assert cv2.imwrite(str(masks / "1.0.png"), np.pad(np.full((6, 8), 255, np.uint8), ((2, 0), (0, 0))))
    with pytest.raises(LabelError, match=r"masks: the mask images look wrong: 1 of 1 positive images"):
        built(dicom, masks)


def test_mask_images_have_no_dialect(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SettingsError, match=r"holds mask images, which have no dialect; leave out --dialect"):
        built(*mask_folder(tmp_path, write_dicom), dialect="absolute-rows")


def test_mask_image_of_another_size_is_refused(tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    dicom, masks = mask_folder(tmp_path, write_dicom)
    assert cv2.imwrite(str(masks / "1.0.png"), np.zeros((8, 16), np.uint8))
    with pytest.raises(LabelError, match=r"the mask of 1\.0 has 16x8 pixels, its image 8x8;"):
        built(dicom, masks)


def test_a_dialect_that_few_masks_cannot_prove_is_said_to_be_not_proven(small_catalog: Catalog) -> None:
    assert small_catalog.dialect == "relative-columns"
    assert not small_catalog.dialect_proven
    assert any("not ruled out" in line for line in small_catalog.evidence)
