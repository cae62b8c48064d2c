"""The cache: right px in every store, only what changed is made anew, nothing a kill or a bad file could spoil."""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pydicom
import pytest

from ptxdist.data import rle
from ptxdist.data.catalog import read_catalog
from ptxdist.data.labels import read_labels
from ptxdist.data.preprocess import PreprocessResult, fit_square, preprocess, resize
from ptxdist.data.store import open_store, read_manifest, store_path
from ptxdist.errors import BusyError, CatalogError, LabelError, StoreError

Pixels = npt.NDArray[np.uint8]
SECRETS = ("Quagmire", "Zebulon", "QX7-HOSPITAL", "19391207", "MAPPED-PERSON")  # of conftest


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def shard_times(cache: Path) -> dict[str, int]:
    """Time of writing of each image and mask shard, in ns."""
    return {
        str(p.relative_to(cache)): p.stat().st_mtime_ns for a in ("image", "mask") for p in cache.glob(f"*/{a}/c/*/0/0")
    }


def rejects_of(cache: Path) -> dict[str, str]:
    with open(cache / "rejects.csv", newline="") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


def block_mean(pixels: npt.NDArray[Any], size: int) -> npt.NDArray[np.float64]:
    """Means of the blocks of a square image whose side is a multiple of `size`."""
    step = len(pixels) // size
    return pixels.reshape(size, step, size, step).mean(axis=(1, 3))


@pytest.fixture(scope="session")
def many_cache(many_dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreprocessResult]:  # type: ignore[no-untyped-def]
    """Cache of `many_dataset` at 32 and 48 px. Nothing may write to it."""
    out, data = tmp_path_factory.mktemp("many") / "cache", many_dataset
    return out, preprocess(data.dicom, data.labels, out, patients=data.patients, sizes_px=(32, 48), workers=2)


@pytest.fixture
def many_copy(many_cache, tmp_path: Path) -> Path:  # type: ignore[no-untyped-def]
    return Path(shutil.copytree(many_cache[0], tmp_path / "cache"))


