"""Label tables and patient maps: CSV files -> plain dictionaries.

Owns: the columns of the CSV files. Refuses: tables that cannot be right (LabelError with the line). Called by:
`catalog` and `phantom`.
"""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from ptxdist.data import rle
from ptxdist.errors import LabelError

NIH_IMAGE = re.compile(r"^(\d{8})_\d{3}\.png$")  # NIH ChestX-ray14: the first eight digits are the patient


def read_labels(path: Path) -> dict[str, tuple[str, ...]]:
    """Run-length texts of each image id of a label table, in the order of the table; () for a negative image.

    Reads `ImageId,EncodedPixels` with or without the challenge's blanks, a BOM, a header or gzip. Raises LabelError
    with the line for missing columns, malformed runs, and an id that has both `-1` and a mask.
    """
    masks: dict[str, list[str]] = {}
    negative: set[str] = set()
    for line, case_id, text in _label_rows(path):
        try:
            runs = rle.parse(text)
        except LabelError as error:
            raise LabelError(f"{path}, line {line}, {case_id}: {error}") from None
        found = masks.setdefault(case_id, [])
        if len(runs):
            found.append(text.strip())
        else:
            negative.add(case_id)
        if found and case_id in negative:
            raise LabelError(
                f"{path}, line {line}: {case_id} has a row '-1' (no pneumothorax) and a row with a mask; remove one"
            )
    if not masks:
        raise LabelError(f"{path}: the label table has no rows")
    return {case_id: tuple(texts) for case_id, texts in masks.items()}


def line_of(path: Path, case_id: str, text: str) -> int:
    """Line of a label table that has this run-length text for this image; 0 when none has."""
    return next((line for line, *row in _label_rows(path) if row[0] == case_id and row[1].strip() == text), 0)


def _label_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    csv.field_size_limit(2**31 - 1)
    with _open_text(path) as file:
        reader = csv.reader(file)
        header = next(reader, None)
        if header is None:
            raise LabelError(f"{path}: the label table is empty")
        names = [name.strip().lower() for name in header]
        if "imageid" in names and "encodedpixels" in names:
            id_column, mask_column = names.index("imageid"), names.index("encodedpixels")
        elif len(header) == 2 and re.fullmatch(r"-1|\d+( \d+)+", header[1].strip()):
            id_column, mask_column = 0, 1  # the challenge's sample table has no header
            yield 1, header[0].strip(), header[1]
        else:
            raise LabelError(f"{path}: expected the columns ImageId and EncodedPixels, found: {', '.join(header)}")
        for row in reader:
            if not row:
                continue
            if len(row) <= max(id_column, mask_column) or not row[id_column].strip():
                raise LabelError(f"{path}, line {reader.line_num}: expected an id and a run-length text")
            yield reader.line_num, row[id_column].strip(), row[mask_column]


def read_patients(path: Path) -> dict[str, str]:
    """Patient of each image id, from a CSV whose first two columns are image id and patient (with a header).

    NIH image names (`00028864_007.png`) are reduced to their patient. LabelError for an id with two patients.
    """
    patients: dict[str, str] = {}
    with _open_text(path) as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if len(header) < 2:
            raise LabelError(f"{path}: expected two columns, image id and patient, found {len(header)}")
        for row in reader:
            if not row:
                continue
            if len(row) < 2 or not row[0].strip() or not row[1].strip():
                raise LabelError(f"{path}, line {reader.line_num}: expected an image id and a patient")
            case_id, patient = row[0].strip(), row[1].strip()
            match = NIH_IMAGE.match(patient)
            patient = match.group(1) if match else patient
            if patients.setdefault(case_id, patient) != patient:
                raise LabelError(f"{path}, line {reader.line_num}: {case_id} has two different patients")
    if not patients:
        raise LabelError(f"{path}: the patient map has no rows")
    return patients


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    """The file as text; whatever goes wrong while it is open, not only at its start, is a LabelError."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise LabelError(f"{path}: cannot be read as a CSV file: {reason}") from error
