"""The manifest of a cache: what each store is made of, and the checksum of every file.

Owns: manifest.json and the schema number. Refuses: a manifest that is damaged or of a newer schema (StoreError).
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


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest says of one shard: its source, its samples' checksums, and cases that could not be read."""

    fingerprint: str
    image_crc32c: str
    mask_crc32c: str
    rejects: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class StoreRecord:
    """What the manifest says of the store of one size, and of what a run that is not finished has staged for it."""

    complete: bool = False
    cases: int = 0
    fingerprint: str = ""
    shards: tuple[ShardRecord, ...] = ()
    staged: tuple[ShardRecord | None, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """Content of manifest.json: a record per size, and the sha256 of the files that are no shards, by path."""

    sizes: dict[int, StoreRecord] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def read_manifest(cache: Path) -> Manifest:
    """The manifest of a cache; an empty one when there is none, or one of a former schema.

    Raises StoreError for a damaged one, and for one of a newer schema.
    """
    path = cache / MANIFEST
    return parse_manifest(path.read_bytes(), path) if path.is_file() else Manifest()


def parse_manifest(text: bytes, path: Path | str) -> Manifest:
    """Content of a manifest, as `read_manifest`; `path` is named in errors."""
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
        raise StoreError(f"{path} is damaged ({error}); remove it and run `ptxdist preprocess` again") from error


def _store_record(entry: dict[str, Any]) -> StoreRecord:
    records = {
        name: tuple(
            shard and ShardRecord(**{**shard, "rejects": tuple(map(tuple, shard["rejects"]))}) for shard in entry[name]
        )
        for name in ("shards", "staged")
    }
    return StoreRecord(**{**entry, **records})


def manifest_text(manifest: Manifest) -> str:
    """A manifest as it stands in its file."""
    sizes = {str(size): asdict(manifest.sizes[size]) for size in sorted(manifest.sizes)}
    content = {"schema": SCHEMA, "sizes": sizes, "files": dict(sorted(manifest.files.items()))}
    content = json.loads(json.dumps(content))  # tuples become lists, as they will be when it is read
    return json.dumps({**content, "sha256": _content_sum(content)}, indent=1)


def write_manifest(cache: Path, manifest: Manifest) -> None:
    """Write manifest.json atomically."""
    files.write_whole(cache / MANIFEST, manifest_text(manifest), error=None)


def _content_sum(content: Mapping[str, Any]) -> str:
    return files.sha256(json.dumps(content, sort_keys=True).encode())
