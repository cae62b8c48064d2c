"""Near-duplicates: pairs of images that are almost the same, found in the cache itself.

A copy of a training image among the held-out ones is leakage that no patient map shows.

Owns: near_duplicates.csv. The hash is pHash with 256 bits: the signs of the 16x16 lowest frequencies of the discrete
cosine transform of the 32x32 pixel image against their median. Chest radiographs look alike, so a pair of hashes within
`MAX_BITS` is only a candidate; it counts when the two images, at 32x32 pixels, also correlate by at least
`MIN_CORRELATION`. Among the pairs of 848 real SIIM-ACR images, none a copy of another, the closest differ in 56 bits
and correlate by 0.965. Copies that were encoded again, resized, windowed or brightened are found; cropped, rotated or
mirrored ones are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ptxdist import files
from ptxdist.cache.catalog import Case
from ptxdist.cache.manifest import refuse_damaged_table
from ptxdist.cache.store import SHARD_CASES, Samples, map_shard, shard_cases, shard_path, store_path
from ptxdist.errors import StoreError

FILE_NAME = "near_duplicates.csv"
COLUMNS = ("ImageId", "other ImageId", "split", "other split", "same group")
SIDE_PX, FREQUENCIES = 32, 16
MAX_BITS = 40
MIN_CORRELATION = 0.985
_BLOCK = 512

Hashes = npt.NDArray[np.uint64]


def thumbnail(sample: Samples) -> npt.NDArray[np.float32]:
    """An image of a store, uint8 (size, size), at 32x32 pixels, float32, by area averaging."""
    import cv2  # late: a rerun without changes does not need it

    small = cv2.resize(sample, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float32)


def perceptual_hashes(small: npt.NDArray[np.float32]) -> Hashes:
    """256-bit hashes, uint64 (n, 4), of images float32 (n, 32, 32)."""
    import cv2

    bits = np.zeros((len(small), FREQUENCIES * FREQUENCIES), bool)
    for number, image in enumerate(small):
        low = cv2.dct(image)[:FREQUENCIES, :FREQUENCIES].reshape(-1)
        bits[number] = low > np.median(low)
    return np.packbits(bits, axis=1).view(np.uint64)


def near_duplicates(small: npt.NDArray[np.float32]) -> list[tuple[int, int]]:
    """Pairs (i < j) of images, float32 (n, 32, 32), that are near-duplicates; [] for fewer than two images."""
    hashes = perceptual_hashes(small)
    flat = small.reshape(len(small), SIDE_PX * SIDE_PX)
    flat = flat - flat.mean(axis=1, keepdims=True)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
    pairs = []
    for start in range(0, len(hashes), _BLOCK):
        block = hashes[start : start + _BLOCK]
        bits = np.zeros((len(block), len(hashes) - start), np.uint16)
        for word in range(hashes.shape[1]):
            bits += np.bitwise_count(block[:, word, None] ^ hashes[None, start:, word])
        for i, j in np.argwhere(bits <= MAX_BITS):
            if j > i and float(flat[start + i] @ flat[start + j]) >= MIN_CORRELATION:
                pairs.append((start + int(i), start + int(j)))
    return pairs


def find_duplicates(cases: Sequence[Case], cache: Path, size_px: int) -> tuple[int, int]:
    """Write the list of a cache; the number of pairs with one image on each side of the split, and of all pairs."""
    rows = [row for row, case in enumerate(cases) if case.split in ("train", "val")]
    small = np.zeros((len(rows), SIDE_PX, SIDE_PX), np.float32)
    path, block = Path(), np.zeros((0, size_px, size_px), np.uint8)
    for place, row in enumerate(rows):
        shard, offset = divmod(row, SHARD_CASES)
        wanted = shard_path(store_path(cache, size_px), "image", shard)
        if wanted != path:
            path, block = wanted, map_shard(wanted, shard_cases(len(cases), shard), size_px)[0]
        small[place] = thumbnail(block[offset])
    pairs = [(cases[rows[i]], cases[rows[j]]) for i, j in near_duplicates(small)]
    table = [(a.case_id, b.case_id, a.split, b.split, str(a.group == b.group).lower()) for a, b in pairs]
    files.write_table(cache / FILE_NAME, COLUMNS, table, error=None)
    return sum(a.split != b.split for a, b in pairs), len(pairs)


def read_pairs(cache: Path) -> list[tuple[str, str]]:
    """Image ids of the pairs that a cache lists; [] when it has no list."""
    path = cache / FILE_NAME
    refuse_damaged_table(cache, FILE_NAME)
    if not path.is_file():
        return []
    try:
        return [(row[COLUMNS[0]], row[COLUMNS[1]]) for row in files.read_table(path)]
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"{path} is damaged ({error}); rerun `ptxdist preprocess`") from error
