"""Near-duplicates of a cache are listed, and counted across the split."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
from cache_files import digests

from ptxdist.cache.duplicates import read_pairs
from ptxdist.cache.preprocess import preprocess
from ptxdist.phantoms.anatomy import pose
from ptxdist.phantoms.greys import draw_image


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory, write_dicom) -> tuple[Path, Path, set[frozenset[str]]]:  # type: ignore[no-untyped-def]
    """Twelve phantoms, three of them twice: encoded anew, brightened, resized; and which are pairs."""
    folder = tmp_path_factory.mktemp("copied")
    images = {}
    for number in range(12):
        rng = np.random.default_rng(number)
        images[f"1.4.{100 + number}"] = draw_image(rng, pose(rng, "PA"), np.zeros((1024, 1024), np.uint8))
    encoded = cv2.imencode(".jpg", images["1.4.100"], [cv2.IMWRITE_JPEG_QUALITY, 40])[1]
    copies = {
        "1.4.200": cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED),
        "1.4.201": np.rint(255 * (images["1.4.101"] / 255.0) ** (1 / 1.2)).astype(np.uint8),
        "1.4.202": cv2.resize(images["1.4.102"], (700, 700), interpolation=cv2.INTER_AREA),
    }
    for uid, image in {**images, **copies}.items():
        write_dicom(folder / "dicom" / f"{uid}.dcm", np.asarray(image, np.uint8), uid)
    labels = folder / "labels.csv"
    labels.write_text("ImageId,EncodedPixels\n" + "".join(f"{uid},-1\n" for uid in {**images, **copies}))
    return folder / "dicom", labels, {frozenset((uid, f"1.4.1{uid[-2:]}")) for uid in copies}


def test_copies_across_the_split_are_counted_and_listed(copied, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    dicom, labels, pairs = copied
    result = preprocess(dicom, labels, tmp_path / "cache", sizes_px=(128, 256), folds=2, seed=1)
    leakage, side = result.catalog.leakage, {case.case_id: case.split for case in result.catalog.cases}
    across = {pair for pair in pairs if len({side[uid] for uid in pair}) == 2}
    assert 1 <= len(across) < 3  # what the test needs to tell one from the other
    assert (leakage.near_duplicates, leakage.near_duplicates_shared) == (3, len(across))
    with open(tmp_path / "cache" / "near_duplicates.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {frozenset((row["ImageId"], row["other ImageId"])) for row in rows} == pairs
    assert set(map(frozenset, read_pairs(tmp_path / "cache"))) == pairs
    for row in rows:
        assert (row["split"], row["other split"]) == (side[row["ImageId"]], side[row["other ImageId"]])
        assert row["same group"] == "false"

    before = digests(tmp_path / "cache")
    again = preprocess(dicom, labels, tmp_path / "cache", sizes_px=(128, 256), folds=2, seed=1)
    assert again.catalog.leakage == leakage
    assert digests(tmp_path / "cache") == before


def test_copies_of_one_patient_are_on_one_side(copied, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    dicom, labels, pairs = copied
    patients = tmp_path / "patients.csv"
    patients.write_text("id,patient\n" + "".join(f"{uid},{min(pair)}\n" for pair in pairs for uid in pair))
    leakage = preprocess(dicom, labels, tmp_path / "cache", sizes_px=(64,), patients=patients).catalog.leakage
    assert (leakage.near_duplicates, leakage.near_duplicates_shared) == (3, 0)
    assert (tmp_path / "cache" / "near_duplicates.csv").read_text().count(",true") == 3


def test_different_images_are_no_pairs(many_cache, small_cache) -> None:  # type: ignore[no-untyped-def]
    for cache, result in (many_cache, small_cache):
        assert result.catalog.leakage.near_duplicates == 0
        assert (cache / "near_duplicates.csv").read_text().count("\n") == 1
