"""The data commands: phantom, preprocess, verify. Each parses options, calls one function, and prints the result."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ptxdist import places
from ptxdist.cli.options import (
    ADDRESS,
    CORES,
    FILE,
    FINDING,
    FOLDER,
    LABELS,
    MATCH,
    PLACE,
    begin,
    executor_for,
    json_option,
)
from ptxdist.errors import CatalogError, LabelError, SettingsError, StoreError

UNLISTED = click.Choice(["unused", "negative"])
SIDE = "Side of the images in pixels; may be repeated."


@click.command(short_help="Draw synthetic radiographs with masks, as SIIM has them.")
@click.argument("out", type=FOLDER)
@click.option("--cases", type=int, default=300, show_default=True, help="Number of images; with --labels, 0 means all.")
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed gives other images.")
@click.option("--positive-share", type=float, default=0.2215, show_default=True, help="Share with a pneumothorax.")
@click.option("--labels", type=FILE, help="Draw images for the ids and masks of this label table.")
@click.option("--bedside", is_flag=True, help="Another hospital, that images in bed: all views AP, and darker.")
@click.option("--workers", type=click.IntRange(1), default=lambda: os.cpu_count() or 1, help=CORES)
@json_option
def phantom(out: Path, cases: int, labels: Path | None, as_json: bool, **options: Any) -> None:
    """Write a synthetic SIIM-like data set to OUT.

    \b
    Examples:
      ptxdist phantom phantoms --cases 300
      ptxdist phantom elsewhere --seed 1 --bedside --positive-share 0.05
    """
    if labels:
        places.refuse_missing(labels, "--labels", LabelError)
    begin(f"draws {'phantoms' if labels else f'{cases:,} phantoms'} into {out}")
    from ptxdist import api, console

    result = api.phantom(out, cases=cases, labels=labels, **options)
    if as_json:
        console.show_json(asdict(result))
    else:
        console.show_pairs(str(out), [(name, str(value)) for name, value in asdict(result).items()])
        tables = f"--labels {result.labels} --patients {result.patients}"
        console.say(f"next: ptxdist preprocess --dicom {result.dicom} {tables} --out cache")


@click.command(short_help="Convert image files and labels to a training cache.")
@click.option("--dicom", type=FOLDER, required=True, help="Folder of DICOM files or PNG images, also nested.")
@click.option("--labels", type=FILE, required=True, help=LABELS)
@click.option("--match", help=MATCH)
@click.option("--out", type=PLACE, required=True, help="Cache to create or update: a folder, or s3://….")
@click.option("--finding", default="pneumothorax", show_default=True, help=FINDING)
@click.option("--unlisted", type=UNLISTED, default="unused", show_default=True, help="Images without a label.")
@click.option("--patients", type=FILE, help="CSV of image id and patient, as nih_id.csv; no patient is in two folds.")
@click.option("--patient-key", type=FILE, help="Secret of the site: patients can be compared with its other caches.")
@click.option(
    "--size", "sizes_px", type=click.IntRange(32), multiple=True, default=(256, 512), show_default=True, help=SIDE
)
@click.option("--folds", type=click.IntRange(2, 100), default=10, show_default=True, help="Folds; 0 is held out.")
@click.option("--dialect", help="Encoding of the masks, such as relative-columns.  [default: detected]")
@click.option("--replace", "replace_other", is_flag=True, help="Renew a cache of other images, which are then lost.")
@click.option("--workers", type=click.IntRange(1), default=lambda: os.cpu_count() or 1, help=CORES)
@click.option("--address", help=ADDRESS)
@json_option
def preprocess(
    dicom: Path,
    labels: Path,
    out: Path | str,
    unlisted: str,
    patients: Path | None,
    workers: int,
    address: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert DICOM files and labels to a training cache.

    Rerun it after any change or interruption: finished and unchanged parts are skipped.

    \b
    Example:
      ptxdist preprocess --dicom dicom-images-train --labels train-rle.csv \\
        --out cache
    """
    if address and "://" in str(out) and "PTXDIST_STAGING" not in os.environ:
        raise SettingsError("--address with --out s3://… needs PTXDIST_STAGING, a folder that all nodes share")
    places.refuse_missing(labels, "--labels", LabelError)
    if patients:
        places.refuse_missing(patients, "--patients", LabelError)
    places.refuse_missing(dicom, "--dicom", CatalogError)
    begin(f"reads {labels} and the images in {dicom}", keeps=True)
    from ptxdist import console
    from ptxdist.cache.preprocess import preprocess as build
    from ptxdist.cache.summary import split_doubts

    with console.progress() as update, _folder_of(out, update) as folder, _frozen():
        result = build(
            dicom,
            labels,
            folder,
            unlisted_negative=unlisted == "negative",
            patients=patients,
            executor=executor_for(workers, address),
            on_progress=update,
            **options,
        )
    if as_json:
        work = {"cache": out, "sizes_px": result.sizes_px, "written": result.written, "reused": result.reused}
        console.show_json({**work, **result.catalog.summary(), "doubts": split_doubts(result.catalog)})
    else:
        console.show_catalog(result.catalog)
        if rejects := result.catalog.rejects:
            counted = "1 file was" if len(rejects) == 1 else f"{len(rejects)} files were"
            console.say(
                f"warning: {counted} rejected, see {folder / 'rejects.csv'}; "
                f"the first one: {rejects[0].path} {rejects[0].reason}"
            )
        if result.is_new_split:
            console.say(
                "warning: the previous catalog.jsonl was damaged or of another version: the cases were sorted and "
                "split again, and runs on the previous split are not comparable with new ones"
            )
        done = f"{result.written} shards written, {result.reused} kept" if result.written else "nothing had to be done"
        console.say(f"{out} is ready at {', '.join(map(str, result.sizes_px))} pixels: {done}")


