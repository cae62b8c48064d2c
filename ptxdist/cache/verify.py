"""Compare a cache with its manifest and with its image files, and repair it where that is possible."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ptxdist import files
from ptxdist.cache.catalog import Case, read_catalog
from ptxdist.cache.manifest import MANIFEST, Manifest, ShardRecord, read_manifest, write_manifest
from ptxdist.cache.preprocess import coordinates, exclusive, shards
from ptxdist.cache.render import Shard, differing_cases, write_shard
from ptxdist.cache.scan import scan
from ptxdist.cache.store import ARRAYS, damaged_rows, pending, shard_path, store_path, write_metadata
from ptxdist.errors import StoreError, remedy, system_says
from ptxdist.executor import Executor, OnProgress, serial


@dataclass(frozen=True)
class Damage:
    """A damaged file: its path below the cache, what is wrong with it, and the cases concerned."""

    path: str
    reason: str
    cases: tuple[str, ...] = ()


def verify(
    cache: Path, *, sizes_px: Sequence[int] | None = None, on_progress: OnProgress = lambda step, done, total: None
) -> list[Damage]:
    """Compare every byte of a cache with the checksums in its manifest, for these sizes or all.

    An empty list means that the cache is as it was written. Raises StoreError when there is no finished store, or when
    the manifest itself is damaged.
    """
    manifest = _finished(cache, sizes_px)
    sizes = manifest.sizes if sizes_px is None else sizes_px
    damages = [
        Damage(name, reason)
        for name, sum_ in manifest.files.items()
        if not name.partition("/")[0].endswith(".zarr") or int(name.split(".")[0]) in sizes
        if (reason := files.damage_of(cache / name, sum_))
    ]
    with suppress(StoreError):
        damages += _compare(cache, manifest, sizes, shards(read_catalog(cache, as_it_is=True).labelled), on_progress)
    return damages


def _compare(
    cache: Path, manifest: Manifest, sizes: Iterable[int], blocks: Sequence[Sequence[Case]], on_progress: OnProgress
) -> list[Damage]:
    damages = []
    for size in sizes:
        entry = manifest.sizes[size]
        for number, record in enumerate(entry.shards):
            block = blocks[number] if number < len(blocks) else ()  # a catalog of another cache is reported by `verify`
            for array, sums in zip(ARRAYS, (record.image_crc32c, record.mask_crc32c), strict=True):
                path = shard_path(store_path(cache, size), array, number)
                found = damaged_rows(path, size, sums)
                if found:
                    rows = [row for row in found if row >= 0] or range(len(block))
                    names = tuple(block[row].case_id for row in rows if row < len(block))
                    damages.append(Damage(path.relative_to(cache).as_posix(), next(iter(found.values())), names))
            on_progress(f"{size} px", number + 1, len(blocks))
    return damages


def verify_source(
    cache: Path, images: Path, *, executor: Executor = serial, on_progress: OnProgress = lambda step, done, total: None
) -> list[Damage]:
    """Decode every image file again and compare the samples with the manifest.

    Files are found by their content, wherever below `images` they are.
    """
    manifest, blocks = _finished(cache), shards(read_catalog(cache).labelled)
    sources = _find(images, dict(enumerate(blocks)), executor, on_progress)
    tasks = [
        (source, {size: entry.shards[number] for size, entry in manifest.sizes.items()})
        for number, source in sources.items()
    ]
    damages, done = {}, 0
    for number, found in executor(differing_cases, tasks):
        path_of = {case.case_id: path for case, path in zip(blocks[number], sources[number].paths, strict=True)}
        damages[number] = [
            Damage("", reason if path_of[name] else "its file is gone or was changed", (name,))
            for name, reason in found.items()
        ]
        done += len(blocks[number])
        on_progress("source", done, sum(map(len, blocks)))
    return [damage for number in sorted(damages) for damage in damages[number]]


def repair(
    cache: Path,
    images: Path | None,
    *,
    executor: Executor = serial,
    on_progress: OnProgress = lambda step, done, total: None,
) -> list[Damage]:
    """Repair what `verify` finds, from the catalog and the image files; returns what was wrong.

    Raises StoreError when the catalog or the manifest is damaged, when `images` is needed and not given, or when the
    image files give other samples; `ptxdist preprocess` repairs these. BusyError when another process writes the cache.
    """
    _finished(cache)  # before a lock file is written to a folder that is no cache
    try:
        with exclusive(cache):
            return _repair(cache, images, executor, on_progress)
    except OSError as error:
        says = system_says(error)
        raise StoreError(f"{cache}: writing stopped: {says}; rerun the same command to continue") from error


def _repair(cache: Path, images: Path | None, executor: Executor, on_progress: OnProgress) -> list[Damage]:
    damages, manifest = verify(cache, on_progress=on_progress), _finished(cache)
    names = {damage.path for damage in damages}
    if lost := sorted(name for name in names if "/" not in name):
        raise StoreError(f"{cache / lost[0]} cannot be repaired from the rest; rerun `ptxdist preprocess`")
    blocks = shards(read_catalog(cache).labelled)
    broken: dict[int, dict[int, ShardRecord]] = {}
    for size, entry in manifest.sizes.items():
        for number, record in enumerate(entry.shards):
            if any(shard_path(store_path(Path(), size), array, number).as_posix() in names for array in ARRAYS):
                broken.setdefault(number, {})[size] = record
    if broken and images is None:
        raise StoreError(f"{len(broken)} shards are damaged; give the image files with --source to rewrite them")
    if broken and images is not None:
        sources = _find(images, {number: blocks[number] for number in broken}, executor, on_progress)
        tasks = [(sources[number], cache, tuple(sizes)) for number, sizes in broken.items()]
        for number, made in executor(write_shard, tasks):
            _replace_shard(cache, number, broken[number], made)
    for size in manifest.sizes:
        store = store_path(cache, size)
        if any(name.startswith(f"{store.name}/") and name in manifest.files for name in names):
            write_metadata(store, size, coordinates([case for block in blocks for case in block]))
    write_manifest(cache, manifest)
    left = verify(cache, on_progress=on_progress)
    if left:
        raise StoreError(f"{cache / left[0].path} {left[0].reason} after the repair too; rerun `ptxdist preprocess`")
    return damages


def _replace_shard(cache: Path, number: int, expected: dict[int, ShardRecord], made: dict[int, ShardRecord]) -> None:
    for size, record in made.items():
        same = (record.image_crc32c, record.mask_crc32c) == (expected[size].image_crc32c, expected[size].mask_crc32c)
        for array in ARRAYS:
            path = shard_path(store_path(cache, size), array, number)
            if same:
                files.move(pending(path), path)
            else:
                pending(path).unlink()
        if not same:
            raise StoreError(
                f"{store_path(cache, size)}: the files given with --source give another shard {number}; "
                "rerun `ptxdist preprocess`"
            )


def _finished(cache: Path, sizes_px: Iterable[int] | None = None) -> Manifest:
    """The manifest; StoreError unless the stores of these sizes, or all, are complete."""
    manifest = read_manifest(cache)
    if not manifest.sizes:
        raise StoreError(f"{cache} is not a ptxdist cache (no {MANIFEST}); make one with `ptxdist preprocess`")
    for size in manifest.sizes if sizes_px is None else sizes_px:
        if size not in manifest.sizes:
            raise StoreError(f"{cache} has no store of {size} px; make it with `ptxdist preprocess … --size {size}`")
        if not manifest.sizes[size].complete:
            raise StoreError(f"{store_path(cache, size)} is not finished; rerun `ptxdist preprocess`")
    return manifest


def _find(
    images: Path, blocks: Mapping[int, Sequence[Case]], executor: Executor, on_progress: OnProgress
) -> dict[int, Shard]:
    """The shards of these numbers and cases, with the cases' files below `images`, which their content identifies."""
    found, _ = scan(images, executor=executor, on_file=lambda done, total: on_progress("headers", done, total))
    paths = {file.digest: file.path for file in found}
    return {
        number: Shard(number, block, [paths.get(case.digest, "") for case in block], images)
        for number, block in blocks.items()
    }


def refuse_damaged(
    cache: Path, sizes_px: Sequence[int], *, on_progress: OnProgress = lambda step, done, total: None
) -> None:
    """Raise a StoreError that names the first damage and its cases when the stores of these sizes are damaged."""
    damages = verify(cache, sizes_px=sizes_px, on_progress=on_progress)
    if damages:
        first = damages[0]
        more = " …" if len(first.cases) > 3 else ""
        cases = f" (cases {', '.join(first.cases[:3])}{more})" if first.cases else ""
        repair = f"repair it with `ptxdist verify {cache} --repair --source DICOM` or `ptxdist preprocess`"
        raise StoreError(f"{cache / first.path} {first.reason}{cases}; {remedy(first.reason, repair)}")
