"""The synthetic data set: files and tables like the challenge's, masks where the pneumothorax is drawn."""

from __future__ import annotations

import csv
import errno
import gzip
import hashlib
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from click.testing import CliRunner, Result

from ptxdist.cache.build import build_catalog
from ptxdist.cache.catalog import FILE_NAME, catalog_text, read_catalog, write_catalog
from ptxdist.cli import cli
from ptxdist.dicom.radiograph import read_header
from ptxdist.dicom.synthetic import is_phantom
from ptxdist.errors import LabelError, RunError, SettingsError
from ptxdist.labels import rle
from ptxdist.labels.patients import read_patients
from ptxdist.labels.tables import read_labels
from ptxdist.phantoms import anatomy, dataset, greys

Grey = npt.NDArray[np.uint8]
CASES = 20


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dataset.PhantomResult:
    return dataset.write_phantoms(tmp_path_factory.mktemp("one") / "out", cases=CASES, seed=3, positive_share=0.3)


@pytest.fixture(scope="module")
def positives() -> list[tuple[anatomy.Chest, Grey, Grey]]:
    """Chest, image and union mask of 20 positive images."""
    drawn = []
    for index in range(20):
        rng = np.random.default_rng((11, index))
        chest = anatomy.pose(rng, "PA" if index % 2 else "AP")
        union = np.maximum.reduce(anatomy.draw_masks(rng, chest))
        drawn.append((chest, greys.draw_image(rng, chest, union), union))
    return drawn


def files(result: dataset.PhantomResult) -> Iterator[tuple[Path, pydicom.FileDataset]]:
    for path in sorted(result.dicom.rglob("*.dcm")):
        yield path, pydicom.dcmread(path)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def lung_fields(chest: anatomy.Chest) -> npt.NDArray[np.bool_]:
    fields = [anatomy.fill(lung.outline(anatomy.ANGLES), anatomy.SIZE_PX) for lung in chest.lungs]
    return np.asarray(np.maximum.reduce(fields) > 0)


def test_files_are_what_the_challenge_ships(written: dataset.PhantomResult) -> None:
    seen = 0
    for path, ds in files(written):
        assert ds.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.4.50"
        assert ds.SOPClassUID.name == "Secondary Capture Image Storage"
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID == path.stem
        assert (ds.StudyInstanceUID, ds.SeriesInstanceUID) == (path.parts[-3], path.parts[-2])
        assert all(pydicom.uid.UID(part).is_valid for part in (*path.parts[-3:-1], path.stem))
        assert (ds.Modality, ds.PhotometricInterpretation, ds.BodyPartExamined) == ("CR", "MONOCHROME2", "CHEST")
        assert (ds.Rows, ds.Columns, ds.BitsStored, ds.SamplesPerPixel) == (1024, 1024, 8, 1)
        assert ds.PatientSex in "MF"
        assert ds.ViewPosition in ("AP", "PA")
        assert len(ds.PixelSpacing) == 2
        assert len(ds.PatientAge) == 2, "the data has '62', not the standard's '062Y'"
        assert 90_000 < path.stat().st_size < 200_000
        image = ds.pixel_array
        assert image.shape == (1024, 1024)
        assert image.dtype == np.uint8
        assert image.std() > 25
        seen += 1
    assert seen == written.images == CASES


def test_bedside_images_of_another_hospital_are_ap_and_darker(written: dataset.PhantomResult, tmp_path: Path) -> None:
    other = dataset.write_phantoms(tmp_path / "other", cases=4, seed=3, bedside=True)
    means = []
    for result in (written, other):
        means.append(np.mean([ds.pixel_array.mean() for _, ds in list(files(result))[:4]]))
    assert {ds.ViewPosition for _, ds in files(other)} == {"AP"}
    assert means[1] < means[0] - 15


def test_a_cache_of_phantoms_is_marked_and_one_other_file_takes_the_mark_away(
    written: dataset.PhantomResult, tmp_path: Path, write_dicom: Callable[..., Path]
) -> None:
    build = partial(build_catalog, written.dicom, written.labels, patients=written.patients)
    catalog = build()[0]
    assert catalog.synthetic
    assert "synthetic" in catalog.summary()
    write_catalog(catalog, tmp_path / FILE_NAME)
    assert read_catalog(tmp_path, as_it_is=True).synthetic
    path = write_dicom(written.dicom / "one.dcm", np.zeros((64, 64), np.uint8), "1.2.3")
    other = build()[0]
    path.unlink()
    assert not other.synthetic
    assert "synthetic" not in other.summary()
    assert '"synthetic"' not in catalog_text(other)


