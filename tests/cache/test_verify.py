"""Verify: a whole cache has no damage, a flipped byte in any of its files is found, and what can be mended is."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from ptxdist.cache.catalog import read_catalog
from ptxdist.cache.manifest import read_manifest, write_manifest
from ptxdist.cache.preprocess import exclusive, preprocess
from ptxdist.cache.store import ARRAYS, open_store, shard_path, store_path
from ptxdist.cache.verify import Damage, refuse_damaged, repair, verify, verify_source
from ptxdist.cli import cli
from ptxdist.errors import BusyError, StoreError
from ptxdist.executor import processes

TABLES = ["catalog.jsonl", "missing.csv", "near_duplicates.csv", "rejects.csv", "salt"]
SUM = "has another checksum than when it was written"


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.fixture
def cache(small_cache, tmp_path: Path) -> Path:  # type: ignore[no-untyped-def]
    """A copy of the cache of `small_dataset`, at 64 and 96 px."""
    return Path(shutil.copytree(small_cache[0], tmp_path / "cache"))


@pytest.fixture
def dicom(small_dataset, tmp_path: Path) -> Path:  # type: ignore[no-untyped-def]
    return Path(shutil.copytree(small_dataset.dicom, tmp_path / "dicom"))


def image_64(cache: Path) -> Path:
    return shard_path(store_path(cache, 64), "image", 0)


def flip_row(cache: Path, *rows: int) -> list[str]:
    """Flip a bit of these images of 64 px; the ids of their cases."""
    for row in rows:
        flip(image_64(cache), row * 64 * 64 + 100)
    return [read_catalog(cache).labelled[row].case_id for row in rows]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


# --- every byte -----------------------------------------------------------------------------------------------------


def test_whole_cache_has_no_damage(small_cache, many_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    heard: list[tuple[str, int, int]] = []
    assert verify(small_cache[0], on_progress=lambda *step: heard.append(step)) == []
    assert heard == [("64 px", 1, 1), ("96 px", 1, 1)]
    preprocess(many_dataset.dicom, many_dataset.labels, tmp_path / "many", sizes_px=(32,))
    assert verify(tmp_path / "many") == []


def test_every_file_of_a_cache_is_checked(small_cache) -> None:  # type: ignore[no-untyped-def]
    """Beside the lock, which is empty, the manifest, which has its own checksum, and the shards, which it lists."""
    cache = small_cache[0]
    shards = {shard_path(store_path(cache, size), array, 0).relative_to(cache) for size in (64, 96) for array in ARRAYS}
    others = {path.relative_to(cache) for path in cache.rglob("*") if path.is_file()} - shards
    expected = {path.as_posix() for path in others} - {".lock", "manifest.json"}
    assert set(read_manifest(cache).files) == expected
    assert set(TABLES) < expected
    assert {f"64.zarr/{name}/zarr.json" for name in ("image", "mask", "case_id", "fold")} < expected
    assert {f"96.zarr/{name}/c/0" for name in ("case_id", "split", "has_mask", "area_px")} < expected


def test_flipped_byte_in_any_file_is_found(cache: Path) -> None:
    """One place of each file: the first and the last one in turn, then one by chance."""
    number = random.Random(0)
    files = [path for path in sorted(cache.rglob("*")) if path.is_file() and path.name != ".lock"]
    assert len(files) > 40
    for index, path in enumerate(files):
        name, size = path.relative_to(cache).as_posix(), path.stat().st_size
        assert size > 0
        place = [0, size - 1, number.randrange(size)][index % 3]
        flip(path, place)
        if name == "manifest.json":
            with pytest.raises(StoreError, match=r"manifest.json is damaged|manifest.json has schema"):
                verify(cache)
        else:
            assert name in {damage.path for damage in verify(cache)}, (name, place)
        flip(path, place)
    assert verify(cache) == []


def test_damaged_samples_are_named_by_their_cases(cache: Path) -> None:
    names = flip_row(cache, 3, 11)
    assert verify(cache) == [Damage("64.zarr/image/c/0/0/0", SUM, tuple(names))]
    path = shard_path(store_path(cache, 96), "mask", 0)
    path.write_bytes(path.read_bytes()[:-1])
    everyone = tuple(case.case_id for case in read_catalog(cache).labelled)
    assert verify(cache)[1:] == [Damage("96.zarr/mask/c/0/0/0", "is damaged", everyone)]


def test_mask_that_should_be_empty_is_found_too(cache: Path) -> None:
    """It is a hole in the file, and still has a checksum."""
    row = next(row for row, case in enumerate(read_catalog(cache).labelled) if not case.masks)
    flip(shard_path(store_path(cache, 96), "mask", 0), row * 96 * 96 + 7)
    [damage] = verify(cache)
    assert damage.cases == (read_catalog(cache).labelled[row].case_id,)


@pytest.mark.parametrize("name", [*TABLES, "64.zarr/zarr.json", "96.zarr/fold/c/0", "96.zarr/mask/c/0/0/0"])
def test_missing_file_is_found(cache: Path, name: str) -> None:
    (cache / name).unlink()
    assert (name, "is missing") in {(damage.path, damage.reason) for damage in verify(cache)}


def test_damage_of_one_size_does_not_concern_another(cache: Path) -> None:
    flip_row(cache, 0)
    flip(cache / "64.zarr" / "zarr.json", 5)
    assert verify(cache, sizes_px=[96]) == []
    assert {damage.path for damage in verify(cache, sizes_px=[64])} == {"64.zarr/zarr.json", "64.zarr/image/c/0/0/0"}


def test_catalog_of_another_cache_is_found(cache: Path, many_cache_catalog: Path) -> None:
    shutil.copy(many_cache_catalog, cache / "catalog.jsonl")
    assert Damage("catalog.jsonl", SUM) in verify(cache)


@pytest.fixture(scope="module")
def many_cache_catalog(many_dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    out = tmp_path_factory.mktemp("other") / "cache"
    preprocess(many_dataset.dicom, many_dataset.labels, out, sizes_px=(32,))
    return out / "catalog.jsonl"


def test_what_is_no_finished_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    for check in (verify, lambda path: repair(path, None)):
        with pytest.raises(StoreError, match=r"nowhere is not a ptxdist cache .* make one with `ptxdist preprocess`"):
            check(tmp_path / "nowhere")
        assert not (tmp_path / "nowhere").exists()
    with pytest.raises(StoreError, match="has no store of 128 px; make it with"):
        verify(cache, sizes_px=[128])
    manifest = read_manifest(cache)
    manifest.sizes[96] = replace(manifest.sizes[96], complete=False)
    write_manifest(cache, manifest)
    with pytest.raises(StoreError, match=r"96.zarr is not finished; rerun `ptxdist preprocess`"):
        verify(cache)
    assert verify(cache, sizes_px=[64]) == []


# --- against the source -----------------------------------------------------------------------------------------------


def test_source_that_is_unchanged_or_moved_is_right(cache: Path, dicom: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    assert verify_source(cache, dicom, on_progress=lambda *step: heard.append(step)) == []
    assert heard[-1] == ("source", 23, 23)
    first, second, *_ = sorted(dicom.rglob("*.dcm"))
    shutil.move(first, dicom / "elsewhere.dcm")
    shutil.move(second, second.with_name("other name"))
    with processes(2) as executor:
        assert verify_source(cache, dicom, executor=executor) == []


def test_changed_and_removed_source_files_are_named(cache: Path, dicom: Path, write_dicom) -> None:  # type: ignore[no-untyped-def]
    files = sorted(dicom.rglob("*.dcm"))
    files[0].unlink()
    write_dicom(files[5], np.zeros((64, 64), np.uint8), files[5].stem)
    expected = {path.stem: "its file is gone or was changed" for path in (files[0], files[5])}
    assert {damage.cases[0]: damage.reason for damage in verify_source(cache, dicom)} == expected


def test_code_that_gives_other_samples_is_found(cache: Path, dicom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an update of a decoder that nobody counted."""
    monkeypatch.setattr("ptxdist.cache.render.fit_square", lambda pixels: np.ascontiguousarray(np.rot90(pixels)))
    found = {damage.cases[0]: damage.reason for damage in verify_source(cache, dicom)}
    assert set(found) == {case.case_id for case in read_catalog(cache).labelled}
    assert all(reason.startswith("its file gives another ") for reason in found.values())


