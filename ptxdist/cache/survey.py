"""What a cache contains, in the numbers that settings are chosen by: cases, patients, sizes of masks, grey levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ptxdist.cache.catalog import read_catalog
from ptxdist.cache.manifest import read_manifest
from ptxdist.cache.store import open_store
from ptxdist.errors import StoreError
from ptxdist.finding import PNEUMOTHORAX, FindingType

_LOOKED_AT = 256  # images whose grey levels are read, evenly spaced over the cases


class Spread(NamedTuple):
    """The 5th percentile, the median and the 95th percentile, each a value that occurs."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Survey:
    """Numbers of a cache, without ids.

    `cases` and `positive` are labelled, readable images; `train` and `val` are cases and positive ones on the two sides
    of fold 0. `patients` are groups of cases, and `grouped_by` is what is known of them ("patient map", "PatientID" or
    "nothing"). `mask_px` are the areas of the positive cases' masks in pixels of the original image, `mask_share` the
    same as a share of the image; None without positive cases. `brightness` is the mean grey level, 0..255, of images;
    None without cases. `sizes_px` are the finished stores, `finding` is what the masks show.
    """

    cases: int
    positive: int
    unlabelled: int
    patients: int
    positive_patients: int
    grouped_by: str
    folds: int
    train: tuple[int, int]
    val: tuple[int, int]
    sizes_px: tuple[int, ...]
    mask_px: Spread | None
    mask_share: Spread | None
    brightness: Spread | None
    finding: FindingType = PNEUMOTHORAX


def survey(cache: Path) -> Survey:
    """Look at the cache in a local folder; StoreError when it is not one, or when no store of it is finished."""
    catalog = read_catalog(cache)
    sizes = tuple(size for size, entry in sorted(read_manifest(cache).sizes.items()) if entry.complete)
    if not sizes:
        raise StoreError(f"{cache} has no finished store; rerun `ptxdist preprocess`, finished work is kept")
    sides = catalog.sides()
    rows = [row for row, case in enumerate(catalog.labelled) if case.split in ("train", "val")]
    cases = [catalog.labelled[row] for row in rows]
    positive = [case for case in cases if case.masks]
    store = open_store(cache, sizes[0])
    step = max(1, -(-len(rows) // _LOOKED_AT))
    return Survey(
        cases=len(cases),
        positive=len(positive),
        unlabelled=sides["unlabelled"]["cases"],
        patients=len({case.group for case in cases}),
        positive_patients=len({case.group for case in positive}),
        grouped_by=catalog.leakage.grouped_by,
        folds=catalog.folds,
        train=(sides["train"]["cases"], sides["train"]["positive"]),
        val=(sides["val"]["cases"], sides["val"]["positive"]),
        sizes_px=sizes,
        mask_px=_spread([case.area_px for case in positive]),
        mask_share=_spread([case.area_px / (case.rows * case.columns) for case in positive]),
        brightness=_spread([float(store.sample(row)[0].mean()) for row in rows[::step]]),
        finding=catalog.finding,
    )


def _spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    return Spread(*np.quantile(values, (0.05, 0.5, 0.95), method="nearest").tolist())
