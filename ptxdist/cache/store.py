"""The zarr store of one size: written sample by sample, opened by any zarr user, memory-mapped by ours.

    CACHE/256.zarr/                 zarr v3 group; attributes: schema, size_px, geometry
        image/, mask/               uint8 (case, y, x), shards of 128 cases, inner chunks of 16, uncompressed
        case_id, split, fold, has_mask, area_px, rows, columns     one value a case
    CACHE/manifest.json             per size and shard: fingerprint, crc32c of each sample, rejected cases; the sha256
                                    of every other file, and its own

`mask` is the share of a pixel's area that lies in the mask, 0..255. An image or mask shard is a plain run of samples
followed by the zarr index (offset and length of each inner chunk, then a crc32c), so that a file can be mapped and
sliced like an array: many times faster than fancy indexing through zarr (`tests/benchmarks`). Empty masks are not
written: they are holes in the file, which read as zeros.

Owns: the names and bytes of stores. Refuses: stores that are not finished or damaged (StoreError).
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
import numpy.typing as npt

from ptxdist import files
from ptxdist.cache.manifest import SCHEMA, ShardRecord, read_manifest
from ptxdist.errors import StoreError, raise_limit, remedy

SHARD_CASES = 128
CHUNK_CASES = 16
ARRAYS = ("image", "mask")
GEOMETRY = (
    "the image is padded with 0 to a square of max(rows, columns), floor of half the difference at the top and left, "
    "then resized by area averaging (bilinear when it grows); mask likewise: the share of the px's area in it, of 255"
)
_NO_CHUNK = 2**64 - 1  # the zarr sharding codec marks a missing inner chunk so

Samples = npt.NDArray[np.uint8]


def store_path(cache: Path, size_px: int) -> Path:
    """Folder of the store of one size."""
    return cache / f"{size_px}.zarr"


def shard_path(store: Path, array: str, shard: int) -> Path:
    """File of one shard of `image` or `mask`."""
    return store / array / "c" / str(shard) / "0" / "0"


def shard_count(cases: int) -> int:
    """Number of shards of a store with so many cases."""
    return -(-cases // SHARD_CASES)


def shard_cases(cases: int, shard: int) -> int:
    """Number of cases in one shard of a store with so many cases."""
    return min(SHARD_CASES, cases - shard * SHARD_CASES)


def crc32c(sample: Samples) -> str:
    """Checksum of one sample, eight hex digits."""
    return f"{google_crc32c.value(np.ascontiguousarray(sample)):08x}"


def pending(path: Path) -> Path:
    """Where a complete new shard waits until all shards of the run are written; the former store stays readable."""
    return path.with_name(path.name + ".new")


@contextmanager
def shard_writer(path: Path, cases: int, size_px: int) -> Iterator[ShardWriter]:
    """Write one shard file; after the block it is pending, or after an exception nothing is left of it.

    Rows that are never put, and all-zero ones, are holes.
    """
    with files.replacing(pending(path), error=None) as temporary, open(temporary, "wb", buffering=0) as file:
        writer = ShardWriter(file.fileno(), cases, size_px)
        yield writer
        writer.write_index()


class ShardWriter:
    """The samples of one shard file that is being written."""

    def __init__(self, descriptor: int, cases: int, size_px: int) -> None:
        self._descriptor, self._cases, self._bytes = descriptor, cases, size_px * size_px
        self._sums = [crc32c(np.zeros((size_px, size_px), np.uint8))] * cases

    def put(self, row: int, sample: Samples) -> None:
        """Write one sample, uint8 (size, size); rows come in any order."""
        if sample.any():
            content = np.ascontiguousarray(sample)
            self._write(content.data.cast("B"), row * self._bytes)
            self._sums[row] = crc32c(content)

    def write_index(self) -> None:
        """Write the zarr index behind the samples."""
        data, index = shard_layout(self._cases, self._bytes)
        self._write(memoryview(index), data)

    @property
    def crc32c(self) -> str:
        """The checksums of all samples, one after the other."""
        return "".join(self._sums)

    def _write(self, part: memoryview, offset: int) -> None:
        while part:
            written = os.pwrite(self._descriptor, part, offset)
            part, offset = part[written:], offset + written


def shard_layout(cases: int, sample_bytes: int) -> tuple[int, bytes]:
    """Number of bytes of the samples in a shard of so many cases, and the zarr index that follows them."""
    chunks, chunk_bytes = -(-cases // CHUNK_CASES), CHUNK_CASES * sample_bytes
    index = np.full((SHARD_CASES // CHUNK_CASES, 2), _NO_CHUNK, dtype="<u8")
    index[:chunks, 0] = np.arange(chunks, dtype=np.uint64) * chunk_bytes
    index[:chunks, 1] = chunk_bytes
    content = index.tobytes()
    return chunks * chunk_bytes, content + int(google_crc32c.value(content)).to_bytes(4, "little")


def write_metadata(store: Path, size_px: int, coordinates: Mapping[str, npt.NDArray[Any]]) -> dict[str, str]:
    """Write the zarr metadata and the coordinate arrays, each (case,), around the shard files.

    The files are written to a folder beside the store and moved in one by one, the metadata of the group last. Returns
    the sha256 of each file by its path below the store.
    """
    import zarr  # slow to import, and the workers that write shards do not need it

    cases = len(coordinates["case_id"])
    draft = store.with_name(store.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr: consolidated metadata and strings are not in the v3 core yet
        group = zarr.create_group(draft, attributes={"schema": SCHEMA, "size_px": size_px, "geometry": GEOMETRY})
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
                # without it zarr writes no chunk of zeros, and the chunk of a former run would stay
                config={"write_empty_chunks": True},
            )
            array[:] = values.astype(object) if text else values
        zarr.consolidate_metadata(group.store)
    paths = sorted(path.relative_to(draft) for path in draft.rglob("*") if path.is_file())
    paths.sort(key=lambda path: path == Path("zarr.json"))
    sums = {path.as_posix(): files.sha256(draft / path) for path in paths}
    for path in paths:
        files.move(draft / path, store / path)
    shutil.rmtree(draft)
    for name in ARRAYS:  # shards past the last case
        for folder in (store / name / "c").iterdir():
            if folder.name.isdigit() and int(folder.name) >= shard_count(cases):
                shutil.rmtree(folder)
    return sums


@dataclass(frozen=True)
class Store:
    """An open store, its shard files mapped read-only."""

    path: Path
    size_px: int
    cases: int
    fingerprint: str
    images: tuple[Samples, ...]
    masks: tuple[Samples, ...]
    records: tuple[ShardRecord, ...] = field(default=(), kw_only=True)  # none for a store that is not a file

    def gather(self, indices: Sequence[int] | npt.NDArray[np.int64], image: Samples, mask: Samples) -> None:
        """Copy samples into `image` and `mask`, uint8 (>= len(indices), size, size), row by row."""
        for row, index in enumerate(indices):
            image[row], mask[row] = self.sample(int(index))

    def sample(self, index: int) -> tuple[Samples, Samples]:
        """Views of one image and one mask, uint8 (size, size), of the mapped file."""
        shard, offset = divmod(index, SHARD_CASES)
        return self.images[shard][offset], self.masks[shard][offset]

    def checked(self, index: int) -> tuple[Samples, Samples]:
        """As `sample`; StoreError when image or mask has another checksum than when it was written."""
        shard, row = divmod(index, SHARD_CASES)
        found = self.sample(index)
        for record in self.records[shard : shard + 1]:
            for array, sample, sums in zip(ARRAYS, found, (record.image_crc32c, record.mask_crc32c), strict=True):
                if crc32c(sample) != sums[8 * row : 8 * row + 8]:
                    raise StoreError(
                        f"{shard_path(self.path, array, shard)} has another checksum than when it was written; "
                        "`ptxdist verify` names all damage, and `ptxdist preprocess` repairs it"
                    )
        return found


def open_store(cache: Path, size_px: int) -> Store:
    """Open and map the store of one size; checks completeness, schema, file sizes and shard indexes.

    Raises StoreError that names what is missing or damaged and the command that repairs it. `verify` compares the
    checksums of the samples.
    """
    manifest = read_manifest(cache)
    if size_px not in manifest.sizes:
        sizes = ", ".join(map(str, manifest.sizes)) or "none"
        raise StoreError(
            f"{cache} has no store of {size_px} px (it has: {sizes}); "
            f"make it with `ptxdist preprocess … --size {size_px}`"
        )
    entry, path = manifest.sizes[size_px], store_path(cache, size_px)
    if not entry.complete:
        raise StoreError(f"{path} is not finished; rerun `ptxdist preprocess`, finished work is kept")
    images, masks = (
        tuple(
            map_shard(shard_path(path, name, shard), shard_cases(entry.cases, shard), size_px)[0]
            for shard in range(shard_count(entry.cases))
        )
        for name in ARRAYS
    )
    return Store(path, size_px, entry.cases, entry.fingerprint, images, masks, records=entry.shards)


def map_shard(path: Path, cases: int, size_px: int) -> tuple[Samples, Samples]:
    """Samples (cases, size, size) of one shard file, and the filling of its last chunk (fewer than 16, size, size).

    Raises StoreError when the file is missing or its length or index is wrong.
    """
    data, index = shard_layout(cases, size_px * size_px)
    otherwise = "rerun `ptxdist preprocess` to rewrite it"
    try:
        if path.stat().st_size != data + len(index):
            raise StoreError(f"{path} is damaged; {otherwise}")
        content = np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise StoreError(f"{path} {what}; {remedy(error, otherwise)}") from error
    if content[data:].tobytes() != index:
        raise StoreError(f"{path} is damaged; {otherwise}")
    samples = np.asarray(content[:data]).reshape(-1, size_px, size_px)
    return samples[:cases], samples[cases:]


def damaged_rows(path: Path, size_px: int, sums: str) -> dict[int, str]:
    """Reason for each row of a shard file that differs from its checksum in `sums`; row -1 is the whole file."""
    expected = [sums[start : start + 8] for start in range(0, len(sums), 8)]
    try:
        samples, filling = map_shard(path, len(expected), size_px)
    except StoreError as error:
        raise_limit(error)
        return {-1: str(error).removeprefix(f"{path} ").split(";")[0]}
    found = {-1: "contains data past its last case"} if filling.any() else {}
    sample = np.zeros(samples.shape[1:], np.uint8)
    empty = crc32c(sample)
    try:
        with open(path, "rb", buffering=0) as file:  # a third faster than the map, whose pages come one by one
            for row, right in enumerate(expected):
                start, end = row * sample.size, (row + 1) * sample.size
                if _next_data(file, start) >= end:
                    sum_ = empty
                else:
                    file.seek(start)
                    sum_ = crc32c(sample) if file.readinto(sample.data) == sample.size else ""
                if sum_ != right:
                    found[row] = "has another checksum than when it was written"
    except OSError as error:
        raise_limit(error)
        found[-1] = f"cannot be read ({error.strerror})"
    return found


def _next_data(file: BinaryIO, position: int) -> int:
    """The first place from `position` on that is in no hole of a file, as far as its file system knows holes."""
    try:
        return os.lseek(file.fileno(), position, os.SEEK_DATA)
    except OSError as error:
        return sys.maxsize if error.errno == errno.ENXIO else position  # ENXIO: nothing but a hole
