"""The store: what is written is what zarr users and the memory map read; damage is found, whatever byte it is in."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from ptxdist.cache.manifest import MANIFEST, Manifest, ShardRecord, StoreRecord, read_manifest, write_manifest
from ptxdist.cache.store import (
    ARRAYS,
    GEOMETRY,
    SHARD_CASES,
    damaged_rows,
    open_store,
    pending,
    shard_count,
    shard_path,
    shard_writer,
    store_path,
    write_metadata,
)
from ptxdist.errors import StoreError
from ptxdist.files import content_sum

Block = npt.NDArray[np.uint8]
EDGES = [1, 15, 16, 17, 127, 128, 129, 143, 144, 145, 255, 256, 257]


def write_array(store: Path, array: str, shard: int, samples: Block, order: list[int] | None = None) -> str:
    """One shard in its place, its rows put in the given order; its checksums."""
    path = shard_path(store, array, shard)
    with shard_writer(path, len(samples), samples.shape[1]) as writer:
        for row in order or range(len(samples)):
            writer.put(row, samples[row])
    pending(path).replace(path)
    return writer.crc32c


def write_store(cache: Path, arrays: dict[str, Block], random: Any = None, flag: bool = True) -> Path:
    """A store with two coordinate arrays; with `random`, shards and their rows are written in any order."""
    cases, size = arrays["image"].shape[:2]
    store = store_path(cache, size)
    records: dict[int, ShardRecord] = {}
    shards = list(range(shard_count(cases)))
    for shard in random.sample(shards, len(shards)) if random else shards:
        blocks = {name: arrays[name][shard * SHARD_CASES :][:SHARD_CASES] for name in ARRAYS}
        rows = list(range(len(blocks["image"])))
        order = random.sample(rows, len(rows)) if random else None
        image, mask = (write_array(store, name, shard, blocks[name], order) for name in ARRAYS)
        records[shard] = ShardRecord(f"source {shard}", image, mask)
    ids = np.array([f"case {index} ä" for index in range(cases)])
    sums = write_metadata(store, size, {"case_id": ids, "has_mask": np.full(cases, flag)})
    manifest = read_manifest(cache)
    manifest.sizes[size] = StoreRecord(True, cases, "f", tuple(records[shard] for shard in shards))
    manifest.files.update({f"{store.name}/{name}": value for name, value in sums.items()})
    write_manifest(cache, manifest)
    return store


def noise(cases: int, size: int, seed: int = 0) -> dict[str, Block]:
    random = np.random.default_rng(seed)
    return {name: random.integers(0, 256, (cases, size, size), dtype=np.uint8) for name in ARRAYS}


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@given(st.sampled_from(EDGES) | st.integers(1, 300), st.integers(1, 5), st.randoms())
@settings(max_examples=20)
def test_zarr_and_the_memory_map_read_what_was_written_in_any_order(cases: int, size: int, random) -> None:  # type: ignore[no-untyped-def]
    arrays = noise(cases, size, seed=cases)
    arrays["mask"][random.sample(range(cases), cases // 2)] = 0
    with TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        write_store(first, arrays)
        write_store(second, arrays, random)
        assert file_bytes(first) == file_bytes(second)

        group = zarr.open_group(store_path(first, size), mode="r")
        assert all(np.array_equal(group[name][:], arrays[name]) for name in ARRAYS)
        assert group["case_id"][:].tolist() == [f"case {index} ä" for index in range(cases)]

        store = open_store(first, size)
        indices = np.array(random.choices(range(cases), k=7))
        image, mask = (np.empty((9, size, size), np.uint8) for _ in range(2))
        store.gather(indices, image, mask)
        assert np.array_equal(image[:7], arrays["image"][indices])
        assert np.array_equal(mask[:7], arrays["mask"][indices])
        assert all(
            np.array_equal(s, arrays[n][cases - 1]) for s, n in zip(store.sample(cases - 1), ARRAYS, strict=True)
        )


def test_zarr_writes_the_same_shard_bytes(tmp_path: Path) -> None:
    arrays = noise(SHARD_CASES + 40, 4)
    write_store(tmp_path / "ours", arrays)
    group = zarr.create_group(tmp_path / "theirs")
    theirs = group.create_array(
        "image",
        shape=(SHARD_CASES + 40, 4, 4),
        shards=(SHARD_CASES, 4, 4),
        chunks=(16, 4, 4),
        dtype="uint8",
        compressors=None,
        config={"write_empty_chunks": True},
    )
    theirs[:] = arrays["image"]
    first = Path("image/c/0/0/0")  # the last shard differs: zarr writes chunks past the last case, or lacks empty ones
    assert (tmp_path / "ours" / "4.zarr" / first).read_bytes() == (tmp_path / "theirs" / first).read_bytes()


def test_tensorstore_reads_a_store(tmp_path: Path) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    arrays = noise(SHARD_CASES + 20, 8)
    arrays["mask"][::2] = 0
    store = write_store(tmp_path, arrays)
    for name in ARRAYS:
        kvstore = {"driver": "file", "path": str(store / name)}
        found = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
        assert np.array_equal(found.read().result(), arrays[name])
        assert found.domain.labels == ("case", "y", "x")


def test_empty_masks_take_no_disk_blocks_and_read_as_zeros(tmp_path: Path) -> None:
    arrays = noise(40, 64)
    arrays["mask"][[index for index in range(40) if index != 17]] = 0
    store = write_store(tmp_path, arrays)
    blocks = {name: shard_path(store, name, 0).stat().st_blocks * 512 for name in ARRAYS}
    assert shard_path(store, "mask", 0).stat().st_size == shard_path(store, "image", 0).stat().st_size
    assert blocks["image"] >= 40 * 64 * 64
    assert blocks["mask"] <= 64 * 64 + 3 * os.statvfs(store).f_bsize  # one mask, not aligned to blocks, and the index
    assert np.array_equal(zarr.open_group(store, mode="r")["mask"][:], arrays["mask"])
    opened = open_store(tmp_path, 64)
    assert all(np.array_equal(opened.sample(row)[1], arrays["mask"][row]) for row in range(40))
    record = read_manifest(tmp_path).sizes[64].shards[0]
    assert damaged_rows(shard_path(store, "mask", 0), 64, record.mask_crc32c) == {}


def test_checksums_are_those_of_the_samples(tmp_path: Path) -> None:
    samples = noise(5, 4)["image"]
    samples[2] = 0
    sums = write_array(tmp_path, "image", 0, samples, order=[4, 0, 3, 1])  # row 2 is never put
    expected = [f"{google_crc32c.value(sample.tobytes()):08x}" for sample in samples]
    assert sums == "".join(expected)


@pytest.mark.parametrize("moment", ["while samples are put", "when it is closed"])
def test_shard_writer_that_fails_leaves_nothing_behind(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shard_path(tmp_path, "image", 0)
    write_array(tmp_path, "image", 0, noise(3, 4)["image"])
    before = file_bytes(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    if moment == "when it is closed":
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), shard_writer(path, 3, 4) as writer:  # noqa: PT012
        writer.put(0, noise(1, 4, seed=1)["image"][0])
        if moment == "while samples are put":
            full(0)
    assert file_bytes(tmp_path) == before


def test_shard_is_pending_until_it_is_put_in_place(tmp_path: Path) -> None:
    path = shard_path(tmp_path, "image", 0)
    with shard_writer(path, 3, 4) as writer:
        writer.put(0, noise(1, 4)["image"][0])
        assert not path.exists()
        assert not pending(path).exists()
    assert not path.exists()
    assert damaged_rows(pending(path), 4, writer.crc32c) == {}


def test_metadata_of_the_arrays_are_golden(tmp_path: Path) -> None:
    store = write_store(tmp_path, noise(20, 8))
    assert json.loads((store / "image" / "zarr.json").read_text()) == {
        "shape": [20, 8, 8],
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [128, 8, 8]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [16, 8, 8],
                    "codecs": [{"name": "bytes"}],
                    "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
                    "index_location": "end",
                },
            }
        ],
        "attributes": {"long_name": "radiograph", "coordinates": "case_id has_mask"},
        "dimension_names": ["case", "y", "x"],
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
    mask = json.loads((store / "mask" / "zarr.json").read_text())["attributes"]
    assert mask == {"long_name": "share of the px's area in the mask, of 255", "coordinates": "case_id has_mask"}
    group = json.loads((store / "zarr.json").read_text())["attributes"]
    assert group == {"schema": 2, "size_px": 8, "geometry": GEOMETRY}


def test_geometry_attribute_says_what_the_transform_does(tmp_path: Path) -> None:
    """A stranger can map a mask back to its image with it and the coordinates rows and columns."""
    assert GEOMETRY == (
        "the image is padded with 0 to a square of max(rows, columns), floor of half the difference at the top and "
        "left, then resized by area averaging (bilinear when it grows); mask likewise: the share of the px's area in "
        "it, of 255"
    )


def test_xarray_opens_a_store(small_cache) -> None:  # type: ignore[no-untyped-def]
    cache, result = small_cache
    data = xarray.open_zarr(store_path(cache, 96))
    labelled = result.catalog.labelled
    assert data["image"].dims == ("case", "y", "x")
    assert data["case_id"].values.tolist() == [case.case_id for case in labelled]
    assert data["split"].values.tolist() == [case.split for case in labelled]
    assert data["has_mask"].values.tolist() == [bool(case.masks) for case in labelled]
    assert data["area_px"].values.tolist() == [case.area_px for case in labelled]
    val = data["image"].values[data["split"].values == "val"]
    assert len(val) == result.catalog.sides()["val"]["cases"]


def test_rewritten_metadata_leave_nothing_of_the_former(tmp_path: Path) -> None:
    """zarr writes no chunk for values that are all zero: the former chunk must not shine through."""
    arrays = noise(3, 4)
    store = write_store(tmp_path, arrays, flag=True)
    write_store(tmp_path, arrays, flag=False)
    assert zarr.open_group(store, mode="r")["has_mask"][:].tolist() == [False] * 3


def test_shards_of_cases_that_are_gone_are_removed(tmp_path: Path) -> None:
    write_store(tmp_path, noise(300, 4))
    store = write_store(tmp_path, noise(100, 4))
    assert sorted(path.name for path in (store / "mask" / "c").iterdir()) == ["0"]
    assert open_store(tmp_path, 4).cases == 100


def test_file_of_another_program_between_the_shards_is_left_alone(tmp_path: Path) -> None:
    """macOS and Windows leave such files in folders they have shown."""
    store = write_store(tmp_path, noise(3, 4))
    (store / "image" / "c" / ".DS_Store").touch()
    write_store(tmp_path, noise(3, 4))
    assert open_store(tmp_path, 4).cases == 3


def refused(cache: Path, size: int, *expected: str) -> None:
    with pytest.raises(StoreError) as caught:
        open_store(cache, size)
    assert all(text in str(caught.value) for text in expected), caught.value
    assert "ptxdist preprocess" in str(caught.value)
    assert caught.value.exit_code == 7


def test_missing_size_names_those_there_are(tmp_path: Path) -> None:
    write_store(tmp_path, noise(3, 4))
    write_store(tmp_path, noise(3, 5))
    refused(tmp_path, 512, "no store of 512 px (it has: 4, 5)", "--size 512")
    refused(tmp_path / "nowhere", 512, "no store of 512 px (it has: none)")


def test_unfinished_store_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path, noise(3, 4))
    manifest = read_manifest(tmp_path)
    manifest.sizes[4] = replace(manifest.sizes[4], complete=False)
    write_manifest(tmp_path, manifest)
    refused(tmp_path, 4, "4.zarr is not finished")


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "longer", "index"])
def test_damaged_shard_is_refused_with_its_path(tmp_path: Path, array: str, damage: str) -> None:
    store = write_store(tmp_path, noise(140, 4))
    path = store / array / "c" / "1" / "0" / "0"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        index = content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]
        path.write_bytes({"empty": b"", "truncated": content[:-1], "longer": content + b"\0", "index": index}[damage])
    refused(tmp_path, 4, str(path), "is missing" if damage == "missing" else "is damaged")


def test_index_with_moved_chunks_is_refused_even_with_a_right_checksum(tmp_path: Path) -> None:
    """Such a shard is valid zarr, but not mapped as it stands."""
    store = write_store(tmp_path, noise(40, 4))
    other = write_store(tmp_path / "other", noise(16, 4))
    path = store / "image" / "c" / "0" / "0" / "0"
    content = bytearray(path.read_bytes())
    footer = (other / "image" / "c" / "0" / "0" / "0").read_bytes()[-132:]
    content[-132:] = footer  # the index of a shard with one chunk: a right checksum, no second and third chunk
    path.write_bytes(content)
    refused(tmp_path, 4, str(path))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a store of 20 cases of 4 px, every third mask empty; nothing may write to it."""
    cache = tmp_path_factory.mktemp("written")
    arrays = noise(20, 4)
    arrays["mask"][::3] = 0
    write_store(cache, arrays)
    return cache