@pytest.mark.parametrize(
    ("study", "series", "expected"),
    [
        ("2.8323329.5.1517875160.100002", "3.8323329.5.1517875160.100003", True),
        ("2.8323329.5.1517875160.100005", "3.8323329.5.1517875160.100006", True),
        ("2.8323329.5.1517875160.878026", "3.8323329.5.1517875160.878025", False),  # as in the challenge
        ("2.8323329.5.1517875160.100003", "3.8323329.5.1517875160.100004", False),
        ("2.8323329.5.1517875160.100002", "3.8323329.6.1517875160.100003", False),
        ("3.8323329.5.1517875160.100002", "2.8323329.5.1517875160.100003", False),
        ("2", "3", False),
    ],
)
def test_only_the_uids_of_phantoms_are_taken_for_them(study: str, series: str, expected: bool) -> None:
    assert is_phantom(*(f"1.2.276.0.7230010.3.1.{part}" for part in (study, series))) is expected
    assert not is_phantom("", "")


def test_patient_id_is_a_new_uuid_in_every_file_so_grouping_on_it_does_nothing(written: dataset.PhantomResult) -> None:
    ids = [(str(ds.PatientID), str(ds.PatientName)) for _, ds in files(written)]
    assert all(uuid.UUID(patient).version == 4 and patient == name for patient, name in ids)
    assert len(set(ids)) == CASES


def test_the_table_has_the_real_tables_oddities_and_agrees_with_the_counts(written: dataset.PhantomResult) -> None:
    assert written.labels.read_text().splitlines()[0] == "ImageId, EncodedPixels"
    table = read_labels(written.labels)
    names = {path.stem for path, _ in files(written)}
    assert written.unlabelled == 1
    assert len(names - set(table)) == 1
    assert set(table) < names
    assert sum(bool(texts) for texts in table.values()) == written.positives == round(0.3 * (CASES - 1))


def test_every_image_has_a_patient_and_positives_fall_on_few_patients() -> None:
    tasks = dataset._plan(4000, 5, 0.2215)
    positive = Counter(task.patient for task in tasks if task.positive)
    every = Counter(task.patient for task in tasks)
    # The real data: 6,171 patients for 12,047 images, 802 for the 2,669 positives.
    assert 0.35 < len(every) / 4000 < 0.65
    assert 0.2 < len(positive) / positive.total() < 0.45
    assert max(positive.values()) > 10
    assert sum(not task.rows for task in tasks) == 16
    assert not any(task.positive and not task.rows for task in tasks)


def test_the_patient_map_names_every_file(written: dataset.PhantomResult) -> None:
    patients = read_patients(written.patients)
    assert set(patients) == {path.stem for path, _ in files(written)}
    assert len(set(patients.values())) < CASES


def test_areas_follow_the_real_distribution_and_some_images_have_several_or_overlapping_masks() -> None:
    areas, several, overlapping = [], 0, 0
    for index in range(400):
        rng = np.random.default_rng((2, index))
        masks = anatomy.draw_masks(rng, anatomy.pose(rng, "PA"))
        union = int(np.count_nonzero(np.maximum.reduce(masks)))
        areas.append(union)
        several += len(masks) > 1
        overlapping += sum(int(mask.sum()) for mask in masks) > union
    p5, median, p75 = np.percentile(areas, (5, 50, 75))
    assert 900 < p5 < 2_200
    assert 6_800 < median < 10_800
    assert 14_000 < p75 < 23_000
    assert max(areas) < 165_000
    assert 0.17 < several / 400 < 0.33
    assert 0.03 < overlapping / 400 < 0.15


@pytest.mark.parametrize("target_px", [600, 3_000, 9_000, 30_000, 90_000])
def test_a_crescent_has_the_area_that_was_asked_for_and_lies_in_its_lung(target_px: int) -> None:
    for index in range(6):
        rng = np.random.default_rng((4, index))
        chest = anatomy.pose(rng, "PA")
        (mask,) = anatomy._crescent(rng, chest.lungs[index % 2], 0.8, target_px, [(-1, 1)])
        assert abs(int(mask.sum()) - target_px) < 0.15 * target_px
        assert (mask.astype(bool) & lung_fields(chest)).sum() > 0.9 * mask.sum()


def test_a_pneumothorax_is_darker_and_smoother_than_the_lung_beside_it(
    positives: list[tuple[anatomy.Chest, Grey, Grey]],
) -> None:
    darker = []
    for chest, image, union in positives:
        beside = (cv2.dilate(union, np.ones((41, 41), np.uint8)) > 0) & (union == 0) & lung_fields(chest)
        darker.append(float(image[beside].mean()) - float(image[union > 0].mean()))
    assert 22 < np.median(darker) < 45
    assert min(darker) > 8


def test_no_grey_threshold_does_the_work_of_a_network_not_even_within_the_lungs(
    positives: list[tuple[anatomy.Chest, Grey, Grey]],
) -> None:
    for within_lungs in (False, True):
        scores = []
        for chest, image, union in positives:
            region = lung_fields(chest) if within_lungs else np.ones_like(union, bool)
            found = np.bincount(image[region], minlength=256).cumsum()  # px at or below each grey level
            hits = np.bincount(image[region & (union > 0)], minlength=256).cumsum()
            scores.append(2 * hits / (found + union.sum()))
        best = np.mean(scores, axis=0).max()  # Dice at the best threshold for all images
        # 0.6 is what the demo asks of a trained network. A threshold comes near it only where the lungs are given.
        assert best < (0.58 if within_lungs else 0.2), f"within the lungs: {within_lungs}"


