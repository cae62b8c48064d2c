"""Image files and tables -> a cache: catalog and stores. A rerun keeps what is still right.

Owns: the order in which a cache is written, rejects.csv and missing.csv.

Shards are written first, then coordinates, catalog and tables, and last the manifest that says that a store is
complete. After an interruption the manifest never lists more than there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ptxdist import files, locks
from ptxdist.cache.build import build_catalog
from ptxdist.cache.catalog import FILE_NAME, Case, Catalog, Reject, catalog_text, leakage_of, read_catalog
from ptxdist.cache.duplicates import FILE_NAME as DUPLICATES
from ptxdist.cache.duplicates import find_duplicates
from ptxdist.cache.manifest import Manifest, ShardRecord, StoreRecord, read_manifest, write_manifest
from ptxdist.cache.render import TRANSFORM, Shard, shard_fingerprint, write_shard
from ptxdist.cache.salt import SALT, choose_salt, keep_salt
from ptxdist.cache.split import FOLDS
from ptxdist.cache.store import ARRAYS, SHARD_CASES, damaged_rows, pending, shard_path, store_path, write_metadata
from ptxdist.errors import CatalogError, StoreError, raise_limit, system_says
from ptxdist.executor import Executor, OnProgress, processes
from ptxdist.files import fingerprint
from ptxdist.finding import DEFAULT, load_finding

MAX_REJECTED_SHARE = 0.1
REJECTS = "rejects.csv"
MISSING = "missing.csv"
TABLES = (FILE_NAME, MISSING, REJECTS, DUPLICATES, SALT)

Records = dict[int, dict[int, ShardRecord]]


@dataclass(frozen=True)
class PreprocessResult:
    """The catalog as written, the path of each case's file, and the shards written and kept over all sizes.

    `is_new_split` says that the catalog of a former run could not be read, so order and split are new.
    """

    catalog: Catalog
    paths: Mapping[str, str] = field(compare=False, repr=False)
    sizes_px: tuple[int, ...]
    written: int
    reused: int
    is_new_split: bool = False


def preprocess(
    images: Path,
    labels: Path,
    out: Path,
    *,
    patients: Path | None = None,
    patient_key: Path | None = None,
    sizes_px: Sequence[int] = (256, 512),
    folds: int = FOLDS,
    seed: int = 0,
    dialect: str | None = None,
    match: str | None = None,
    finding: str = DEFAULT,
    unlisted_negative: bool = False,
    replace_other: bool = False,
    executor: AbstractContextManager[Executor] | None = None,
    workers: int = 1,
    on_progress: OnProgress = lambda step, done, total: None,
) -> PreprocessResult:
    """Build or renew the cache `out` from image files and a label table.

    Shards whose source, labels and parameters are unchanged, and whose bytes are whole, are kept. The work is done by
    `executor`, or else by `workers` processes. `patient_key` is a file with a secret of the site, by which patients are
    hashed: so they can be compared with those of other caches that were made with it. `finding` is what the masks show:
    a name in `findings.toml`, or a file of this kind. With `unlisted_negative` images without a label are negative. A
    cache of other images is renewed only with `replace_other`. `on_progress` is called with a step, and how much of it
    is done of how much. Raises as `build_catalog`; BusyError when another run holds the cache; CatalogError when more
    than a tenth of the files cannot be used, or images, key or finding do not fit the cache; StoreError when the disk
    is full or a worker dies.
    """
    sizes = tuple(sorted(set(sizes_px)))
    is_new = not (out / locks.LOCK).is_file()
    try:
        with ExitStack() as held, executor or processes(workers) as work:
            if not is_new:
                held.enter_context(exclusive(out))
            # All tables and headers are read before the first byte is written.
            salt = choose_salt(out, patient_key, anew=replace_other)
            former, was_there = _former(out), (out / FILE_NAME).is_file()
            if former is not None:
                _refuse_other_finding(former, finding, out)
            else:
                work.prepare(write_shard.__module__)  # there will be shards to write
            catalog, paths = build_catalog(
                images,
                labels,
                patients=patients,
                former=former,
                folds=folds,
                seed=seed,
                salt=salt,
                dialect=dialect,
                match=match,
                finding=finding,
                unlisted_negative=unlisted_negative,
                skip=[out] if out.resolve().is_relative_to(images.resolve()) else (),
                executor=work,
                on_file=lambda done, total: on_progress("headers", done, total),
            )
            if former is not None and not replace_other:
                _refuse_other_images(former, catalog, images, out)
            if is_new:
                out.mkdir(parents=True, exist_ok=True)
                held.enter_context(exclusive(out))
            keep_salt(out / SALT, salt)
            result = _write_cache(catalog, paths, former, images, out, sizes, work, on_progress)
            return replace(result, is_new_split=was_there and former is None)
    except OSError as error:
        raise StoreError(
            f"{out}: writing stopped: {system_says(error)}; finished work is kept, rerun the same command to continue"
        ) from error


def _refuse_other_finding(former: Catalog, finding: str, out: Path) -> None:
    wanted, _ = load_finding(finding)
    if wanted.is_other(former.finding):
        raise CatalogError(
            f"the masks in {out} show {former.finding.name}, not {wanted.name}: give --finding "
            f"{former.finding.name!r}, or another cache with --out"
        )


def _refuse_other_images(former: Catalog, catalog: Catalog, images: Path, out: Path) -> None:
    """CatalogError when less than half of the cases of a cache are among the new ones: it is not a renewal."""
    before, now = ({case.case_id for case in item.labelled if case.case_id} for item in (former, catalog))
    if 2 * len(before & now) < len(before):
        raise CatalogError(
            f"{out} is a cache of other images: of its {len(before):,} cases {len(before & now):,} are in {images}; "
            "give another folder with --out, or --replace to lose it"
        )


def _former(out: Path) -> Catalog | None:
    """The catalog of the former run; None when there is none, or when it is damaged and has to be built again."""
    manifest = read_manifest(out)
    if FILE_NAME in manifest.files and not _is_whole(out, FILE_NAME, manifest):
        return None
    try:
        return read_catalog(out)
    except StoreError as error:
        raise_limit(error)
        return None


def _write_cache(
    catalog: Catalog,
    paths: Mapping[str, str],
    former: Catalog | None,
    images: Path,
    out: Path,
    sizes: tuple[int, ...],
    executor: Executor,
    on_progress: OnProgress,
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
        sources = [paths.get(case.case_id, "") for case in blocks[number]]
        tasks.append((Shard(number, blocks[number], sources, images), out, missing))
    for number, written in executor(write_shard, tasks):
        for size, record in written.items():
            records[size][number] = record
            ready = tuple(records[size].get(index) for index in range(len(blocks)))
            manifest.sizes[size] = replace(manifest.store(size), pending=ready)
        write_manifest(out, manifest)
        done += len(blocks[number])
        on_progress("images", done, total)

    unreadable = dict(pair for size in sizes for record in records[size].values() for pair in record.rejects)
    rejects = (*catalog.rejects, *(Reject(paths[name], reason) for name, reason in unreadable.items()))
    _refuse_too_many(rejects, catalog, out)
    cases = tuple(
        replace(case, split="rejected", fold=-1) if case.case_id in unreadable else case for case in catalog.cases
    )
    leakage = leakage_of(cases, catalog.leakage.grouped_by) if unreadable else catalog.leakage
    final = replace(catalog, cases=cases, rejects=rejects, leakage=leakage)
    final = _put_in_place(final, former, out, prints, manifest, records)
    return PreprocessResult(final, paths, sizes, len(sizes) * len(blocks) - reused, reused)


def shards(cases: Sequence[Case]) -> list[Sequence[Case]]:
    """The cases of each shard."""
    return [cases[start : start + SHARD_CASES] for start in range(0, len(cases), SHARD_CASES)]


def _kept_shards(
    out: Path, size: int, manifest: Manifest, prints: Sequence[str], on_progress: OnProgress
) -> dict[int, ShardRecord]:
    """Records of the shards, in place or pending, that are still right and whole; other pending files are removed."""
    store, entry = store_path(out, size), manifest.store(size)
    kept: dict[int, ShardRecord] = {}
    for number, source in enumerate(prints):
        for record in entry.records(number):
            if record.fingerprint == source and _is_there(store, size, number, record):
                kept[number] = record
                break
        else:
            for array in ARRAYS:
                pending(shard_path(store, array, number)).unlink(missing_ok=True)
        if entry.shards or entry.pending:
            on_progress(f"check of {size} px", number + 1, len(prints))
    return kept


def _is_there(store: Path, size: int, number: int, record: ShardRecord) -> bool:
    """Whether both files of a shard are whole, each in place or pending."""
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
    if manifest.files.pop(REJECTS, None):  # the stores stay as they are; this file is no longer about them
        write_manifest(out, manifest)
    files.write_whole(out / REJECTS, _rejects_text(rejects), error=None)
    raise CatalogError(
        f"{len(rejects)} of {catalog.reconciliation.files} files cannot be used, more than a tenth; "
        f"the reasons are in {out / REJECTS} (the first: {rejects[0].path} {rejects[0].reason})"
    )


def coordinates(cases: Sequence[Case]) -> dict[str, np.ndarray[Any, Any]]:
    """The coordinate arrays of every store, one value a case."""
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
    """Move pending shards into place, write coordinates, catalog and tables, then declare the stores complete."""
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
    manifest.transform = TRANSFORM
    for size, entry in manifest.sizes.items():  # what differs must not be trained on until it is renewed
        manifest.sizes[size] = replace(entry, complete=entry.complete and entry.fingerprint == source[size])
    if former is not None and is_counted:
        shared, pairs = former.leakage.near_duplicates_shared, former.leakage.near_duplicates
        catalog = _with_duplicates(catalog, shared, pairs)
    texts = _texts(catalog) if is_counted else {}
    kept = _kept_tables(texts, out, manifest) if is_counted else set()
    for name in set(TABLES) - kept:  # until the end, either version of each is right: a kill may come in between
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
    if not is_counted:
        catalog = _with_duplicates(catalog, *find_duplicates(cases, out, sizes[0]))
        texts = _texts(catalog)
    for name, text in texts.items():
        if name not in kept:
            files.write_whole(out / name, text, error=None)
    for name in set(TABLES) - kept:
        manifest.files[name] = files.sha256(out / name)
    write_manifest(out, manifest)
    return catalog


def _with_duplicates(catalog: Catalog, shared: int, pairs: int) -> Catalog:
    leakage = replace(catalog.leakage, near_duplicates=pairs, near_duplicates_shared=shared)
    return replace(catalog, leakage=leakage)


def _texts(catalog: Catalog) -> dict[str, bytes]:
    """The content of the tables about all cases, by name."""
    return {
        REJECTS: _rejects_text(catalog.rejects),
        MISSING: files.table_text(("ImageId",), [(case_id,) for case_id in catalog.missing]),
        FILE_NAME: catalog_text(catalog).encode(),
    }


def _kept_tables(texts: Mapping[str, bytes], out: Path, manifest: Manifest) -> set[str]:
    """Names of the tables that are whole and would be written with the same content, as `_texts` gives it."""
    sums = {name: files.sha256(text) for name, text in texts.items()}
    return {
        name
        for name in TABLES
        if _is_whole(out, name, manifest) and manifest.files[name] == sums.get(name, manifest.files[name])
    }


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


def _is_whole(out: Path, name: str, manifest: Manifest) -> bool:
    return (out / name).is_file() and manifest.files.get(name) == files.sha256(out / name)


@contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Lock a cache for writing and remove what killed writers have left in it; BusyError when it is locked already."""
    busy = f"another `ptxdist preprocess` is writing to {out}; wait for it or stop it"
    with locks.only(out / locks.LOCK, busy, error=StoreError):
        files.remove_leftovers(out)
        yield


def _rejects_text(rejects: Sequence[Reject]) -> bytes:
    return files.table_text(("path", "reason"), [(reject.path, reject.reason) for reject in rejects])
