"""Masks that any tool has written: every reader gives the same pixels; wrong input gets a sentence."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK as sitk  # noqa: N813  the name that its documentation uses
from PIL import Image

from ptxdist import files
from ptxdist.errors import LabelError, PtxdistError, SettingsError
from ptxdist.labels import rle
from ptxdist.labels.dialect import DIALECTS
from ptxdist.labels.masks import Masks, open_labels, open_predictions

Mask = npt.NDArray[np.bool_]
Write = Callable[[Path, dict[str, Mask]], Path]
SHAPE = (24, 31)
IDS = ("1.2.3", "ID_7", "a.b")


@pytest.fixture
def masks() -> dict[str, Mask]:
    """Three masks that differ from their mirrors and their transposes; the last one is empty."""
    found = {case_id: np.zeros(SHAPE, bool) for case_id in IDS}
    found["1.2.3"][2:9, 3:15], found["1.2.3"][9:20, 3:8] = True, True
    found["ID_7"][10:24, 20:31] = np.tri(14, 11, dtype=bool)
    return found


def write_table(path: Path, masks: dict[str, Mask], *, starts: str = "relative", order: str = "columns") -> Path:
    rows = []
    for case_id, mask in masks.items():
        spans = rle.spans_of(mask if order == "columns" else mask.T)
        if starts == "relative":
            text = rle.encode_spans(spans)
        else:
            text = " ".join(f"{start + 1} {end - start}" for start, end in spans.tolist()) or "-1"
        rows.append((case_id, text))
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w", newline="") as file:
        csv.writer(file).writerows([("ImageId", " EncodedPixels"), *rows])
    return path


def write_png(folder: Path, masks: dict[str, Mask], factor: int = 255, dtype: type = np.uint8) -> Path:
    folder.mkdir(exist_ok=True)
    for case_id, mask in masks.items():
        Image.fromarray(mask.astype(dtype) * dtype(factor)).save(folder / f"{case_id}.png")
    return folder


def write_probabilities(folder: Path, masks: dict[str, Mask], dtype: type = np.uint8) -> Path:
    """Above 0.5 in the mask, below it outside."""
    folder.mkdir(exist_ok=True)
    random, highest = np.random.default_rng(6), np.iinfo(dtype).max
    for case_id, mask in masks.items():
        value = (np.where(mask, 0.55, 0.05) + 0.4 * random.random(mask.shape)) * highest
        Image.fromarray(value.astype(dtype)).save(folder / f"{case_id}.png")
    return folder


def write_simpleitk(folder: Path, masks: dict[str, Mask], axes: int = 2) -> Path:
    """As nnU-Net's SimpleITKIO.write_seg: an array (rows, columns), or (1, rows, columns)."""
    folder.mkdir(exist_ok=True)
    for case_id, mask in masks.items():
        array = mask.astype(np.uint8)
        image = sitk.GetImageFromArray(array if axes == 2 else array[None])
        sitk.WriteImage(image, str(folder / f"{case_id}.nii.gz"))
    (folder / "dataset.json").write_text("{}")  # nnU-Net puts these beside the masks
    return folder


def write_nibabel(folder: Path, masks: dict[str, Mask], dtype: Any = np.uint8, factor: float = 1) -> Path:
    """As nnU-Net's NibabelIO.write_seg: the array (1, rows, columns) is transposed."""
    folder.mkdir(exist_ok=True)
    for case_id, mask in masks.items():
        array = (mask[None] * factor).astype(dtype).transpose(2, 1, 0)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / f"{case_id}.nii")
    return folder


def write_predict_folder(folder: Path, masks: dict[str, Mask]) -> Path:
    (folder / "findings").mkdir(parents=True)
    (folder / "predict.json").write_text("{}")
    write_table(folder / "submission.csv", masks)
    for case_id, mask in masks.items():
        content = {"rows": mask.shape[0], "columns": mask.shape[1], "case_id": case_id}
        (folder / "findings" / f"{case_id}.json").write_text(json.dumps(content))
    return write_png(folder / "masks", masks).parent


@pytest.mark.parametrize("name", ["predict.json", "submission.csv"])
def test_a_folder_of_predict_that_lacks_a_part_is_not_taken_for_mask_images(tmp_path: Path, name: str) -> None:
    folder = write_predict_folder(tmp_path / "out", {"a": np.ones((4, 4), bool)})
    open_predictions(folder)
    (folder / name).unlink()
    with pytest.raises(LabelError, match=f"{name}(:)? cannot be read.*No such file"):
        open_predictions(folder)


