"""The cache: right px in every store, only what changed is made anew, nothing a kill or a bad file could spoil."""

from __future__ import annotations

import csv
import hashlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from click.testing import CliRunner

from ptxdist.cache import render
from ptxdist.cache.catalog import read_catalog
from ptxdist.cache.duplicates import read_pairs
from ptxdist.cache.manifest import read_manifest
from ptxdist.cache.preprocess import PreprocessResult, preprocess
from ptxdist.cache.store import ARRAYS, open_store, store_path
from ptxdist.cache.verify import verify
from ptxdist.cli import cli
from ptxdist.dicom import pixels
from ptxdist.errors import BusyError, CatalogError, LabelError, PtxdistError, StoreError
from ptxdist.labels import rle
from ptxdist.labels.tables import read_labels
from ptxdist.phantoms.anatomy import pose
from ptxdist.phantoms.greys import draw_image

Pixels = npt.NDArray[np.uint8]
SIZES = (32, 48)
SECRETS = ("Quagmire", "Zebulon", "QX7-HOSPITAL", "19391207", "MAPPED-PERSON")  # of conftest
FORKS = multiprocessing.get_context("forkserver")  # processes that start in no time, for those that are killed
FORKS.set_forkserver_preload(["ptxdist.cache.preprocess"])


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def shard_files(cache: Path) -> dict[str, tuple[int, str]]:
    """Time of writing, in ns, and content of each image and mask shard."""
    found = {}
    for array in ARRAYS:
        for path in cache.glob(f"*/{array}/c/*/0/0"):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[path.relative_to(cache).as_posix()] = path.stat().st_mtime_ns, digest
    return found


def shard_names(*shards: int, sizes: tuple[int, ...] = SIZES) -> set[str]:
    return {f"{size}.zarr/{array}/c/{shard}/0/0" for size in sizes for array in ARRAYS for shard in shards}


def rejects_of(cache: Path) -> dict[str, str]:
    with open(cache / "rejects.csv", newline="") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


def block_mean(pixels: npt.NDArray[Any], size: int) -> npt.NDArray[np.float64]:
    """Means of the blocks of a square image whose side is a multiple of `size`."""
    step = len(pixels) // size
    return np.asarray(pixels.reshape(size, step, size, step).mean(axis=(1, 3)))


def folds_of(cache: Path) -> dict[str, int]:
    return {case.case_id: case.fold for case in read_catalog(cache).labelled if case.case_id}


def rows_of(cache: Path) -> list[str]:
    return [case.case_id for case in read_catalog(cache).labelled]


@pytest.fixture(scope="session")
def many_cache(many_dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreprocessResult]:  # type: ignore[no-untyped-def]
    """Cache of `many_dataset` at 32 and 48 px, in three shards. Nothing may write to it."""
    out, data = tmp_path_factory.mktemp("many") / "cache", many_dataset
    return out, preprocess(data.dicom, data.labels, out, patients=data.patients, sizes_px=SIZES, workers=2)