def test_the_same_seed_gives_the_same_files_for_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(dataset, "CHUNK", 2)
    dataset.write_phantoms(tmp_path / "one", cases=5, seed=9)
    dataset.write_phantoms(tmp_path / "two", cases=5, seed=9, workers=2, on_image=lambda *counts: seen.append(counts))
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert seen[-1] == (5, 5)
    assert len(seen) > 1


def test_another_seed_gives_other_images(tmp_path: Path) -> None:
    one = dataset.write_phantoms(tmp_path / "one", cases=1, seed=1)
    two = dataset.write_phantoms(tmp_path / "two", cases=1, seed=2)
    (_, first), (_, second) = *files(one), *files(two)
    assert first.SOPInstanceUID != second.SOPInstanceUID
    assert not np.array_equal(first.pixel_array, second.pixel_array)


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")  # stage 2 of the challenge has ids like ID_0, too
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_a_given_table_is_drawn_where_its_masks_are(tmp_path: Path, suffix: str) -> None:
    mask = np.zeros((1024, 1024), np.uint8)
    mask[250:450, 180:230] = 1
    other = np.zeros_like(mask)
    other[400:520, 180:230] = 1
    rows = [("ID_0", rle.encode(mask)), ("ID_0", rle.encode(other)), ("ID_1", "-1"), ("ID_2", "-1")]
    table = tmp_path / f"table{suffix}"
    text = "ImageId, EncodedPixels\n" + "".join(f"{name}, {runs}\n" for name, runs in rows)
    table.write_bytes(gzip.compress(text.encode()) if suffix == ".csv.gz" else text.encode())

    result = dataset.write_phantoms(tmp_path / "out", cases=0, labels=table)

    assert (result.images, result.positives, result.unlabelled) == (3, 1, 0)
    with result.labels.open(newline="") as file:
        assert [tuple(row) for row in csv.reader(file)][1:] == rows
    images = {str(ds.SOPInstanceUID): ds.pixel_array.astype(float) for _, ds in files(result)}
    assert set(images) == {"ID_0", "ID_1", "ID_2"}
    assert all(read_header(path.read_bytes(), b"").synthetic for path, _ in files(result))
    inside, beside = images["ID_0"][260:510, 190:220], images["ID_0"][260:510, 250:280]
    assert beside.mean() - inside.mean() > 10


def test_cases_takes_the_first_ids_of_a_given_table(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("ImageId,EncodedPixels\n" + "".join(f"ID_{i},-1\n" for i in range(5)))
    result = dataset.write_phantoms(tmp_path / "out", cases=2, labels=table)
    assert list(read_labels(result.labels)) == ["ID_0", "ID_1"]


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", ".."])
def test_an_id_that_would_leave_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    table = tmp_path / "table.csv"
    table.write_text(f"ImageId,EncodedPixels\n{name},-1\n")
    with pytest.raises(LabelError, match="cannot be a file name"):
        dataset.write_phantoms(tmp_path / "out", cases=0, labels=table)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(RunError, match="delete it or give another one"):
        dataset.write_phantoms(out, cases=1)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert dataset.write_phantoms(tmp_path / "out", cases=1).labels.is_file()


def test_a_failure_leaves_nothing_half_written(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataset.write_phantoms(tmp_path / "out", cases=2, on_image=interrupt)
    assert list(tmp_path.iterdir()) == []


def phantom(out: Path, *words: str) -> Result:
    done = CliRunner().invoke(cli, ["phantom", str(out), "--cases", "1", "--workers", "1", *words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_places_where_nothing_can_be_written_are_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / ("x" * 300), tmp_path / ("x/" * 3000), tmp_path / "file" / "out", Path("/proc/out")):
        done = phantom(out)
        assert done.exit_code == 8, done.output
        assert "cannot be written: " in done.stderr.replace("\n", " ")

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    done = phantom(tmp_path / "out")
    assert done.exit_code == 8, done.output
    assert "out cannot be written: No space left on device" in done.stderr.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_one_left_is_removed_and_a_second_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.ptxdist-01234567.tmp" / "dicom-images").mkdir(parents=True)
    codes: list[int] = []

    def nested(*given: object, **more: object) -> list[tuple[str, list[str]]]:
        codes.append(phantom(tmp_path / "out").exit_code)
        return [("a", ["-1"])]

    monkeypatch.setattr(dataset, "in_chunks", nested)
    assert phantom(tmp_path / "out").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (phantom(tmp_path / "out").exit_code, codes) == (8, [12])


def test_wrong_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cases"):
        dataset.write_phantoms(tmp_path / "out", cases=0)
    with pytest.raises(SettingsError, match="positive_share"):
        dataset.write_phantoms(tmp_path / "out", cases=1, positive_share=1.5)
    with pytest.raises(SettingsError, match="workers"):
        dataset.write_phantoms(tmp_path / "out", cases=1, workers=0)
    with pytest.raises(SettingsError, match="seed"):
        dataset.write_phantoms(tmp_path / "out", cases=1, seed=-1)
    assert list(tmp_path.iterdir()) == []
