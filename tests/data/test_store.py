"""The store: what is written is what zarr, xarray and the memory map read; damage is found when a store is opened."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import pytest
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from ptxdist.data.store import (
    ARRAYS,
    SHARD_CASES,
    ShardRecord,
    open_store,
    read_manifest,
    shard_count,
    shard_is_whole,
    store_path,
    write_manifest,
    write_metadata,
    write_shard,
)
from ptxdist.errors import StoreError

Block = npt.NDArray[np.uint8]
EDGES = [1, 15, 16, 17, 255, 256, 257, 271, 272, 273, 511, 512, 513]


def write_store(cache: Path, arrays: dict[str, Block], order: list[int] | None = None, flag: bool = True) -> Path:
    """A store with two coordinate arrays, its shards written in the given order."""
    cases, size = arrays["image"].shape[:2]
    store = store_path(cache, size)
    store.parent.mkdir(parents=True, exist_ok=True)
    records: list[ShardRecord | None] = [None] * shard_count(cases)
    for shard in order or range(shard_count(cases)):
        crcs = [write_shard(store, name, shard, arrays[name][shard * SHARD_CASES :][:SHARD_CASES]) for name in ARRAYS]
        records[shard] = ShardRecord(f"source {shard}", *crcs)
    ids = np.array([f"case {index} ä" for index in range(cases)])
    write_metadata(store, size, {"case_id": ids, "has_mask": np.full(cases, flag)})
    entry = {"complete": True, "cases": cases, "fingerprint": "f", "shards": [asdict(record) for record in records]}
    write_manifest(cache, {**read_manifest(cache), size: entry})
    return store


def noise(cases: int, size: int, seed: int = 0) -> dict[str, Block]:
    random = np.random.default_rng(seed)
    return {name: random.integers(0, 256, (cases, size, size), dtype=np.uint8) for name in ARRAYS}


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@given(st.sampled_from(EDGES) | st.integers(1, 600), st.integers(1, 5), st.randoms())
@settings(max_examples=20, deadline=None)
def test_zarr_and_the_memory_map_read_what_was_written_in_any_order(cases: int, size: int, random) -> None:  # type: ignore[no-untyped-def]
    arrays = noise(cases, size, seed=cases)
    order = list(range(shard_count(cases)))
    with TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        write_store(first, arrays)
        write_store(second, arrays, order=random.sample(order, len(order)))
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
    arrays = noise(300, 4)
    write_store(tmp_path / "ours", arrays)
    group = zarr.create_group(tmp_path / "theirs")
    theirs = group.create_array(
        "image",
        shape=(300, 4, 4),
        shards=(256, 4, 4),
        chunks=(16, 4, 4),
        dtype="uint8",
        compressors=None,
        config={"write_empty_chunks": True},
    )
    theirs[:] = arrays["image"]
    first = Path("image/c/0/0/0")  # the last shard differs: zarr leaves out chunks beyond the last case only if told to
    assert (tmp_path / "ours" / "4.zarr" / first).read_bytes() == (tmp_path / "theirs" / first).read_bytes()


def test_metadata_of_the_arrays_are_golden(tmp_path: Path) -> None:
    store = write_store(tmp_path, noise(20, 8))
    assert json.loads((store / "image" / "zarr.json").read_text()) == {
        "shape": [20, 8, 8],
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [256, 8, 8]}},
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
    assert json.loads((store / "zarr.json").read_text())["attributes"] == {"schema": 1, "size_px": 8}


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


def test_column_gives_the_coordinates(small_cache) -> None:  # type: ignore[no-untyped-def]
    cache, result = small_cache
    store = open_store(cache, 64)
    assert store.column("case_id").tolist() == [case.case_id for case in result.catalog.labelled]
    assert store.column("rows").tolist() == [case.rows for case in result.catalog.labelled]


def test_rewritten_metadata_leave_nothing_of_the_former(tmp_path: Path) -> None:
    """zarr writes no chunk for values that are all zero: the former chunk must not shine through."""
    arrays = noise(3, 4)
    store = write_store(tmp_path, arrays, flag=True)
    write_store(tmp_path, arrays, flag=False)
    assert zarr.open_group(store, mode="r")["has_mask"][:].tolist() == [False] * 3


def test_shards_of_cases_that_are_gone_are_removed(tmp_path: Path) -> None:
    write_store(tmp_path, noise(300, 4))
    store = write_store(tmp_path, noise(200, 4))
    assert sorted(path.name for path in (store / "mask" / "c").iterdir()) == ["0"]
    assert open_store(tmp_path, 4).cases == 200


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
    manifest[4]["complete"] = False
    write_manifest(tmp_path, manifest)
    refused(tmp_path, 4, "4.zarr is not finished")


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "longer", "index"])
def test_damaged_shard_is_refused_with_its_path(tmp_path: Path, array: str, damage: str) -> None:
    store = write_store(tmp_path, noise(270, 4))
    path = store / array / "c" / "1" / "0" / "0"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        index = content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]
        path.write_bytes({"empty": b"", "truncated": content[:-1], "longer": content + b"\0", "index": index}[damage])
    refused(tmp_path, 4, str(path), "missing or damaged")


def test_index_with_moved_chunks_is_refused_even_with_a_right_checksum(tmp_path: Path) -> None:
    """Such a shard is valid zarr, but not mapped as it stands."""
    store = write_store(tmp_path, noise(40, 4))
    other = write_store(tmp_path / "other", noise(16, 4))
    path = store / "image" / "c" / "0" / "0" / "0"
    content = bytearray(path.read_bytes())
    footer = (other / "image" / "c" / "0" / "0" / "0").read_bytes()[-260:]
    content[-260:] = footer  # the index of a shard with one chunk: a right checksum, no second and third chunk
    path.write_bytes(content)
    refused(tmp_path, 4, str(path))


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_any_flipped_bit_shows_in_the_checksum(data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        store = write_store(Path(folder), noise(20, 4))
        record = ShardRecord(**read_manifest(Path(folder))[4]["shards"][0])
        assert shard_is_whole(store, 0, record)
        path = store / data.draw(st.sampled_from(ARRAYS)) / "c" / "0" / "0" / "0"
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        assert not shard_is_whole(store, 0, record)


def test_shard_that_is_missing_or_empty_is_not_whole(tmp_path: Path) -> None:
    store = write_store(tmp_path, noise(20, 4))
    record = ShardRecord(**read_manifest(tmp_path)[4]["shards"][0])
    (store / "mask" / "c" / "0" / "0" / "0").write_bytes(b"")
    assert not shard_is_whole(store, 0, record)
    shutil.rmtree(store / "mask")
    assert not shard_is_whole(store, 0, record)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"schema": 2, "sizes": {}}', "has schema 2, this ptxdist reads 1: update ptxdist"),
        ('{"schema": 1, "sizes"', "is damaged"),
        ('{"schema": 1, "sizes": []}', "is damaged"),
        ("[]", "is damaged"),
        ("{}", "is damaged"),
    ],
)
def test_manifest_of_another_version_or_damaged_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(StoreError) as caught:
        open_store(tmp_path, 4)
    assert str(tmp_path / "manifest.json") in str(caught.value)
    assert expected in str(caught.value)
