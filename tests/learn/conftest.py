"""A tiny cache, made directly from arrays, for the tests of the learning layer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from ptxdist.data import rle
from ptxdist.data.catalog import FILE_NAME, Case, Catalog, Reconciliation, write_catalog
from ptxdist.data.split import Leakage
from ptxdist.data.store import ARRAYS, ShardRecord, store_path, write_manifest, write_metadata, write_shard

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
                f"case-{number}", f"{number}.dcm", "0", SIDE_PX, SIDE_PX, f"g{number}", texts, area, split=split, fold=0
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
        checksums = [write_shard(store, name, 0, blocks[name]) for name in ARRAYS]
        write_metadata(store, size, {"case_id": np.array([case.case_id for case in cases])})
        record = ShardRecord("0", *checksums)
        sizes[size] = {"complete": True, "cases": len(cases), "fingerprint": f"f{size}", "shards": [asdict(record)]}
    write_manifest(folder, sizes)
    positive = sum(bool(case.masks) for case in cases)
    counts = Reconciliation(len(cases), len(cases), positive, 0, 0, len(cases), 0, 0, len(cases), positive, 0, 0)
    leakage = Leakage("patient map", len(cases), positive, val, val // 2, 0, 0, 0.0, 0.0)
    write_catalog(Catalog(tuple(cases), counts, leakage, (), ()), folder / FILE_NAME)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny cache; nothing may write to it."""
    return make_cache(tmp_path_factory.mktemp("learn") / "cache")