class Renewal:
    """A copy of the cache of `many_dataset`, and copies of what it was made from, to be changed."""

    def __init__(self, cache: Path, data: Any, folder: Path) -> None:
        self.cache = Path(shutil.copytree(cache, folder / "cache"))
        self.dicom, self.labels, self.patients = folder / "dicom", folder / "labels.csv", folder / "patients.csv"
        self.dicom.mkdir()
        for path in data.dicom.iterdir():
            (self.dicom / path.name).symlink_to(path)
        shutil.copy(data.labels, self.labels)
        shutil.copy(data.patients, self.patients)

    def file(self, number: int) -> Path:
        return self.dicom / f"1.2.3.{10000 + number}.dcm"

    def lines(self) -> list[str]:
        return self.labels.read_text().splitlines(keepends=True)

    def relabel(self, old: str, new: str) -> None:
        text = self.labels.read_text()
        assert old in text
        self.labels.write_text(text.replace(old, new))

    def run(self, **options: Any) -> PreprocessResult:
        options = {"patients": self.patients, "sizes_px": SIZES, **options}
        return preprocess(self.dicom, self.labels, self.cache, **options)

    def changed(self, work: Callable[[], PreprocessResult] | None = None) -> set[str]:
        """Shard files that a run writes; the others keep their bytes and times, and the result counts right."""
        before = shard_files(self.cache)
        result = (work or self.run)()
        after = shard_files(self.cache)
        written = {name for name in after if after[name] != before.get(name)}
        assert len(written) == 2 * result.written
        assert result.written + result.reused == len(result.sizes_px) * -(-len(result.catalog.labelled) // 128)
        assert verify(self.cache) == []
        assert not [path for path in self.cache.rglob("*") if path.suffix in (".tmp", ".new")]
        assert read_catalog(self.cache) == result.catalog
        for size in result.sizes_px:
            store = open_store(self.cache, size)
            for name in ("case_id", "split", "fold", "area_px"):
                assert store.column(name).tolist() == [getattr(case, name) for case in result.catalog.labelled]
        return written


@pytest.fixture
def renewal(many_cache, many_dataset, tmp_path: Path) -> Renewal:  # type: ignore[no-untyped-def]
    return Renewal(many_cache[0], many_dataset, tmp_path)


# --- what is in it --------------------------------------------------------------------------------------------------


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


# --- only what changed --------------------------------------------------------------------------------------------


def test_nothing_changed_nothing_written(renewal: Renewal, many_cache) -> None:  # type: ignore[no-untyped-def]
    before = digests(renewal.cache)
    heard: list[tuple[str, int, int]] = []
    results: list[PreprocessResult] = []

    def again() -> PreprocessResult:
        results.append(renewal.run(sizes_px=(48, 32, 48), on_progress=lambda *step: heard.append(step), workers=2))
        return results[0]

    assert renewal.changed(again) == set()
    [result] = results
    assert (result.written, result.reused) == (0, 6)
    assert digests(renewal.cache) == before
    assert result.catalog == many_cache[1].catalog
    assert {step for step, _, _ in heard} == {"headers", "check of 32 px", "check of 48 px"}
    assert ("headers", 300, 300) in heard


def test_one_changed_label_rewrites_its_shard_alone(renewal: Renewal) -> None:
    before = folds_of(renewal.cache)
    renewal.relabel("1.2.3.10151,-1", "1.2.3.10151,0 64")
    assert renewal.changed() == shard_names(1)
    assert folds_of(renewal.cache) == before
    store = open_store(renewal.cache, 32)
    assert store.sample(151)[1][:, 0].tolist() == [128] * 32  # one column of 64 px is half of one of 32
    assert store.column("has_mask")[151]
    assert store.column("area_px")[151] == 64
    renewal.relabel("1.2.3.10151,0 64", "1.2.3.10151,-1")
    assert renewal.changed() == shard_names(1)
    assert not open_store(renewal.cache, 32).sample(151)[1].any()


def test_added_file_goes_to_the_end(renewal: Renewal, write_dicom) -> None:  # type: ignore[no-untyped-def]
    rows, folds = rows_of(renewal.cache), folds_of(renewal.cache)
    write_dicom(renewal.dicom / "0.dcm", np.full((64, 64), 200, np.uint8), "1.2.3.0")  # the first one by id and by name
    renewal.relabel("ImageId,EncodedPixels", "ImageId,EncodedPixels\n1.2.3.0,-1")
    assert renewal.changed() == shard_names(2)
    assert rows_of(renewal.cache) == [*rows, "1.2.3.0"]
    assert {**folds_of(renewal.cache), "1.2.3.0": -1} == {**folds, "1.2.3.0": -1}
    assert open_store(renewal.cache, 48).sample(300)[0].mean() == pytest.approx(200, abs=2)


def test_removed_case_leaves_a_row_of_zeros_and_nothing_else(renewal: Renewal) -> None:
    rows, folds, name = rows_of(renewal.cache), folds_of(renewal.cache), "1.2.3.10150"
    assert open_store(renewal.cache, 32).sample(150)[1].any()
    digest = next(case.digest for case in read_catalog(renewal.cache).cases if case.case_id == name)
    renewal.file(150).unlink()
    renewal.labels.write_text("".join(line for line in renewal.lines() if not line.startswith(name)))
    assert renewal.changed() == shard_names(1)
    assert rows_of(renewal.cache) == [row if row != name else "" for row in rows]
    assert folds_of(renewal.cache) == {case: fold for case, fold in folds.items() if case != name}
    for size in SIZES:
        store = open_store(renewal.cache, size)
        assert not any(sample.any() for sample in store.sample(150))
        assert (store.column("split")[150], store.column("has_mask")[150]) == ("removed", False)
        assert store.sample(149)[0].any()
    for path in renewal.cache.rglob("*"):
        assert path.is_dir() or not [word for word in (name, digest) if word.encode() in path.read_bytes()], path


def test_removed_case_that_comes_back_takes_its_free_row(renewal: Renewal, many_cache, write_dicom) -> None:  # type: ignore[no-untyped-def]
    before, content = shard_files(renewal.cache), renewal.file(20).readlink()
    renewal.file(20).unlink()
    renewal.run()
    renewal.file(20).symlink_to(content)
    assert renewal.changed() == shard_names(0)
    assert {name: digest for name, (_, digest) in shard_files(renewal.cache).items()} == {
        name: digest for name, (_, digest) in before.items()
    }
    assert rows_of(renewal.cache) == rows_of(many_cache[0])


def test_new_case_takes_the_row_of_a_removed_one(renewal: Renewal, write_dicom) -> None:  # type: ignore[no-untyped-def]
    renewal.file(20).unlink()
    renewal.run()
    write_dicom(renewal.dicom / "new.dcm", np.full((64, 64), 90, np.uint8), "1.2.3.77777")
    renewal.labels.write_text(renewal.labels.read_text() + "1.2.3.77777,-1\n")
    assert renewal.changed() == shard_names(0)
    assert rows_of(renewal.cache)[20] == "1.2.3.77777"
    assert len(rows_of(renewal.cache)) == 300


def test_changed_file_rewrites_its_shard_and_keeps_its_place(renewal: Renewal, write_dicom) -> None:  # type: ignore[no-untyped-def]
    rows, folds = rows_of(renewal.cache), folds_of(renewal.cache)
    renewal.file(130).unlink()
    write_dicom(renewal.file(130), np.full((64, 64), 77, np.uint8), "1.2.3.10130")
    assert renewal.changed() == shard_names(1)
    assert (rows_of(renewal.cache), folds_of(renewal.cache)) == (rows, folds)
    assert open_store(renewal.cache, 32).sample(130)[0].mean() == pytest.approx(77, abs=2)


def test_moved_file_writes_no_shard(renewal: Renewal) -> None:
    before = digests(renewal.cache)
    (renewal.dicom / "below").mkdir()
    shutil.move(renewal.file(130), renewal.dicom / "below" / "moved.dcm")
    assert renewal.changed() == set()
    differing = {name for name, digest in digests(renewal.cache).items() if digest != before[name]}
    assert differing == set()  # no path is written


def test_new_size_leaves_the_others_alone(renewal: Renewal) -> None:
    fingerprints = {size: entry.fingerprint for size, entry in read_manifest(renewal.cache).sizes.items()}
    assert renewal.changed(lambda: renewal.run(sizes_px=(16, 32))) == shard_names(0, 1, 2, sizes=(16,))
    assert {size: open_store(renewal.cache, size).cases for size in (16, 32, 48)} == {16: 300, 32: 300, 48: 300}
    assert {size: open_store(renewal.cache, size).fingerprint for size in SIZES} == fingerprints


def test_other_decoder_rewrites_the_shards_of_its_files(renewal: Renewal, write_dicom, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """All files are JPEG Baseline but one; a new version of what decodes that one concerns one shard."""
    renewal.file(130).unlink()
    write_dicom(renewal.file(130), np.full((64, 64), 77, np.uint8), "1.2.3.10130", raw=True)
    renewal.run()

    def newer(package: str) -> str:
        return "99.0" if package == "pydicom" else version(package)

    monkeypatch.setattr("ptxdist.dicom.pixels.version", newer)
    pixels.decoder_of.cache_clear()
    try:
        assert renewal.changed() == shard_names(1)
        assert {case.decoder for case in read_catalog(renewal.cache).cases[130:131]} == {"pydicom 99.0"}
        assert renewal.changed() == set()
    finally:
        pixels.decoder_of.cache_clear()


def test_other_transform_rewrites_all(renewal: Renewal, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: digest for name, (_, digest) in shard_files(renewal.cache).items()}
    monkeypatch.setattr(render, "TRANSFORM", render.TRANSFORM + 1)
    assert renewal.changed() == shard_names(0, 1, 2)
    assert {name: digest for name, (_, digest) in shard_files(renewal.cache).items()} == before
    assert renewal.changed() == set()


def test_more_than_a_quarter_removed_is_made_as_a_fresh_cache(renewal: Renewal, tmp_path: Path) -> None:
    folds = folds_of(renewal.cache)
    for number in range(0, 300, 2):
        renewal.file(number).unlink()
    renewal.changed()
    assert rows_of(renewal.cache) == [f"1.2.3.{10000 + number}" for number in range(1, 300, 2)]
    assert folds_of(renewal.cache).items() <= folds.items()  # of the split, though, nothing moves
    fresh = tmp_path / "fresh"
    preprocess(renewal.dicom, renewal.labels, fresh, patients=renewal.patients, sizes_px=SIZES)
    assert {name: digest for name, (_, digest) in shard_files(renewal.cache).items()} == {
        name: digest for name, (_, digest) in shard_files(fresh).items()
    }
    assert sorted(path.name for path in (renewal.cache / "32.zarr" / "image" / "c").iterdir()) == ["0", "1"]


def test_fewer_files_end_as_a_fresh_cache_would(renewal: Renewal, tmp_path: Path) -> None:
    """The last two shards go: what is left has its rows and, here, its folds as in a fresh cache."""
    for number in range(128, 300):
        renewal.file(number).unlink()
    assert renewal.changed() == set()
    for size in SIZES:
        names = {path.name for array in ARRAYS for path in (renewal.cache / f"{size}.zarr" / array / "c").iterdir()}
        assert names == {"0"}
        assert open_store(renewal.cache, size).cases == 128


def test_labels_that_come_and_go(renewal: Renewal) -> None:
    rows = rows_of(renewal.cache)
    line = next(line for line in renewal.lines() if line.startswith("1.2.3.10030,"))
    renewal.relabel(line, "")
    assert renewal.changed() == shard_names(0)
    [unlabelled] = [case for case in read_catalog(renewal.cache).cases if case.masks is None]
    assert (unlabelled.case_id, unlabelled.split, unlabelled.fold) == ("1.2.3.10030", "unlabelled", -1)
    assert rows_of(renewal.cache) == [row if row != "1.2.3.10030" else "" for row in rows]
    assert not open_store(renewal.cache, 32).sample(30)[0].any()
    renewal.labels.write_text(renewal.labels.read_text() + line)
    assert renewal.changed() == shard_names(0)
    assert rows_of(renewal.cache) == rows
    assert open_store(renewal.cache, 32).sample(30)[1].any()


def test_map_that_joins_two_patients_leaves_nothing_shared(renewal: Renewal) -> None:
    sides = {case.case_id: case.split for case in read_catalog(renewal.cache).labelled}
    first = {side: next(n for n in range(300) if sides[f"1.2.3.{10000 + n}"] == side) for side in ("val", "train")}
    number = {side: n // 2 for side, n in first.items()}  # of the patient
    text = renewal.patients.read_text()
    renewal.patients.write_text(text.replace(f",{number['val']}\n", f",{number['train']}\n"))
    assert renewal.changed() == set()  # the samples are the same, only the split is another
    catalog = read_catalog(renewal.cache)
    assert (catalog.leakage.groups, catalog.leakage.shared_cases, catalog.leakage.shared_positive) == (149, 0, 0)
    moved = {case.case_id for case in catalog.labelled if case.split != sides[case.case_id]}
    assert len(moved) == 2


def test_store_that_fits_the_new_split_no_more_is_not_trained_on(renewal: Renewal) -> None:
    """Without the patient map the split is another: the size that is not renewed must not be used with it."""
    renewal.run(patients=None, sizes_px=(32,))
    splits = [case.split for case in read_catalog(renewal.cache).labelled]
    assert open_store(renewal.cache, 32).column("split").tolist() == splits
    with pytest.raises(StoreError, match=r"48.zarr is not finished"):
        open_store(renewal.cache, 48)
    assert verify(renewal.cache, sizes_px=[32]) == []
    with pytest.raises(StoreError, match=r"48.zarr is not finished"):
        verify(renewal.cache)
    again = renewal.run(patients=None)
    assert again.written == 0
    assert open_store(renewal.cache, 48).column("split").tolist() == splits


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_shard_is_made_anew(small_cache, small_dataset, tmp_path: Path, damage: str) -> None:  # type: ignore[no-untyped-def]
    cache, data = Path(shutil.copytree(small_cache[0], tmp_path / "cache")), small_dataset
    before, path = digests(cache), store_path(cache, 64) / "mask" / "c" / "0" / "0" / "0"
    content = path.read_bytes()
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(content[:-9] if damage == "truncate" else bytes([content[0] ^ 1]) + content[1:])
    result = preprocess(data.dicom, data.labels, cache, patients=data.patients, sizes_px=(64, 96))
    assert (result.written, result.reused) == (1, 1)
    assert digests(cache) == before


@pytest.mark.parametrize(
    "name", ["catalog.jsonl", "missing.csv", "near_duplicates.csv", "rejects.csv", "64.zarr/zarr.json"]
)
def test_damaged_table_is_made_anew(small_cache, small_dataset, tmp_path: Path, name: str) -> None:  # type: ignore[no-untyped-def]
    """A digit that changes in the catalog would otherwise move a case to another fold for good."""
    cache, data = Path(shutil.copytree(small_cache[0], tmp_path / "cache")), small_dataset
    before, path = digests(cache), cache / name
    content = path.read_bytes()
    if name == "catalog.jsonl":
        assert b'"fold": 7' in content
        path.write_bytes(content.replace(b'"fold": 7', b'"fold": 0'))
        assert read_catalog(cache) != small_cache[1].catalog
    else:
        path.write_bytes(content[:-3])
    result = preprocess(data.dicom, data.labels, cache, patients=data.patients, sizes_px=(64, 96))
    assert (result.written, result.reused) == (0, 2)
    assert result.dealt_anew == (name == "catalog.jsonl")
    assert digests(cache) == before


def test_cache_of_a_former_schema_is_made_anew(small_cache, small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    cache, data = Path(shutil.copytree(small_cache[0], tmp_path / "cache")), small_dataset
    before = digests(cache)
    for name in ("manifest.json", "catalog.jsonl"):
        text = (cache / name).read_text()
        (cache / name).write_text(text.replace('"schema": 2', '"schema": 1', 1))
    result = preprocess(data.dicom, data.labels, cache, patients=data.patients, sizes_px=(64, 96))
    assert (result.written, result.reused) == (2, 0)
    assert digests(cache) == before


def test_cache_of_a_newer_schema_is_left_alone(small_cache, small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    cache, data = Path(shutil.copytree(small_cache[0], tmp_path / "cache")), small_dataset
    for name in ("manifest.json", "catalog.jsonl"):
        text = (cache / name).read_text()
        (cache / name).write_text(text.replace('"schema": 2', '"schema": 3', 1))
    before = digests(cache)
    with pytest.raises(StoreError, match="has schema 3, this ptxdist knows 2: update ptxdist"):
        preprocess(data.dicom, data.labels, cache, sizes_px=(64, 96))
    assert digests(cache) == before


def test_cache_below_the_images_is_not_taken_for_images(small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    dicom = Path(shutil.copytree(small_dataset.dicom, tmp_path / "dicom"))
    first = preprocess(dicom, small_dataset.labels, dicom / "cache", sizes_px=(32,))
    again = preprocess(dicom, small_dataset.labels, dicom / "cache", sizes_px=(32,))
    assert again.catalog == first.catalog
    assert (again.written, again.catalog.rejects, again.catalog.reconciliation.other_files) == (0, (), 0)


# --- interruption and company ---------------------------------------------------------------------------------------


def run_until(dicom: Path, labels: Path, patients: Path, out: Path, stop_at: int, log: Path) -> None:
    """In a process of its own: `preprocess`, killed before its `stop_at`-th operation on files below `out`.

    `log` gets a line for each operation, and at the end the word "done".
    """
    done = 0
    with open(log, "w", buffering=1) as file:

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal done
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(out) in str(arguments[0]):
                done += 1
                if done == stop_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                file.write(f"{event} {' '.join(map(str, arguments[:2]))}\n")

        sys.addaudithook(watch)
        preprocess(dicom, labels, out, patients=patients, sizes_px=SIZES)
        file.write("done\n")


def killed_run(renewal: Renewal, stop_at: int = 0, after_s: float = 60.0) -> list[str]:
    """Log of a run that is killed at one of these moments, if it is not over before."""
    log = renewal.cache.with_name("log")
    paths = (renewal.dicom, renewal.labels, renewal.patients, renewal.cache)
    process = FORKS.Process(target=run_until, args=(*paths, stop_at, log))
    process.start()
    process.join(after_s)
    process.kill()
    process.join()
    lines = log.read_text().splitlines() if log.is_file() else []
    assert process.exitcode == (0 if lines[-1:] == ["done"] else -signal.SIGKILL)
    return lines


def first_removal_of_the_former(log: list[str]) -> int:
    """Number of the operation by which the former store may begin to be replaced: the last manifest before it."""
    placed = next(n for n, line in enumerate(log) if line.startswith("os.rename") and line.split()[1].endswith(".new"))
    return max(n for n in range(placed) if log[n].startswith("os.rename") and "manifest.json" in log[n])


def moments(log: list[str], count: int, seed: int) -> list[int]:
    """Numbers of operations of a whole run, one from each of `count` equal parts."""
    number, total = random.Random(seed), len(log)
    return [number.randint(1 + part * total // count, (part + 1) * total // count) for part in range(count)]


@pytest.mark.slow
def test_first_build_killed_at_any_moment_ends_in_the_same_bytes(many_cache, many_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    build = Renewal(many_cache[0], many_dataset, tmp_path)
    expected = digests(many_cache[0])

    def reset() -> None:
        shutil.rmtree(build.cache)
        build.cache.mkdir()
        shutil.copy(many_cache[0] / "salt", build.cache)  # the hashes in the cache depend on it

    reset()
    started = time.monotonic()
    log = killed_run(build)
    whole_s = time.monotonic() - started
    assert log[-1] == "done"
    assert digests(build.cache) == expected
    kills: list[dict[str, Any]] = [{"stop_at": moment} for moment in moments(log, 6, seed=1)]
    kills += [{"after_s": random.Random(2).uniform(0, whole_s)}]
    for kill in kills:
        reset()
        killed_run(build, **kill)
        if not read_manifest(build.cache).sizes.get(48) or not read_manifest(build.cache).sizes[48].complete:
            with pytest.raises(StoreError):
                open_store(build.cache, 48)
        killed_run(build, stop_at=40)  # and once more, soon after its start
        build.run()
        assert digests(build.cache) == expected, kill


@pytest.mark.slow
def test_renewal_killed_at_any_moment_keeps_the_old_or_ends_in_the_new(renewal: Renewal, tmp_path: Path) -> None:
    """Until all that is new has been written, the store that was there is there; then it says that it is unfinished."""
    former = Path(shutil.copytree(renewal.cache, tmp_path / "former"))
    images = {size: [image.copy() for image in open_store(former, size).images] for size in SIZES}
    renewal.relabel("1.2.3.10001,-1", "1.2.3.10001,0 64")
    renewal.relabel("1.2.3.10151,-1", "1.2.3.10151,0 64")
    renewal.file(290).unlink()
    started = time.monotonic()
    log = killed_run(renewal)
    whole_s = time.monotonic() - started
    expected, begun = digests(renewal.cache), first_removal_of_the_former(log)
    assert expected != digests(former)
    before, after = moments(log[:begun], 4, seed=3), [begun + moment for moment in moments(log[begun:], 5, seed=4)]
    kills: list[dict[str, Any]] = [{"stop_at": moment} for moment in (*before, begun, *after)]
    kills += [{"after_s": random.Random(5).uniform(0, whole_s)}]
    readable, refusals = 0, set()
    for kill in kills:
        shutil.rmtree(renewal.cache)
        shutil.copytree(former, renewal.cache)
        log = killed_run(renewal, **kill)
        try:
            assert verify(renewal.cache) == [], kill
            if len(log) <= begun:
                readable += 1
                for size in SIZES:
                    store = open_store(renewal.cache, size)
                    assert all(map(np.array_equal, store.images, images[size]))
                    assert not store.sample(1)[1].any()
        except StoreError as error:
            said = str(error)
            assert len(log) > begun, (kill, said)
            refusals.add(said.removeprefix(str(renewal.cache)))
        renewal.run()
        assert digests(renewal.cache) == expected, kill
    assert readable >= 5
    assert refusals == {"/32.zarr is not finished; run `ptxdist preprocess` again"}


@pytest.mark.slow
def test_killed_while_only_tables_are_renewed_the_cache_stays_whole(renewal: Renewal, tmp_path: Path) -> None:
    """The stores need nothing; a table that is new already must not look like a damaged one."""
    former = Path(shutil.copytree(renewal.cache, tmp_path / "former"))
    renewal.labels.write_text(renewal.labels.read_text() + "1.2.3.55555,-1\n")  # an id without a file
    log = killed_run(renewal)
    expected = digests(renewal.cache)
    renewed = [n for n, line in enumerate(log) if line.startswith("os.rename") and line.split()[1].endswith(".tmp")]
    assert len(renewed) == 5  # the manifest, three tables, and the manifest
    for moment in renewed:
        shutil.rmtree(renewal.cache)
        shutil.copytree(former, renewal.cache)
        killed_run(renewal, stop_at=moment + 2)  # after that one
        assert verify(renewal.cache) == []
        assert open_store(renewal.cache, 48).cases == 300
        renewal.run()
        assert digests(renewal.cache) == expected


@pytest.mark.slow
@pytest.mark.parametrize("event", [".tmp", ".new"])
def test_change_that_is_taken_back_after_a_kill_leaves_nothing(renewal: Renewal, tmp_path: Path, event: str) -> None:
    former = Path(shutil.copytree(renewal.cache, tmp_path / "former"))
    before = digests(former)
    renewal.relabel("1.2.3.10151,-1", "1.2.3.10151,0 64")
    log = killed_run(renewal)
    moment = next(n for n, line in enumerate(log) if line.startswith("open") and line.split()[1].endswith("/1/0/0.tmp"))
    if event == ".new":
        moment = next(n for n, line in enumerate(log) if n > moment and "manifest.json.tmp" in line)
    shutil.rmtree(renewal.cache)
    shutil.copytree(former, renewal.cache)
    killed_run(renewal, stop_at=moment + 2)
    assert list(renewal.cache.rglob(f"*/1/0/0{event}"))
    renewal.relabel("1.2.3.10151,0 64", "1.2.3.10151,-1")
    assert renewal.changed() == set()
    assert digests(renewal.cache) == before


def start(data: Any, out: Path, workers: int = 2) -> subprocess.Popen[bytes]:
    """`preprocess` in a process group of its own."""
    call = (
        "from pathlib import Path; from ptxdist.cache.preprocess import preprocess; "
        f"preprocess(Path({str(data.dicom)!r}), Path({str(data.labels)!r}), Path({str(out)!r}), "
        f"patients=Path({str(data.patients)!r}), sizes_px=(32, 48), workers={workers})"
    )
    return subprocess.Popen([sys.executable, "-c", call], start_new_session=True, stderr=subprocess.DEVNULL)


def group_alive(group: int) -> list[str]:
    """Processes of a group that still run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, member = status.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(member) == group and state != "Z":
            found.append(status.parent.name)
    return found


def wait_for(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_beside_its_workers_it_leaves_none_of_them(many_dataset, many_cache, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Or they would write beside the next run, which is to end in the same bytes."""
    out = tmp_path / "cache"
    out.mkdir()
    shutil.copy(many_cache[0] / "salt", out)  # groups are hashed with it
    running = start(many_dataset, out)
    wait_for(lambda: list(out.glob("*/image/c/*/0/0.*")) or running.poll() is not None)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    try:
        wait_for(lambda: not group_alive(running.pid))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    assert start(many_dataset, out).wait() == 0
    assert digests(out) == digests(many_cache[0])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 5 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can be mounted by root only")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_full_disk_leaves_the_old_store_and_the_next_run_ends_well(renewal: Renewal, small_disk: Path) -> None:
    """Two stores of 32 and 48 px take 2 MB; that of 128 px has no room."""
    shutil.copytree(renewal.cache, small_disk / "cache")
    renewal.run(sizes_px=(*SIZES, 128))
    expected, renewal.cache = digests(renewal.cache), small_disk / "cache"
    before = digests(renewal.cache)
    with pytest.raises(StoreError, match=r"writing stopped: No space left on device; what is finished stays") as caught:
        renewal.run(sizes_px=(*SIZES, 128))
    assert caught.value.exit_code == 7
    assert not list(renewal.cache.rglob("*.tmp"))
    assert verify(renewal.cache, sizes_px=SIZES) == []
    now = digests(renewal.cache)
    assert {name: now[name] for name in before if name != "manifest.json"} == {
        name: digest for name, digest in before.items() if name != "manifest.json"
    }
    assert [open_store(renewal.cache, size).cases for size in SIZES] == [300, 300]
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    renewal.run(sizes_px=(*SIZES, 128))
    assert digests(renewal.cache) == expected


def run_with_small_files(dicom: Path, labels: Path, out: Path, limit_bytes: int, answer: Any) -> None:
    """In a process of its own: `preprocess` where no file may be longer than so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    try:
        preprocess(dicom, labels, out, sizes_px=(64,))
        answer.put("no error")
    except PtxdistError as error:
        answer.put(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("limit_bytes", [5_000, 80_000])
def test_write_that_fails_at_any_length_stops_with_a_sentence(small_dataset, tmp_path: Path, limit_bytes: int) -> None:  # type: ignore[no-untyped-def]
    """As a full disk, where nobody may mount one; the shards have 94 kB, the catalog 9."""
    out, data, answer = tmp_path / "cache", small_dataset, FORKS.Queue()
    process = FORKS.Process(target=run_with_small_files, args=(data.dicom, data.labels, out, limit_bytes, answer))
    process.start()
    message = answer.get(timeout=60)
    process.join()
    assert message == (
        f"StoreError: {out}: writing stopped: File too large; what is finished stays, "
        "and the same command goes on from there"
    )
    assert not list(out.rglob("*.tmp"))
    result = preprocess(data.dicom, data.labels, out, sizes_px=(64,))
    assert (result.written, verify(out)) == (1, [])


def test_second_run_on_the_same_cache_is_refused(small_cache, small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    cache, data = Path(shutil.copytree(small_cache[0], tmp_path / "cache")), small_dataset
    before = digests(cache)
    hold = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(cache / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout
        holder.stdout.readline()
        with pytest.raises(
            BusyError, match=r"another `ptxdist preprocess` is writing to .*cache; wait for it"
        ) as caught:
            preprocess(data.dicom, data.labels, cache, sizes_px=(32,))
        assert caught.value.exit_code == 12
        holder.communicate()
    assert digests(cache) == before


def test_run_holds_the_cache_from_its_first_moment(renewal: Renewal) -> None:
    """Not only when it writes: what it has read of the cache must still be so."""
    refused: list[str] = []

    def run_beside(step: str, done: int, total: int) -> None:
        with pytest.raises(BusyError) as caught:
            renewal.run()
        refused.append(step)
        assert "another `ptxdist preprocess`" in str(caught.value)

    renewal.run(on_progress=run_beside)
    assert {"headers", "check of 32 px"} <= set(refused)
    assert renewal.changed() == set()


def test_key_of_no_bytes_is_replaced(renewal: Renewal) -> None:
    """As a loss of power may leave it."""
    (renewal.cache / "salt").write_bytes(b"")
    rows, folds = rows_of(renewal.cache), folds_of(renewal.cache)
    assert renewal.changed() == set()
    assert (rows_of(renewal.cache), folds_of(renewal.cache)) == (rows, folds)
    assert len((renewal.cache / "salt").read_bytes()) == 32


def test_run_that_began_before_another_made_the_cache_is_refused(small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Its groups are hashed with a salt of its own."""
    data, out = small_dataset, tmp_path / "cache"

    def other_run(step: str, done: int, total: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "salt").write_bytes(b"of the other run")

    with pytest.raises(BusyError, match="run the command again"):
        preprocess(data.dicom, data.labels, out, sizes_px=(32,), on_progress=other_run)


def test_folder_that_cannot_be_written_to_stops_with_a_sentence(small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "cache"
    out.mkdir()
    (out / "32.zarr").write_text("a file where a folder has to be")
    with pytest.raises(StoreError, match=r"writing stopped: .*; what is finished stays") as caught:
        preprocess(small_dataset.dicom, small_dataset.labels, out, sizes_px=(32,))
    assert caught.value.exit_code == 7


# --- bad files ----------------------------------------------------------------------------------------------------


def test_bad_files_become_rejects_and_stop_nothing(small_dataset, tmp_path: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    dicom = Path(shutil.copytree(small_dataset.dicom, tmp_path / "dicom"))
    files = sorted(dicom.rglob("*.dcm"))
    content = files[1].read_bytes()
    files[1].write_bytes(content[: len(content) // 2])  # a positive or negative case: its header is whole
    (dicom / "empty.dcm").touch()
    for number in range(10):  # so that three of 36 are less than a tenth
        write_dicom(dicom / f"more{number}.dcm", np.zeros((32, 32), np.uint8), f"2.{number}")
    (dicom / "text.dcm").write_text("not DICOM")
    out = tmp_path / "cache"
    result = preprocess(dicom, small_dataset.labels, out, sizes_px=(32, 48))
    truncated = files[1].relative_to(dicom).as_posix()
    found = rejects_of(out)  # test_dicom has the reasons in full
    assert set(found) == {"empty.dcm", "text.dcm", truncated}
    for name, reason in (("empty.dcm", "is empty"), ("text.dcm", "is not a DICOM file"), (truncated, "is cut off")):
        assert found[name].startswith(reason)
    assert {reject.path: reject.reason for reject in result.catalog.rejects} == rejects_of(out)
    [rejected] = [case for case in read_catalog(out).cases if case.split == "rejected"]
    assert (result.catalog.paths[rejected.case_id], rejected.fold) == (truncated, -1)
    store = open_store(out, 48)
    index = store.column("case_id").tolist().index(rejected.case_id)
    assert Counter(store.column("split").tolist())["rejected"] == 1
    assert store.column("split")[index] == "rejected"
    assert not store.sample(index)[0].any()
    assert result.catalog.sides()["rejected"]["cases"] == 1

    before = digests(out)
    sides = result.catalog.sides()  # a rejected case is on neither
    assert result.catalog.leakage.val_cases == sides["val"]["cases"]

    again = preprocess(dicom, small_dataset.labels, out, sizes_px=(32, 48))
    assert (again.written, again.catalog.rejects) == (0, result.catalog.rejects)
    assert digests(out) == before
    files[1].write_bytes(content)
    mended = preprocess(dicom, small_dataset.labels, out, sizes_px=(32, 48))
    assert mended.written == 2
    assert truncated not in rejects_of(out)
    assert open_store(out, 48).sample(index)[0].any()


def test_file_that_changes_meanwhile_is_tried_again_by_the_next_run(small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    dicom, out = Path(shutil.copytree(small_dataset.dicom, tmp_path / "dicom")), tmp_path / "cache"
    path = min(dicom.rglob("*.dcm"))
    content = path.read_bytes()

    def take_away(step: str, done: int, total: int) -> None:
        if (step, done) == ("headers", total):
            path.unlink()

    result = preprocess(dicom, small_dataset.labels, out, sizes_px=(32,), on_progress=take_away)
    assert [reject.reason for reject in result.catalog.rejects] == ["cannot be read: No such file or directory"]
    path.write_bytes(content)
    again = preprocess(dicom, small_dataset.labels, out, sizes_px=(32,))
    assert (again.written, again.catalog.rejects) == (1, ())
    assert open_store(out, 32).sample(0)[0].any()


@pytest.mark.parametrize("damage", ["header", "pixels"])
def test_too_many_rejects_are_an_error_that_shows_the_first(small_dataset, tmp_path: Path, damage: str) -> None:  # type: ignore[no-untyped-def]
    dicom, out = Path(shutil.copytree(small_dataset.dicom, tmp_path / "dicom")), tmp_path / "cache"
    for path in sorted(dicom.rglob("*.dcm"))[:3]:
        path.write_bytes(path.read_bytes()[: 200 if damage == "header" else -500])
    with pytest.raises(CatalogError) as caught:
        preprocess(dicom, small_dataset.labels, out, sizes_px=(32,))
    assert str(caught.value).startswith("3 of 24 files cannot be used, more than a tenth; the reasons are in ")
    assert str(out / "rejects.csv") in str(caught.value)
    assert "is cut off" in str(caught.value)
    assert caught.value.exit_code == 6
    assert len(rejects_of(out)) == 3
    assert (out / "32.zarr").exists() == (damage == "pixels")
    with pytest.raises(StoreError):
        open_store(out, 32)


@pytest.mark.parametrize("wrong", ["images", "labels", "patients"])
def test_wrong_input_is_refused_before_anything_is_written(small_dataset, tmp_path: Path, wrong: str) -> None:  # type: ignore[no-untyped-def]
    paths = {"images": small_dataset.dicom, "labels": small_dataset.labels, "patients": small_dataset.patients}
    paths[wrong] = tmp_path / "nowhere"
    with pytest.raises((CatalogError, LabelError), match="nowhere"):
        preprocess(out=tmp_path / "cache", sizes_px=(32,), **paths)
    assert not (tmp_path / "cache").exists()


def test_renewal_with_too_many_rejects_leaves_the_cache_to_be_trained_on(renewal: Renewal) -> None:
    """Such as after a wrong --dicom; rejects.csv then has the reasons, and everything else is as it was."""
    before = digests(renewal.cache)
    for number in range(40):
        renewal.file(number).unlink()
        renewal.file(number).touch()
    with pytest.raises(CatalogError, match="40 of 300 files cannot be used"):
        renewal.run()
    assert len(rejects_of(renewal.cache)) == 40
    assert verify(renewal.cache) == []
    now = digests(renewal.cache)
    assert {name for name in before if now[name] != before[name]} == {"rejects.csv", "manifest.json"}
    assert open_store(renewal.cache, 32).cases == 300


# --- what a person is told ------------------------------------------------------------------------------------------


def test_command_tells_what_there_is_and_warns_where_patients_are_not_known(small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data, cache = small_dataset, tmp_path / "cache"
    build = ["preprocess", "--dicom", data.dicom, "--labels", data.labels, "--out", cache, "--size", 32]

    def call(*arguments: object) -> tuple[dict[str, str], str]:
        done = CliRunner().invoke(cli, list(map(str, arguments)))
        assert done.exit_code == 0, done.output
        cells = [line.strip("│ ").split("│") for line in done.stdout.splitlines() if line.startswith("│")]
        return {name.strip(): value.strip() for name, value in cells}, done.stderr

    shown, said = call(*build)
    assert (shown["table: rows"], shown["table: images"]) == ("27", "25")
    assert (shown["images: labelled"], shown["images: without a row, unlabelled"]) == ("23", "1")
    assert shown["table: dialect of the masks"] == "relative-columns (not proven)"
    assert "warning: PatientID groups nothing" in said
    assert "warning: the masks are read as relative-columns: " in said
    assert "1 shards written, 0 kept" in said
    assert "nothing had to be done" in call(*build)[1]
    known, said = call(*build, "--patients", data.patients)
    assert known["groups by patient map"] == "12 (8 with a positive)"
    assert "PatientID" not in said
    found, _ = call("inspect", cache)
    assert (
        found.items() >= {name: known[name] for name in known if name.startswith(("table", "images", "split"))}.items()
    )
    assert found["32 px, 23 cases"] == read_manifest(cache).sizes[32].fingerprint
    sheet = cv2.imread(str(cache / "contact-sheet.png"))
    assert sheet is not None
    assert sheet.shape == (4 * 256, 6 * 256, 3)
    coloured = (sheet.astype(int).max(2) - sheet.min(2) > 60).reshape(4, 256, 6, 256).any((1, 3)).reshape(-1)
    assert coloured.tolist() == [number < 8 for number in range(24)], "the masks of the eight positive ones, first"


# --- near-duplicates ------------------------------------------------------------------------------------------------


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


# --- privacy ------------------------------------------------------------------------------------------------------


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
    assert all("Quagmire_Zebulon" in path for path in small_cache[1].catalog.paths.values())
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
