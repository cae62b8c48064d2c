"""Catalog -> stores: every size from one decode, one shard a task, nothing done twice.

Owns: the transform from a Radiograph and its masks to samples, the distribution of shards over processes, rejects.csv.
Refuses: two runs on one cache at once (BusyError), input of which too much is unusable (CatalogError).
Called by: `cli`.

The transform: the image is padded to a square with black, centred, then resized by area averaging (bilinear when it has
to grow); the mask, as 0 and 255, goes the same way, which leaves each px the share of its area inside the mask.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import multiprocessing
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ptxdist.config import fingerprint
from ptxdist.data import rle
from ptxdist.data.catalog import FILE_NAME, Case, Catalog, Reject, build_catalog, write_catalog
from ptxdist.data.dicom import Pixels, read_bytes, read_radiograph
from ptxdist.data.store import (
    ARRAYS,
    SHARD_CASES,
    ShardRecord,
    read_manifest,
    shard_is_whole,
    store_path,
    write_manifest,
    write_metadata,
    write_shard,
)
from ptxdist.errors import BusyError, CatalogError, DicomError, StoreError

TRANSFORM = 1  # counts changes of the transform: a new number rewrites every shard
MAX_REJECTED_SHARE = 0.1
REJECTS = "rejects.csv"
MISSING = "missing.csv"
LOCK = ".lock"
SALT = "salt"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PreprocessResult:
    """What a run did: the catalog as written, shards written and reused over all sizes, and rejected files."""

    catalog: Catalog
    sizes_px: tuple[int, ...]
    written: int
    reused: int
    rejects: tuple[Reject, ...]


def fit_square(pixels: Pixels) -> Pixels:
    """Pad uint8 (height, width) with 0 to a square, the image in its middle; a square comes back as it is."""
    height, width = pixels.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    if height == width:
        return pixels
    return np.pad(pixels, ((top, side - height - top), (left, side - width - left)))


def resize(square: Pixels, size_px: int) -> Pixels:
    """Resize a square uint8 image by area averaging, or bilinearly when it has to grow."""
    shrinks = size_px <= len(square)
    resized = cv2.resize(square, (size_px, size_px), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.asarray(resized, dtype=np.uint8)


def preprocess(
    dicom: Path,
    labels: Path,
    out: Path,
    *,
    patients: Path | None = None,
    sizes_px: Sequence[int] = (256, 512),
    workers: int = 1,
    seed: int = 0,
    on_progress: Progress = lambda step, done, total: None,
) -> PreprocessResult:
    """Build or renew the cache `out` from DICOM files and a label table.

    Shards whose source, labels and parameters are unchanged, and whose bytes are whole, are kept. `on_progress` hears
    ("headers" or "images", files done, files). Raises as `build_catalog`; BusyError when another run holds the cache;
    CatalogError when more than a tenth of the files cannot be used; StoreError when the disk is full or a worker dies.
    """
    sizes = tuple(sorted(set(sizes_px)))
    try:
        if (out / LOCK).is_file():
            with _exclusive(out):
                pass  # says at once, and not after reading all headers, that another run is at work
        # Everything that can be wrong with the tables and the headers is found before the first byte is written.
        salt = (out / SALT).read_bytes() if (out / SALT).is_file() else secrets.token_bytes(32)
        catalog = build_catalog(
            dicom,
            labels,
            patients=patients,
            seed=seed,
            salt=salt,
            on_file=lambda done, total: on_progress("headers", done, total),
        )
        out.mkdir(parents=True, exist_ok=True)
        with _exclusive(out):
            _keep_salt(out / SALT, salt)
            return _write_cache(catalog, dicom, out, sizes, workers, on_progress)
    except OSError as error:
        raise StoreError(
            f"{out}: writing stopped: {error.strerror}; what is finished stays, and the same command goes on from there"
        ) from error
    except BrokenProcessPool as error:
        raise StoreError(
            f"{out}: a worker process was killed, perhaps because memory ran out: try fewer --workers; "
            f"what is finished stays, and the same command goes on from there"
        ) from error


def _write_cache(
    catalog: Catalog, dicom: Path, out: Path, sizes: tuple[int, ...], workers: int, on_progress: Progress
) -> PreprocessResult:
    _refuse_too_many(catalog.rejects, catalog, out)
    cases = catalog.labelled
    manifest = read_manifest(out)
    blocks = [cases[start : start + SHARD_CASES] for start in range(0, len(cases), SHARD_CASES)]
    prints = {size: [_shard_fingerprint(block, size) for block in blocks] for size in sizes}
    records = {size: _whole_shards(out, size, manifest, prints[size]) for size in sizes}
    todo = {
        shard: tuple(size for size in sizes if shard not in records[size])
        for shard in range(len(blocks))
        if any(shard not in records[size] for size in sizes)
    }
    reused = sum(map(len, records.values()))

    def record_progress() -> None:
        for size in sizes:
            ready = records[size]
            former = manifest.get(size, {})
            manifest[size] = {
                "complete": former.get("complete", False)
                and former.get("cases") == len(cases)
                and not any(size in missing for missing in todo.values()),
                "cases": len(cases),
                "fingerprint": former.get("fingerprint", ""),
                "shards": [asdict(ready[shard]) if shard in ready else None for shard in range(len(blocks))],
            }
        write_manifest(out, manifest)

    if todo:
        record_progress()
    total = sum(len(blocks[shard]) for shard in todo)
    tasks = [(shard, blocks[shard], dicom, out, todo[shard]) for shard in todo]
    for shard, written in _run(tasks, workers, lambda done: on_progress("images", done, total)):
        for size, record in written.items():
            records[size][shard] = record
        record_progress()

    unreadable = dict(pair for size in sizes for shard in range(len(blocks)) for pair in records[size][shard].rejects)
    path_of = {case.case_id: case.path for case in cases}
    rejects = (*catalog.rejects, *(Reject(path_of[case_id], reason) for case_id, reason in unreadable.items()))
    _refuse_too_many(rejects, catalog, out)
    _write_table(out / MISSING, ("ImageId",), [(case_id,) for case_id in catalog.missing])
    final = replace(
        catalog,
        cases=tuple(
            replace(case, split="rejected", fold=-1) if case.case_id in unreadable else case for case in catalog.cases
        ),
        rejects=rejects,
    )
    _finish(final, out, sizes, manifest, records)
    return PreprocessResult(final, sizes, len(sizes) * len(blocks) - reused, reused, rejects)


def _refuse_too_many(rejects: Sequence[Reject], catalog: Catalog, out: Path) -> None:
    """Write rejects.csv; CatalogError when it has more than a tenth of the files."""
    _write_table(out / REJECTS, ("path", "reason"), [(reject.path, reject.reason) for reject in rejects])
    if len(rejects) > MAX_REJECTED_SHARE * catalog.reconciliation.files:
        raise CatalogError(
            f"{len(rejects)} of {catalog.reconciliation.files} files cannot be used, more than a tenth; "
            f"the reasons are in {out / REJECTS} (the first one: {rejects[0].path} {rejects[0].reason})"
        )


def _finish(
    catalog: Catalog,
    out: Path,
    sizes: tuple[int, ...],
    manifest: dict[int, dict[str, Any]],
    records: dict[int, dict[int, ShardRecord]],
) -> None:
    """Coordinates, catalog, then the manifest that declares the stores complete."""
    cases = catalog.labelled
    coordinates: dict[str, np.ndarray[Any, Any]] = {
        "case_id": np.array([case.case_id for case in cases]),
        "split": np.array([case.split for case in cases]),
        "fold": np.array([case.fold for case in cases], np.int8),
        "has_mask": np.array([bool(case.masks) for case in cases]),
        "area_px": np.array([case.area_px for case in cases], np.int32),
        "rows": np.array([case.rows for case in cases], np.int32),
        "columns": np.array([case.columns for case in cases], np.int32),
    }
    sides = [[case.case_id, case.split, case.fold] for case in cases]
    blocks = [cases[start : start + SHARD_CASES] for start in range(0, len(cases), SHARD_CASES)]
    source = {size: fingerprint([_shard_fingerprint(b, size) for b in blocks], sides) for size in (*sizes, *manifest)}
    for size, entry in manifest.items():  # what differs is not to be trained on until it is renewed
        entry["complete"] = bool(entry["complete"] and entry["fingerprint"] == source[size])
    stale = [size for size in sizes if size not in manifest or not manifest[size]["complete"]]
    if manifest:
        write_manifest(out, manifest)
    for size in stale:
        write_metadata(store_path(out, size), size, coordinates)
    for size in sizes:
        manifest[size] = {
            "complete": True,
            "cases": len(cases),
            "fingerprint": source[size],
            "shards": [asdict(records[size][shard]) for shard in range(len(blocks))],
        }
    write_catalog(catalog, out / FILE_NAME)
    write_manifest(out, manifest)


def _shard_fingerprint(block: Sequence[Case], size_px: int) -> str:
    sources = [[case.case_id, case.digest, case.masks] for case in block]
    return fingerprint(TRANSFORM, size_px, f"cv2 {cv2.__version__}", sources)


def _whole_shards(
    out: Path, size: int, manifest: dict[int, dict[str, Any]], prints: Sequence[str]
) -> dict[int, ShardRecord]:
    """Shards of a former run that are still right and whole."""
    kept = {}
    for shard, entry in enumerate(manifest.get(size, {}).get("shards", [])[: len(prints)]):
        if entry is not None and entry["fingerprint"] == prints[shard]:
            record = ShardRecord(**{**entry, "rejects": tuple(map(tuple, entry["rejects"]))})
            if shard_is_whole(store_path(out, size), shard, record):
                kept[shard] = record
    return kept


Task = tuple[int, Sequence[Case], Path, Path, tuple[int, ...]]
_counter: Synchronized[int] | None = None


def _start_worker(counter: Synchronized[int]) -> None:
    global _counter
    _counter = counter
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this a worker outlives a killed parent, and writes where the next run writes."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(
    tasks: Sequence[Task], workers: int, on_done: Callable[[int], None]
) -> Iterator[tuple[int, dict[int, ShardRecord]]]:
    """Results of the tasks as they come, over spawned processes."""
    if not tasks:
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("l", 0)
    workers = min(workers, len(tasks))
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(counter,)) as pool:
        try:
            waiting: set[Future[tuple[int, dict[int, ShardRecord]]]] = {pool.submit(_write_shards, *t) for t in tasks}
            while waiting:
                done, waiting = wait(waiting, timeout=0.1, return_when=FIRST_COMPLETED)
                on_done(counter.value)
                for future in done:
                    yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _write_shards(
    shard: int, block: Sequence[Case], dicom: Path, out: Path, sizes: tuple[int, ...]
) -> tuple[int, dict[int, ShardRecord]]:
    """One task: decode each file of a shard once, write the shard at each size."""
    samples = {size: {array: np.zeros((len(block), size, size), np.uint8) for array in ARRAYS} for size in sizes}
    rejects, lasting = [], True
    for row, case in enumerate(block):
        try:
            image = _read_image(case, dicom)
        except DicomError as error:
            rejects.append((case.case_id, str(error)))
            lasting &= not isinstance(error, _PassingError)
        else:
            for size in sizes:
                samples[size]["image"][row] = resize(image, size)
            if case.masks:
                # Runs go down columns: decoding and resizing the transposed mask keeps memory access in order.
                mask = fit_square(rle.decode_columns(case.masks, case.rows, case.columns, value=255))
                for size in sizes:
                    samples[size]["mask"][row] = resize(mask, size).T
        if _counter is not None:
            with _counter.get_lock():
                _counter.value += 1
    records = {}
    for size in sizes:
        image_crc, mask_crc = (write_shard(store_path(out, size), name, shard, samples[size][name]) for name in ARRAYS)
        source = _shard_fingerprint(block, size) if lasting else ""  # "": the next run makes the shard anew
        records[size] = ShardRecord(source, image_crc, mask_crc, tuple(rejects))
    return shard, records


class _PassingError(DicomError):
    """A file that could be read when the catalog was built, and may be the next time."""


def _read_image(case: Case, dicom: Path) -> Pixels:
    try:
        content = read_bytes(dicom / case.path)
    except DicomError as error:
        raise _PassingError(str(error)) from error
    if hashlib.sha256(content).hexdigest()[:32] != case.digest:
        raise _PassingError("was changed while it was being read; run the command again")
    return fit_square(read_radiograph(content).pixels)


@contextmanager
def _exclusive(out: Path) -> Iterator[None]:
    with open(out / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BusyError(f"another `ptxdist preprocess` is writing to {out}; wait for it or stop it") from None
        yield


def _keep_salt(path: Path, salt: bytes) -> None:
    """Store the salt of a new cache; BusyError when another run has given it one since this run looked."""
    if path.is_file():
        if path.read_bytes() != salt:
            raise BusyError(f"another `ptxdist preprocess` has just made {path.parent}; run the command again")
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.touch(mode=0o600)
    temporary.write_bytes(salt)
    temporary.replace(path)


def _write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    os.replace(temporary, path)
