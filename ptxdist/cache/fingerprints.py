"""One-way fingerprints of images, by which a model recognises those that it was trained on, and their properties.

    training-images.csv     in a run and in its bundle: a row for each training image, sorted, without ids
        pixels              sha256 of its sample in the store, 16 hex digits: equal where decoded pixels are equal
        look                its perceptual hash (see `duplicates`), 64 hex digits: close for copies of another encoding
        patient             its patient, hashed with the salt of the cache, after eight digits that say which salt;
                            empty if patients are not known

Who has an image can find out from a model whether it was trained on it, and nothing else: no image can be made from its
fingerprints, and no patient be found without the secret salt. Pixels are compared at the size of the model, so both
caches need that size.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ptxdist import files
from ptxdist.cache.catalog import Catalog
from ptxdist.cache.duplicates import SIDE_PX, Hashes, perceptual_hashes, thumbnail
from ptxdist.cache.likeness import MOST, likeness_of, look
from ptxdist.cache.store import Store
from ptxdist.errors import StoreError
from ptxdist.records import Profile

COLUMNS = ("pixels", "look", "patient")
_AT = (0.05, 0.25, 0.5, 0.75, 0.95)
_BLOCK = 256
_SALT_DIGITS = 8
# Without the images, nothing but the hash decides. Copies with another encoding, brightness or gamma differ in at most
# 26 of 256 bits, different phantoms in 34 and different radiographs in 56 (measured on 60, 200 and 848 images).
_MOST_BITS = 26


@dataclass(frozen=True)
class Fingerprints:
    """Of n images: `pixels`, 16 hex digits each, `looks` uint64 (n, 4), and `patients`, "" if they are not known."""

    pixels: tuple[str, ...]
    looks: Hashes
    patients: tuple[str, ...]

    def write(self) -> str:
        """The table as text, sorted, so that it is the same for any order of the images."""
        looks = (look.tobytes().hex() for look in self.looks)
        rows = sorted(zip(self.pixels, looks, self.patients, strict=True))
        return files.table_text(COLUMNS, rows, "\n").decode()

    @classmethod
    def read(cls, text: str | bytes, source: str) -> Fingerprints:
        """The table in a text; StoreError, naming the `source`, when it is damaged."""
        try:
            reader = csv.DictReader(io.StringIO(text if isinstance(text, str) else text.decode()))
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
            rows = list(reader)
            if any(None in row or None in row.values() for row in rows):
                raise ValueError("a row has too few or too many columns")
            looks = [np.frombuffer(bytes.fromhex(row[COLUMNS[1]]), np.uint64) for row in rows]
            stacked = np.array(looks, np.uint64).reshape(len(rows), 4)
            return cls(tuple(row[COLUMNS[0]] for row in rows), stacked, tuple(row[COLUMNS[2]] for row in rows))
        except (KeyError, ValueError, TypeError, csv.Error) as error:
            raise StoreError(f"{source}: the fingerprints of its training images are damaged ({error})") from error

    def seen_in(self, training: Fingerprints) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Which of these images have equal pixels in `training`, and which others look the same; bool (n,) each."""
        known = set(training.pixels)
        equal = np.array([pixels in known for pixels in self.pixels], bool)
        close = np.zeros(len(self.pixels), bool)
        for start in range(0, len(self.looks) if len(training.looks) else 0, _BLOCK):
            block = self.looks[start : start + _BLOCK]
            bits = np.zeros((len(block), len(training.looks)), np.uint16)
            for word in range(4):
                bits += np.bitwise_count(block[:, word, None] ^ training.looks[None, :, word])
            close[start : start + len(block)] = (bits <= _MOST_BITS).any(1)
        return equal, close & ~equal

    def patients_in(self, training: Fingerprints) -> npt.NDArray[np.bool_] | None:
        """Of which of these images the patient is in `training`, bool (n,); None if patients cannot be compared."""
        salts = [{patient[:_SALT_DIGITS] for patient in side.patients} for side in (self, training)]
        if salts[0] != salts[1] or "" in salts[0]:
            return None
        known = set(training.patients)
        return np.array([patient in known for patient in self.patients], bool)


def look_at(
    store: Store, catalog: Catalog, indices: npt.NDArray[np.int64], salt: bytes
) -> tuple[Fingerprints, Profile]:
    """Fingerprints of the images at `indices` in the store of a cache with this `salt`, and what they are like."""
    labelled = catalog.labelled
    cases, looks = [labelled[index] for index in indices.tolist()], []
    step = max(1, -(-len(cases) // MOST))
    pixels, small, brightness = [], np.zeros((len(cases), SIDE_PX, SIDE_PX), np.float32), []
    for row, (index, case) in enumerate(zip(indices.tolist(), cases, strict=True)):
        image = np.ascontiguousarray(store.sample(index)[0])
        pixels.append(hashlib.sha256(image.data).hexdigest()[:16])
        small[row] = thumbnail(image)
        brightness.append(float(image.mean()))
        if row % step == 0:
            looks.append(look(image, max(case.rows, case.columns)))
    which = hashlib.blake2b(b"salt of patients", key=salt[:64]).hexdigest()[:_SALT_DIGITS]
    known = catalog.leakage.grouped_by != "nothing"
    patients = tuple(f"{which}{case.group}" if known else "" for case in cases)
    views = [case.view or "unknown" for case in cases]
    profile = Profile(
        images=len(cases),
        positives=sum(bool(case.masks) for case in cases),
        mask_share=_spread([case.area_px / (case.rows * case.columns) for case in cases if case.masks]),
        brightness=_spread(brightness),
        age=_spread([case.age for case in cases if case.age is not None]),
        side_px=_spread([max(case.rows, case.columns) for case in cases]),
        views={view: views.count(view) for view in sorted(set(views))},
        synthetic=catalog.synthetic,
        likeness=likeness_of(looks),
    )
    return Fingerprints(tuple(pixels), perceptual_hashes(small), patients), profile


def _spread(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(np.quantile(values, _AT).tolist()) if values else ()
