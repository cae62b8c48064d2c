"""`manifest.json` of a cache and its schema: what each store is made of, and the checksum of every file."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ptxdist import files, places
from ptxdist.errors import StoreError

SCHEMA = 2
MANIFEST = places.MANIFEST
_FORMER_TRANSFORM = 2  # of a manifest that does not name it
# The files that a manifest lists beside the shards: tables, and what zarr writes around the shards.
_NAME = re.compile(r"[a-z_]+(\.csv|\.jsonl)?|[1-9][0-9]{0,4}\.zarr/([a-z_]+/)?(zarr\.json|c/[0-9]{1,9})", re.ASCII)
_SIZE = re.compile("[1-9][0-9]{0,4}", re.ASCII)
_SUM, _SUMS = re.compile("[0-9a-f]+"), re.compile("([0-9a-f]{8})*")
_SHARD_KEYS = ("shards", "staged")  # the second one is `StoreRecord.pending`


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest says of one shard: its source, the checksums of its samples, and the cases that failed."""

    fingerprint: str
    image_crc32c: str
    mask_crc32c: str
    rejects: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class StoreRecord:
    """What the manifest says of the store of one size; `pending` are shards of an unfinished run."""

    complete: bool = False
    cases: int = 0
    fingerprint: str = ""
    shards: tuple[ShardRecord, ...] = ()
    pending: tuple[ShardRecord | None, ...] = ()

    def records(self, number: int) -> list[ShardRecord]:
        """The records of one shard, the pending one first; at most two."""
        found = (*self.pending[number : number + 1], *self.shards[number : number + 1])
        return [record for record in found if record]


@dataclass
class Manifest:
    """Content of manifest.json: a record per size, and the sha256 of each file that is not a shard, by path.

    `transform` is `render.TRANSFORM` of the code that wrote the stores.
    """

    sizes: dict[int, StoreRecord] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    transform: int = _FORMER_TRANSFORM

    def store(self, size_px: int) -> StoreRecord:
        """The record of one size; an empty one when there is none."""
        return self.sizes.get(size_px, StoreRecord())

    def shard(self, size_px: int, number: int) -> ShardRecord | None:
        """The record of one shard: the pending one, or else the one in place."""
        return next(iter(self.store(size_px).records(number)), None)


def read_manifest(cache: Path) -> Manifest:
    """The manifest of a cache; an empty one when there is none or its schema is older.

    Raises StoreError when it is damaged or its schema is newer.
    """
    path = cache / MANIFEST
    return parse_manifest(path.read_bytes(), path) if path.is_file() else Manifest()


def refuse_other_transform(cache: Path, wanted: int) -> None:
    """Raise StoreError when the images of a cache were resized by another transform than a model needs."""
    found = read_manifest(cache).transform
    if found != wanted:
        raise StoreError(
            f"{cache} was written with transform {found}, and transform {wanted} is needed; rerun `ptxdist preprocess` "
            "with the present version, which rewrites it"
        )


def refuse_damaged_table(cache: Path, name: str) -> None:
    """Raise StoreError when a table of a cache is missing or has another checksum than its manifest lists.

    While a cache is being written, its manifest lists none.
    """
    sum_ = read_manifest(cache).files.get(name)
    if sum_ is not None:
        files.refuse_damaged(cache / name, sum_, "rerun `ptxdist preprocess`", StoreError)


def parse_manifest(text: bytes, path: Path | str) -> Manifest:
    """As `read_manifest`, from the bytes of the file; errors name `path`."""
    try:
        content = files.parse_json(text)
        if content["schema"] > SCHEMA:
            raise StoreError(f"{path} has schema {content['schema']}, this ptxdist knows {SCHEMA}: update ptxdist")
        if content["schema"] < SCHEMA:
            return Manifest()
        if content.pop("sha256") != files.content_sum(content):
            raise ValueError("its checksum differs")
        for name, sum_ in content["files"].items():
            _check(_NAME.fullmatch(name), f"it lists {name!r}, which is no file of a cache")
            _check(_SUM.fullmatch(sum_), f"the checksum of {name} is none")
        for size in content["sizes"]:
            _check(_SIZE.fullmatch(size), f"{size!r} is no size")
        transform = content.get("transform", _FORMER_TRANSFORM)
        _check(type(transform) is int, "its transform is no number")
        sizes = {int(size): _store_record(entry) for size, entry in content["sizes"].items()}
        return Manifest(sizes, content["files"], transform)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path} is damaged ({error}); remove it and rerun `ptxdist preprocess`") from error


def _store_record(entry: dict[str, Any]) -> StoreRecord:
    shards, pending = (tuple(record and _shard_record(record) for record in entry.pop(key)) for key in _SHARD_KEYS)
    record = StoreRecord(**entry, shards=shards, pending=pending)
    kinds = type(record.complete), type(record.cases), type(record.fingerprint)
    _check(kinds == (bool, int, str), "a store is not described as one")
    samples = sum(len(shard.image_crc32c) // 8 for shard in shards)
    _check(not record.complete or samples == record.cases, f"{samples} checksums for {record.cases} cases")
    return record


def _shard_record(record: dict[str, Any]) -> ShardRecord:
    found = ShardRecord(**{**record, "rejects": tuple(map(tuple, record["rejects"]))})
    texts = all(tuple(map(type, reject)) == (str, str) for reject in found.rejects)
    _check(texts and type(found.fingerprint) is str, "a shard is not described as one")
    sums = found.image_crc32c, found.mask_crc32c
    _check(all(map(_SUMS.fullmatch, sums)) and len(set(map(len, sums))) == 1, "the checksums of a shard are none")
    return found


def _check(is_right: object, what: str) -> None:
    if not is_right:
        raise ValueError(what)


def manifest_text(manifest: Manifest) -> str:
    """The text of manifest.json."""
    sizes = {str(size): asdict(manifest.sizes[size]) for size in sorted(manifest.sizes)}
    for entry in sizes.values():
        entry["staged"] = entry.pop("pending")
    content = {"schema": SCHEMA, "sizes": sizes, "files": dict(sorted(manifest.files.items()))}
    if manifest.transform != _FORMER_TRANSFORM:
        content["transform"] = manifest.transform
    content = json.loads(json.dumps(content))  # tuples become lists, as they will be when it is read
    return json.dumps({**content, "sha256": files.content_sum(content)}, indent=1)


def write_manifest(cache: Path, manifest: Manifest) -> None:
    """Write manifest.json atomically, unless it has this content already."""
    path, content = cache / MANIFEST, manifest_text(manifest).encode()
    if not path.is_file() or path.read_bytes() != content:
        files.write_whole(path, content, error=None)
