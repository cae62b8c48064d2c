"""Label tables: all known variants are read alike, all else is rejected with its line."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import pytest

from ptxdist.errors import LabelError
from ptxdist.labels import rle, tables
from ptxdist.labels.tables import line_of, read_labels

MANY = " ".join(["1"] * 12)
TABLE = {"a": ("5 3", "9 1"), "b": (), "c": ("0 2",)}


def write(folder: Path, content: str | bytes, name: str = "labels.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(path: Path, expected: str) -> None:
    with pytest.raises(LabelError) as caught:
        read_labels(path)
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "text",
    [
        "ImageId,EncodedPixels\na,5 3\na,9 1\nb,-1\nc,0 2\n",
        "ImageId, EncodedPixels\na, 5 3\na, 9 1\nb, -1\nc, 0 2\n",
        "\ufeffImageId,EncodedPixels\r\na,5 3\r\na,9 1\r\nb,-1\r\nc,0 2\r\n\r\n",
        "\ufeffa,5 3\na, 9 1\nb,-1\nc,0 2",
        "EncodedPixels,view,ImageId\n5 3,PA,a\n9 1,PA,a\n-1,AP,b\n0 2,AP,c\n",
        '"ImageId","EncodedPixels"\n"a","5 3"\n\n"b","-1"\n"b","-1"\n"a","9 1"\n"c","0 2"\n',
        'filename,SOPInstanceUID,Report,EncodedPixels\nP1_a,a,"two\nlines",5 3\nP1_a,a,,9 1\nP2_b,b,,-1\nP3_c,c,,0 2\n',
        "anon_SOPUID,mask_rle\na,5 3\na,9 1\nb,-1\nc,0 2\n",
    ],
    ids=["plain", "blanks", "bom-crlf", "bom-no-header", "other-columns", "quoted-unordered", "candid", "candid-tube"],
)
def test_all_variants_of_the_table_are_read_alike(tmp_path: Path, text: str) -> None:
    assert read_labels(write(tmp_path, text)) == TABLE
    assert read_labels(write(tmp_path, gzip.compress(text.encode()), "labels.csv.gz")) == TABLE
    for name in ("labels.csv.zip", "labels.csv"):  # Kaggle's client may leave out the suffix
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("train-rle.csv", text)
            for name_of_rest in ("__MACOSX/._train-rle.csv", "._train-rle.csv", "data/._train-rle.csv"):
                archive.writestr(name_of_rest, "what a file manager adds")
        assert read_labels(tmp_path / name) == TABLE


def test_an_archive_that_is_no_table_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "labels.csv.zip"
    for names, expected in (
        (["a.csv", "b.csv"], "is a zip file of 2 tables; unpack it"),
        (["a.dcm"], "is a zip file of 0 tables; unpack it"),
        (["[Content_Types].xml", "xl/sheet1.xml"], "is an Excel workbook; save it as CSV"),
        (["../../a.csv"], "expected the columns"),  # nothing is written
    ):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.writestr(name, "0" * 100_000)
        refused(path, expected)
    monkeypatch.setattr(tables, "MAX_BYTES", 9_999)
    refused(path, "has more than 9,999 bytes; give a table of the images used")
    refused(write(tmp_path, gzip.compress(bytes(10_000)), "labels.csv.gz"), "has more than 9,999 bytes")
    refused(write(tmp_path, bytes(10_000)), "has more than 9,999 bytes")
    path.write_bytes(path.read_bytes()[:-30])
    refused(path, "cannot be read as a CSV file: it is a damaged zip file")


def test_a_table_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, f"ImageId,EncodedPixels\na,{MANY}\nb,-1\n")
    for name, value, expected in (
        ("ptxdist.labels.rle.MOST_RUNS", 1, f"line 2, a: run-length text has more than 1 runs: {MANY!r}"),
        ("ptxdist.labels.tables.MAX_ROWS", 1, "has more than 1 rows"),
        ("ptxdist.labels.rle.MAX_TEXT", 25, ""),
        ("ptxdist.labels.rle.MAX_TEXT", 20, "cannot be read as a CSV file: field larger than field limit (20)"),
        ("ptxdist.labels.tables.MAX_BYTES", 10_000, ""),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(name, value)
            if expected:
                refused(path, expected)
            else:
                assert read_labels(path) == {"a": (MANY,), "b": ()}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "the label table is empty"),
        ("ImageId,EncodedPixels\n", "has no rows"),
        ("id,mask\na,-1\n", "expected the columns ImageId and EncodedPixels, found: id, mask"),
        ("ImageId\na\n", "expected the columns ImageId and EncodedPixels, found: ImageId"),
        ("ImageId,EncodedPixels\na,-1\nb,5 3\na,5 3\n", "line 4: a has a row without a mask (a negative image) and"),
        ("ImageId,EncodedPixels\na,5 3\na,-1\n", "line 3: a has a row without a mask"),
        ("ImageId,EncodedPixels\na,5 3 4\n", "line 2, a: run-length text must be '-1' or pairs"),
        (
            "ImageId,EncodedPixels\na,nan\n",
            "line 2, a: run-length text contains something that is not an integer: 'nan'",
        ),
        ("ImageId,EncodedPixels\na,None\n", "line 2, a: run-length text contains something that is not an integer"),
        ("ImageId,EncodedPixels\na,-1 -1\n", "line 2, a: run-length text has a negative gap"),
        (
            "ImageId,EncodedPixels\na,5 3\nb, \nc,-1\n",
            "line 3: the field for the mask is empty, while line 4",
        ),
        ("ImageId,EncodedPixels\nc,-1\na,5 3\nb,\nb,\n", "line 4: the field for the mask is empty, while line 2 has"),
        ("ImageId,EncodedPixels\na,\nb,\n", "the field for the mask is empty in every row"),
        ("ImageId,EncodedPixels\na,5 3\na,\n", "line 3: a has a row without a mask"),
        ("ImageId,EncodedPixels\na\n", "line 2: expected an id and a run-length text"),
        ("ImageId,EncodedPixels\n ,-1\n", "line 2: expected an id"),
        ("ImageId,EncodedPixels\na,-1\nb\0,-1\n", "line 3: an image id has a character that cannot be seen"),
        ("ImageId,EncodedPixels\nb\u200b1,-1\n", "line 2: an image id has a character that cannot be seen"),
        ("ImageId,EncodedPixels,EncodedPixels\na,-1,5 3\n", "two columns are named EncodedPixels; keep one"),
        ("ImageId,EncodedPixels,imageid\na,-1,b\n", "two columns are named ImageId; keep one"),
        (b"ImageId,EncodedPixels\n\xff\xfe,-1\n", "cannot be read as a CSV file: it is not text in UTF-8"),
        (json.dumps({"images": [{"file_name": f"patient-{i}.png"} for i in range(9999)]}), "is JSON; give a CSV file"),
        (json.dumps([{"id": i} for i in range(9999)], indent=1), "is JSON; give a CSV file"),
        ("<!DOCTYPE html>" + "<p>" * 9999, "is a web page or XML"),
        ("ImageId;EncodedPixels\na;-1\n", "found: ImageId;EncodedPixels; the columns must be separated by commas"),
        (",".join(f"column{i}" for i in range(9999)) + "\n", "found: column0, column1, column2"),
        ("x" * 9999 + "\n", "found: "),
        ('ImageId,EncodedPixels\n"a,-1\n' + "b,-1\n" * 9999 + '",-1\n', "characters; is a quote not closed?"),
        ('ImageId,EncodedPixels\na,-1\nb,"5 3', "line 3: the file ends within quotes; is a quote not closed?"),
        ('ImageId,EncodedPixels\na,"5 3\n9 1\n', "line 2: the file ends within quotes"),
        ('ImageId,"EncodedPixels\na,-1\n', "line 1: the file ends within quotes"),
        ("ImageId,EncodedPixels\na," + "x" * 9999, "line 2, a: run-length text contains something"),
        ("ImageId,EncodedPixels\na,-1\n".encode("utf-16"), "it is UTF-16; save it as CSV in UTF-8"),
        ("ImageId,EncodedPixels\na,-1\n".encode("utf-16-le"), "expected the columns"),
        (b"PK\3\4\x14\0\0\0\x08\0" + bytes(range(256)), "cannot be read as a CSV file: it is a damaged zip file"),
    ],
)
def test_wrong_table_is_refused_with_file_and_line(tmp_path: Path, content: str | bytes, expected: str) -> None:
    path = write(tmp_path, content)
    refused(path, expected)
    with pytest.raises(LabelError) as caught:
        read_labels(path)
    assert len(str(caught.value)) < 300 + len(str(path))
    assert str(caught.value).isprintable()


def test_table_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.csv", "No such file")
    assert read_labels(write(tmp_path, "ImageId,EncodedPixels\na,-1\n", "plain.csv.gz")) == {"a": ()}
    packed = gzip.compress(b"ImageId,EncodedPixels\n" + b"a,-1\n" * 1000)
    refused(write(tmp_path, packed[: len(packed) // 2], "short.csv.gz"), "cannot be read as a CSV file")


def test_empty_fields_are_negative_where_the_whole_table_writes_them_so(tmp_path: Path) -> None:
    path = write(tmp_path, "ImageId,EncodedPixels\na,5 3\na,9 1\nb,\nc, 0 2\nb, \n")
    assert read_labels(path) == TABLE


def test_line_of_finds_the_row_of_a_mask(tmp_path: Path) -> None:
    path = write(tmp_path, "ImageId,EncodedPixels\na,5 3\nb,9 1\na, 9 1\n")
    assert [line_of(path, "a", "5 3"), line_of(path, "a", "9 1"), line_of(path, "b", "5 3")] == [2, 4, 0]


# --- the real tables ------------------------------------------------------------------------------------------------


def test_real_table_has_the_numbers_it_is_known_for(real_data: Path) -> None:
    table = read_labels(real_data / "siim-real" / "train-rle.csv.gz")
    positive = [texts for texts in table.values() if texts]
    several = [texts for texts in positive if len(texts) > 1]
    rows = len(table) - len(positive) + sum(map(len, positive))
    assert (rows, len(table), len(positive), len(several)) == (12_954, 12_047, 2_669, 624)
    assert sum(map(rle.overlap, several)) == 183


def test_challenge_sample_table_without_header_is_read(real_data: Path) -> None:
    path = real_data / "siim-real" / "train-rle-sample.csv"
    table = read_labels(path)
    lines = [line.split(",") for line in path.read_text(encoding="utf-8-sig").splitlines()]
    assert list(table) == list(dict.fromkeys(name for name, _ in lines))
    assert "1.2.276.0.7230010.3.1.4.8323329.1000.1517875165.878027" in table
    assert sum(len(texts) for texts in table.values()) == sum(text.strip() != "-1" for _, text in lines) > 0