@given(st.data())
@settings(max_examples=100)
def test_any_flipped_bit_is_found_in_the_right_row(written: Path, data: st.DataObject) -> None:
    cases, size, record = 20, 4, read_manifest(written).sizes[4].shards[0]
    array = data.draw(st.sampled_from(ARRAYS))
    sums = record.image_crc32c if array == "image" else record.mask_crc32c
    path = shard_path(store_path(written, size), array, 0)
    assert damaged_rows(path, size, sums) == {}
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    damaged = written.with_name("damaged shard")
    damaged.write_bytes(content)
    row = place // size**2
    assert list(damaged_rows(damaged, size, sums)) == [row if row < cases else -1]  # -1: past the cases, the index


def test_several_damaged_rows_are_all_named(tmp_path: Path) -> None:
    store = write_store(tmp_path, noise(40, 4))
    path = shard_path(store, "image", 0)
    content = bytearray(path.read_bytes())
    for row in (3, 17, 39):
        content[16 * row + 5] ^= 1
    path.write_bytes(content)
    assert list(damaged_rows(path, 4, read_manifest(tmp_path).sizes[4].shards[0].image_crc32c)) == [3, 17, 39]


@pytest.mark.parametrize(("damage", "reason"), [("missing", "is missing"), ("empty", "is damaged")])
def test_shard_that_is_missing_or_empty_is_damaged_as_a_whole(tmp_path: Path, damage: str, reason: str) -> None:
    store = write_store(tmp_path, noise(20, 4))
    record = read_manifest(tmp_path).sizes[4].shards[0]
    if damage == "empty":
        shard_path(store, "mask", 0).write_bytes(b"")
    else:
        shutil.rmtree(store / "mask")
    assert damaged_rows(shard_path(store, "mask", 0), 4, record.mask_crc32c) == {-1: reason}


