"""Folders of mask or probability images of any tool, PNG or NIfTI, read one file at a time: two kinds of `masks.Masks`.

Whether the PNG files of a folder are masks or probabilities is decided by their values, for all files together.

nnU-Net writes 2-D masks as PNG with the values 0 and 1 (nnunetv2/imageio/natural_image_reader_writer.py), or as NIfTI,
see `nifti`.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from ptxdist.dicom.png import read_png_header
from ptxdist.errors import DicomError, LabelError
from ptxdist.files import open_at_once, require_extra
from ptxdist.labels import rle
from ptxdist.labels.evidence import Size
from ptxdist.labels.found import about, place_of
from ptxdist.labels.nifti import SUFFIXES as NIFTI
from ptxdist.labels.nifti import read_blocks, read_shape
from ptxdist.labels.pictures import read_png
from ptxdist.labels.rle import Spans

PNG = (".png",)
_LOW = 0.1  # if no probability reaches it, the values are rather labels of several classes


class PngMasks:
    """Masks or probabilities of the PNG files in a folder or below it."""

    def __init__(self, folder: Path, threshold: float) -> None:
        self._folder, self._threshold = folder, threshold
        self._files = find_masks(folder, PNG)
        self.sizes: Mapping[str, Size] = {case_id: self._read_size(path) for case_id, path in self._files.items()}
        self._known: dict[str, Spans] | None = None  # of all files, when they have no other values than 0 and 1
        self._dim = ""  # a file that is not black, and whose values are 0 and 1 while other files have higher ones
        self._between, self._brightest = False, 0.0

    @property
    def ids(self) -> Collection[str]:
        """The image ids."""
        return self._files

    def _read_size(self, path: Path) -> Size:
        try:
            with open(path, "rb", opener=open_at_once) as file:
                header = read_png_header(file.read(33) or b"", mask=True)
        except OSError as error:
            raise LabelError(f"{place_of(self._folder, path)} cannot be read: {error.strerror}") from None
        except DicomError as error:
            raise LabelError(f"{place_of(self._folder, path)} {error}") from None
        return header.rows, header.columns

    def prepare(self, sizes: Mapping[str, Size], on_file: Callable[[int, int], None]) -> None:
        """As in `masks.Masks`: reads files until one has a value above 1."""
        known = {}
        for number, case_id in enumerate(sizes):
            values = read_png(self._folder, self._files[case_id])
            if values.max() > 1:
                return
            with about(place_of(self._folder, self._files[case_id])):
                known[case_id] = rle.spans_of(values)
            on_file(number + 1, len(sizes))
        self._known = known

    def spans(self, case_id: str, size: Size) -> Spans:
        """As in `masks.Masks`."""
        if self._known is not None:
            return self._known[case_id]
        values = read_png(self._folder, self._files[case_id])
        highest, brightest = int(np.iinfo(values.dtype).max), int(values.max())
        self._dim = self._dim or (case_id if brightest == 1 else "")
        self._between = self._between or bool(((values > 1) & (values < highest)).any())
        self._brightest = max(self._brightest, brightest / highest)
        with about(place_of(self._folder, self._files[case_id])):
            return rle.spans_of(values >= math.ceil(self._threshold * highest * (1 - 1e-12)))

    def describe(self) -> tuple[str, tuple[str, ...]]:
        """As in `masks.Masks`."""
        if self._known is not None:
            return "PNG masks of 0 and 1", ()
        if not self._between:
            if self._dim:
                raise LabelError(
                    f"{self._folder}: {self._dim} has the values 0 and 1, others 0 and the highest value; write all "
                    "masks in one way"
                )
            return "PNG masks of 0 and the highest value", ()
        if self._brightest < min(_LOW, self._threshold):
            raise LabelError(
                f"{self._folder}: no value is above {self._brightest:.3f} of the range, so these are probably labels "
                "of several classes, or 8-bit values in 16 bits; write masks of 0 and 1"
            )
        return f"PNG probabilities, threshold {self._threshold:g}", _too_low(
            self._folder, self._brightest, self._threshold
        )


def _too_low(folder: Path, highest: float, threshold: float) -> tuple[str, ...]:
    """A note where all masks are empty because no probability reaches the threshold: they may be percentages."""
    if highest >= threshold:
        return ()
    return (f"{folder}: no pixel reaches {threshold:g}, the highest has {highest:.3f} of the range; see --threshold",)


class NiftiMasks:
    """Masks or probabilities of the NIfTI files in a folder or below it. Needs the extra `nifti`."""

    def __init__(self, folder: Path, threshold: float) -> None:
        require_extra("nifti", "reading NIfTI files", "nibabel")
        self._folder, self._threshold = folder, threshold
        self._files = find_masks(folder, NIFTI)
        self.sizes: Mapping[str, Size] = {case_id: read_shape(folder, path) for case_id, path in self._files.items()}
        self._between, self._highest = False, 0.0

    @property
    def ids(self) -> Collection[str]:
        """The image ids."""
        return self._files

    def prepare(self, sizes: Mapping[str, Size], on_file: Callable[[int, int], None]) -> None:
        """As in `masks.Masks`: nothing has to be found out."""

    def spans(self, case_id: str, size: Size) -> Spans:
        """As in `masks.Masks`."""
        path = self._files[case_id]
        parts, ends = [], []
        for values in read_blocks(self._folder, path):
            parts.append((values >= self._threshold).T)
            ends += [values.min(), values.max()]
            self._between = self._between or bool(((values > 0) & (values < 1)).any())
        low, top = np.min(ends), np.max(ends)
        if not (low >= 0 and top <= 1):  # also true of NaN
            found = "pixels without a value (NaN)" if low != low else f"values from {low:g} to {top:g}"
            raise LabelError(
                f"{place_of(self._folder, path)} has {found}; expected a mask of 0 and 1, or probabilities of 0 to 1"
            )
        self._highest = max(self._highest, float(top))
        with about(place_of(self._folder, path)):
            return rle.spans_of(np.concatenate(parts))

    def describe(self) -> tuple[str, tuple[str, ...]]:
        """As in `masks.Masks`."""
        if not self._between:
            return "NIfTI masks", ()
        return f"NIfTI probabilities, threshold {self._threshold:g}", _too_low(
            self._folder, self._highest, self._threshold
        )


def find_masks(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Files `<image id><suffix>` in a folder or below it, by image id, in the order of their paths.

    Hidden files do not count; the case of a suffix does not matter. Raises LabelError when there is none, when two have
    the same id, and for a folder that cannot be read.
    """

    def unreadable(error: OSError) -> None:  # by default, os.walk skips folders that it cannot read
        raise LabelError(f"{folder}: a folder in it cannot be read: {error.strerror}") from error

    paths = sorted(
        Path(where) / name
        for where, _, names in os.walk(folder, onerror=unreadable)
        for name in names
        if name.lower().endswith(tuple(suffixes)) and not name.startswith(".")
    )
    if not paths:
        raise LabelError(f"{folder}: there are no mask images (<image id>{suffixes[0]}) in it or below it")
    names = [next(p.name[: -len(end)] for end in suffixes if p.name.lower().endswith(end)) for p in paths]
    case_id, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise LabelError(f"{folder}: {count} mask images in it are named {case_id}; an image can have only one")
    return dict(zip(names, paths, strict=True))
