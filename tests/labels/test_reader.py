"""Labels of every format but tables: which one it is, and what its values mean."""

from __future__ import annotations

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
from ptxdist.labels.reader import read_any
from ptxdist.labels.tables import read_labels


def refused(path: Path, expected: str) -> None:
    with pytest.raises(LabelError) as caught:
        read_any(path)
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)
    assert caught.value.exit_code == 4


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
    found = read_any(tmp_path)
    assert (found.masks, found.sizes) == ({"1.2.31": (), "1.2.30": ("9 2 2 2",)}, {"1.2.31": (5, 3), "1.2.30": (4, 6)})
    assert (list(found.masks), found.kind) == (["1.2.31", "1.2.30"], "mask images")
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
    assert read_any(tmp_path).masks == {"a": ("9 2 2 2",)}


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
    found = read_any(tmp_path)
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
    refused(tmp_path / "m", f"the mask image b.png has areas of more than two values ({named})")
    large = cv2.resize(values.astype(np.uint8), (1024, 1024), interpolation=cv2.INTER_NEAREST)
    write_png(tmp_path / "m" / "b.png", large.astype(np.uint16) * 257)
    refused(tmp_path / "m", "has areas of more than two values")


def test_masks_with_different_values_inside_are_refused(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", DISK)
    for inside, share in ((1, "0%"), (200, "78%")):
        write_png(tmp_path / "b.png", DISK // 255 * inside)
        refused(
            tmp_path,
            f"different values inside (b.png has {share} of the highest value, a.png has 100%)",
        )
    Image.fromarray(DISK > 0).save(tmp_path / "b.png")  # one bit
    write_png(tmp_path / "c.png", DISK.astype(np.uint16) * 257)
    masks = read_any(tmp_path).masks
    assert masks["a"] == masks["b"] == masks["c"]


def test_a_radiograph_is_no_mask(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    ramp = np.add.outer(2 * np.arange(64), 2 * np.arange(64)).astype(np.uint8)
    for picture in (grey, ramp):
        write_png(tmp_path / "m" / "a.png", picture)
        refused(tmp_path / "m", "a.png is a picture in greys; a mask must be black and white")


@pytest.mark.parametrize("value", [1, 255])
def test_a_mask_without_a_black_pixel_is_refused(tmp_path: Path, value: int) -> None:
    write_png(tmp_path / "m" / "a.png", np.full((4, 6), value, np.uint8))
    refused(tmp_path / "m", f"a.png has no black pixel (its darkest one is {value}); a mask must")


def test_a_folder_without_usable_masks_is_refused_without_the_names_of_its_folders(tmp_path: Path) -> None:
    refused(tmp_path, "has no mask images (<image id>.png), NIfTI masks, annotations in JSON or DICOM SEG objects")
    person = tmp_path / "Quagmire^Zebulon"
    content = write_png(person / "a.png", MASK).read_bytes()
    for bad, reason in (
        (content[:-20], "is a damaged PNG (it is cut off)"),
        (content[:50] + bytes([content[50] ^ 1]) + content[51:], "is a damaged PNG (a checksum is wrong)"),
        (b"", "is empty (0 bytes)"),
        (b"BM" + content, "is not a PNG, TIFF, GIF or BMP image, or is damaged"),
        (
            cv2.imencode(".png", MASK // 2)[1].tobytes(),
            "is dark (its brightest pixel is 127); a mask must be black and white",
        ),
        (cv2.imencode(".png", MASK.astype(np.uint16))[1].tobytes(), "is dark (its brightest pixel is 255)"),
    ):
        (person / "a.png").write_bytes(bad)
        refused(tmp_path, f"the mask image a.png {reason}")
    (person / "a.png").write_bytes(content)
    write_png(tmp_path / "other" / "a.png", MASK)
    refused(tmp_path, "2 mask images in it are named a; an image can have only one")
    with pytest.raises(LabelError) as caught:
        read_any(tmp_path)
    assert "Quagmire" not in str(caught.value)


def test_more_masks_than_a_task_holds_are_read_in_order_by_processes_too(tmp_path: Path) -> None:
    content = cv2.imencode(".png", MASK)[1].tobytes()
    for number in range(150):
        (tmp_path / f"1.{number:03}.png").write_bytes(content)
    (tmp_path / "1.007.png").write_bytes(cv2.imencode(".png", 0 * MASK)[1].tobytes())
    found = read_any(tmp_path)
    assert list(found.masks) == [f"1.{number:03}" for number in range(150)]
    assert [case_id for case_id, texts in found.masks.items() if not texts] == ["1.007"]
    with processes(2) as executor:
        assert read_any(tmp_path, executor=executor) == found
        (tmp_path / "1.149.png").write_bytes(b"nothing")
        with pytest.raises(LabelError, match=r"the mask image 1\.149\.png is not a PNG, TIFF"):
            read_any(tmp_path, executor=executor)


def test_masks_of_the_png_mirror_are_the_tables(real_data: Path) -> None:
    table = read_labels(real_data / "siim-real" / "train-rle.csv.gz")
    found = read_any(real_data / "siim-png" / "masks")
    assert (len(found.masks), sum(map(bool, found.masks.values()))) == (24, 16)
    assert set(found.sizes.values()) == {(1024, 1024)}
    for case_id, texts in found.masks.items():
        union = rle.decode(table[case_id], 1024, 1024)
        assert texts == ((rle.encode(union),) if table[case_id] else ())