# --- the manifest -------------------------------------------------------------------------------------------------


def test_manifest_survives_write_and_read(tmp_path: Path) -> None:
    shard = ShardRecord("a", "01234567", "89abcdef", (("case 1", "is cut off"), ("case 2", "ä")))
    manifest = Manifest({64: StoreRecord(True, 1, "f", (shard,), (None, shard)), 32: StoreRecord()}, {"salt": "00"})
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_no_manifest_is_an_empty_one(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) == Manifest()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"schema": 3, "sizes": {}}', "has schema 3, this ptxdist knows 2: update ptxdist"),
        ('{"schema": 2, "sizes"', "is damaged"),
        ('{"schema": 2, "sizes": {}, "files": {}, "sha256": "0"}', "is damaged (its checksum differs)"),
        ('{"schema": 2, "sizes": []}', "is damaged"),
        ("[]", "is damaged"),
        ("{}", "is damaged"),
    ],
)
def test_manifest_of_a_newer_version_or_damaged_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(StoreError) as caught:
        open_store(tmp_path, 4)
    assert str(tmp_path / MANIFEST) in str(caught.value)
    assert expected in str(caught.value)


SHARD = {"fingerprint": "a", "image_crc32c": "00000000", "mask_crc32c": "00000000", "rejects": []}
STORE = {"complete": True, "cases": 1, "fingerprint": "f", "shards": [SHARD], "staged": []}


