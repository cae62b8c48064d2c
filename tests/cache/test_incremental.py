"""A rerun of `preprocess` rewrites what changed and nothing else; rows and folds keep their places."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from cache_files import SIZES, Renewal, digests, folds_of, rows_of, shard_files, shard_names
from tiny_caches import column

from ptxdist.cache import render
from ptxdist.cache.catalog import read_catalog
from ptxdist.cache.manifest import read_manifest
from ptxdist.cache.preprocess import PreprocessResult, preprocess
from ptxdist.cache.store import ARRAYS, open_store
from ptxdist.cache.verify import verify
from ptxdist.dicom import syntax
from ptxdist.errors import CatalogError, StoreError
from ptxdist.locks import LOCK


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


def test_a_run_without_changes_writes_nothing_and_loads_no_decoder(renewal: Renewal) -> None:
    """Nothing but this keeps a rerun under a second: imports are most of its time."""
    before = {path: path.stat().st_mtime_ns for path in renewal.cache.rglob("*") if path.name != LOCK}
    options = ["--dicom", renewal.dicom, "--labels", renewal.labels, "--patients", renewal.patients]
    code = (
        "import sys; from ptxdist.cli import cli; cli(sys.argv[1:], standalone_mode=False);"
        "slow = {'pydicom', 'simplejpeg', 'imagecodecs', 'PIL.Image', 'pydantic', 'zarr', 'scipy', 'torch'};"
        "sys.exit(str(slow & set(sys.modules)) if slow & set(sys.modules) else 0)"
    )
    sizes = [option for size in SIZES for option in ("--size", size)]
    command = [sys.executable, "-c", code, "preprocess", *options, "--out", renewal.cache, *sizes]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing had to be done" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in renewal.cache.rglob("*") if path.name != LOCK} == before


def test_a_cache_of_other_images_is_replaced_only_on_purpose(renewal: Renewal, write_dicom) -> None:  # type: ignore[no-untyped-def]
    before = digests(renewal.cache)
    shutil.rmtree(renewal.dicom)
    for number in range(4):
        write_dicom(renewal.dicom / f"{number}.dcm", np.full((64, 64), 60 * number, np.uint8), f"1.2.9.{number}")
    renewal.labels.write_text("ImageId,EncodedPixels\n" + "".join(f"1.2.9.{number},-1\n" for number in range(4)))
    with pytest.raises(
        CatalogError, match=r"of its 300 cases 0 are in .*; give another folder with --out, or --replace"
    ):
        renewal.run(patients=None)
    assert digests(renewal.cache) == before
    assert len(renewal.run(patients=None, replace_other=True).catalog.labelled) == 4


def test_one_changed_label_rewrites_its_shard_alone(renewal: Renewal) -> None:
    before = folds_of(renewal.cache)
    renewal.relabel("1.2.3.10151,-1", "1.2.3.10151,0 64")
    assert renewal.changed() == shard_names(1)
    assert folds_of(renewal.cache) == before
    store = open_store(renewal.cache, 32)
    assert store.sample(151)[1][:, 0].tolist() == [128] * 32  # one column of 64 px is half of one of 32
    assert column(store, "has_mask")[151]
    assert column(store, "area_px")[151] == 64
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
        assert (column(store, "split")[150], column(store, "has_mask")[150]) == ("removed", False)
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

    monkeypatch.setattr("ptxdist.dicom.syntax.version", newer)
    syntax.decoder_of.cache_clear()
    try:
        assert renewal.changed() == shard_names(1)
        assert {case.decoder for case in read_catalog(renewal.cache).cases[130:131]} == {"pydicom 99.0"}
        assert renewal.changed() == set()
    finally:
        syntax.decoder_of.cache_clear()


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
    assert renewal.changed(lambda: renewal.run(replace_other=True)) == set()
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
    assert column(open_store(renewal.cache, 32), "split").tolist() == splits
    with pytest.raises(StoreError, match=r"48.zarr is not finished"):
        open_store(renewal.cache, 48)
    assert verify(renewal.cache, sizes_px=[32]) == []
    with pytest.raises(StoreError, match=r"48.zarr is not finished"):
        verify(renewal.cache)
    again = renewal.run(patients=None)
    assert again.written == 0
    assert column(open_store(renewal.cache, 48), "split").tolist() == splits


@pytest.mark.parametrize("content", [b"", b"x" * 32, None], ids=["empty", "other", "gone"])
def test_a_damaged_key_is_refused_and_put_back_or_replaced_on_demand(renewal: Renewal, content: bytes | None) -> None:
    """With another one, all hashes of patients would change."""
    path, rows, folds = renewal.cache / "salt", rows_of(renewal.cache), folds_of(renewal.cache)
    whole = path.read_bytes()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(CatalogError, match=r"salt is missing or damaged; .* put it back from a copy, .* --replace"):
        renewal.run()
    assert (path.read_bytes() if path.is_file() else None) == content
    renewal.run(replace_other=True)
    assert (rows_of(renewal.cache), folds_of(renewal.cache)) == (rows, folds)
    assert len(path.read_bytes()) == 32
    assert path.read_bytes() not in (whole, content)
    assert renewal.changed() == set()