# --- mending ----------------------------------------------------------------------------------------------------------


def _break_shards(cache: Path) -> None:
    flip_row(cache, 0, 22)
    shard_path(store_path(cache, 96), "image", 0).unlink()
    shard_path(store_path(cache, 96), "mask", 0).write_bytes(b"")


def _break_metadata(cache: Path) -> None:
    flip(cache / "64.zarr" / "zarr.json", 30)
    flip(cache / "96.zarr" / "image" / "zarr.json", 30)
    (cache / "96.zarr" / "case_id" / "c" / "0").unlink()


@pytest.mark.parametrize(("damage", "needs_source"), [(_break_shards, True), (_break_metadata, False)])
def test_repair_gives_back_the_same_bytes(
    cache: Path, dicom: Path, damage: Callable[[Path], None], needs_source: bool
) -> None:
    before = digests(cache)
    damage(cache)
    found = verify(cache)
    assert len(found) >= 3
    if needs_source:
        now = digests(cache)
        with pytest.raises(StoreError, match=r"1 shards are damaged; give the image files with --source"):
            repair(cache, None)
        assert digests(cache) == now
    shutil.move(min(dicom.rglob("*.dcm")), dicom / "moved.dcm")
    assert repair(cache, dicom if needs_source else None) == found
    assert digests(cache) == before
    assert verify(cache) == []