@pytest.mark.parametrize(
    "content",
    [
        *({"sizes": {size: STORE}} for size in ("0", "-4", "../4", "4.0", "123456", "٤")),
        *(
            {"sizes": {"4": STORE | change}}
            for change in ({"cases": "1"}, {"cases": 2}, {"cases": True}, {"complete": 1}, {"fingerprint": 1})
        ),
        *(
            {"sizes": {"4": STORE | {"shards": [SHARD | change]}}}
            for change in ({"image_crc32c": "0"}, {"rejects": [1]}, {"rejects": [["a", 1]]}, {"fingerprint": None})
        ),
        *({"files": {name: "00"}} for name in ("/etc/x", "../x", "4.zarr/../x", "C:x", "salt\n", ".lock", MANIFEST)),
        {"files": {"salt": 1}},
        {"files": ["salt"]},
        {"schema": float("nan")},
    ],
)
def test_manifest_with_a_right_checksum_and_wrong_content_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    plain = {"schema": 2, "sizes": {"4": STORE}, "files": {"salt": "00", "4.zarr/image/c/0": "00"}}
    for text, expected in ((plain, True), ({**plain, **content}, False)):
        (tmp_path / MANIFEST).write_text(json.dumps({**text, "sha256": content_sum(text)}))
        if expected:
            assert read_manifest(tmp_path).store(4).cases == 1
        else:
            refused(tmp_path, 4, "manifest.json is damaged (")


