"""Image files and tables -> a cache: catalog and stores, nothing done twice, nothing lost.

Owns: the order in which a cache is written, what of a former run is kept, rejects.csv and missing.csv.
Refuses: two runs on one cache at once (BusyError), input of which too much is unusable (CatalogError).
Called by: `cli`. Writing goes from the inside out: shards, coordinates, catalog, and last the manifest that says that a
store is complete. Whatever is interrupted, the manifest never promises more than is there.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ptxdist import files, locks
from ptxdist.cache.catalog import (
    FILE_NAME,
    Case,
    Catalog,
    Reject,
    build_catalog,
    leakage_of,
    read_catalog,
    write_catalog,
)
from ptxdist.cache.duplicates import COLUMNS, SIDE_PX, near_duplicates, thumbnail
from ptxdist.cache.duplicates import FILE_NAME as DUPLICATES
from ptxdist.cache.manifest import Manifest, ShardRecord, StoreRecord, read_manifest, write_manifest
from ptxdist.cache.render import Shard, shard_fingerprint, write_shard
from ptxdist.cache.split import FOLDS
from ptxdist.cache.store import (
    ARRAYS,
    SHARD_CASES,
    damaged_rows,
    map_shard,
    pending,
    shard_cases,
    shard_path,
    store_path,
    write_metadata,
)
from ptxdist.config import fingerprint
from ptxdist.errors import BusyError, CatalogError, StoreError
from ptxdist.executor import Executor, processes

MAX_REJECTED_SHARE = 0.1
REJECTS = "rejects.csv"
MISSING = "missing.csv"
SALT = "salt"
TABLES = (FILE_NAME, MISSING, REJECTS, DUPLICATES, SALT)

Progress = Callable[[str, int, int], None]
Records = dict[int, dict[int, ShardRecord]]


@dataclass(frozen=True)
class PreprocessResult:
    """What a run did: the catalog as written, shards written and reused over all sizes.

    `dealt_anew` tells that the catalog of a former run could not be read, so that order and split are new ones.
    """

    catalog: Catalog
    sizes_px: tuple[int, ...]
    written: int
    reused: int
    dealt_anew: bool = False


def preprocess(
    images: Path,
    labels: Path,
    out: Path,
    *,
    patients: Path | None = None,
    sizes_px: Sequence[int] = (256, 512),
    folds: int = FOLDS,
    seed: int = 0,
    dialect: str | None = None,
    executor: AbstractContextManager[Executor] | None = None,
    workers: int = 1,
    on_progress: Progress = lambda step, done, total: None,
) -> PreprocessResult:
    """Build or renew the cache `out` from image files and a label table.

    Shards whose source, labels and parameters are unchanged, and whose bytes are whole, are kept. `spread` says who
    does the work: `workers` processes if not given. `on_progress` hears ("headers", "images" or "check", done, total).
    Raises as `build_catalog`; BusyError when another run holds the cache; CatalogError when more than a tenth of the
    files cannot be used; StoreError when the disk is full or a worker dies.
    """
    sizes = tuple(sorted(set(sizes_px)))
    is_new = not (out / locks.LOCK).is_file()
    try:
        with ExitStack() as held, executor or processes(workers) as work:
            if not is_new:
                held.enter_context(exclusive(out))
            # Everything that can be wrong with the tables and the headers is found before the first byte is written.
            salt = read_salt(out) or secrets.token_bytes(32)
            former, was_there = _former(out), (out / FILE_NAME).is_file()
            if former is None:
                work.prepare(write_shard.__module__)  # there will be shards to write
            catalog = build_catalog(
                images,
                labels,
                patients=patients,
                former=former,
                folds=folds,
                seed=seed,
                salt=salt,
                dialect=dialect,
                skip=[out] if out.resolve().is_relative_to(images.resolve()) else (),
                executor=work,
                on_file=lambda done, total: on_progress("headers", done, total),
            )
            if is_new:
                out.mkdir(parents=True, exist_ok=True)
                held.enter_context(exclusive(out))
            _keep_salt(out / SALT, salt)
            result = _write_cache(catalog, former, images, out, sizes, work, on_progress)
            return replace(result, dealt_anew=was_there and former is None)
    except OSError as error:
        raise StoreError(
            f"{out}: writing stopped: {error.strerror}; what is finished stays, and the same command goes on from there"
        ) from error


def _former(out: Path) -> Catalog | None:
    """The catalog of the run before; None at a first run, and for a damaged one, which is then made from the start."""
    manifest = read_manifest(out)
    if FILE_NAME in manifest.files and not _is_whole(out, FILE_NAME, manifest):
        return None
    with suppress(StoreError):
        return read_catalog(out)
    return None


def _write_cache(
    catalog: Catalog,
    former: Catalog | None,
    images: Path,
    out: Path,
    sizes: tuple[int, ...],
    executor: Executor,
    on_progress: Progress,
) -> PreprocessResult:
    _refuse_too_many(catalog.rejects, catalog, out)
    blocks = shards(catalog.labelled)
    manifest = read_manifest(out)
    prints = {size: [shard_fingerprint(block, size) for block in blocks] for size in sizes}
    records = {size: _kept_shards(out, size, manifest, prints[size], on_progress) for size in sizes}
    todo = {
        number: missing
        for number in range(len(blocks))
        if (missing := tuple(size for size in sizes if number not in records[size]))
    }
    reused = sum(map(len, records.values()))

    total, done = sum(len(blocks[number]) for number in todo), 0
    tasks = []
    for number, missing in todo.items():
        paths = [catalog.paths.get(case.case_id, "") for case in blocks[number]]
        tasks.append((Shard(number, blocks[number], paths, images), out, missing))
    for number, written in executor(write_shard, tasks):
        for size, record in written.items():
            records[size][number] = record
            entry = manifest.sizes.get(size, StoreRecord())
            ready = tuple(records[size].get(index) for index in range(len(blocks)))
            manifest.sizes[size] = replace(entry, staged=ready)
        write_manifest(out, manifest)
        done += len(blocks[number])
        on_progress("images", done, total)

    unreadable = dict(pair for size in sizes for record in records[size].values() for pair in record.rejects)
    rejects = (*catalog.rejects, *(Reject(catalog.paths[name], reason) for name, reason in unreadable.items()))
    _refuse_too_many(rejects, catalog, out)
    cases = tuple(
        replace(case, split="rejected", fold=-1) if case.case_id in unreadable else case for case in catalog.cases
    )
    leakage = leakage_of(cases, catalog.leakage.grouped_by)
    final = replace(catalog, cases=cases, rejects=rejects, leakage=leakage)
    final = _put_in_place(final, former, out, prints, manifest, records)
    return PreprocessResult(final, sizes, len(sizes) * len(blocks) - reused, reused)


def shards(cases: Sequence[Case]) -> list[Sequence[Case]]:
    """The cases of each shard."""
    return [cases[start : start + SHARD_CASES] for start in range(0, len(cases), SHARD_CASES)]


def _kept_shards(
    out: Path, size: int, manifest: Manifest, prints: Sequence[str], on_progress: Progress
) -> dict[int, ShardRecord]:
    """Shards of a former run, in place or staged, that are still right and whole; other staged files are removed."""
    store, entry = store_path(out, size), manifest.sizes.get(size, StoreRecord())
    kept: dict[int, ShardRecord] = {}
    for number, source in enumerate(prints):
        for record in (*entry.staged[number : number + 1], *entry.shards[number : number + 1]):
            if record is not None and record.fingerprint == source and _is_there(store, size, number, record):
                kept[number] = record
                break
        else:
            for array in ARRAYS:
                pending(shard_path(store, array, number)).unlink(missing_ok=True)
        if entry.shards or entry.staged:
            on_progress(f"check of {size} px", number + 1, len(prints))
    return kept


def _is_there(store: Path, size: int, number: int, record: ShardRecord) -> bool:
    """Whether both files of a shard are whole, each in its place or staged."""
    whole = True
    for array, sums in zip(ARRAYS, (record.image_crc32c, record.mask_crc32c), strict=True):
        path = shard_path(store, array, number)
        if not damaged_rows(path, size, sums):
            pending(path).unlink(missing_ok=True)
        else:
            whole = whole and not damaged_rows(pending(path), size, sums)
    return whole


def _refuse_too_many(rejects: Sequence[Reject], catalog: Catalog, out: Path) -> None:
    """CatalogError, and rejects.csv, when more than a tenth of the files cannot be used."""
    if len(rejects) <= MAX_REJECTED_SHARE * catalog.reconciliation.files:
        return
    manifest = read_manifest(out)
    if manifest.files.pop(REJECTS, None):  # the stores stay as they are, but this file speaks of them no more
        write_manifest(out, manifest)
    _write_rejects(out, rejects)
    raise CatalogError(
        f"{len(rejects)} of {catalog.reconciliation.files} files cannot be used, more than a tenth; "
        f"the reasons are in {out / REJECTS} (the first one: {rejects[0].path} {rejects[0].reason})"
    )


def coordinates(cases: Sequence[Case]) -> dict[str, np.ndarray[Any, Any]]:
    """The values that stand beside the samples in every store, one a case."""
    return {
        "case_id": np.array([case.case_id for case in cases]),
        "split": np.array([case.split for case in cases]),
        "fold": np.array([case.fold for case in cases], np.int8),
        "has_mask": np.array([bool(case.masks) for case in cases]),
        "area_px": np.array([case.area_px for case in cases], np.int32),
        "rows": np.array([case.rows for case in cases], np.int32),
        "columns": np.array([case.columns for case in cases], np.int32),
    }


def _put_in_place(
    catalog: Catalog,
    former: Catalog | None,
    out: Path,
    prints: dict[int, list[str]],
    manifest: Manifest,
    records: Records,
) -> Catalog:
    """Staged shards, coordinates, catalog and tables, then the manifest that declares the stores complete."""
    cases = catalog.labelled
    blocks = shards(cases)
    sides = [[case.case_id, case.split, case.fold] for case in cases]
    sizes = tuple(prints)
    source = {
        size: fingerprint(prints.get(size) or [shard_fingerprint(block, size) for block in blocks], sides)
        for size in (*sizes, *manifest.sizes)
    }
    unchanged = all(
        entry.complete and entry.fingerprint == source[size] for size, entry in manifest.sizes.items()
    ) and set(sizes) <= set(manifest.sizes)
    is_counted = former is not None and unchanged and _is_whole(out, DUPLICATES, manifest)
    for size, entry in manifest.sizes.items():  # what differs is not to be trained on until it is renewed
        manifest.sizes[size] = replace(entry, complete=entry.complete and entry.fingerprint == source[size])
    for name in TABLES:  # a kill may come before or after each is renewed: until the end, either is right
        manifest.files.pop(name, None)
    write_manifest(out, manifest)
    for size in sizes:
        for number in range(len(blocks)):
            for array in ARRAYS:
                path = shard_path(store_path(out, size), array, number)
                with suppress(FileNotFoundError):
                    files.move(pending(path), path)
        _renew_metadata(out, size, manifest, cases)
        manifest.sizes[size] = StoreRecord(
            True, len(cases), source[size], tuple(records[size][number] for number in range(len(blocks)))
        )
    if former is not None and is_counted:
        shared, pairs = former.leakage.near_duplicates_shared, former.leakage.near_duplicates
    else:
        shared, pairs = _find_duplicates(cases, out, sizes[0])
    leakage = replace(catalog.leakage, near_duplicates=pairs, near_duplicates_shared=shared)
    catalog = replace(catalog, leakage=leakage)
    _write_rejects(out, catalog.rejects)
    files.write_table(out / MISSING, ("ImageId",), [(case_id,) for case_id in catalog.missing], error=None)
    write_catalog(catalog, out / FILE_NAME)
    for name in TABLES:
        manifest.files[name] = files.sha256(out / name)
    write_manifest(out, manifest)
    return catalog


def _renew_metadata(out: Path, size: int, manifest: Manifest, cases: Sequence[Case]) -> None:
    """Write the metadata of one store, unless it is complete and whole."""
    store = store_path(out, size)
    names = [name for name in manifest.files if name.startswith(f"{store.name}/")]
    entry = manifest.sizes.get(size)
    if entry and entry.complete and names and all(_is_whole(out, name, manifest) for name in names):
        return
    for name in names:
        del manifest.files[name]
    sums = write_metadata(store, size, coordinates(cases))
    manifest.files.update({f"{store.name}/{name}": value for name, value in sums.items()})


def _find_duplicates(cases: Sequence[Case], out: Path, size: int) -> tuple[int, int]:
    """Write near_duplicates.csv; the number of pairs with one image on each side of the split, and of all pairs."""
    rows = [row for row, case in enumerate(cases) if case.split in ("train", "val")]
    small = np.zeros((len(rows), SIDE_PX, SIDE_PX), np.float32)
    path, block = Path(), np.zeros((0, size, size), np.uint8)
    for place, row in enumerate(rows):
        shard, offset = divmod(row, SHARD_CASES)
        wanted = shard_path(store_path(out, size), "image", shard)
        if wanted != path:
            path, block = wanted, map_shard(wanted, shard_cases(len(cases), shard), size)[0]
        small[place] = thumbnail(block[offset])
    pairs = [(cases[rows[i]], cases[rows[j]]) for i, j in near_duplicates(small)]
    table = [(a.case_id, b.case_id, a.split, b.split, str(a.group == b.group).lower()) for a, b in pairs]
    files.write_table(out / DUPLICATES, COLUMNS, table, error=None)
    return sum(a.split != b.split for a, b in pairs), len(pairs)


def _is_whole(out: Path, name: str, manifest: Manifest) -> bool:
    return (out / name).is_file() and manifest.files.get(name) == files.sha256(out / name)


@contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Lock a cache for writing and remove what killed writers have left in it; BusyError when it is locked already."""
    busy = f"another `ptxdist preprocess` is writing to {out}; wait for it or stop it"
    with locks.only(out / locks.LOCK, busy, error=StoreError):
        files.remove_leftovers(out)
        yield


def read_salt(cache: Path) -> bytes:
    """The key of a cache's hashes of paths and patients; b"" when it has none yet."""
    return (cache / SALT).read_bytes() if (cache / SALT).is_file() else b""


def _keep_salt(path: Path, salt: bytes) -> None:
    """Store the salt of a new cache; BusyError when another run has given it one since this run looked."""
    former = read_salt(path.parent)
    if former and former != salt:
        raise BusyError(f"another `ptxdist preprocess` has just made {path.parent}; rerun the command")
    if former:
        return
    files.write_whole(path, salt, mode=0o600, error=None)


def _write_rejects(out: Path, rejects: Sequence[Reject]) -> None:
    rows = [(reject.path, reject.reason) for reject in rejects]
    files.write_table(out / REJECTS, ("path", "reason"), rows, error=None)
