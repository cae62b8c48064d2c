"""A tiny cache, made directly from arrays, for the tests of what reads a cache; without torch."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from ptxdist.cache.catalog import FILE_NAME, Case, Catalog, Reconciliation, Reject, read_catalog, write_catalog
from ptxdist.cache.manifest import Manifest, ShardRecord, StoreRecord, write_manifest
from ptxdist.cache.split import Leakage
from ptxdist.cache.store import ARRAYS, Store, pending, shard_path, shard_writer, store_path, write_metadata
from ptxdist.labels import rle

SIDE_PX = 128  # of the "original" images
SIZES_PX = (32, 64)


def make_cache(folder: Path, train: int = 6, val: int = 4) -> Path:
    """A cache of noise with, in every second case, a dark square that is its mask; stores of 32 and 64 px."""
    random = np.random.default_rng(7)
    cases, images, masks = [], [], []
    for number in range(train + val):
        image = random.integers(120, 200, (SIDE_PX, SIDE_PX), dtype=np.uint8)
        mask = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
        if number % 2 == 0:
            top, left = random.integers(8, 80, 2)
            mask[top : top + 40, left : left + 40] = 255
            image[mask > 0] //= 4
        images.append(image)
        masks.append(mask)
        texts = (rle.encode(mask),) if mask.any() else ()
        area = int(np.count_nonzero(mask))
        split = "train" if number < train else "val"
        cases.append(
            Case(
                f"case-{number}",
                "0",
                "none",
                SIDE_PX,
                SIDE_PX,
                f"g{number}",
                texts,
                area,
                split=split,
                fold=int(split == "train"),
            )
        )
    folder.mkdir(parents=True)
    sizes = {}
    for size in SIZES_PX:
        step = SIDE_PX // size
        blocks = {
            name: np.stack([item.reshape(size, step, size, step).mean((1, 3)).astype(np.uint8) for item in items])
            for name, items in (("image", images), ("mask", masks))
        }
        store = store_path(folder, size)
        checksums = []
        for name in ARRAYS:
            path = shard_path(store, name, 0)
            with shard_writer(path, len(cases), size) as writer:
                for row, sample in enumerate(blocks[name]):
                    writer.put(row, sample)
            pending(path).replace(path)
            checksums.append(writer.crc32c)
        write_metadata(store, size, {"case_id": np.array([case.case_id for case in cases])})
        sizes[size] = StoreRecord(True, len(cases), f"f{size}", (ShardRecord("0", *checksums),))
    write_manifest(folder, Manifest(sizes))
    positive = sum(bool(case.masks) for case in cases)
    counts = Reconciliation(len(cases), len(cases), positive, 0, 0, len(cases), 0, 0, len(cases), positive, 0, 0)
    leakage = Leakage("patient map", len(cases), positive, val, val // 2, 0, 0, 0.0, 0.0)
    write_catalog(Catalog(tuple(cases), counts, leakage, (), ()), folder / FILE_NAME)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny cache; nothing may write to it."""
    return make_cache(tmp_path_factory.mktemp("learn") / "cache")


@pytest.fixture(scope="session")
def long_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with enough training cases for several looks at the losses in an epoch; nothing may write to it."""
    return make_cache(tmp_path_factory.mktemp("learn-long") / "cache", train=22)


@pytest.fixture(scope="session")
def described_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with views, sexes and ages, and with texts that a page must escape; nothing may write to it."""
    folder = make_cache(tmp_path_factory.mktemp("Quagmire_Zebulon") / "cache", train=4, val=16)
    catalog = read_catalog(folder)
    cases = tuple(
        replace(
            case,
            group=f"salted-group-{number // 2}",
            view="PA" if number % 4 < 2 else "AP",
            sex="F" if number % 3 else "M",
            age=20 + 4 * number,
        )
        for number, case in enumerate(catalog.cases)
    )
    described = replace(
        catalog,
        cases=cases,
        rejects=(Reject("", "has <script>alert(1)</script> & no pixels"), Reject("", "is not an image")),
        dialect_proven=True,
        evidence=("absolute starts are out: <b>a mask</b> ends past its image",),
    )
    write_catalog(described, folder / FILE_NAME)
    return folder


@pytest.fixture(scope="session")
def folds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 cases in two folds, two images a patient, with views, ages and sexes; nothing may write to it."""
    folder = make_cache(tmp_path_factory.mktemp("folds") / "cache", train=36, val=4)
    catalog = read_catalog(folder)
    cases = [
        replace(
            case,
            group=f"patient-{number // 2}",
            fold=number // 2 % 2,
            split="train" if number // 2 % 2 else "val",
            view=("AP", "PA")[number % 3 == 0],
            sex=("F", "M")[number % 5 == 0],
            age=(30, 50, 70)[number % 3],
        )
        for number, case in enumerate(catalog.cases)
    ]
    write_catalog(replace(catalog, cases=tuple(cases), folds=2), folder / FILE_NAME)
    return folder


def column(store: Store, name: str) -> Any:
    """One coordinate array of a store, (case,)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return zarr.open_group(store.path, mode="r")[name][:]