# --- the transform ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(3, 8), (8, 3), (5, 8), (4, 4)])
def test_square_is_padded_with_black_around_the_middle(height: int, width: int) -> None:
    square = fit_square(np.full((height, width), 9, np.uint8))
    assert square.shape == (max(height, width),) * 2
    assert square.sum() == 9 * height * width
    rows, columns = np.nonzero(square.any(axis=1))[0], np.nonzero(square.any(axis=0))[0]
    assert (rows[0], columns[0]) == ((len(square) - height) // 2, (len(square) - width) // 2)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_shrinking_takes_the_mean_of_each_block(size: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256), dtype=np.uint8)
    assert np.abs(resize(pixels, size) - block_mean(pixels, size)).max() <= 0.5


def test_growing_is_bilinear() -> None:
    grown = resize(np.array([[0, 100], [0, 100]], np.uint8), 4)
    assert grown[0].tolist() == [0, 25, 75, 100]


@pytest.mark.parametrize("size", [64, 96])
def test_every_sample_is_its_file_and_its_masks(small_cache, small_dataset, size: int) -> None:  # type: ignore[no-untyped-def]
    cache, result = small_cache
    store = open_store(cache, size)
    assert store.cases == len(result.catalog.labelled) == 23
    for index, case in enumerate(result.catalog.labelled):
        image, mask = store.sample(index)
        original, truth = small_dataset.images[case.case_id], small_dataset.masks[case.case_id]
        assert np.abs(image.astype(int) - resize(fit_square(original), size)).mean() < 2  # JPEG
        expected = cv2.resize(fit_square(truth * 255).astype(np.float64), (size, size), interpolation=cv2.INTER_AREA)
        assert np.abs(mask - expected).max() <= 1
        if len(original) == 128 and size == 64:
            assert np.abs(mask - block_mean(truth * 255.0, 64)).max() <= 0.5


def test_result_catalog_and_tables_agree(small_cache) -> None:  # type: ignore[no-untyped-def]
    cache, result = small_cache
    assert (result.written, result.reused, result.sizes_px, result.rejects) == (2, 0, (64, 96), ())
    assert read_catalog(cache) == result.catalog
    assert (cache / "missing.csv").read_text().split() == ["ImageId", *result.catalog.missing]
    assert rejects_of(cache) == {}
    assert not list(cache.rglob("*.tmp"))


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
        expected[path.stem] = image, cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
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
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(rle.decode(table[path.stem], 1024, 1024) * 255, mask), path.stem
        positive += bool(mask.any())
    assert positive == 16


# --- only what changed --------------------------------------------------------------------------------------------


def test_nothing_changed_nothing_written(many_copy: Path, many_dataset, many_cache) -> None:  # type: ignore[no-untyped-def]
    data, times, before = many_dataset, shard_times(many_copy), digests(many_copy)
    heard: list[tuple[str, int, int]] = []
    result = preprocess(
        data.dicom,
        data.labels,
        many_copy,
        patients=data.patients,
        sizes_px=(48, 32, 48),
        on_progress=lambda *step: heard.append(step),
    )
    assert (result.written, result.reused) == (0, 6)
    assert shard_times(many_copy) == times
    assert digests(many_copy) == before
    assert result.catalog == many_cache[1].catalog
    assert heard[-1] == ("headers", 540, 540)
    assert {step for step, _, _ in heard} == {"headers"}


def test_one_changed_label_rewrites_its_shard_alone(many_copy: Path, many_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data, times = many_dataset, shard_times(many_copy)
    labels = tmp_path / "labels.csv"
    labels.write_text(data.labels.read_text().replace("1.2.3.10301,-1", "1.2.3.10301,0 64"))  # case 301: shard 1
    result = preprocess(data.dicom, labels, many_copy, patients=data.patients, sizes_px=(32, 48))
    assert (result.written, result.reused) == (2, 4)
    changed = {name for name, written in shard_times(many_copy).items() if written != times[name]}
    assert changed == {f"{size}.zarr/{array}/c/1/0/0" for size in (32, 48) for array in ("image", "mask")}
    store = open_store(many_copy, 32)
    assert store.sample(301)[1][:, 0].tolist() == [128] * 32  # one column of 64 px is half of one of 32
    assert store.column("has_mask")[301]
    assert store.column("area_px")[301] == 64


def test_new_size_leaves_the_others_alone(many_copy: Path, many_dataset) -> None:  # type: ignore[no-untyped-def]
    data, times = many_dataset, shard_times(many_copy)
    fingerprints = {size: entry["fingerprint"] for size, entry in read_manifest(many_copy).items()}
    result = preprocess(data.dicom, data.labels, many_copy, patients=data.patients, sizes_px=(16, 32))
    assert (result.written, result.reused) == (3, 3)
    assert {name: written for name, written in shard_times(many_copy).items() if name in times} == times
    assert {size: open_store(many_copy, size).cases for size in (16, 32, 48)} == {16: 540, 32: 540, 48: 540}
    assert {size: open_store(many_copy, size).fingerprint for size in (32, 48)} == fingerprints


def test_store_that_fits_the_new_split_no_more_is_not_trained_on(many_copy: Path, many_dataset) -> None:  # type: ignore[no-untyped-def]
    """Without the patient map the split is another: the size that is not renewed must not be used with it."""
    data = many_dataset
    preprocess(data.dicom, data.labels, many_copy, sizes_px=(32,))
    assert open_store(many_copy, 32).column("split").tolist() == [c.split for c in read_catalog(many_copy).labelled]
    with pytest.raises(StoreError, match=r"48.zarr is not finished"):
        open_store(many_copy, 48)
    again = preprocess(data.dicom, data.labels, many_copy, sizes_px=(32, 48))
    assert again.written == 0
    assert open_store(many_copy, 48).column("split").tolist() == [c.split for c in again.catalog.labelled]


def test_fewer_files_end_as_a_fresh_cache_would(many_copy: Path, many_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data, dicom = many_dataset, tmp_path / "dicom"
    dicom.mkdir()
    for path in sorted(data.dicom.iterdir())[:256]:
        (dicom / path.name).symlink_to(path)
    result = preprocess(dicom, data.labels, many_copy, patients=data.patients, sizes_px=(32, 48))
    assert (result.written, result.reused) == (0, 2)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    shutil.copy(many_copy / "salt", fresh)
    preprocess(dicom, data.labels, fresh, patients=data.patients, sizes_px=(32, 48))
    assert digests(many_copy) == digests(fresh)


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


# --- interruption and company ---------------------------------------------------------------------------------------


def start(data: Any, out: Path, workers: int = 2) -> subprocess.Popen[bytes]:
    """`preprocess` in a process group of its own."""
    call = (
        "from pathlib import Path; from ptxdist.data.preprocess import preprocess; "
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
def test_killed_at_any_moment_the_same_command_ends_in_the_same_bytes(many_dataset, many_cache, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The fourth attempt ends it; no worker outlives its killed parent, or it would write beside the next run."""
    out = tmp_path / "cache"
    out.mkdir()
    shutil.copy(many_cache[0] / "salt", out)  # groups are hashed with it

    def written() -> set[tuple[str, int]]:
        with suppress(OSError):  # a file has just been renamed
            return {(path.name, path.stat().st_mtime_ns) for path in out.rglob("*")}
        return set()

    for changes in (2, 6, 9):  # of the folder since the start; a whole run makes about forty
        running, state, seen = start(many_dataset, out), written(), 0
        while seen < changes and running.poll() is None:
            before, state = state, written()
            seen += state != before
            time.sleep(0.01)
        running.kill()
        assert running.wait() == -signal.SIGKILL
        try:
            wait_for(lambda: not group_alive(running.pid))  # noqa: B023
        finally:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
    assert start(many_dataset, out).wait() == 0
    assert digests(out) == digests(many_cache[0])


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


def test_run_that_began_before_another_made_the_cache_is_refused(small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Its groups are hashed with a salt of its own."""
    data, out = small_dataset, tmp_path / "cache"

    def other_run(step: str, done: int, total: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "salt").write_bytes(b"of the other run")

    with pytest.raises(BusyError, match="run the command again"):
        preprocess(data.dicom, data.labels, out, sizes_px=(32,), on_progress=other_run)


def test_full_disk_stops_with_a_sentence(small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
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
    assert rejects_of(out) == {
        "empty.dcm": "is empty (0 bytes)",
        "text.dcm": "is not a DICOM file (no DICM prefix)",
        truncated: "is cut off: the file ends in the midst of its data",
    }
    assert {reject.path: reject.reason for reject in result.rejects} == rejects_of(out)
    [rejected] = [case for case in read_catalog(out).cases if case.split == "rejected"]
    assert (rejected.path, rejected.fold) == (truncated, -1)
    store = open_store(out, 48)
    index = store.column("case_id").tolist().index(rejected.case_id)
    assert Counter(store.column("split").tolist())["rejected"] == 1
    assert store.column("split")[index] == "rejected"
    assert not store.sample(index)[0].any()
    assert result.catalog.sides()["rejected"]["cases"] == 1

    again = preprocess(dicom, small_dataset.labels, out, sizes_px=(32, 48))
    assert (again.written, again.rejects) == (0, result.rejects)
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
    assert [reject.reason for reject in result.rejects] == ["cannot be read: No such file or directory"]
    path.write_bytes(content)
    again = preprocess(dicom, small_dataset.labels, out, sizes_px=(32,))
    assert (again.written, again.rejects) == (1, ())
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


@pytest.mark.parametrize("wrong", ["dicom", "labels", "patients"])
def test_wrong_input_is_refused_before_anything_is_written(small_dataset, tmp_path: Path, wrong: str) -> None:  # type: ignore[no-untyped-def]
    paths = {"dicom": small_dataset.dicom, "labels": small_dataset.labels, "patients": small_dataset.patients}
    paths[wrong] = tmp_path / "nowhere"
    with pytest.raises((CatalogError, LabelError), match="nowhere"):
        preprocess(out=tmp_path / "cache", sizes_px=(32,), **paths)
    assert not (tmp_path / "cache").exists()


# --- privacy ------------------------------------------------------------------------------------------------------


def test_no_identifier_of_a_patient_is_in_the_cache(small_cache, small_dataset) -> None:  # type: ignore[no-untyped-def]
    source = b"".join(path.read_bytes() for path in (*small_dataset.dicom.rglob("*.dcm"), small_dataset.patients))
    cache = small_cache[0]
    assert len(list(cache.rglob("*"))) > 30
    for secret in map(str.encode, SECRETS):
        assert secret in source
        for path in cache.rglob("*"):
            assert secret not in path.name.encode()
            assert path.is_dir() or secret not in path.read_bytes(), path
    assert (cache / "salt").stat().st_mode & 0o077 == 0