def test_manifest_of_a_former_version_is_as_none(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"schema": 1, "sizes": {"256": {"complete": true}}}')
    assert read_manifest(tmp_path) == Manifest()
    refused(tmp_path, 256, "no store of 256 px (it has: none)")


@given(st.data())
@settings(max_examples=200)
def test_any_edit_of_the_manifest_is_found(written: Path, data: st.DataObject) -> None:
    """It is refused, or the edit changed nothing but blanks; a former schema is as no manifest."""
    content = bytearray((written / MANIFEST).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    edit = data.draw(st.sampled_from(["flip", "delete", "double", "digit"]))
    if edit == "flip":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    elif edit == "delete":
        del content[place]
    elif edit == "double":
        content.insert(place, content[place])
    else:
        content[place] = data.draw(st.sampled_from(b"0123456789abcdef"))
    cache = written.with_name("edited manifest")
    cache.mkdir(exist_ok=True)
    (cache / MANIFEST).write_bytes(content)
    try:
        found = read_manifest(cache)
    except StoreError:
        return
    assert found in (read_manifest(written), Manifest())


def test_the_documented_example_reads_a_store_without_ptxdist(small_cache) -> None:  # type: ignore[no-untyped-def]
    text = (Path(__file__).parents[2] / "docs" / "cache.md").read_text()
    blocks = [block.split("```", 1)[0] for block in text.split("```python\n")[1:]]
    (code,) = (block for block in blocks if "import torch, zarr" in block)
    assert "ptxdist" not in code
    cache, result = small_cache
    for old, new in (("cache/256.zarr", str(store_path(cache, 64))), ("batch_size=40", "batch_size=4")):
        assert old in code
        code = code.replace(old, new)
    names: dict[str, object] = {}
    exec(code, names)  # the documented lines are what is tested
    image, mask = names["image"], names["mask"]
    assert tuple(image.shape) == tuple(mask.shape) == (4, 1, 64, 64)  # type: ignore[attr-defined]
    assert len(names["rows"]) == result.catalog.sides()["train"]["cases"]  # type: ignore[arg-type]
