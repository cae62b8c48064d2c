"""What `preprocess` finds damaged, or written by another version, is rewritten."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cache_files import digests

from ptxdist.cache.catalog import read_catalog
from ptxdist.cache.preprocess import preprocess
from ptxdist.cache.store import store_path
from ptxdist.errors import StoreError


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
        assert read_catalog(cache, as_it_is=True) != small_cache[1].catalog
    else:
        path.write_bytes(content[:-3])
    result = preprocess(data.dicom, data.labels, cache, patients=data.patients, sizes_px=(64, 96))
    assert (result.written, result.reused) == (0, 2)
    assert result.is_new_split == (name == "catalog.jsonl")
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
