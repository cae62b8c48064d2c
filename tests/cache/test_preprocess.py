"""`preprocess`: every sample is its file and its masks, and the command prints what there is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from cache_files import rejects_of
from click.testing import CliRunner, Result

from ptxdist.cache.catalog import read_catalog
from ptxdist.cache.manifest import read_manifest
from ptxdist.cache.preprocess import preprocess
from ptxdist.cache.store import open_store
from ptxdist.cli import cli
from ptxdist.errors import CatalogError
from ptxdist.labels import rle
from ptxdist.labels.tables import read_labels


def block_mean(pixels: npt.NDArray[Any], size: int) -> npt.NDArray[np.float64]:
    """Means of the blocks of a square image whose side is a multiple of `size`."""
    step = len(pixels) // size
    return np.asarray(pixels.reshape(size, step, size, step).mean(axis=(1, 3)))


@pytest.mark.parametrize("size", [64, 96])
def test_every_sample_is_its_file_and_its_masks(small_cache, small_dataset, size: int) -> None:  # type: ignore[no-untyped-def]
    cache, result = small_cache
    store = open_store(cache, size)
    assert store.cases == len(result.catalog.labelled) == 23
    for index, case in enumerate(result.catalog.labelled):
        image, mask = store.sample(index)
        original, truth = small_dataset.images[case.case_id], small_dataset.masks[case.case_id]
        if len(original) == original.shape[1] == 128 and size == 64:
            assert np.abs(image - block_mean(original.astype(float), size)).mean() < 2  # JPEG
            assert np.abs(mask - block_mean(truth * 255.0, 64)).max() <= 0.5
        assert image.any()
        assert mask.any() == bool(case.masks)


def test_result_catalog_and_tables_agree(small_cache) -> None:  # type: ignore[no-untyped-def]
    cache, result = small_cache
    assert (result.written, result.reused, result.sizes_px, result.catalog.rejects) == (2, 0, (64, 96), ())
    assert read_catalog(cache) == result.catalog
    assert (cache / "missing.csv").read_text().split() == ["ImageId", *result.catalog.missing]
    assert rejects_of(cache) == {}
    assert not list(cache.rglob("*.tmp"))
    assert not list(cache.rglob("*.new"))


def test_real_images_and_masks_are_right_at_256_and_512(real_data: Path, tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    """Against pydicom and block means; the masks against the PNG mirror, which shows a transposition at once."""
    labels, dicom = real_data / "siim-real" / "train-rle.csv.gz", tmp_path / "dicom"
    dicom.mkdir()
    table, expected = read_labels(labels), {}
    files = {path.stem: path for path in (real_data / "siim-real" / "dicom-images").rglob("*.dcm")}
    for case_id in [name for name in sorted(files) if table.get(name)][:3] + [n for n in sorted(files) if n in table][
        :2
    ]:
        (dicom / f"{case_id}.dcm").symlink_to(files[case_id])
        file = pydicom.dcmread(files[case_id])
        expected[case_id] = file.pixel_array, rle.decode(table[case_id], 1024, 1024) * 255
    for path in sorted((real_data / "siim-png" / "masks").iterdir())[:6]:
        image = cv2.imread(str(real_data / "siim-png" / "images" / path.name), cv2.IMREAD_UNCHANGED)
        expected[path.stem] = image, np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
        write_dicom(dicom / f"{path.stem}.dcm", image, path.stem, raw=True)
    assert sum(bool(mask.any()) for _, mask in expected.values()) >= 5

    result = preprocess(dicom, labels, tmp_path / "cache", patients=real_data / "siim-real" / "nih_id.csv")
    assert result.catalog.reconciliation.labelled == len(expected)
    for size in (256, 512):
        store = open_store(tmp_path / "cache", size)
        for index, case in enumerate(result.catalog.labelled):
            stored, truth = store.sample(index), expected[case.case_id]
            # Decoders of JPEG may differ by one grey level, rounding adds a half.
            assert np.abs(stored[0] - block_mean(truth[0], size)).max() <= 1.5
            assert np.abs(stored[1] - block_mean(truth[1], size)).max() <= 0.5
            assert case.area_px == np.count_nonzero(truth[1])


def test_all_png_masks_equal_the_decoded_table(real_data: Path) -> None:
    table = read_labels(real_data / "siim-real" / "train-rle.csv.gz")
    positive = 0
    for path in sorted((real_data / "siim-png" / "masks").iterdir()):
        mask = np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
        assert np.array_equal(rle.decode(table[path.stem], 1024, 1024) * 255, mask), path.stem
        positive += bool(mask.any())
    assert positive == 16


def test_cache_below_the_images_is_not_taken_for_images(small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    dicom = Path(shutil.copytree(small_dataset.dicom, tmp_path / "dicom"))
    first = preprocess(dicom, small_dataset.labels, dicom / "cache", sizes_px=(32,))
    again = preprocess(dicom, small_dataset.labels, dicom / "cache", sizes_px=(32,))
    assert again.catalog == first.catalog
    assert (again.written, again.catalog.rejects, again.catalog.reconciliation.other_files) == (0, (), 0)


def test_command_tells_what_there_is_and_warns_where_patients_are_not_known(small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data, cache = small_dataset, tmp_path / "cache"
    build = ["preprocess", "--dicom", data.dicom, "--labels", data.labels, "--out", cache, "--size", 32]

    def call(*arguments: object) -> tuple[dict[str, str], str]:
        done = CliRunner().invoke(cli, list(map(str, arguments)))
        assert done.exit_code == 0, done.output
        cells = [line.strip("│ ").split("│") for line in done.stdout.splitlines() if line.startswith("│")]
        return {name.strip(): value.strip() for name, value in cells}, done.stderr

    shown, said = call(*build)
    assert (shown["rows of the label table"], shown["images in the label table"]) == ("27", "25")
    assert (shown["images with a label"], shown["images without a label, not used"]) == ("23", "1")
    assert shown["encoding of the masks"] == "relative-columns (not proven)"
    assert "warning: patients are not known" in said
    assert "warning: the encoding of the masks, relative-columns, is not proven: " in said
    assert "1 shards written, 0 kept" in said
    assert "nothing had to be done" in call(*build)[1]
    known, said = call(*build, "--patients", data.patients)
    assert known["groups by patient map"] == "12 (8 with a pneumothorax)"
    assert "PatientID" not in said
    found, _ = call("inspect", cache)
    assert (
        found.items() >= {name: known[name] for name in known if name.startswith(("rows", "images", "split"))}.items()
    )
    assert found["32 px, 23 cases"] == read_manifest(cache).sizes[32].fingerprint
    sheet = cv2.imread(str(cache / "contact-sheet.png"))
    assert sheet is not None
    assert sheet.shape == (4 * 256, 6 * 256, 3)
    coloured = (sheet.astype(int).max(2) - sheet.min(2) > 60).reshape(4, 256, 6, 256).any((1, 3)).reshape(-1)
    assert coloured.tolist() == [number < 8 for number in range(24)], "the masks of the eight positive ones, first"


def test_command_warns_of_doubtful_groups_and_refuses_one_group_before_it_writes(small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    cache, patients = tmp_path / "cache", tmp_path / "patients.csv"
    build = [
        "preprocess",
        "--dicom",
        small_dataset.dicom,
        "--labels",
        small_dataset.labels,
        "--out",
        cache,
        "--size",
        32,
    ]
    ids = [line.split(",")[0] for line in small_dataset.patients.read_text().splitlines()[1:]]

    def call(patient_of: dict[str, str], *more: str) -> Result:
        patients.write_text("id,patient\n" + "".join(f"{name},{who}\n" for name, who in patient_of.items()))
        return CliRunner().invoke(cli, [*map(str, build), "--patients", str(patients), *more])

    one = call(dict.fromkeys(ids, "QX7"))
    assert one.exit_code == CatalogError.exit_code
    assert (
        "all 23 images with a label would be on one side of the split, as of one patient by patient map" in one.stderr
    )
    assert not cache.exists()
    half = call(dict.fromkeys(ids[:10], "QX7"))
    assert "warning: 10 of 23 images are of one patient by patient map, all on one side" in half.stderr
    assert "warning: 13 of 23 images have no patient by patient map" in half.stderr
    assert len(json.loads(call(dict.fromkeys(ids[:10], "QX7"), "--json").stdout)["doubts"]) == 2
