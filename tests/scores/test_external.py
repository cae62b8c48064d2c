"""`score_predictions`: from files to scores, the same for every kind of file, and its refusals."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from ptxdist.errors import LabelError, PtxdistError
from ptxdist.labels import rle
from ptxdist.records import Record
from ptxdist.scores.definitions import DEFINITIONS
from ptxdist.scores.external import ExternalScores, as_markdown, score_predictions
from ptxdist.scores.metrics import scores

Masks = dict[str, npt.NDArray[np.bool_]]
SIDE = 64


def box(top: int, left: int, rows: int, columns: int, side: int = SIDE) -> npt.NDArray[np.bool_]:
    mask = np.zeros((side, side), bool)
    mask[top : top + rows, left : left + columns] = True
    return mask


@pytest.fixture
def true() -> Masks:
    """Twenty images, every second one positive."""
    empty = np.zeros((SIDE, SIDE), bool)
    return {f"im{n}": box(5 + n, 3 + n, 20, 8) if n % 2 else empty for n in range(20)}


@pytest.fixture
def predicted(true: Masks) -> Masks:
    """Shifted masks, two false alarms, one miss; in another order."""
    found = {name: np.roll(mask, 2, axis=0) for name, mask in reversed(true.items())}
    found["im4"], found["im6"], found["im7"] = box(0, 0, 3, 3), box(9, 9, 5, 5), np.zeros((SIDE, SIDE), bool)
    return found


def table(path: Path, masks: Masks) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("ImageId", "EncodedPixels"), *((n, rle.encode(m)) for n, m in masks.items())])
    return path


def pngs(folder: Path, masks: Masks, factor: int = 255) -> Path:
    folder.mkdir()
    for name, mask in masks.items():
        Image.fromarray(mask.astype(np.uint8) * np.uint8(factor)).save(folder / f"{name}.png")
    return folder


def run(predictions: Path, truth: Path, **options: Any) -> ExternalScores:
    if not (predictions.is_dir() or truth.is_dir()):
        options = {"size_px": SIDE, **options}
    return score_predictions(predictions, truth, **options)


def test_the_scores_are_those_of_the_counts(tmp_path: Path, predicted: Masks, true: Masks) -> None:
    found = run(table(tmp_path / "p.csv", predicted), table(tmp_path / "t.csv", true))
    counts = [((p & true[n]).sum(), p.sum(), true[n].sum(), SIDE**2) for n, p in predicted.items()]
    rows = np.array(counts, np.int64)
    assert {field: score.value for field, score in found.scores.items()} == pytest.approx(
        {field: definition.of(rows) for field, definition in DEFINITIONS.items()}
    )
    assert found.scores["kaggle_dice"].value == scores(rows[:, :3]).kaggle_dice
    assert (found.cases, found.positives, found.hits, found.unit, found.groups) == (20, 10, 9, "images", 20)
    assert found.scores["false_alarm_px"].value == (9 + 25) / 10
    assert found.scores["kaggle_dice"].all_empty == 0.5
    assert found.scores["specificity"].constant_mask == 0
    assert 0 < (found.scores["positive_dice"].constant_mask or 0) < 1
    for score in found.scores.values():
        if score.interval and score.value is not None:
            assert score.interval[0] <= score.value <= score.interval[1]


def test_every_kind_of_file_gives_the_same_scores(tmp_path: Path, predicted: Masks, true: Masks) -> None:
    ordered = {name: predicted[name] for name in sorted(predicted)}  # a folder is read in the order of its names
    tables = table(tmp_path / "p.csv", ordered), table(tmp_path / "t.csv", true)
    folders = pngs(tmp_path / "p", predicted), pngs(tmp_path / "t", true), pngs(tmp_path / "p01", predicted, 1)
    wanted = run(*tables).scores
    for one, other in ((folders[0], folders[1]), (tables[0], folders[1]), (folders[2], tables[1])):
        assert run(one, other).scores == wanted


def test_a_perfect_prediction(tmp_path: Path, true: Masks) -> None:
    found = run(table(tmp_path / "p.csv", true), table(tmp_path / "t.csv", true), surfaces=True)
    values = {field: score.value for field, score in found.scores.items()}
    assert values.pop("false_alarm_px") == values.pop("hd95_px") == 0
    assert set(values.values()) == {1.0}
    assert found.scores["flattened_dice"].interval is None, "a bootstrap of equal numbers shows no certainty"
    low, high = found.scores["nnunet_dice"].interval or (0, 0)
    assert (0.6 < low < 0.8, high) == (True, 1.0), "Clopper and Pearson's bound for ten images"


def test_distances_are_means_of_hits(tmp_path: Path, predicted: Masks, true: Masks) -> None:
    files = table(tmp_path / "p.csv", predicted), table(tmp_path / "t.csv", true)
    found = run(*files, surfaces=True)
    assert "hd95_px" not in run(*files).scores
    assert (found.scores["hd95_px"].value, found.scores["hd95_px"].all_empty) == (2.0, None)
    assert found.scores["surface_dice"].value == 1.0, "all edges are within 3 pixels"


def test_without_positive_images_or_without_negative_ones(tmp_path: Path, true: Masks) -> None:
    negative = {name: mask for name, mask in true.items() if not mask.any()}
    positive = {name: mask for name, mask in true.items() if mask.any()}
    found = run(table(tmp_path / "a.csv", negative), table(tmp_path / "b.csv", negative), surfaces=True)
    fields = ("kaggle_dice", "positive_dice", "nnunet_dice", "mmseg_dice", "sensitivity", "hd95_px", "surface_dice")
    assert [found.scores[field].value for field in fields] == [1, None, None, 1, None, None, None]
    assert {score.constant_mask for score in found.scores.values()} == {None}
    found = run(table(tmp_path / "c.csv", positive), table(tmp_path / "d.csv", positive))
    assert (found.scores["specificity"].value, found.scores["false_alarm_px"].value) == (None, None)


def test_one_image_has_scores_and_no_interval(tmp_path: Path, true: Masks) -> None:
    one = {"im1": true["im1"]}
    found = run(table(tmp_path / "p.csv", one), table(tmp_path / "t.csv", one))
    assert {score.interval for score in found.scores.values()} == {None}
    assert as_markdown(found).count("| too few |") == 9, "specificity and false alarms are not defined"


def test_patients_are_drawn_together_and_never_shown(tmp_path: Path, predicted: Masks, true: Masks) -> None:
    files = table(tmp_path / "p.csv", predicted), table(tmp_path / "t.csv", true)
    patients = tmp_path / "patients.csv"
    names = list(true)[:-1]
    patients.write_text("id,patient\n" + "".join(f"{name},SECRET-{n // 4}\n" for n, name in enumerate(names)))
    found = run(*files, patients=patients)
    assert (found.unit, found.groups) == ("patients", 6)
    assert found.notes[-1].endswith("1 of the 20 images are not in it; each counts as one patient")
    assert "SECRET" not in found.model_dump_json() + as_markdown(found)
    assert {f: s.value for f, s in found.scores.items()} == {f: s.value for f, s in run(*files).scores.items()}
    patients.write_text("id,patient\nother,SECRET-1\n")
    with pytest.raises(LabelError, match="none of the 20 images in it") as caught:
        run(*files, patients=patients)
    assert "SECRET" not in str(caught.value)


def test_ids_that_do_not_match(tmp_path: Path, predicted: Masks, true: Masks) -> None:
    more = {**predicted, **{f"x{n}": box(1, 1, 2, 2) for n in range(4)}}
    fewer = {name: mask for name, mask in true.items() if name not in ("im0", "im1")}
    files = table(tmp_path / "p.csv", more), table(tmp_path / "t.csv", {**fewer, "y0": box(0, 0, 1, 1)})
    with pytest.raises(LabelError) as caught:
        run(*files)
    text = str(caught.value)
    assert "6 of 24 images of" in text
    assert "(im1, im0, x0, …)" in text
    assert "1 of 19 images of" in text
    assert "(y0)" in text
    assert "--subset scores the 18 images that are in both" in text
    found = run(*files, subset=True)
    assert (found.cases, found.only_predicted, found.only_true) == (18, 6, 1)
    with pytest.raises(LabelError, match=r"No image is in both"):
        run(files[0], table(tmp_path / "o.csv", {"z": box(0, 0, 1, 1)}), subset=True)


def test_masks_of_other_sizes(tmp_path: Path, predicted: Masks, true: Masks) -> None:
    truth = pngs(tmp_path / "t", true)
    with pytest.raises(LabelError, match="the predicted mask of im0 has 32x32 pixels and the true one 64x64; resize"):
        run(pngs(tmp_path / "p", {name: mask[::2, ::2] for name, mask in predicted.items()}), truth)
    large = table(tmp_path / "p.csv", {**predicted, "im2": box(90, 90, 9, 9, side=100)})
    with pytest.raises(LabelError, match=r"p.csv, line \d+: the mask of im2 does not fit its image: .* past the 64x64"):
        run(large, truth)
    with pytest.raises(LabelError, match=r"taken to have 64x64 pixels; see --size-px"):
        run(large, table(tmp_path / "t.csv", true))
    with pytest.raises(PtxdistError, match="the size of the images is known from their masks; leave out --size-px"):
        run(large, truth, size_px=64)


def test_predictions_whose_axes_are_swapped_are_named(tmp_path: Path, true: Masks) -> None:
    truth = table(tmp_path / "t.csv", true)
    found = run(pngs(tmp_path / "p", {name: mask.T for name, mask in true.items()}), truth)
    assert "the masks fit the truth better with rows and columns swapped" in found.notes[0]
    assert run(pngs(tmp_path / "q", true), truth).notes == ()


def test_inverted_predictions_are_named(tmp_path: Path, true: Masks) -> None:
    files = pngs(tmp_path / "p", {name: ~mask for name, mask in true.items()}), pngs(tmp_path / "t", true)
    assert ["are they inverted?" in note for note in run(*files).notes] == [True]


def test_the_encoding_of_a_table_is_confirmed_by_the_truth(tmp_path: Path, true: Masks) -> None:
    truth = pngs(tmp_path / "t", true)
    assert run(table(tmp_path / "p.csv", true), truth).notes == ()
    elsewhere = {name: np.roll(mask, 30, axis=1) for name, mask in true.items()}
    assert "the encoding of the masks is not proven" in run(table(tmp_path / "q.csv", elsewhere), truth).notes[0]


def test_markdown_and_json(tmp_path: Path, predicted: Masks, true: Masks) -> None:
    found = run(table(tmp_path / "p.csv", predicted), table(tmp_path / "t.csv", true))
    assert isinstance(found, Record)
    assert ExternalScores.model_validate_json(found.model_dump_json()) == found
    lines = as_markdown(found).splitlines()
    assert lines[0].startswith(
        "| 20 images, 10 positive | value | 95 % interval | predicting nothing | constant mask |"
    )
    assert all(line.count("|") == 6 for line in lines[: 2 + len(DEFINITIONS)])
    assert sum(line.startswith("- **") for line in lines) == len(DEFINITIONS)


def test_progress_is_reported(tmp_path: Path, predicted: Masks, true: Masks) -> None:
    seen: list[tuple[str, int, int]] = []
    run(table(tmp_path / "p.csv", predicted), pngs(tmp_path / "t", true), on_progress=lambda *done: seen.append(done))
    assert ("truth", 20, 20) in seen
    run(pngs(tmp_path / "p", predicted, 1), tmp_path / "t", on_progress=lambda *done: seen.append(done))
    assert ("predictions", 20, 20) in seen
    assert [done for what, done, _ in seen if what == "images"] == 2 * list(range(1, 21))


def test_it_needs_no_torch_no_zarr_and_no_cache(tmp_path: Path, true: Masks) -> None:
    files = table(tmp_path / "p.csv", true), table(tmp_path / "t.csv", true)
    code = (
        "import sys, ptxdist\n"
        f"ptxdist.score({str(files[0])!r}, {str(files[1])!r}, size_px={SIDE}, quiet=True)\n"
        "sys.exit(str({'torch', 'zarr', 'ray', 'monai', 'cv2', 'nibabel', 'pydicom'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