def test_repair_of_a_whole_cache_changes_nothing(cache: Path) -> None:
    before = digests(cache)
    assert repair(cache, None) == []
    assert digests(cache) == before


@pytest.mark.parametrize("name", TABLES)
def test_what_only_preprocess_can_make_is_left_to_it(cache: Path, small_dataset, name: str) -> None:  # type: ignore[no-untyped-def]
    before = digests(cache)
    flip(cache / name, (cache / name).stat().st_size // 2)
    damaged = digests(cache)
    with pytest.raises(StoreError, match=f"{name} cannot be repaired from the rest; rerun `ptxdist preprocess`"):
        repair(cache, small_dataset.dicom)
    assert digests(cache) == damaged
    data = small_dataset
    preprocess(data.dicom, data.labels, cache, patients=data.patients, sizes_px=(64, 96), replace_other=name == "salt")
    assert verify(cache) == []
    if name != "salt":  # with another key, the hashes are others
        assert digests(cache) == before


def test_repair_from_files_that_are_no_longer_the_same_changes_nothing(cache: Path, dicom: Path) -> None:
    flip_row(cache, 2)
    before = digests(cache)
    min(dicom.rglob("*.dcm")).unlink()
    with pytest.raises(StoreError, match=r"64.zarr: the files given with --source give another shard 0; rerun"):
        repair(cache, dicom)
    assert digests(cache) == before


def test_repair_does_not_work_beside_another_run(cache: Path) -> None:
    with exclusive(cache), pytest.raises(BusyError):
        repair(cache, None)


def test_repair_on_a_full_disk_is_a_refusal(cache: Path, dicom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip_row(cache, 2)
    before = digests(cache)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StoreError, match="writing stopped: No space left on device"):
        repair(cache, dicom)
    assert digests(cache) == before


# --- before a training, and on the command line ---------------------------------------------------------------------


def test_training_is_refused_with_file_case_and_remedy(cache: Path) -> None:
    refuse_damaged(cache, [64, 96])
    names = flip_row(cache, 4, 5, 6, 7)
    refuse_damaged(cache, [96])
    with pytest.raises(StoreError) as caught:
        refuse_damaged(cache, [64, 96])
    assert str(caught.value) == (
        f"{cache}/64.zarr/image/c/0/0/0 {SUM} (cases {', '.join(names[:3])} …); "
        f"repair it with `ptxdist verify {cache} --repair --source DICOM` or `ptxdist preprocess`"
    )
    assert caught.value.exit_code == 7
    assert open_store(cache, 64).cases == 23  # what opening alone does not see


def test_command_says_that_a_cache_is_whole(cache: Path, dicom: Path) -> None:
    done = run("verify", cache, "--source", dicom, "--workers", 1)
    assert (done.exit_code, done.stdout) == (0, f"{cache} has no damage\n")
    done = run("verify", cache, "--json")
    assert (done.exit_code, json.loads(done.stdout)) == (0, {"mended": [], "wrong": []})


def test_command_ends_with_its_exit_code_and_says_what_is_wrong(cache: Path) -> None:
    [name] = flip_row(cache, 4)
    done = run("verify", cache)
    assert done.exit_code == 7
    assert "64.zarr/image" in done.stdout
    assert name in done.stdout
    assert "has no damage" not in done.stdout
    done = run("verify", cache, "--json")
    assert done.exit_code == 7
    wrong = [{"path": "64.zarr/image/c/0/0/0", "reason": SUM, "cases": [name]}]
    assert json.loads(done.stdout) == {"mended": [], "wrong": wrong}


def test_command_mends_and_then_is_content(cache: Path, dicom: Path) -> None:
    before = digests(cache)
    [name] = flip_row(cache, 4)
    assert run("verify", cache, "--repair").exit_code == 7
    done = run("verify", cache, "--repair", "--source", dicom, "--workers", 1, "--json")
    assert done.exit_code == 0
    mended = [{"path": "64.zarr/image/c/0/0/0", "reason": SUM, "cases": [name]}]
    assert json.loads(done.stdout) == {"mended": mended, "wrong": []}
    assert digests(cache) == before


def test_command_reports_a_source_that_differs(cache: Path, dicom: Path) -> None:
    gone = min(dicom.rglob("*.dcm"))
    gone.unlink()
    done = run("verify", cache, "--source", dicom, "--workers", 1, "--json")
    assert done.exit_code == 7
    wrong = [{"path": "", "reason": "its file is gone or was changed", "cases": [gone.stem]}]
    assert json.loads(done.stdout) == {"mended": [], "wrong": wrong}


@pytest.mark.parametrize("damage", ["manifest", "nowhere"])
def test_command_refuses_what_it_cannot_check(cache: Path, damage: str) -> None:
    if damage == "manifest":
        flip(cache / "manifest.json", 200)
    done = run("verify", cache if damage == "manifest" else cache / "nowhere", "--json")
    assert done.exit_code == 7
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert done.stdout == ""