def read(masks: Masks, sizes: dict[str, tuple[int, int]] | None = None) -> dict[str, Mask]:
    sizes = dict(masks.sizes) or sizes or dict.fromkeys(IDS, SHAPE)
    masks.prepare(sizes, lambda done, total: None)
    return {
        case_id: rle.decode(rle.encode_spans(masks.spans(case_id, sizes[case_id])), *sizes[case_id]).astype(bool)
        for case_id in masks.ids
    }


WRITERS: dict[str, tuple[Write, str]] = {
    "relative-columns": (lambda path, masks: write_table(path / "a.csv", masks), "run-length table, relative-columns"),
    "gz": (lambda path, masks: write_table(path / "a.csv.gz", masks), "run-length table, relative-columns"),
    "png-255": (lambda path, masks: write_png(path / "m", masks), "PNG masks of 0 and the highest value"),
    "png-01": (lambda path, masks: write_png(path / "m", masks, 1), "PNG masks of 0 and 1"),
    "png-16": (
        lambda path, masks: write_png(path / "m", masks, 65535, np.uint16),
        "PNG masks of 0 and the highest value",
    ),
    "probability-8": (
        lambda path, masks: write_probabilities(path / "m", masks),
        "PNG probabilities, threshold 0.5",
    ),
    "probability-16": (
        lambda path, masks: write_probabilities(path / "m", masks, np.uint16),
        "PNG probabilities, threshold 0.5",
    ),
    "simpleitk-2d": (lambda path, masks: write_simpleitk(path / "m", masks), "NIfTI masks"),
    "simpleitk-3d": (lambda path, masks: write_simpleitk(path / "m", masks, 3), "NIfTI masks"),
    "nibabel": (lambda path, masks: write_nibabel(path / "m", masks), "NIfTI masks"),
    "nifti-probability": (
        lambda path, masks: write_nibabel(path / "m", masks, np.float32, 0.8),
        "NIfTI probabilities, threshold 0.5",
    ),
    "predict": (lambda path, masks: write_predict_folder(path / "m", masks), "folder of ptxdist predict"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_reader_gives_the_same_pixels(tmp_path: Path, masks: dict[str, Mask], name: str) -> None:
    write, words = WRITERS[name]
    opened = open_predictions(write(tmp_path, masks))
    assert set(opened.ids) == set(IDS)
    assert opened.sizes in ({}, dict.fromkeys(opened.ids, SHAPE))
    found = read(opened)
    assert all(np.array_equal(found[case_id], masks[case_id]) for case_id in IDS)
    assert opened.describe()[0].startswith(words)


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_a_table_in_any_dialect(tmp_path: Path, masks: dict[str, Mask], dialect: Any) -> None:
    table = write_table(tmp_path / "a.csv", masks, starts=dialect.starts, order=dialect.order)
    opened = open_predictions(table, dialect=dialect.name)
    found = read(opened)
    assert all(np.array_equal(found[case_id], masks[case_id]) for case_id in IDS)
    assert opened.describe() == (f"run-length table, {dialect.name} (given)", ())


def test_several_masks_of_an_image_are_united(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("ImageId,EncodedPixels\nx,0 4\ny,-1\nx,2 4\nx,20 1\n")
    found = read(open_predictions(table), dict.fromkeys("xy", (5, 5)))
    assert np.flatnonzero(found["x"].T).tolist() == [0, 1, 2, 3, 4, 5, 20]
    assert not found["y"].any()


@pytest.mark.parametrize(("threshold", "inside"), [(0.5, 2), (0.6, 2), (0.61, 1), (1.0, 1), (0.001, 3)])
def test_pixels_that_reach_the_threshold_are_inside(tmp_path: Path, threshold: float, inside: int) -> None:
    Image.fromarray(np.array([[255, 153, 1, 0]], np.uint8)).save(tmp_path / "x.png")  # 153 is 0.6 of 255
    opened = open_predictions(tmp_path, threshold=threshold)
    opened.prepare({"x": (1, 4)}, lambda done, total: None)
    assert np.diff(opened.spans("x", (1, 4))).sum() == inside
    assert opened.describe()[0] == f"PNG probabilities, threshold {threshold:g}"


def test_a_probability_image_whose_highest_value_is_1_of_255_is_not_a_mask(tmp_path: Path) -> None:
    for name, values in (("a", [0, 0, 1]), ("b", [0, 1, 1]), ("c", [9, 99, 200])):
        Image.fromarray(np.array([values], np.uint8)).save(tmp_path / f"{name}.png")
    found = read(open_predictions(tmp_path))
    assert [int(found[name].sum()) for name in "abc"] == [0, 0, 1]


def test_masks_of_two_kinds_in_one_folder_are_refused(tmp_path: Path) -> None:
    for name, values in (("a", [0, 1]), ("b", [0, 255])):
        Image.fromarray(np.array([values], np.uint8)).save(tmp_path / f"{name}.png")
    opened = open_predictions(tmp_path)
    read(opened)
    with pytest.raises(LabelError, match="a has the values 0 and 1, others 0 and the highest"):
        opened.describe()


def test_labels_of_several_classes_are_no_probabilities(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1, 2, 3]], np.uint8)).save(tmp_path / "x.png")
    opened = open_predictions(tmp_path)
    read(opened)
    with pytest.raises(LabelError, match="labels of several classes"):
        opened.describe()


