"""Reading label tables as dictionaries.

Owns: the columns of label tables, and how tables are packed. Refuses: malformed or contradictory tables (LabelError
with the line). `dialect` finds the encoding of a table's masks.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import IO, Any, TextIO

from ptxdist import files
from ptxdist.archives import Archive, ArchiveError
from ptxdist.errors import LabelError
from ptxdist.labels import rle

MAX_BYTES = 512 * 1024 * 1024  # unpacked; the challenge's table has 17 million
MAX_ROWS = 2_000_000  # each takes up to 0.4 kB; the largest sets of radiographs have 650,000 images
_SHOWN, _MOST_ID = 60, 255  # characters
_END = "\x1c end of the file \x1c"  # an additional last line
_IDS = ("imageid", "sopinstanceuid", "anon_sopuid")  # of the challenge; of CANDID-PTX, whose other tables have the last
_MASKS = ("encodedpixels", "mask_rle")
_GZIP, _ZIP = b"\x1f\x8b", b"PK"
_NO_TEXT = dict.fromkeys((b"\xff\xfe", b"\xfe\xff"), "it is UTF-16; save it as CSV in UTF-8")  # by the first two bytes


def read_labels(path: Path) -> dict[str, tuple[str, ...]]:
    """Run-length texts of each image id of a label table, in the order of the table; () for a negative image.

    Reads `ImageId,EncodedPixels` with or without the challenge's blanks, a BOM or a header, and the tables of
    CANDID-PTX (`SOPInstanceUID,EncodedPixels` among other columns); each also gzipped, or alone in a zip file, as
    Kaggle serves it. A negative image has `-1`, or an empty field if the whole table is written so, as in other
    challenges; a table with both is rejected, since an empty field beside `-1` may be an image without a label. Raises
    LabelError with the line for missing columns, malformed runs, and an id that has rows with and without a mask.
    """
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
                f"{path}, line {line}: {case_id} has a row without a mask (a negative image) and one with a mask; "
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
            f"{path}, line {empty_line}: the field for the mask is empty, while line {minus_line} has '-1' for a "
            "negative image; write '-1', or remove the row of an image without a label"
        )
    if empty_line and not positive:
        raise LabelError(f"{path}: the field for the mask is empty in every row; write '-1' for a negative image")


def line_of(path: Path, case_id: str, text: str) -> int:
    """Line of a label table with this run-length text for this image; 0 when there is none."""
    return next((line for line, *row in _label_rows(path) if row[0] == case_id and row[1] == text), 0)


def _label_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line, image id and run-length text of each row, stripped of blanks."""
    csv.field_size_limit(rle.MAX_TEXT)
    with open_text(path) as file:
        rows = table_rows(path, file)
        _, header = next(rows, (0, None))
        if header is None:
            raise LabelError(f"{path}: the label table is empty")
        names = [name.strip().lower() for name in header]
        found = [next((names.index(name) for name in known if name in names), None) for known in (_IDS, _MASKS)]
        for place in found:
            if place is not None and names.count(names[place]) > 1:
                raise LabelError(f"{path}: two columns are named {header[place].strip()}; keep one of them")
        if found[0] is not None and found[1] is not None:
            id_column, mask_column = found[0], found[1]
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
    if not text.isprintable():
        raise LabelError(f"{path}, line {line}: an image id has a character that cannot be seen; remove it")
    return text


def table_rows(path: Path, file: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Number of the last line and values of each row of a CSV file; LabelError where the file ends within quotes.

    Python's reader accepts such a row, whose last value then lacks its end, or contains the rows after the quote.
    """
    reader = csv.reader(itertools.chain(file, [_END]))
    before = 0
    for number, row in enumerate(reader):
        if number > MAX_ROWS:
            raise LabelError(f"{path} has more than {MAX_ROWS:,} rows; give a table of the images that are used")
        if row and row[-1].endswith(_END):
            if len(row) == 1 and row[0] == _END:
                return
            raise LabelError(f"{path}, line {before + 1}: the file ends within quotes; is a quote not closed?")
        yield reader.line_num, row
        before = reader.line_num


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """The file as text, unpacked if it is gzip or zip; an error while it is open becomes a LabelError."""
    try:
        with open(path, "rb", opener=files.open_at_once) as file:
            start = file.read(2)
            file.seek(0)
            with _unpacked(path, start, file) as unpacked:
                content = io.BufferedReader(_Bounded(path, unpacked))
                with io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as text:
                    yield text
    except UnicodeDecodeError as error:
        what = _NO_TEXT.get(start, "it is not text in UTF-8; save it as CSV in UTF-8")
        raise LabelError(f"{path}: cannot be read as a CSV file: {what}") from error
    except ArchiveError as error:
        raise LabelError(f"{path} {error}") from None
    except zipfile.BadZipFile as error:  # its message may contain bytes of the file
        raise LabelError(f"{path}: cannot be read as a CSV file: it is a damaged zip file") from error
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise LabelError(f"{path}: cannot be read as a CSV file: {reason}") from error


@contextmanager
def _unpacked(path: Path, start: bytes, file: IO[bytes]) -> Iterator[IO[bytes] | gzip.GzipFile]:
    if start != _ZIP:
        yield gzip.GzipFile(fileobj=file) if start == _GZIP else file
        return
    with Archive(path) as archive:
        names = [
            name
            for name in archive.namelist()
            if name.lower().endswith((".csv", ".txt"))
            and "/._" not in f"/{name}"  # what a file manager adds, also in __MACOSX
        ]
        if len(names) != 1:
            what = "an Excel workbook; save it as CSV" if "[Content_Types].xml" in archive.namelist() else "a zip file"
            raise LabelError(f"{path} is {what}" + (f" of {len(names)} tables; unpack it" if "zip" in what else ""))
        try:
            table = archive.unpacked(archive.getinfo(names[0]))
        except (RuntimeError, NotImplementedError) as error:  # a password, an unknown compression
            raise LabelError(f"{path}: its table cannot be unpacked; unpack it with another tool") from error
        with table:
            yield table


class _Bounded(io.RawIOBase):
    """What is read of a table: up to MAX_BYTES, since an archive may hold far more than its own size."""

    def __init__(self, path: Path, file: IO[bytes] | gzip.GzipFile) -> None:
        self._path, self._file, self._left = path, file, MAX_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)
        content = self._file.read(len(view))
        self._left -= len(content)
        if self._left < 0:
            raise LabelError(f"{self._path} has more than {MAX_BYTES:,} bytes; give a table of the images used")
        view[: len(content)] = content
        return len(content)