@contextmanager
def _frozen() -> Iterator[None]:
    """Spares what was imported from garbage collections, which would take a twentieth of a rerun without changes."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _folder_of(out: Path | str, on_progress: Callable[[str, int, int], None]) -> AbstractContextManager[Path]:
    if "://" not in str(out):
        return nullcontext(Path(out))
    from ptxdist.storage.caches import working_cache  # late: a folder needs none of its imports

    return working_cache(out, on_progress)


@click.command(short_help="Check every byte of a cache, and repair it.")
@click.argument("cache", type=PLACE)
@click.option("--source", type=FOLDER, help="Folder of the image files; the cache is compared with them.")
@click.option("--repair", is_flag=True, help="Rewrite damaged parts from --source.")
@click.option("--workers", type=click.IntRange(1), default=lambda: os.cpu_count() or 1, help=CORES)
@click.option("--address", help=ADDRESS)
@json_option
def verify(
    cache: Path | str, source: Path | None, repair: bool, workers: int, address: str | None, as_json: bool
) -> None:
    """Check every byte of a cache against its checksums, and with --source against the image files.

    A cache in an object store is copied first; `preprocess` repairs it.

    Ends with exit code 7 when something is wrong and was not repaired.

    \b
    Examples:
      ptxdist verify cache
      ptxdist verify cache --source dicom-images-train --repair
    """
    if repair and "://" in str(cache):
        raise SettingsError(f"--repair works on folders; repair this cache with `ptxdist preprocess --out {cache}`")
    places.refuse_other(cache, places.CACHE)
    if source:
        places.refuse_missing(source, "--source", CatalogError)
    begin(f"checks {cache}", keeps=repair)
    from ptxdist import console
    from ptxdist.cache import verify as checks
    from ptxdist.storage.caches import local_cache

    with console.progress() as update, executor_for(workers, address) as executor:
        cache = local_cache(cache, on_progress=update)
        if repair:
            damages = checks.repair(cache, source, executor=executor, on_progress=update)
        else:
            damages = checks.verify(cache, on_progress=update)
        if source is not None and (repair or not damages):
            left = checks.verify_source(cache, source, executor=executor, on_progress=update)
        else:
            left = [] if repair else damages
    if as_json:
        console.show_json(
            {"mended": [asdict(d) for d in damages] if repair else [], "wrong": [asdict(d) for d in left]}
        )
    else:
        console.show_damages(cache, damages if repair else [], left)
    if left:
        raise SystemExit(StoreError.exit_code)
