"""What a file with masks says, whatever its format: the record that all readers return, and their common words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from ptxdist.dicom.png import check_size
from ptxdist.dicom.radiograph import is_file_id
from ptxdist.errors import DicomError, LabelError
from ptxdist.labels import rle
from ptxdist.labels.evidence import Size
from ptxdist.labels.rle import Spans

CLASSES = "these may be several classes: write 0 and 255, where 255 is what the model is to find"
_SUFFIX = re.compile(r"\.(dcm|dicom|ima|png|jpe?g|tiff?|gif|bmp|nii(\.gz)?|json)$", re.IGNORECASE)
_MOST_SHOWN = 40


@dataclass(frozen=True)
class FoundMask:
    """One mask: the run-length text of `rle`, and the (rows, columns) of its image.

    `inside` says what is inside, so that several classes are noticed: a share of the highest value, a colour, or a name
    of a class; "" or 0.0 where that is not known. `case_id` is "" where the file's name says which image it is of, and
    `tool` is what wrote a JSON file.
    """

    text: str
    size: Size
    inside: str | float = ""
    case_id: str = ""
    tool: str = ""

    @classmethod
    def of(cls, mask: npt.NDArray[np.bool_], inside: str | float, case_id: str = "") -> FoundMask:
        """The record of a mask bool (rows, columns)."""
        return cls(rle.encode(mask), (mask.shape[0], mask.shape[1]), inside if mask.any() else "", case_id)

    @classmethod
    def of_spans(cls, spans: Spans, size: Size, inside: str, case_id: str, tool: str = "") -> FoundMask:
        """The record of a mask as spans down its columns."""
        return cls(rle.encode_spans(spans), size, inside if len(spans) else "", case_id, tool)


@contextmanager
def about(subject: str) -> Iterator[None]:
    """Puts what a sentence is about before a LabelError of the block."""
    try:
        yield
    except LabelError as error:
        raise LabelError(f"{subject} {error}") from None


def place_of(folder: Path, path: Path) -> str:
    """The file in words, without the folders between, which may be named after patients."""
    if folder == path:
        return str(path)
    return f"{folder}: {'the mask image ' if path.suffix.lower() not in ('.json', '.dcm', '') else ''}{path.name}"


def stem_of(name: str) -> str:
    """A file's name without the suffix of an image; what is behind the last dot of a UID is none."""
    return _SUFFIX.sub("", name)


def bare_id(name: str) -> str:
    """The id in the name or the path of a file, of Windows too: the stem without folders.

    Raises LabelError, a sentence without a subject, for what cannot be an id.
    """
    stem = stem_of(PurePosixPath(name.replace("\\", "/")).name)
    if not stem.strip(".") or not is_file_id(stem):
        raise LabelError(f"names an image {short(name)}, which is no file name")
    return stem


def read_size(rows: object, columns: object) -> Size:
    """Rows and columns of an image; LabelError, a sentence without a subject, for what cannot be its size."""
    if type(rows) is not int or type(columns) is not int or rows < 1 or columns < 1:
        raise LabelError("does not say how many rows and columns its image has")
    try:
        check_size(rows, columns)
    except DicomError as error:
        raise LabelError(str(error)) from None
    return rows, columns


def short(text: object) -> str:
    """A name out of a file, for messages: printable, in quotes, and not long."""
    shown = "".join(sign if sign.isprintable() else "?" for sign in str(text)[: _MOST_SHOWN + 1])
    return f"'{shown}'" if len(shown) <= _MOST_SHOWN else f"'{shown[:_MOST_SHOWN]}…'"