def test_probabilities_that_never_reach_the_threshold_are_noted(tmp_path: Path) -> None:
    """Percentages in a PNG file would score like empty masks, without a word."""
    values = np.array([[0, 50, 100]], np.uint8)
    (tmp_path / "png").mkdir()
    (tmp_path / "nifti").mkdir()
    Image.fromarray(values).save(tmp_path / "png" / "x.png")
    nibabel.save(nibabel.Nifti1Image(values / 255, np.eye(4)), tmp_path / "nifti" / "x.nii.gz")
    for folder in (tmp_path / "png", tmp_path / "nifti"):
        for threshold, notes in ((0.5, 1), (0.3, 0)):
            opened = open_predictions(folder, threshold=threshold)
            read(opened)
            assert [
                f"no pixel reaches {threshold:g}, the highest has 0.392" in note for note in opened.describe()[1]
            ] == [True] * notes


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[0, 2]], np.uint8), "values from 0 to 2; expected a mask of 0 and 1, or probabilities of 0 to 1"),
        (np.array([[0, 1.5]], np.float32), "values from 0 to 1.5"),
        (np.array([[-0.1, 1]], np.float32), "values from -0.1 to 1"),
        (np.array([[np.nan, 1]], np.float32), "x.nii.gz has pixels without a value"),
        (np.array([[0, np.inf]], np.float32), "values from 0 to inf"),
        (np.array([[0, 1]], np.complex64), "x.nii.gz has colours or complex numbers"),
        (np.zeros((2, 2), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "x.nii.gz has colours or complex numbers"),
    ],
)
def test_nifti_values_that_are_neither_mask_nor_probability(tmp_path: Path, array: Any, message: str) -> None:
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "x.nii.gz")
    with pytest.raises(LabelError, match=message):
        read(open_predictions(tmp_path))


def test_a_nifti_file_with_several_slices(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 3), np.uint8), np.eye(4)), tmp_path / "x.nii.gz")
    with pytest.raises(LabelError, match=r"x.nii.gz has the shape 4x5x3; only single 2-D images"):
        open_predictions(tmp_path)


@pytest.mark.parametrize("cut", [False, True])
def test_a_damaged_nifti_file(tmp_path: Path, cut: bool) -> None:
    path = tmp_path / "x.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).random((90, 90)), np.eye(4)), path)
    path.write_bytes(path.read_bytes()[:-4000] if cut else b"no gzip file")
    with pytest.raises(LabelError, match=r"the mask image x\.nii\.gz cannot be read as NIfTI"):
        read(open_predictions(tmp_path))


