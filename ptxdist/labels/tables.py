"""Reading label tables and folders of mask images as dictionaries.

Owns: the columns of label tables, and the meaning of pixel values in mask images. Refuses: malformed or contradictory
tables and folders (LabelError with the line or the file). `dialect` finds the encoding of a table's masks.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TextIO

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from ptxdist.dicom.png import SIGNATURE, decode_png
from ptxdist.errors import DicomError, LabelError
from ptxdist.executor import Executor, serial
from ptxdist.labels import rle

_FILES_A_TASK = 64
_NOISE = 1 / 16  # of the range of values, in images from JPEG
_GREY = 1 / 4  # of the pixels; a soft edge has far fewer
_FEW_VALUES, _MANY_VALUES = 4, 16
_CLASSES = "these may be several classes: write 0 and 255, where 255 is what the model is to find"
_SHOWN, _MOST_ID = 60, 255  # characters
_END = "\x1c end of the file \x1c"  # an additional last line
_NO_TEXT = {  # by the first two bytes
    b"PK": "it is a zip file or an Excel workbook; unpack it, or save it as CSV",
    b"\x1f\x8b": "it is compressed; add .gz to its name, or unpack it",
    b"\xff\xfe": "it is UTF-16; save it as CSV in UTF-8",
    b"\xfe\xff": "it is UTF-16; save it as CSV in UTF-8",
}


@dataclass(frozen=True)
class MaskFolder:
    """A folder of mask images: by image id, the run-length texts of `rle` (() for an all-black mask), and the sizes.

    `sizes` are the (rows, columns) of the mask images; a mask fits only an image of the same size.
    """

    masks: dict[str, tuple[str, ...]]
    sizes: dict[str, tuple[int, int]]


def read_labels(path: Path) -> dict[str, tuple[str, ...]]:
    """Run-length texts of each image id of a label table, in the order of the table; () for a negative image.

    Reads `ImageId,EncodedPixels` with or without the challenge's blanks, a BOM, a header or gzip. A negative image has
    `-1`, or an empty field if the whole table is written so, as in other challenges; a table with both is rejected,
    since an empty field beside `-1` may be an image without a label. For a folder, returns the masks of
    `read_mask_folder`. Raises LabelError with the line for missing columns, malformed runs, and an id that has rows
    with and without a mask.
    """
    if path.is_dir():
        return read_mask_folder(path).masks
    masks: dict[str, list[str]] = {}
    negative: set[str] = set()
    empty_line, minus_line = 0, 0
    for line, case_id, text in _label_rows(path):
        try:
            runs = rle.parse(text or rle.EMPTY)
        except LabelError as error:
            raise LabelError(f"{path}, line {line}, {case_id}: {error}") from None
        found = masks.setdefault(case_id, [])
        if len(runs):
            found.append(text)
        else:
            negative.add(case_id)
            empty_line, minus_line = (empty_line, minus_line or line) if text else (empty_line or line, minus_line)
        if found and case_id in negative:
            raise LabelError(
                f"{path}, line {line}: {case_id} has a row without a mask (no pneumothorax) and one with a mask; "
                "remove one"
            )
    _check_empty_fields(path, empty_line, minus_line, bool(masks), len(negative) < len(masks))
    return {case_id: tuple(texts) for case_id, texts in masks.items()}


def _check_empty_fields(path: Path, empty_line: int, minus_line: int, rows: bool, positive: bool) -> None:
    """Raise LabelError for inconsistent empty fields; the lines are those of the first one and the first `-1`, or 0."""
    if not rows:
        raise LabelError(f"{path}: the label table has no rows")
    if empty_line and minus_line:
        raise LabelError(
            f"{path}, line {empty_line}: the field for the mask is empty, while line {minus_line} has '-1' for no "
            "pneumothorax; write '-1', or remove the row of an image without a label"
        )
    if empty_line and not positive:
        raise LabelError(f"{path}: the field for the mask is empty in every row; write '-1' for no pneumothorax")


def read_mask_folder(
    folder: Path, executor: Executor = serial, on_file: Callable[[int, int], None] = lambda done, total: None
) -> MaskFolder:
    """Masks of the PNG files `<image id>.png` in a folder or below it, in the order of their paths.

    A pixel is inside the mask when its value is above half of the range of its type (over 127 of 255), or is 1 in a
    file with no other values than 0 and 1; edges may be soft. Grayscale and three equal colour channels are read.
    `on_file` is called with (files done, files). Raises LabelError when there is no PNG, two have the same name, a file
    is damaged or not a mask (its brightest pixel is dark, but not black; its darkest one is bright; it has many greys,
    or areas of a third value), or two masks have different values inside.
    """
    files = find_masks(folder)
    paths = list(files.values())
    starts = range(0, len(paths), _FILES_A_TASK)
    tasks = [(folder, start, paths[start : start + _FILES_A_TASK]) for start in starts]
    found: dict[int, list[_ReadMask]] = {}
    done = 0
    for start, masks in executor(_read_masks, tasks):
        found[start] = masks
        done += len(masks)
        on_file(done, len(paths))
    read = dict(zip(files, (mask for start in starts for mask in found[start]), strict=True))
    _check_insides(folder, {files[case_id]: mask.inside for case_id, mask in read.items() if mask.inside})
    return MaskFolder(
        {case_id: () if mask.text == rle.EMPTY else (mask.text,) for case_id, mask in read.items()},
        {case_id: mask.size for case_id, mask in read.items()},
    )


def _check_insides(folder: Path, insides: Mapping[Path, float]) -> None:
    """Raise LabelError when masks have different values inside: those may be other classes."""
    ordered = sorted(insides, key=insides.__getitem__)
    if ordered and insides[ordered[-1]] - insides[ordered[0]] > _NOISE:
        low, high = (f"{path.name} has {insides[path]:.0%}" for path in (ordered[0], ordered[-1]))
        raise LabelError(
            f"{folder}: the mask images have different values inside ({low} of the highest value, {high}); {_CLASSES}"
        )


def find_masks(folder: Path, suffixes: Sequence[str] = (".png",)) -> dict[str, Path]:
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


@dataclass(frozen=True)
class _ReadMask:
    """Run-length text and (rows, columns); `inside` is the value of its areas as a share of the highest; 0 if none."""

    text: str
    size: tuple[int, int]
    inside: float


def _read_masks(folder: Path, start: int, paths: Sequence[Path]) -> tuple[int, list[_ReadMask]]:
    """One task: returns `start` with the results, since tasks finish in any order."""
    return start, [_read_mask(folder, path) for path in paths]


def _read_mask(folder: Path, path: Path) -> _ReadMask:
    values = read_png(folder, path)
    darkest, brightest, highest = int(values.min()), int(values.max()), int(np.iinfo(values.dtype).max)
    half = highest // 2
    if 1 < brightest <= half:
        raise LabelError(
            f"{place_of(folder, path)} is dark (its brightest pixel is {brightest}); a mask must be black and white"
        )
    if darkest > half or darkest == brightest == 1:
        raise LabelError(
            f"{place_of(folder, path)} has no black pixel (its darkest one is {darkest}); a mask must be black outside"
        )
    levels = _levels(values)
    between = [level for level in levels if darkest < level < brightest]
    if between:
        raise LabelError(
            f"{place_of(folder, path)} has areas of more than two values ({darkest}, {between[0]}, {brightest}); "
            + _CLASSES
        )
    noise = _NOISE * (brightest - darkest)
    if ((values > darkest + noise) & (values < brightest - noise)).mean() > _GREY:
        raise LabelError(f"{place_of(folder, path)} is a picture in greys; a mask must be black and white")
    inside = brightest / highest if brightest in levels and brightest > darkest else 0.0
    return _ReadMask(rle.encode(values > (half if brightest > 1 else 0)), (values.shape[0], values.shape[1]), inside)


def _levels(values: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]) -> list[int]:
    """The values of a mask that fill areas, in increasing order: all if there are two, else those of flat squares.

    A soft edge has many values, but no flat squares. Images that were JPEG files have many values too; those near the
    darkest or the brightest are taken for it.
    """
    found = np.flatnonzero(np.bincount(values.reshape(-1)))
    darkest, brightest = int(found[0]), int(found[-1])
    noise = _NOISE * (brightest - darkest) if len(found) > _MANY_VALUES else 0
    if len(found) > 2:
        # Larger than the steps of a soft edge that was enlarged, which has more values than a few classes.
        side = max(3, min(values.shape) // 64) if len(found) > _FEW_VALUES else 3
        if min(values.shape) < side:
            return []
        across = sliding_window_view(values[:, 1:] == values[:, :-1], side - 1, axis=1).all(axis=-1)
        first = values[:, : across.shape[1]]
        down = sliding_window_view(first[1:] == first[:-1], side - 1, axis=0).all(axis=-1)
        flat = sliding_window_view(across, side, axis=0).all(axis=-1) & down
        found = np.unique(first[: down.shape[0]][flat])
    return [darkest if v - darkest <= noise else brightest if brightest - v <= noise else v for v in found.tolist()]


def read_png(folder: Path, path: Path) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    """Stored values (rows, columns) of a grayscale PNG below `folder`; LabelError when it cannot be used."""
    try:
        content = path.read_bytes() if path.is_file() else b""  # reading a pipe would never end
        if not content.startswith(SIGNATURE):
            raise DicomError("is not a PNG")
        return decode_png(content, mask=True)
    except OSError as error:
        raise LabelError(f"{place_of(folder, path)} cannot be read: {error.strerror}") from None
    except DicomError as error:
        raise LabelError(f"{place_of(folder, path)} {error}") from None


def place_of(folder: Path, path: Path) -> str:
    """The file in words, without the folders between, which may be named after patients."""
    return f"{folder}: the mask image {path.name}"


def line_of(path: Path, case_id: str, text: str) -> int:
    """Line of a label table with this run-length text for this image; 0 when there is none."""
    return next((line for line, *row in _label_rows(path) if row[0] == case_id and row[1] == text), 0)


def _label_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line, image id and run-length text of each row, stripped of blanks."""
    csv.field_size_limit(2**31 - 1)
    with open_text(path) as file:
        rows = table_rows(path, file)
        _, header = next(rows, (0, None))
        if header is None:
            raise LabelError(f"{path}: the label table is empty")
        names = [name.strip().lower() for name in header]
        if "imageid" in names and "encodedpixels" in names:
            id_column, mask_column = names.index("imageid"), names.index("encodedpixels")
        elif len(header) == 2 and re.fullmatch(r"-1|\d+( \d+)+", header[1].strip()):
            id_column, mask_column = 0, 1  # the challenge's sample table has no header
            yield 1, header[0].strip(), header[1].strip()
        else:
            raise LabelError(_unexpected(path, header))
        for line, row in rows:
            if not row:
                continue
            if len(row) <= max(id_column, mask_column) or not row[id_column].strip():
                raise LabelError(f"{path}, line {line}: expected an id and a run-length text")
            yield line, image_id(path, line, row[id_column]), row[mask_column].strip()


