"""Cases -> samples: the transform from radiographs and masks to a shard of a store.

Owns: the transform and its number. The image is padded with black to a centred square and resized by area averaging
(bilinearly when it grows). The mask, as 0 and 255, is transformed likewise, so each pixel becomes the share of its area
inside the mask. A file that cannot be used becomes a row of zeros, with a reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ptxdist.cache.catalog import Case
from ptxdist.cache.manifest import ShardRecord
from ptxdist.cache.scan import digest_of
from ptxdist.cache.store import ARRAYS, crc32c, shard_path, shard_writer, store_path
from ptxdist.dicom.guard import PassingError, bare, guarded
from ptxdist.dicom.pixels import Pixels
from ptxdist.dicom.radiograph import read_bytes, read_radiograph
from ptxdist.errors import DicomError
from ptxdist.files import fingerprint
from ptxdist.labels import rle

TRANSFORM = 2  # raised by every change of the transform, which rewrites every shard


@dataclass(frozen=True)
class Shard:
    """The cases of a shard with their files below `root` ("" for a removed case, whose row is zeros)."""

    number: int
    cases: Sequence[Case]
    paths: Sequence[str]
    root: Path


def fit_square(pixels: Pixels) -> Pixels:
    """Pad uint8 (height, width) with 0 to a centred square; a square is returned unchanged."""
    height, width = pixels.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    if height == width:
        return pixels
    return np.pad(pixels, ((top, side - height - top), (left, side - width - left)))


def resize(square: Pixels, size_px: int) -> Pixels:
    """Resize a square uint8 image by area averaging, or bilinearly when it grows."""
    import cv2

    shrinks = size_px <= len(square)
    resized = cv2.resize(square, (size_px, size_px), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.asarray(resized, dtype=np.uint8)


def shard_fingerprint(cases: Sequence[Case], size_px: int) -> str:
    """Hash of what determines a shard's bytes: the transform, the files, their decoders, and the masks."""
    sources = [[case.case_id, case.digest, case.decoder, case.masks] for case in cases]
    return fingerprint(TRANSFORM, size_px, f"cv2 {version_of_cv2()}", sources)


@cache
def version_of_cv2() -> str:
    """cv2.__version__, as its version.py states it: the import takes as long as reading the headers of 800 files.

    Several packages on PyPI bring cv2, and the last one that was installed is imported.
    """
    spec = find_spec("cv2")
    with suppress(OSError):
        text = Path(spec.origin).with_name("version.py").read_text() if spec and spec.origin else ""
        if found := re.match(r'opencv_version = "(\d+\.\d+\.\d+)', text):
            return found[1]
    import cv2

    return str(cv2.__version__)


def write_shard(shard: Shard, out: Path, sizes_px: Sequence[int]) -> tuple[int, dict[int, ShardRecord]]:
    """A task of `preprocess`: decode each file once and write the shard at each size."""
    rejects: list[tuple[str, DicomError]] = []
    with ExitStack() as stack:
        writers = {
            (size, array): stack.enter_context(
                shard_writer(shard_path(store_path(out, size), array, shard.number), len(shard.cases), size)
            )
            for size in sizes_px
            for array in ARRAYS
        }
        for row, size, array, sample in _samples(shard, sizes_px, rejects):
            writers[size, array].put(row, sample)
    lasting = not any(isinstance(error, PassingError) for _, error in rejects)
    records = {}
    for size in sizes_px:
        source = shard_fingerprint(shard.cases, size) if lasting else ""  # "": the next run rewrites the shard
        image, mask = (writers[size, array].crc32c for array in ARRAYS)
        records[size] = ShardRecord(source, image, mask, tuple((case_id, str(error)) for case_id, error in rejects))
    return shard.number, records


def differing_cases(shard: Shard, records: dict[int, ShardRecord]) -> tuple[int, dict[str, str]]:
    """A task of `verify --source`: reason for each case whose file does not give the samples of the records."""
    rejects: list[tuple[str, DicomError]] = []
    found = {}
    made = {(row, size, array): crc32c(sample) for row, size, array, sample in _samples(shard, tuple(records), rejects)}
    reasons = {case_id: str(error) for case_id, error in rejects}
    for row, case in enumerate(shard.cases):
        for size, record in records.items():
            empty = crc32c(np.zeros((size, size), np.uint8))
            for array, sums in zip(ARRAYS, (record.image_crc32c, record.mask_crc32c), strict=True):
                if sums[8 * row : 8 * row + 8] != made.get((row, size, array), empty):
                    found[case.case_id] = reasons.get(case.case_id, f"its file gives another {array} of {size} px")
    return shard.number, found


def _samples(
    shard: Shard, sizes_px: Sequence[int], rejects: list[tuple[str, DicomError]]
) -> Iterator[tuple[int, int, str, Pixels]]:
    """(row, size, array, sample) of every case that can be read, without empty masks; the others go to `rejects`."""
    import cv2

    cv2.setNumThreads(1)  # the processes use all cores already
    for row, (case, path) in enumerate(zip(shard.cases, shard.paths, strict=True)):
        if not case.digest:
            continue
        try:
            with guarded():
                samples = [*_of_case(case, shard.root / path, sizes_px)]
        except DicomError as error:
            rejects.append((case.case_id, bare(error)))
            continue
        for sample in samples:
            yield row, *sample


def _of_case(case: Case, path: Path, sizes_px: Sequence[int]) -> Iterator[tuple[int, str, Pixels]]:
    """(size, array, sample) of a case, without an empty mask."""
    image = _read_image(case, path)
    for size in sizes_px:
        yield size, "image", resize(image, size)
    del image
    if case.masks:
        # Runs go down columns: decoding and resizing the transposed mask keeps memory access in order.
        mask = fit_square(rle.decode_columns(case.masks, case.rows, case.columns, value=255))
        for size in sizes_px:
            yield size, "mask", resize(mask, size).T


def _read_image(case: Case, path: Path) -> Pixels:
    try:
        content = read_bytes(path)
    except DicomError as error:
        raise PassingError(str(error)) from error
    if digest_of(content) != case.digest:
        raise PassingError("was changed while it was read; rerun the command")
    return fit_square(read_radiograph(content, name=path.name).pixels)
