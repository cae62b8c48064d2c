"""The zarr store of one size: written shard by shard, opened by any zarr user, memory-mapped by ours.

    CACHE/256.zarr/                 zarr v3 group; attributes: schema, size_px
        image/, mask/               uint8 (case, y, x), shards of 256 cases, inner chunks of 16, uncompressed
        case_id, split, fold, has_mask, area_px, rows, columns     one value a case
    CACHE/manifest.json             per size and shard: fingerprint, crc32c of both shard files, rejected cases

`mask` is the share of a pixel's area that lies in the mask, 0..255. A mask or image shard is a plain run of samples
followed by the zarr index (offset and length of each inner chunk, then a crc32c), so that a file can be mapped and
sliced like an array: many times faster than fancy indexing through zarr (`tests/benchmarks`).

Owns: the schema, names and bytes of stores and the manifest. Refuses: stores that are unfinished, damaged, or of an
unknown schema. Called by: `preprocess` (writes), `learn.dataset`, `learn.report` and `cli` (read).
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr

from ptxdist.errors import StoreError

SCHEMA = 1
SHARD_CASES = 256
CHUNK_CASES = 16
ARRAYS = ("image", "mask")
MANIFEST = "manifest.json"
_INDEX_BYTES = SHARD_CASES // CHUNK_CASES * 16 + 4
_NO_CHUNK = 2**64 - 1  # how the zarr sharding codec marks an inner chunk that is not there

Samples = npt.NDArray[np.uint8]


def store_path(cache: Path, size_px: int) -> Path:
    """Folder of the store of one size."""
    return cache / f"{size_px}.zarr"


def shard_count(cases: int) -> int:
    """Number of shards that hold so many cases."""
    return -(-cases // SHARD_CASES)


def write_shard(store: Path, array: str, shard: int, block: Samples) -> str:
    """Write samples uint8 (1 <= n <= 256, size, size) as one zarr shard, in one step, and return its crc32c in hex.

    The last chunk is filled up with zeros. The file is flushed to disk before it takes the place of a former one.
    """
    cases, chunk_bytes = len(block), CHUNK_CASES * block[0].nbytes
    chunks = -(-cases // CHUNK_CASES)
    index = np.full((SHARD_CASES // CHUNK_CASES, 2), _NO_CHUNK, dtype="<u8")
    index[:chunks, 0] = np.arange(chunks, dtype=np.uint64) * chunk_bytes
    index[:chunks, 1] = chunk_bytes
    footer = index.tobytes()
    footer += int(google_crc32c.value(footer)).to_bytes(4, "little")
    padding = bytes((chunks * CHUNK_CASES - cases) * block[0].nbytes)
    path = _shard_path(store, array, shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    checksum = 0
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb", buffering=0) as file:
        for part in (np.ascontiguousarray(block).data.cast("B"), memoryview(padding), memoryview(footer)):
            _write_all(file.fileno(), part)
            checksum = google_crc32c.extend(checksum, bytes(part))
        os.fsync(file.fileno())
    temporary.replace(path)
    return f"{checksum:08x}"


def _write_all(descriptor: int, part: memoryview) -> None:
    while part:
        part = part[os.write(descriptor, part[: 1 << 30]) :]


def _shard_path(store: Path, array: str, shard: int) -> Path:
    return store / array / "c" / str(shard) / "0" / "0"


def write_metadata(store: Path, size_px: int, coordinates: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write the zarr metadata and the coordinate arrays, each (case,), around the shard files.

    Everything is made in a folder beside the store and moved in file by file, metadata of the group last.
    """
    cases = len(coordinates["case_id"])
    draft = store.with_name(store.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr: consolidated metadata and strings are not in the v3 core yet
        group = zarr.create_group(draft, attributes={"schema": SCHEMA, "size_px": size_px})
        for name in ARRAYS:
            group.create_array(
                name,
                shape=(cases, size_px, size_px),
                shards=(SHARD_CASES, size_px, size_px),
                chunks=(CHUNK_CASES, size_px, size_px),
                dtype="uint8",
                compressors=None,
                fill_value=0,
                dimension_names=("case", "y", "x"),
                attributes={
                    "long_name": "radiograph" if name == "image" else "share of the px's area in the mask, of 255",
                    "coordinates": " ".join(coordinates),  # CF: what xarray shows beside the array
                },
            )
        for name, values in coordinates.items():
            text = values.dtype.kind == "U"
            array = group.create_array(
                name,
                shape=(cases,),
                chunks=(max(1, cases),),
                dtype=str if text else values.dtype,
                dimension_names=("case",),
                # zarr leaves out a chunk of only zeros, and the chunk of a former run would stay in its place
                config={"write_empty_chunks": True},
            )
            array[:] = values.astype(object) if text else values
        zarr.consolidate_metadata(group.store)
    files = sorted(path for path in draft.rglob("*") if path.is_file())
    files.sort(key=lambda path: path == draft / "zarr.json")
    for path in files:
        target = store / path.relative_to(draft)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    shutil.rmtree(draft)
    for name in ARRAYS:  # shards of cases that are no longer there
        for folder in (store / name / "c").iterdir():
            if int(folder.name) >= shard_count(cases):
                shutil.rmtree(folder)


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest says of one shard: its source, its bytes, and the cases whose pixels could not be read."""

    fingerprint: str
    image_crc32c: str
    mask_crc32c: str
    rejects: tuple[tuple[str, str], ...] = ()


def read_manifest(cache: Path) -> dict[int, dict[str, Any]]:
    """Content of the manifest by size: `shards`, `complete`, `fingerprint`; empty when there is none."""
    path = cache / MANIFEST
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        if content["schema"] != SCHEMA:
            raise StoreError(f"{path} has schema {content['schema']}, this ptxdist reads {SCHEMA}: update ptxdist")
        return {int(size): entry for size, entry in content["sizes"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is damaged ({error}); remove it and run `ptxdist preprocess` again") from error


def write_manifest(cache: Path, sizes: Mapping[int, Mapping[str, Any]]) -> None:
    """Write the manifest in one step."""
    temporary = cache / (MANIFEST + ".tmp")
    with open(temporary, "w") as file:
        json.dump({"schema": SCHEMA, "sizes": {str(size): sizes[size] for size in sorted(sizes)}}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(cache / MANIFEST)


@dataclass(frozen=True)
class Store:
    """An open store: shard files mapped read-only, gathered like one array."""

    path: Path
    size_px: int
    cases: int
    fingerprint: str
    images: tuple[Samples, ...]
    masks: tuple[Samples, ...]

    def gather(self, indices: Sequence[int] | npt.NDArray[np.int64], image: Samples, mask: Samples) -> None:
        """Copy samples into `image` and `mask`, uint8 (>= len(indices), size, size), row by row."""
        for row, index in enumerate(indices):
            shard, offset = divmod(int(index), SHARD_CASES)
            image[row] = self.images[shard][offset]
            mask[row] = self.masks[shard][offset]

    def sample(self, index: int) -> tuple[Samples, Samples]:
        """Views of one image and one mask, uint8 (size, size), straight from the mapped file."""
        shard, offset = divmod(index, SHARD_CASES)
        return self.images[shard][offset], self.masks[shard][offset]

    def column(self, name: str) -> npt.NDArray[Any]:
        """One coordinate array, (case,): case_id, split, fold, has_mask, area_px, rows or columns."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(zarr.open_group(self.path, mode="r")[name][:])


def open_store(cache: Path, size_px: int) -> Store:
    """Open and map the store of one size; checks completeness, schema, file sizes and shard indexes.

    Raises StoreError naming what is missing or damaged, and the command that mends it.
    """
    manifest = read_manifest(cache)
    if size_px not in manifest:
        sizes = ", ".join(map(str, manifest)) or "none"
        raise StoreError(
            f"{cache} has no store of {size_px} px (it has: {sizes}); "
            f"make it with `ptxdist preprocess … --size {size_px}`"
        )
    entry, path = manifest[size_px], store_path(cache, size_px)
    if not entry.get("complete"):
        raise StoreError(f"{path} is not finished; run `ptxdist preprocess` again, it goes on where it stopped")
    cases = int(entry["cases"])
    arrays = {
        name: tuple(
            _map_shard(path, name, shard, min(SHARD_CASES, cases - shard * SHARD_CASES), size_px)
            for shard in range(shard_count(cases))
        )
        for name in ARRAYS
    }
    return Store(path, size_px, cases, entry["fingerprint"], arrays["image"], arrays["mask"])


def _map_shard(store: Path, array: str, shard: int, cases: int, size_px: int) -> Samples:
    path = _shard_path(store, array, shard)
    chunks = -(-cases // CHUNK_CASES)
    data_bytes = chunks * CHUNK_CASES * size_px * size_px
    damaged = StoreError(f"{path} is missing or damaged; run `ptxdist preprocess` again to rewrite it")
    try:
        if path.stat().st_size != data_bytes + _INDEX_BYTES:
            raise damaged
        content = np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise damaged from error
    footer = content[data_bytes:].tobytes()
    index = np.frombuffer(footer[:-4], dtype="<u8").reshape(-1, 2)
    contiguous = np.arange(chunks, dtype=np.uint64) * np.uint64(CHUNK_CASES * size_px * size_px)
    if (
        google_crc32c.value(footer[:-4]) != int.from_bytes(footer[-4:], "little")
        or (index[:chunks, 0] != contiguous).any()
    ):
        raise damaged
    return np.asarray(content[: cases * size_px * size_px]).reshape(cases, size_px, size_px)


def shard_is_whole(store: Path, shard: int, record: ShardRecord) -> bool:
    """Whether both files of a shard are there with the bytes that the manifest says."""
    for array, expected in zip(ARRAYS, (record.image_crc32c, record.mask_crc32c), strict=True):
        try:
            content = np.memmap(_shard_path(store, array, shard), dtype=np.uint8, mode="r")
        except (OSError, ValueError):
            return False
        if f"{google_crc32c.value(content.tobytes()):08x}" != expected:
            return False
    return True
