"""DICOM Segmentation objects (PS3.3 A.51) -> masks, by the SOP instance that each frame was derived from.

Binary, fractional (at half of the highest value) and label map objects are read. The frames of an instance and a class
are united. An instance that an object refers to without a frame stays unlabelled. A mask has the pixels of its
radiograph; positions in space are not used, since a radiograph has none.
"""

from __future__ import annotations

import re
import warnings
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ptxdist.dicom.png import MAX_PIXELS
from ptxdist.dicom.radiograph import CASE_ID, read_bytes
from ptxdist.errors import DicomError, LabelError
from ptxdist.labels import rle
from ptxdist.labels.found import FoundMask, place_of, read_size

if TYPE_CHECKING:
    from pydicom import Dataset

_CLASS = re.compile(rb"1\.2\.840\.10008\.5\.1\.4\.1\.1\.66\.[47](?![0-9.])")  # Segmentation, Label Map Segmentation
_MOST_FRAMES = 4096


def is_segmentation(start: bytes) -> bool:
    """Whether a file is a DICOM SEG, from its first `dicom.kind.START_BYTES` bytes."""
    return _CLASS.search(start) is not None


def read_segmentation(folder: Path, path: Path) -> list[FoundMask]:
    """The masks of the radiographs that one DICOM SEG refers to, in the order of its frames.

    Raises LabelError for a damaged file, and frames that do not say which image they are of.
    """
    import pydicom  # here, so that `ptxdist score` starts fast

    from ptxdist.dicom.parsing import for_pydicom

    place = place_of(folder, path)
    try:
        content = for_pydicom(read_bytes(path))
        with warnings.catch_warnings(action="ignore"):  # invalid values are common and harmless
            return _read(pydicom.dcmread(BytesIO(content), force=True))
    except (DicomError, LabelError) as error:
        raise LabelError(f"{place} {error}") from None
    except Exception as error:  # pydicom raises almost anything on damaged files
        raise LabelError(f"{place} is a damaged DICOM SEG: its frames cannot be read") from error


def _read(source: Dataset) -> list[FoundMask]:
    from pydicom import Dataset, uid
    from pydicom.encaps import generate_frames
    from pydicom.pixels import iter_pixels

    syntax = source.file_meta.get("TransferSyntaxUID", uid.ImplicitVRLittleEndian)
    if syntax not in (
        *uid.UncompressedTransferSyntaxes,
        uid.RLELossless,
    ):  # other streams would have to be checked first
        raise LabelError(
            f"is compressed as {uid.UID(syntax).name}, which is not read of a DICOM SEG; save it uncompressed"
        )
    size = read_size(*(int(source.get(name) or 0) for name in ("Rows", "Columns")))
    frames = int(source.get("NumberOfFrames") or 1)
    if not 1 <= frames <= _MOST_FRAMES or frames * size[0] * size[1] > 16 * MAX_PIXELS:
        raise LabelError(f"has {frames:,} frames of {size[1]}x{size[0]} pixels, which are too many")
    if syntax == uid.RLELossless:
        from ptxdist.dicom.decoding import refuse_long_runs  # late: a rerun without changes needs no decoder

        for frame in generate_frames(source.PixelData, number_of_frames=frames):
            refuse_long_runs(frame, size[0] * size[1], int(source.BitsAllocated))
    groups = list(source.get("PerFrameFunctionalGroupsSequence") or [Dataset()] * frames)
    if len(groups) != frames:
        raise LabelError(f"has {frames} frames, and says of {len(groups)} what they are")
    shared = next(iter(source.get("SharedFunctionalGroupsSequence") or ()), Dataset())
    names = {int(item.SegmentNumber): _name(item) for item in source.SegmentSequence}
    kind = str(source.get("SegmentationType", ""))
    half = int(source.get("MaximumFractionalValue") or 255) / 2 if kind == "FRACTIONAL" else 0.5
    masks: dict[tuple[str, str], rle.Spans] = {}
    for group, values in zip(groups, iter_pixels(source, raw=True), strict=True):
        instance = _instance(source, shared, group)
        mask = values >= half
        numbers = np.unique(values[mask]).tolist() if kind == "LABELMAP" else [_segment(shared, group)]
        for number in numbers or [0]:
            part = values == number if kind == "LABELMAP" and number else mask
            if (inside := part.any()) and number not in names:
                raise LabelError(f"has a frame of segment {number}, which it does not describe (Segment Sequence)")
            key = instance, names[number] or f"segment {number}" if inside else ""
            masks[key] = rle.unite([*([masks[key]] if key in masks else ()), rle.spans_of(part)])
            rle.refuse_many_runs(sum(map(len, masks.values())))
    return [FoundMask.of_spans(spans, size, name, instance) for (instance, name), spans in masks.items()]


def _items(source: Any, *path: str) -> list[Any]:
    """Items of nested sequences; [] where one is missing."""
    items = [source]
    for name in path:
        items = [inner for item in items for inner in item.get(name) or ()]
    return items


def _name(segment: Dataset) -> str:
    codes = _items(segment, "SegmentedPropertyTypeCodeSequence")
    meaning = str(codes[0].get("CodeMeaning", "")) if codes else ""
    return " ".join((meaning or str(segment.get("SegmentLabel", ""))).split()).casefold()


def _segment(shared: Dataset, group: Dataset) -> int:
    found = _items(group, "SegmentIdentificationSequence") or _items(shared, "SegmentIdentificationSequence")
    return int(found[0].ReferencedSegmentNumber) if found else 1


def _instance(source: Dataset, shared: Dataset, group: Dataset) -> str:
    """The SOP instance that a frame is of: by its own reference, or else the only one of the object."""
    derived = ("DerivationImageSequence", "SourceImageSequence")
    for items in (
        _items(group, *derived),
        _items(shared, *derived),
        _items(source, "ReferencedSeriesSequence", "ReferencedInstanceSequence"),
        _items(source, "SourceImageSequence"),
    ):
        found = {str(item.get("ReferencedSOPInstanceUID", "")) for item in items}
        if len(found) == 1 and CASE_ID.fullmatch(instance := found.pop()):
            return instance
        if found:
            break
    raise LabelError("has a frame that does not say which image it is of (Source Image Sequence)")
