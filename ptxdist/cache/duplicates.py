"""Near-duplicates: images that are almost the same, found in the cache itself.

Owns: the perceptual hash, the limits, and the list of a cache. Refuses: nothing. Called by: `preprocess`, for the
leakage report: a copy of a training image among the held-out ones is a leak that no patient map shows; `report.report`.

The hash is the usual pHash, longer: signs of the 16x16 lowest frequencies of the discrete cosine transform of the
32x32 px image against their median, 256 bits. Chest radiographs look alike, so a pair of hashes within `MAX_BITS` is
only a candidate; it counts when the two images, at 32x32 px, also correlate by at least `MIN_CORRELATION`. Among the
pairs of 848 real SIIM-ACR images, none a copy of another, the closest differ in 56 bits and correlate by 0.965. Found
are copies that were encoded, resized, windowed or brightened anew; cropped, turned or mirrored ones are not.
"""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from ptxdist.cache.store import Samples

FILE_NAME = "near_duplicates.csv"
COLUMNS = ("ImageId", "other ImageId", "split", "other split", "same group")
SIDE_PX, FREQUENCIES = 32, 16
MAX_BITS = 40
MIN_CORRELATION = 0.985
_BLOCK = 512

Hashes = npt.NDArray[np.uint64]


def thumbnail(sample: Samples) -> npt.NDArray[np.float32]:
    """An image of a store, uint8 (size, size), at 32x32 px, float32, by area averaging."""
    small = cv2.resize(sample, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float32)


def perceptual_hashes(small: npt.NDArray[np.float32]) -> Hashes:
    """256-bit hashes, uint64 (n, 4), of images float32 (n, 32, 32)."""
    bits = np.zeros((len(small), FREQUENCIES * FREQUENCIES), bool)
    for number, image in enumerate(small):
        low = cv2.dct(image)[:FREQUENCIES, :FREQUENCIES].reshape(-1)
        bits[number] = low > np.median(low)
    return np.packbits(bits, axis=1).view(np.uint64)


def near_duplicates(small: npt.NDArray[np.float32]) -> list[tuple[int, int]]:
    """Pairs (i < j) of images, float32 (n, 32, 32), that show almost the same. None for fewer than two images."""
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


def read_pairs(cache: Path) -> list[tuple[str, str]]:
    """Image ids of the pairs that a cache lists; none where there is no list."""
    path = cache / FILE_NAME
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [(row[COLUMNS[0]], row[COLUMNS[1]]) for row in csv.DictReader(file)]
