"""Labels of every format but tables: which one it is, and what its values mean."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import nibabel
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from ptxdist.errors import LabelError, PtxdistError, SettingsError
from ptxdist.executor import processes
from ptxdist.labels import rle
from ptxdist.labels.masks import open_predictions
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
    refused(tmp_path, "2 mask images in it are named a; an image can have only one. If")
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


# --- colours, other kinds of files, names -----------------------------------------------------------------------------


def save(path: Path, values: npt.NDArray[np.generic], palette: list[int] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if palette:
        image = image.convert("P")
        image.putpalette(palette)
    image.save(path)
    return path


RED, GREEN = (MASK[:, :, None] // 255 * np.array([colour], np.uint8) for colour in ([128, 0, 0], [0, 200, 0]))
CORNER = np.zeros((4, 6, 1), np.uint8)
CORNER[0, 0] = 1
THREE = MASK // 255 + 2 * CORNER[:, :, 0]
STEPS = np.arange(24, dtype=np.uint8).reshape(4, 6)


@pytest.mark.parametrize(
    ("name", "values", "palette", "message"),
    [
        (
            "a.png",
            RED + CORNER * np.array([0, 200, 0], np.uint8),
            None,
            "has 3 colours (#000000, #00c800, #800000); these may be several",
        ),
        ("a.png", RED + 7, None, "has no black pixel (its colours are #070707, #870707); a mask must be black outside"),
        ("a.tif", np.stack([STEPS, STEPS * 2, STEPS * 3], axis=2), None, "is a picture in colours; a mask must be"),
        ("a.png", MASK // 255, [0, 0, 0, 0, 0, 0], "has several entries of its palette in one colour"),
        ("a.png", THREE, [0, 0, 0, 0, 1, 0, 0, 2, 0], "has 3 colours (#000000, #000100, #000200)"),
        ("a.png", np.dstack([RED, MASK]), None, "has transparency; a mask must be black and white, or of two"),
        ("a.png", THREE, None, "its values are 0, 1, 2; these may be several classes"),
        ("a.tif", STEPS.astype(np.float32) / 24, None, "has at least 24 values from 0 to 0.958333; a mask has 0 and 1"),
        ("a.tif", STEPS.astype(np.int32) - 3, None, "has at least 24 values from -3 to 20; a mask has 0 and 1"),
        ("a.bmp", np.dstack([MASK, MASK // 2, MASK]), None, ""),
    ],
)
def test_pictures_of_two_colours_are_masks(
    tmp_path: Path, name: str, values: npt.NDArray[np.generic], palette: list[int] | None, message: str
) -> None:
    save(tmp_path / "m" / name, values, palette)
    if message:
        refused(tmp_path / "m", f"the mask image {name} {message}" if message.startswith("has") else message)
    else:
        assert read_any(tmp_path / "m").masks == read_any(tmp_path / "m" / name).masks == {"a": ("9 2 2 2",)}


def test_a_mask_of_numbers_may_fill_the_first_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptxdist.labels.pictures._STRIP_ROWS", 2)
    values = np.array([[1, 1], [1, 1], [0, 1], [0, 0]])
    for kind in (np.int32, np.float32):
        save(tmp_path / "a.tif", values.astype(kind))
        assert read_any(tmp_path).masks == {"a": ("0 2 2 3",)}
    save(tmp_path / "a.tif", np.ones((4, 2), np.int32))
    refused(tmp_path, "the mask image a.tif has at least 1 values from 1 to 1; a mask has 0 and 1")


def test_masks_in_different_colours_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.png", RED)
    save(tmp_path / "b.png", GREEN)
    refused(tmp_path, "several classes (a.png has '#800000', b.png has '#00c800'); keep the one to be found")
    save(tmp_path / "b.png", MASK)
    refused(tmp_path, "several classes (a.png has '#800000', b.png has black and white)")
    save(tmp_path / "b.png", 0 * RED)
    assert read_any(tmp_path).masks == {"a": ("9 2 2 2",), "b": ()}


def test_pictures_of_several_pages_and_too_many_pixels_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = [Image.fromarray(value < MASK) for value in (0, 99)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    monkeypatch.delattr("PIL.TiffImagePlugin.TiffImageFile.n_frames")  # would look at each page
    refused(tmp_path, "a.tif has several pages; only single images are accepted")
    monkeypatch.setattr("ptxdist.dicom.png.MAX_PIXELS", 20)
    for name in ("a.tif", "b.png", "c.gif"):
        refused(save(tmp_path / name, RED if name == "b.png" else MASK), "claims 6x4 pixels; at most 20 are accepted")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (STEPS % 3, "x.nii has the values 0, 1, 2; these may be several classes: write 0 and 1"),
        (STEPS / 24, "x.nii has more than 16 values; a mask has 0 outside and one other value inside"),
        (np.where(MASK > 0, np.nan, 0), "x.nii has 2 values; a mask has 0 outside"),
        (MASK // 255 + 1, "x.nii has no pixel of 0 (its values are 1, 2)"),
        (MASK[:0], "x.nii has the shape 0x6; only single 2-D images are read"),
        (np.stack([MASK, MASK]), "x.nii has the shape 2x4x6; only single 2-D images are read"),
    ],
)
def test_nifti_files_that_are_no_masks(tmp_path: Path, values: npt.NDArray[np.generic], message: str) -> None:
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), np.eye(4)), tmp_path / "x.nii")
    refused(tmp_path, message)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("order", "<>")
def test_extensions_of_a_nifti_header_are_bounded(tmp_path: Path, kind: Any, order: str) -> None:
    """nibabel reads them whole, and packed zeros are short."""
    image = kind(MASK.T // 255, np.eye(4), kind.header_class(endianness=order))
    for size in (2**20, 2**25):
        image.header.extensions[:] = [nibabel.nifti1.Nifti1Extension("comment", bytes(size - 1) + b"x")]
        nibabel.save(image, tmp_path / "x.nii.gz")
        if size == 2**20:
            assert read_any(tmp_path).masks == {"x": ("9 2 2 2",)}
    refused(tmp_path, "x.nii.gz cannot be read as NIfTI: its header has more than 16,777,216 bytes")


@pytest.mark.parametrize("slope", [1.0, 0.5])
def test_a_nifti_file_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slope: float) -> None:
    image = nibabel.Nifti1Image((MASK.T[:, :, None] > 0).astype(np.int16), np.eye(4))
    image.header.set_slope_inter(slope, 0)
    nibabel.save(image, tmp_path / "x.nii.gz")
    whole = read_any(tmp_path).masks
    for pixels in (1, 6, 12, 18):
        monkeypatch.setattr("ptxdist.labels.nifti._BLOCK_PX", pixels)
        assert read_any(tmp_path).masks == whole == {"x": ("9 2 2 2",)}
        assert open_predictions(tmp_path).spans("x", (4, 6)).tolist() == [[9, 11], [13, 15]]


def test_masks_of_more_pieces_than_any_drawn_one_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece of a column takes a hundred bytes: a small file of a chequered mask would take gigabytes."""
    monkeypatch.setattr(rle, "MOST_RUNS", 2)
    assert len(rle.spans_of(MASK)) == 2
    many = np.tile(MASK, (2, 1))
    nibabel.save(nibabel.Nifti1Image(many.T // 255, np.eye(4)), tmp_path / "a.nii")
    for path in (write_png(tmp_path / "b.png", many), save(tmp_path / "c.png", many // 255, [0, 0, 0, 255, 0, 0])):
        refused(path, f"{path} has a mask of 4 pieces of columns; at most 2 are accepted")
    refused(tmp_path / "a.nii", "a.nii has a mask of 4 pieces")
    (tmp_path / "only").mkdir()
    for name in ("a.nii", "b.png"):
        (tmp_path / name).rename(tmp_path / "only" / name)
        masks = open_predictions(tmp_path / "only")
        with pytest.raises(LabelError, match=f"{name} has a mask of 4 pieces"):
            masks.spans(name[0], (8, 6))
        (tmp_path / "only" / name).unlink()


@pytest.mark.parametrize("name", ["a.json", "a.png", "a.nii"])
def test_nobody_waits_for_the_writer_of_a_pipe(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    refused(tmp_path, name)
    write_png(tmp_path / "b.png", MASK)
    if name == "a.png":
        with pytest.raises(LabelError, match=name):
            open_predictions(tmp_path)


def test_nifti_masks_with_different_values_are_refused(tmp_path: Path) -> None:
    for name, value in (("x", 1), ("y", 2)):
        mask = (MASK.T // 255 * value).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), tmp_path / f"{name}.nii.gz")
    refused(tmp_path, "the masks are of several classes (x.nii.gz has '1', y.nii.gz has '2')")
    assert read_any(tmp_path / "x.nii.gz").masks == {"x": ("9 2 2 2",)}


@pytest.mark.parametrize(
    ("match", "names", "ids"),
    [
        (None, ("a_mask.png", "b_mask.png"), {"a", "b"}),
        (None, ("a.png", "a-seg.png", "b-SEG.png", "c.png"), {"a", "b"}),
        (None, ("leftMask/a.png", "rightMask/a.png", "leftMask/b.png"), {"a", "b"}),
        ("*_lesion.png", ("a_lesion.png", "b.png", "a_lesion.tif"), {"a"}),
        ("lesion_*", ("lesion_a.png", "b.png", "lesion_1.2.3.tif"), {"a", "1.2.3"}),
        ("masks/*", ("masks/a.png", "images/a.png", "old/masks/b.png"), {"a", "b"}),
        ("*/*_m=*/*", ("1/a_m.png", "2/a_m.png", "2/a.png"), {"1_a", "2_a"}),
        ("*/m/*.png", ("x/1/m/a.png", "x/2/m/a.png"), {"1_a", "2_a"}),
    ],
)
def test_names_of_masks_give_those_of_images(
    tmp_path: Path, match: str | None, names: tuple[str, ...], ids: set[str]
) -> None:
    for name in names:
        save(tmp_path / name, MASK)
    assert set(read_any(tmp_path, match=match).masks) == ids


@pytest.mark.parametrize(
    ("match", "names", "message"),
    [
        (None, ("a_mask.png", "b.png"), r"1 files are named \*_mask, and 1 in another way \(b\); say with --match"),
        ("*_x.png", ("a.png", "b.png"), r"no mask image is named \*_x.png; the first names: a.png, b.png"),
        ("*_x", ("a_x.png", "a_x.nii"), r"1 mask images and 1 NIfTI masks; give .* --match with a suffix"),
        (None, ("1/a.2.mask.png", "2/a.2.mask.png"), r"named a.1.img; .* give --match '\*/\*.2.mask.png=\*/\*.1.img"),
        (None, ("left/a.png", "right/a.png", "heart/a.png"), r"3 mask images in it are named a"),
        ("a.png", ("a.png",), r"--match 'a.png' is no pattern; give the name of a mask file with \* for the id"),
        ("*_*=*", ("a.png",), r"is no pattern"),
        ("*", ("a.json",), r"has no mask images|no mask image is named"),
        ("*", ("a.csv",), r"no mask image is named"),
    ],
)
def test_names_that_do_not_tell_masks_apart(
    tmp_path: Path, match: str | None, names: tuple[str, ...], message: str
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not read")
    with pytest.raises(PtxdistError, match=message):
        read_any(tmp_path, match=match)


def test_labels_that_name_their_images_have_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("ImageId,EncodedPixels\na,-1\n")
    with pytest.raises(SettingsError, match=r"a.csv holds a table, which names its images; leave out --match"):
        read_any(tmp_path / "a.csv", match="*_mask")


def test_labels_that_cannot_be_opened(tmp_path: Path) -> None:
    refused(tmp_path / "gone.csv", ": there is no such file or folder")
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "below.csv", " cannot be read: Not a directory")
