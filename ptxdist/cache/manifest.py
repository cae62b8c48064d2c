"""The manifest of a cache: what each store is made of, and the checksum of every file.

Owns: `manifest.json` and its schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ptxdist import files
from ptxdist.errors import StoreError

SCHEMA = 2
MANIFEST = "manifest.json"
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
    """Content of manifest.json: a record per size, and the sha256 of each file that is not a shard, by path."""

    sizes: dict[int, StoreRecord] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

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


def parse_manifest(text: bytes, path: Path | str) -> Manifest:
    """As `read_manifest`, from the bytes of the file; errors name `path`."""
    try:
        content = json.loads(text)
        if content["schema"] > SCHEMA:
            raise StoreError(f"{path} has schema {content['schema']}, this ptxdist knows {SCHEMA}: update ptxdist")
        if content["schema"] < SCHEMA:
            return Manifest()
        if content.pop("sha256") != _content_sum(content):
            raise ValueError("its checksum differs")
        return Manifest({int(size): _store_record(entry) for size, entry in content["sizes"].items()}, content["files"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is damaged ({error}); remove it and rerun `ptxdist preprocess`") from error


def _store_record(entry: dict[str, Any]) -> StoreRecord:
    shards, pending = (tuple(record and _shard_record(record) for record in entry.pop(key)) for key in _SHARD_KEYS)
    return StoreRecord(**entry, shards=shards, pending=pending)


def _shard_record(record: dict[str, Any]) -> ShardRecord:
    return ShardRecord(**{**record, "rejects": tuple(map(tuple, record["rejects"]))})


def manifest_text(manifest: Manifest) -> str:
    """The text of manifest.json."""
    sizes = {str(size): asdict(manifest.sizes[size]) for size in sorted(manifest.sizes)}
    for entry in sizes.values():
        entry["staged"] = entry.pop("pending")
    content = {"schema": SCHEMA, "sizes": sizes, "files": dict(sorted(manifest.files.items()))}
    content = json.loads(json.dumps(content))  # tuples become lists, as they will be when it is read
    return json.dumps({**content, "sha256": _content_sum(content)}, indent=1)


def write_manifest(cache: Path, manifest: Manifest) -> None:
    """Write manifest.json atomically."""
    files.write_whole(cache / MANIFEST, manifest_text(manifest), error=None)


def _content_sum(content: Mapping[str, Any]) -> str:
    return files.sha256(json.dumps(content, sort_keys=True).encode())
