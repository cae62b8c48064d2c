"""DICOM Segmentation objects (PS3.3 A.51) -> masks, by the SOP instance that each frame was derived from.

Binary, fractional (at half of the highest value) and label map objects are read. The frames of an instance and a class
are united. An instance that an object refers to without a frame stays unlabelled. A mask has the pixels of its
radiograph; positions in space are not used, since a radiograph has none.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptxdist.dicom import syntax, tags
from ptxdist.dicom.png import MAX_PIXELS
from ptxdist.dicom.radiograph import CASE_ID, read_bytes
from ptxdist.dicom.tags import Tags
from ptxdist.errors import DicomError, LabelError, raise_limit
from ptxdist.labels import rle
from ptxdist.labels.found import FoundMask, place_of, read_size
from ptxdist.labels.rle import Spans

if TYPE_CHECKING:
    from pydicom import Dataset

_CLASS = re.compile(rb"1\.2\.840\.10008\.5\.1\.4\.1\.1\.66\.[47](?![0-9.])")  # Segmentation, Label Map Segmentation
_MOST_FRAMES, _MOST_RUNS = 4096, 2**23
_MOST_READS = 1_000_000  # as parsing counts them; a frame takes about 100
_DERIVED = ("DerivationImageSequence", "SourceImageSequence")
_NOTHING: Spans = np.zeros((0, 2), np.int64)


def is_segmentation(start: bytes) -> bool:
    """Whether a file is a DICOM SEG, from its first `dicom.kind.START_BYTES` bytes."""
    return _CLASS.search(start) is not None


def read_segmentation(folder: Path, path: Path) -> list[FoundMask]:
    """The masks of the radiographs that one DICOM SEG refers to, in the order of its frames.

    Raises LabelError for a damaged file, and frames that do not say which image they are of.
    """
    place = place_of(folder, path)
    try:
        with warnings.catch_warnings(action="ignore"):  # invalid values are common and harmless
            return _read(read_bytes(path))
    except (DicomError, LabelError) as error:
        raise LabelError(f"{place} {error}") from None
    except Exception as error:  # pydicom raises almost anything on damaged files
        raise_limit(error)
        raise LabelError(f"{place} is a damaged DICOM SEG: its frames cannot be read") from error


def _read(content: bytes) -> list[FoundMask]:
    from ptxdist.dicom.decoding import decode_frames  # late: a rerun without changes needs no decoder

    file, source = _Source.of(content)
    if file.syntax not in (*syntax.NATIVE, syntax.RLE):  # other streams would have to be checked first
        name = syntax.name_of(file.syntax)
        raise LabelError(f"is compressed as {name}, which is not read of a DICOM SEG; save it uncompressed")
    size = read_size(file.whole(tags.ROWS, 0), file.whole(tags.COLUMNS, 0))
    frames = int(file.decimal(tags.FRAMES) or 1)
    if not 1 <= frames <= _MOST_FRAMES or frames * size[0] * size[1] > 16 * MAX_PIXELS:
        raise LabelError(f"has {frames:,} frames of {size[1]}x{size[0]} pixels, which are too many")
    groups = list(source.items("PerFrameFunctionalGroupsSequence")) or [None] * frames
    if len(groups) != frames:
        raise LabelError(f"has {frames} frames, and says of {len(groups)} what they are")
    names = {int(item.SegmentNumber): _name(source, item) for item in source.items("SegmentSequence")}
    kind = source.text("SegmentationType")
    half = int(source.text("MaximumFractionalValue") or 255) / 2 if kind == "FRACTIONAL" else 0.5
    masks: dict[tuple[str, str], list[Spans]] = {}
    runs = 0
    for group, values in zip(groups, decode_frames(file, *size, frames), strict=True):
        instance = source.instance(group)
        parts = _label_spans(values) if kind == "LABELMAP" else [(source.segment(group), rle.spans_of(values >= half))]
        for number, spans in parts or [(0, _NOTHING)]:
            if len(spans) and number not in names:
                raise LabelError(f"has a frame of segment {number}, which it does not describe (Segment Sequence)")
            name = names[number] or f"segment {number}" if len(spans) else ""
            rle.add(masks.setdefault((instance, name), []), spans)
            runs += len(spans)
        if runs > _MOST_RUNS:
            raise LabelError(f"has masks of more than {_MOST_RUNS:,} pieces of columns")
    return [FoundMask.of_spans(rle.unite(parts), size, name, instance) for (instance, name), parts in masks.items()]


def _label_spans(values: npt.NDArray[Any]) -> list[tuple[int, Spans]]:
    """The numbers in a label map but 0, and the spans of each, in time of the pixels, however many numbers it has."""
    flat = np.ascontiguousarray(values.T).reshape(-1)
    starts = np.flatnonzero(np.append(True, flat[1:] != flat[:-1]))
    rle.refuse_many_runs(len(starts) // 2)
    spans = np.column_stack((starts, np.append(starts[1:], flat.size)))
    order = np.argsort(flat[starts], kind="stable")
    numbers = flat[starts][order]
    firsts = np.flatnonzero(np.append(True, numbers[1:] != numbers[:-1]))
    parts = zip(numbers[firsts].tolist(), np.split(spans[order], firsts[1:]), strict=True)
    return [(number, part) for number, part in parts if number]


class _Source:
    """Sequences and values of a DICOM SEG, by keyword. All of them together are read with a bounded number of reads."""

    def __init__(self, dataset: Dataset, reads: Iterator[int]) -> None:
        self._dataset, self._reads = dataset, reads

    @classmethod
    def of(cls, content: bytes) -> tuple[Tags, _Source]:
        from ptxdist.dicom.parsing import read_dataset

        reads = iter(range(_MOST_READS))
        file, dataset = read_dataset(content, reads)
        return file, cls(dataset, reads)

    def text(self, name: str) -> str:
        return str(self._dataset.get(name) or "")

    def items(self, *path: str, item: Dataset | None = None) -> Sequence[Dataset]:
        """Items of nested sequences, of the whole object or of an item; none where one is missing."""
        from pydicom.datadict import tag_for_keyword

        from ptxdist.dicom.parsing import items

        found: Sequence[Dataset] = [self._dataset if item is None else item]
        for name in path:
            found = [inner for outer in found for inner in items(outer, tag_for_keyword(name) or 0, self._reads)]
        return found

    @cached_property
    def _shared(self) -> Dataset | None:
        return next(iter(self.items("SharedFunctionalGroupsSequence")), None)

    def _in_groups(self, group: Dataset | None, *path: str) -> Sequence[Dataset]:
        return (group is not None and self.items(*path, item=group)) or ()

    def segment(self, group: Dataset | None) -> int:
        """The segment that a frame is of."""
        found = self._in_groups(group, "SegmentIdentificationSequence") or self._shared_segments
        return int(found[0].ReferencedSegmentNumber) if found else 1

    @cached_property
    def _shared_segments(self) -> Sequence[Dataset]:
        return self._in_groups(self._shared, "SegmentIdentificationSequence")

    def instance(self, group: Dataset | None) -> str:
        """The SOP instance that a frame is of: by its own reference, or else the only one of the object."""
        found = _instances(self._in_groups(group, *_DERIVED)) or self._shared_instances
        if len(found) == 1 and CASE_ID.fullmatch(instance := next(iter(found))):
            return instance
        raise LabelError("has a frame that does not say which image it is of (Source Image Sequence)")

    @cached_property
    def _shared_instances(self) -> set[str]:
        return (
            _instances(self._in_groups(self._shared, *_DERIVED))
            or _instances(self.items("ReferencedSeriesSequence", "ReferencedInstanceSequence"))
            or _instances(self.items("SourceImageSequence"))
        )


def _instances(items: Sequence[Dataset]) -> set[str]:
    return {str(item.get("ReferencedSOPInstanceUID", "")) for item in items}


def _name(source: _Source, segment: Dataset) -> str:
    codes = source.items("SegmentedPropertyTypeCodeSequence", item=segment)
    meaning = str(codes[0].get("CodeMeaning", "")) if codes else ""
    return " ".join((meaning or str(segment.get("SegmentLabel", ""))).split()).casefold()
