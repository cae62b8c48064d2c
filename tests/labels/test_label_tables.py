"""Label tables: all known variants are read alike, all else is rejected with its line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from ptxdist.errors import LabelError
from ptxdist.executor import processes
from ptxdist.labels import rle
from ptxdist.labels.tables import MaskFolder, line_of, read_labels, read_mask_folder

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
        ("ImageId,EncodedPixels\na,-1\nb,5 3\na,5 3\n", "line 4: a has a row without a mask (no pneumothorax) and"),
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
        (gzip.compress(b"ImageId,EncodedPixels\na,-1\n"), "it is compressed; add .gz to its name"),
        (b"PK\3\4\x14\0\0\0\x08\0" + bytes(range(256)), "it is a zip file or an Excel workbook; unpack it"),
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
    refused(write(tmp_path, "ImageId,EncodedPixels\na,-1\n", "plain.csv.gz"), "Not a gzipped file")
    packed = gzip.compress(b"ImageId,EncodedPixels\n" + b"a,-1\n" * 1000)
    refused(write(tmp_path, packed[: len(packed) // 2], "short.csv.gz"), "cannot be read as a CSV file")


def test_empty_fields_are_negative_where_the_whole_table_writes_them_so(tmp_path: Path) -> None:
    path = write(tmp_path, "ImageId,EncodedPixels\na,5 3\na,9 1\nb,\nc, 0 2\nb, \n")
    assert read_labels(path) == TABLE


def test_line_of_finds_the_row_of_a_mask(tmp_path: Path) -> None:
    path = write(tmp_path, "ImageId,EncodedPixels\na,5 3\nb,9 1\na, 9 1\n")
    assert [line_of(path, "a", "5 3"), line_of(path, "a", "9 1"), line_of(path, "b", "5 3")] == [2, 4, 0]


# --- a folder of mask images ----------------------------------------------------------------------------------------

MASK = np.zeros((4, 6), np.uint8)
MASK[1:3, 2:4] = 255


def write_png(path: Path, values: npt.NDArray[np.generic]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", values)[1].tobytes())
    return path


def test_mask_images_are_read_as_the_table_would_have_them(tmp_path: Path) -> None:
    write_png(tmp_path / "b" / "1.2.30.png", MASK)
    write_png(tmp_path / "a" / "1.2.31.PNG", np.zeros((5, 3), np.uint8))
    (tmp_path / "a" / "._1.2.31.png").write_bytes(b"what a file manager leaves")
    (tmp_path / "notes.txt").write_text("hand drawn")
    found = read_mask_folder(tmp_path)
    assert found == MaskFolder({"1.2.31": (), "1.2.30": ("9 2 2 2",)}, {"1.2.31": (5, 3), "1.2.30": (4, 6)})
    assert list(found.masks) == ["1.2.31", "1.2.30"]
    assert read_labels(tmp_path) == found.masks
    assert np.array_equal(rle.decode(found.masks["1.2.30"], 4, 6) * 255, MASK)


@pytest.mark.parametrize(
    "values",
    [
        MASK,
        MASK // 255,
        (MASK // 255).astype(bool),
        np.where(MASK > 0, 128, 127).astype(np.uint8),
        np.where(MASK > 0, 40_000, 30_000).astype(np.uint16),
        np.repeat(MASK[:, :, None], 3, axis=2),
    ],
    ids=["black-white", "zero-one", "one-bit", "grays", "16-bit", "colour"],
)
def test_a_px_is_inside_from_half_brightness_on_or_where_a_mask_of_zeros_has_ones(
    tmp_path: Path, values: npt.NDArray[np.generic]
) -> None:
    if values.dtype == bool:
        Image.fromarray(values).save(tmp_path / "a.png")
    else:
        write_png(tmp_path / "a.png", values)
    assert read_mask_folder(tmp_path).masks == {"a": ("9 2 2 2",)}


DISK = np.zeros((256, 256), np.uint8)
cv2.circle(DISK, (150, 90), 40, 255, -1)
LUNGS = cv2.ellipse(np.zeros_like(DISK), ((140, 120), (150, 200), 0), 255, -1)


def jpeg(values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    return cv2.imdecode(cv2.imencode(".jpg", values, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_GRAYSCALE)


@pytest.mark.parametrize(
    "soft",
    [
        lambda mask: cv2.GaussianBlur(mask, (0, 0), 3),
        lambda mask: cv2.resize(mask, (128, 128), interpolation=cv2.INTER_AREA),
        lambda mask: cv2.resize(cv2.resize(mask, (90, 90), interpolation=cv2.INTER_AREA), (1024, 1024)),
        lambda mask: cv2.resize(cv2.resize(mask, (128, 128), interpolation=3), (1024, 1024), interpolation=0),
        jpeg,
        lambda mask: jpeg(cv2.resize(mask, (1000, 1000), interpolation=cv2.INTER_CUBIC)),
    ],
    ids=["blurred", "halved", "enlarged", "enlarged-nearest", "jpeg", "jpeg-enlarged"],
)
def test_soft_edges_are_cut_at_half_brightness(tmp_path: Path, soft: Callable[[object], object]) -> None:
    for name, mask in (("a", DISK), ("b", 0 * DISK), ("c", cv2.flip(DISK, 1))):
        write_png(tmp_path / f"{name}.png", soft(mask))
    found = read_mask_folder(tmp_path)
    for name, mask in (("a", DISK), ("c", cv2.flip(DISK, 1))):
        size = found.sizes[name]
        expected = cv2.resize(mask, size[::-1], interpolation=cv2.INTER_AREA) > 127
        assert np.mean(rle.decode(found.masks[name], *size) != expected) < 0.005
    assert found.masks["b"] == ()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (np.where(DISK > 0, 255, LUNGS // 255 * 128), "0, 128, 255"),
        (np.where(cv2.dilate(DISK, np.ones((3, 3))) > DISK, 255, DISK // 255), "0, 1, 255"),  # 255: to be ignored
        (np.where(DISK > 0, 255, LUNGS // 255 * 85), "0, 85, 255"),
        (np.where(DISK > 0, 254, LUNGS // 255 * 255), "0, 254, 255"),
    ],
    ids=["lungs", "ignore", "dark-class", "close"],
)
def test_areas_of_a_third_value_are_refused(tmp_path: Path, values: npt.NDArray[np.generic], named: str) -> None:
    write_png(tmp_path / "m" / "a.png", DISK)
    write_png(tmp_path / "m" / "b.png", values.astype(np.uint8))
    refused(tmp_path / "m", f"the mask image b.png has areas of more than two values ({named})", read_mask_folder)
    large = cv2.resize(values.astype(np.uint8), (1024, 1024), interpolation=cv2.INTER_NEAREST)
    write_png(tmp_path / "m" / "b.png", large.astype(np.uint16) * 257)
    refused(tmp_path / "m", "has areas of more than two values", read_mask_folder)


def test_masks_with_different_values_inside_are_refused(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", DISK)
    for inside, share in ((1, "0%"), (200, "78%")):
        write_png(tmp_path / "b.png", DISK // 255 * inside)
        refused(
            tmp_path,
            f"different values inside (b.png has {share} of the highest value, a.png has 100%)",
            read_mask_folder,
        )
    Image.fromarray(DISK > 0).save(tmp_path / "b.png")  # one bit
    write_png(tmp_path / "c.png", DISK.astype(np.uint16) * 257)
    masks = read_mask_folder(tmp_path).masks
    assert masks["a"] == masks["b"] == masks["c"]


def test_a_radiograph_is_no_mask(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    ramp = np.add.outer(2 * np.arange(64), 2 * np.arange(64)).astype(np.uint8)
    for picture in (grey, ramp):
        write_png(tmp_path / "m" / "a.png", picture)
        refused(tmp_path / "m", "a.png is a picture in greys; a mask must be black and white", read_mask_folder)


@pytest.mark.parametrize("value", [1, 255])
def test_a_mask_without_a_black_pixel_is_refused(tmp_path: Path, value: int) -> None:
    write_png(tmp_path / "m" / "a.png", np.full((4, 6), value, np.uint8))
    refused(tmp_path / "m", f"a.png has no black pixel (its darkest one is {value}); a mask must", read_mask_folder)


def test_a_folder_without_usable_masks_is_refused_without_the_names_of_its_folders(tmp_path: Path) -> None:
    refused(tmp_path, "no mask images (<image id>.png) in it or below it", read_mask_folder)
    person = tmp_path / "Quagmire^Zebulon"
    content = write_png(person / "a.png", MASK).read_bytes()
    for bad, reason in (
        (content[:-20], "is a damaged PNG (it is cut off)"),
        (content[:50] + bytes([content[50] ^ 1]) + content[51:], "is a damaged PNG (a checksum is wrong)"),
        (b"", "is not a PNG"),
        (b"BM" + content, "is not a PNG"),
        (
            cv2.imencode(".png", MASK // 2)[1].tobytes(),
            "is dark (its brightest pixel is 127); a mask must be black and white",
        ),
        (cv2.imencode(".png", MASK.astype(np.uint16))[1].tobytes(), "is dark (its brightest pixel is 255)"),
        (cv2.imencode(".png", np.stack((MASK, MASK, MASK // 3), axis=2))[1].tobytes(), "is a colour PNG"),
    ):
        (person / "a.png").write_bytes(bad)
        refused(tmp_path, f"the mask image a.png {reason}", read_mask_folder)
    (person / "a.png").write_bytes(content)
    write_png(tmp_path / "other" / "a.png", MASK)
    refused(tmp_path, "2 mask images in it are named a; an image can have only one", read_mask_folder)
    with pytest.raises(LabelError) as caught:
        read_mask_folder(tmp_path)
    assert "Quagmire" not in str(caught.value)


def test_more_masks_than_a_task_holds_are_read_in_order_by_processes_too(tmp_path: Path) -> None:
    content = cv2.imencode(".png", MASK)[1].tobytes()
    for number in range(150):
        (tmp_path / f"1.{number:03}.png").write_bytes(content)
    (tmp_path / "1.007.png").write_bytes(cv2.imencode(".png", 0 * MASK)[1].tobytes())
    found = read_mask_folder(tmp_path)
    assert list(found.masks) == [f"1.{number:03}" for number in range(150)]
    assert [case_id for case_id, texts in found.masks.items() if not texts] == ["1.007"]
    with processes(2) as executor:
        assert read_mask_folder(tmp_path, executor) == found
        (tmp_path / "1.149.png").write_bytes(b"nothing")
        with pytest.raises(LabelError, match=r"the mask image 1\.149\.png is not a PNG"):
            read_mask_folder(tmp_path, executor)


def test_masks_of_the_png_mirror_are_the_tables(real_data: Path) -> None:
    table = read_labels(real_data / "siim-real" / "train-rle.csv.gz")
    found = read_mask_folder(real_data / "siim-png" / "masks")
    assert (len(found.masks), sum(map(bool, found.masks.values()))) == (24, 16)
    assert set(found.sizes.values()) == {(1024, 1024)}
    for case_id, texts in found.masks.items():
        union = rle.decode(table[case_id], 1024, 1024)
        assert texts == ((rle.encode(union),) if table[case_id] else ())


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