@pytest.mark.parametrize(
    ("start", "value"), [(70, b"\x0f\x27"), (108, b"\x28\x6b\x6e\xce"), (40, b"\xff\x7f"), (344, b"n+9\0")]
)
def test_a_nifti_header_that_nibabel_refuses(
    tmp_path: Path, start: int, value: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    content = bytearray(nibabel.Nifti1Image(np.zeros((4, 4), np.uint8), np.eye(4)).to_bytes())
    content[start : start + len(value)] = value
    (tmp_path / "x.nii").write_bytes(content)
    with pytest.raises(LabelError, match=r"the mask image x\.nii "):
        open_predictions(tmp_path).spans("x", (4, 4))
    assert capfd.readouterr().err == ""


def test_nifti_needs_an_extra(tmp_path: Path, masks: dict[str, Mask], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_nibabel(tmp_path / "m", masks)
    monkeypatch.setattr(files, "_is_installed", lambda module: False)
    with pytest.raises(SettingsError, match=r"nibabel\): pip install 'ptxdist\[nifti\]'"):
        open_predictions(folder)


def _touch(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda path: path / "gone.csv", {}, "there is no such file or folder"),
        (lambda path: _touch(path / "masks.npz"), {}, r"files of this kind are not read; give a table \(.csv"),
        (lambda path: _touch(path / "m" / ".hidden.png").parent, {}, "has no mask images .* it is empty"),
        (lambda path: _touch(path / "m" / "a.jpg").parent, {}, r"its files: 1 with the suffix \.jpg"),
        (lambda path: _touch(path / "m" / "a.png").parent, {}, r"the mask image a\.png is a damaged PNG"),
        (lambda path: _touch(path / "m" / "a.png", b"\x89PNG\r\n\x1a\n" + b"x" * 40).parent, {}, "is a damaged PNG"),
        (lambda path: _touch(_touch(path / "m/a.png").with_name("b.nii.gz")).parent, {}, "1 PNG and 1 NIfTI files"),
        (lambda path: _touch(path / "a.csv", b"a,b\n"), {}, "expected the columns ImageId and EncodedPixels"),
        (lambda path: _touch(path / "a.csv", b"ImageId,EncodedPixels\nx,1 2 3\n"), {}, "line 2, x: .* pairs"),
        (lambda path: _touch(path / "a.csv.gz", b"\x1f\x8bx"), {}, "cannot be read as a CSV file"),
        (lambda path: _touch(path / "a.csv", b"ImageId,EncodedPixels\nx,-1\n"), {"dialect": "rle"}, "unknown mask enc"),
        (lambda path: _touch(path / "a.csv", b"ImageId,EncodedPixels\nx,-1\n"), {"threshold": 0.4}, "no probabilities"),
        (lambda path: _touch(path / "m" / "a.png").parent, {"dialect": "relative-rows"}, "masks have no dialect"),
        (lambda path: _touch(path / "m" / "a.png").parent, {"threshold": 0.0}, "not a probability above 0"),
        (lambda path: _touch(path / "m" / "a.png").parent, {"threshold": 1.1}, "not a probability above 0"),
    ],
)
def test_input_that_cannot_be_used(
    tmp_path: Path, make: Callable[[Path], Path], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PtxdistError, match=message):
        read(open_predictions(make(tmp_path), **options))


def test_two_files_of_one_image_are_refused(tmp_path: Path, masks: dict[str, Mask]) -> None:
    folder = write_nibabel(tmp_path / "m", masks)
    write_simpleitk(folder, {"ID_7": masks["ID_7"]})
    with pytest.raises(LabelError, match="2 mask images in it are named ID_7"):
        open_predictions(folder)


@pytest.mark.parametrize("content", [{}, {"rows": 10**400, "columns": 8}, {"rows": 1e308, "columns": 8}])
def test_a_predict_folder_without_a_sound_finding(
    tmp_path: Path, masks: dict[str, Mask], content: dict[str, float]
) -> None:
    folder = write_predict_folder(tmp_path / "m", masks)
    (folder / "findings" / "ID_7.json").write_text(json.dumps(content))
    with pytest.raises(LabelError, match=r"findings/ID_7.json is missing or damaged; rerun `ptxdist predict`"):
        open_predictions(folder)


def test_true_masks_are_those_of_preprocess(tmp_path: Path, masks: dict[str, Mask]) -> None:
    done: list[tuple[int, int]] = []
    folder = open_labels(write_png(tmp_path / "m", masks), on_file=lambda *count: done.append(count))
    table = open_labels(
        write_table(tmp_path / "a.csv", masks), dialect="relative-columns", on_file=lambda done, total: None
    )
    for opened, words in ((folder, "mask images"), (table, "run-length table, relative-columns (given)")):
        found = read(opened)
        assert all(np.array_equal(found[case_id], masks[case_id]) for case_id in IDS)
        assert opened.describe() == (words, ())
    assert done[-1] == (3, 3)
    with pytest.raises(SettingsError, match="leave out --truth-dialect"):
        open_labels(tmp_path / "m", dialect="relative-columns", on_file=lambda done, total: None)
    with pytest.raises(LabelError, match="is dark"):
        open_labels(write_png(tmp_path / "d", masks, 90), on_file=lambda done, total: None)