def _unexpected(path: Path, header: Sequence[str]) -> str:
    """What to do about a table without the columns."""
    found = ", ".join(header).strip()
    if found.startswith(("{", "[")):
        return f"{path} is JSON; give a CSV file with ImageId and EncodedPixels, or a folder of mask images"
    if found.startswith("<"):
        return f"{path} is a web page or XML; give a CSV file with ImageId and EncodedPixels"
    hint = "; the columns must be separated by commas" if len(header) == 1 and re.search(r"[;\t|]", found) else ""
    shown = "".join(sign if sign.isprintable() else "?" for sign in shorten(found, _SHOWN, placeholder=" …"))
    return f"{path}: expected the columns ImageId and EncodedPixels, found: {shown[:_SHOWN]}{hint}"


def image_id(path: Path, line: int, text: str) -> str:
    """An id of a table without blanks around it; LabelError when it is too long for one."""
    text = text.strip()
    if len(text) > _MOST_ID or "\n" in text:
        raise LabelError(f"{path}, line {line}: an image id has {len(text):,} characters; is a quote not closed?")
    return text


def table_rows(path: Path, file: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Number of the last line and values of each row of a CSV file; LabelError where the file ends within quotes.

    Python's reader accepts such a row, whose last value then lacks its end, or contains the rows after the quote.
    """
    reader = csv.reader(itertools.chain(file, [_END]))
    before = 0
    for row in reader:
        if row and row[-1].endswith(_END):
            if len(row) == 1 and row[0] == _END:
                return
            raise LabelError(f"{path}, line {before + 1}: the file ends within quotes; is a quote not closed?")
        yield reader.line_num, row
        before = reader.line_num


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """The file as text; an error while it is open becomes a LabelError."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        with open(path, "rb") as raw:
            start = raw.read(2)
        what = _NO_TEXT.get(start, "it is not text in UTF-8; save it as CSV in UTF-8")
        raise LabelError(f"{path}: cannot be read as a CSV file: {what}") from error
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise LabelError(f"{path}: cannot be read as a CSV file: {reason}") from error
