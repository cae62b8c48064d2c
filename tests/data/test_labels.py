"""Label tables and patient maps: all variants met in the wild are read alike, all else is refused with its line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from ptxdist.data.labels import line_of, read_labels, read_patients
from ptxdist.errors import LabelError

TABLE = {"a": ("5 3", "9 1"), "b": (), "c": ("0 2",)}


def write(folder: Path, content: str | bytes, name: str = "labels.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(path: Path, expected: str, read: object = read_labels) -> None:
    with pytest.raises(LabelError) as caught:
        read(path)  # type: ignore[operator]
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
    ],
    ids=["plain", "blanks", "bom-crlf", "bom-no-header", "other-columns", "quoted-unordered"],
)
def test_all_variants_of_the_table_are_read_alike(tmp_path: Path, text: str) -> None:
    assert read_labels(write(tmp_path, text)) == TABLE
    assert read_labels(write(tmp_path, gzip.compress(text.encode()), "labels.csv.gz")) == TABLE


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "the label table is empty"),
        ("ImageId,EncodedPixels\n", "has no rows"),
        ("id,mask\na,-1\n", "expected the columns ImageId and EncodedPixels, found: id, mask"),
        ("ImageId\na\n", "expected the columns ImageId and EncodedPixels, found: ImageId"),
        ("ImageId,EncodedPixels\na,-1\nb,5 3\na,5 3\n", "line 4: a has a row '-1' (no pneumothorax) and a row with a"),
        ("ImageId,EncodedPixels\na,5 3\na,-1\n", "line 3: a has a row '-1'"),
        ("ImageId,EncodedPixels\na,5 3 4\n", "line 2, a: run-length text must be '-1' or pairs"),
        ("ImageId,EncodedPixels\na,\n", "line 2, a: run-length text must be"),
        ("ImageId,EncodedPixels\na\n", "line 2: expected an id and a run-length text"),
        ("ImageId,EncodedPixels\n ,-1\n", "line 2: expected an id"),
        (b"ImageId,EncodedPixels\n\xff\xfe,-1\n", "cannot be read as a CSV file"),
    ],
)
def test_wrong_table_is_refused_with_file_and_line(tmp_path: Path, content: str | bytes, expected: str) -> None:
    refused(write(tmp_path, content), expected)


def test_table_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.csv", "No such file")
    refused(tmp_path, "Is a directory")
    refused(write(tmp_path, "ImageId,EncodedPixels\na,-1\n", "plain.csv.gz"), "Not a gzipped file")
    packed = gzip.compress(b"ImageId,EncodedPixels\n" + b"a,-1\n" * 1000)
    refused(write(tmp_path, packed[: len(packed) // 2], "short.csv.gz"), "cannot be read as a CSV file")


def test_line_of_finds_the_row_of_a_mask(tmp_path: Path) -> None:
    path = write(tmp_path, "ImageId,EncodedPixels\na,5 3\nb,9 1\na, 9 1\n")
    assert [line_of(path, "a", "5 3"), line_of(path, "a", "9 1"), line_of(path, "b", "5 3")] == [2, 4, 0]


def test_patient_map_reduces_nih_names_to_the_patient(tmp_path: Path) -> None:
    path = write(
        tmp_path, "Kaggle_ID,NIH_ID\na,00028864_007.png\nb,00028864_011.png\n\nc, Jones \na,00028864_001.png\n"
    )
    assert read_patients(path) == {"a": "00028864", "b": "00028864", "c": "Jones"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "expected two columns"),
        ("id\na\n", "expected two columns, image id and patient, found 1"),
        ("id,patient\n", "has no rows"),
        ("id,patient\na,1\na,2\n", "line 3: a has two different patients"),
        ("id,patient\na,\n", "line 2: expected an image id and a patient"),
        (b"id,patient\n\xff,1\n", "cannot be read as a CSV file"),
    ],
)
def test_wrong_patient_map_is_refused_with_file_and_line(tmp_path: Path, content: str | bytes, expected: str) -> None:
    refused(write(tmp_path, content), expected, read_patients)


def test_challenge_sample_table_without_header_is_read(real_data: Path) -> None:
    path = real_data / "siim-real" / "train-rle-sample.csv"
    table = read_labels(path)
    lines = [line.split(",") for line in path.read_text(encoding="utf-8-sig").splitlines()]
    assert list(table) == list(dict.fromkeys(name for name, _ in lines))
    assert "1.2.276.0.7230010.3.1.4.8323329.1000.1517875165.878027" in table
    assert sum(len(texts) for texts in table.values()) == sum(text.strip() != "-1" for _, text in lines) > 0
