"""What the tests of a cache share: its files, its rows, and a cache to renew."""

from __future__ import annotations

import csv
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_caches import column

from ptxdist.cache.catalog import read_catalog
from ptxdist.cache.preprocess import PreprocessResult, preprocess
from ptxdist.cache.store import ARRAYS, open_store
from ptxdist.cache.verify import verify

SIZES = (32, 48)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def shard_files(cache: Path) -> dict[str, tuple[int, str]]:
    """Time of writing, in ns, and content of each image and mask shard."""
    found = {}
    for array in ARRAYS:
        for path in cache.glob(f"*/{array}/c/*/0/0"):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[path.relative_to(cache).as_posix()] = path.stat().st_mtime_ns, digest
    return found


def shard_names(*shards: int, sizes: tuple[int, ...] = SIZES) -> set[str]:
    return {f"{size}.zarr/{array}/c/{shard}/0/0" for size in sizes for array in ARRAYS for shard in shards}


def rejects_of(cache: Path) -> dict[str, str]:
    with open(cache / "rejects.csv", newline="") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


def folds_of(cache: Path) -> dict[str, int]:
    return {case.case_id: case.fold for case in read_catalog(cache).labelled if case.case_id}


def rows_of(cache: Path) -> list[str]:
    return [case.case_id for case in read_catalog(cache).labelled]


class Renewal:
    """A copy of the cache of `many_dataset`, and copies of what it was made from, to be changed."""

    def __init__(self, cache: Path, data: Any, folder: Path) -> None:
        self.cache = Path(shutil.copytree(cache, folder / "cache"))
        self.dicom, self.labels, self.patients = folder / "dicom", folder / "labels.csv", folder / "patients.csv"
        self.dicom.mkdir()
        for path in data.dicom.iterdir():
            (self.dicom / path.name).symlink_to(path)
        shutil.copy(data.labels, self.labels)
        shutil.copy(data.patients, self.patients)

    def file(self, number: int) -> Path:
        return self.dicom / f"1.2.3.{10000 + number}.dcm"

    def lines(self) -> list[str]:
        return self.labels.read_text().splitlines(keepends=True)

    def relabel(self, old: str, new: str) -> None:
        text = self.labels.read_text()
        assert old in text
        self.labels.write_text(text.replace(old, new))

    def run(self, **options: Any) -> PreprocessResult:
        options = {"patients": self.patients, "sizes_px": SIZES, **options}
        return preprocess(self.dicom, self.labels, self.cache, **options)

    def changed(self, work: Callable[[], PreprocessResult] | None = None) -> set[str]:
        """Shard files that a run writes; the others keep their bytes and times, and the result counts right."""
        before = shard_files(self.cache)
        result = (work or self.run)()
        after = shard_files(self.cache)
        written = {name for name in after if after[name] != before.get(name)}
        assert len(written) == 2 * result.written
        assert result.written + result.reused == len(result.sizes_px) * -(-len(result.catalog.labelled) // 128)
        assert verify(self.cache) == []
        assert not [path for path in self.cache.rglob("*") if path.suffix in (".tmp", ".new")]
        assert read_catalog(self.cache) == result.catalog
        for size in result.sizes_px:
            store = open_store(self.cache, size)
            for name in ("case_id", "split", "fold", "area_px", "rows", "columns"):
                assert column(store, name).tolist() == [getattr(case, name) for case in result.catalog.labelled]
        return written
