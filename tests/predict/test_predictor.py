"""Predictions: the same masks as the evaluation's, in any batch, of one model or several."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ptxdist import Prediction, Predictor
from ptxdist.errors import CheckpointError, DicomError, SettingsError
from ptxdist.executor import ahead
from ptxdist.files import write_json
from ptxdist.labels import rle
from ptxdist.predict.bundle import load_model, read_members, write_bundle
from ptxdist.predict.export import describe
from ptxdist.records import SYNTHETIC, Likeness, OperatingPoint
from ptxdist.rundir import EVALUATION, ORIGIN, PREDICTIONS, TRAINING_IMAGES, read_origin, read_result
from ptxdist.train.scoring import mask_at


def files(dataset: Any) -> dict[str, Path]:
    return {path.stem: path for path in sorted(dataset.dicom.rglob("*.dcm"))}


def test_a_held_out_case_gets_the_mask_of_the_evaluation(
    finished_run: Path, small_dataset: Any, tmp_path: Path
) -> None:
    with open(finished_run / EVALUATION / PREDICTIONS, newline="") as file:
        evaluated = {row["ImageId"]: row["EncodedPixels"] for row in csv.DictReader(file)}
    threshold = read_result(finished_run).evaluation.threshold
    point = OperatingPoint(top=threshold, min_area_px=0, bottom=threshold)
    predictor = Predictor.load(finished_run, device="cpu", operating_point=point)
    assert len(set(evaluated.values()) - {"-1"}) > 1, "there is something to compare"
    paths = [files(small_dataset)[case_id] for case_id in evaluated]
    (tmp_path / "no.dcm").write_text("hello")
    found = list(predictor.predict_many([*paths[:1], tmp_path / "no.dcm", *paths[1:]]))
    assert [path for path, _ in found] == [paths[0], tmp_path / "no.dcm", *paths[1:]]
    assert isinstance(found.pop(1)[1], DicomError)
    for (_, prediction), (case_id, text) in zip(found, evaluated.items(), strict=True):
        assert isinstance(prediction, Prediction)
        assert prediction.case_id == case_id
        assert prediction.mask.shape == prediction.pixels.shape == small_dataset.images[case_id].shape
        assert np.array_equal(prediction.mask, prediction.probability >= threshold)
        assert rle.encode(prediction.mask) == text
        assert prediction.area_px == rle.decode(text, *prediction.mask.shape).sum()
        assert 0 < float(prediction.probability.max()) <= prediction.score + 1e-6


def test_a_model_with_itself_is_itself(finished_run: Path, small_dataset: Any) -> None:
    path = next(iter(files(small_dataset).values()))
    one, two = Predictor.load(finished_run, device="cpu"), Predictor.load(finished_run, finished_run, device="cpu")
    assert one.operating_point == two.operating_point == one.cards[0].operating_point
    assert np.array_equal(one.predict(path).probability, two.predict(path).probability)


def test_a_mask_needs_enough_pixels_at_the_top_and_has_all_at_the_bottom() -> None:
    probability = np.array([[0.1, 0.4, 0.6, 0.9]], np.float32)
    for top, area, bottom, expected in (
        (0.5, 2, 0.3, [0, 1, 1, 1]),
        (0.5, 3, 0.3, [0, 0, 0, 0]),
        (0.5, 0, 0.5, [0, 0, 1, 1]),
        (0.95, 0, 0.95, [0, 0, 0, 0]),
    ):
        point = OperatingPoint(top=top, min_area_px=area, bottom=bottom)
        assert mask_at(torch.from_numpy(probability), point, 1.0).int().tolist() == [expected]


def test_a_model_of_phantoms_says_so_and_an_image_unlike_its_training_images_too(
    finished_run: Path, small_dataset: Any, tmp_path: Path, write_dicom: Callable[..., Path]
) -> None:
    """Run, bundle and export say it; a run whose record says nothing says nothing."""
    image = write_dicom(tmp_path / "a.dcm", np.full((96, 96), 250, np.uint8), "1.2.3", PatientOrientation=["L", "F"])
    silent = Predictor.load(finished_run, device="cpu")
    assert (silent.caution, silent.predict(image).unlike) == ("", "")
    assert silent.predict(image).orientation == "LF"

    run, origin = shutil.copytree(finished_run, tmp_path / "run"), read_origin(finished_run)
    assert origin is not None
    assert origin.profile is not None
    ranges = dict.fromkeys(("brightness", "contrast", "sharpness", "size", "layout"), (0.0, 0.0, 1.0, 1.0))
    ranges |= {"brightness": (90, 100, 120, 130), "contrast": (0, 0, 80, 90), "size": (6, 6, 8, 8)}
    ranges |= {"layout": (-1, -1, 1, 1), "sharpness": (-9, -9, 9, 9)}
    likeness = Likeness.model_validate({"ranges": ranges, "layout": "00ff" * 128})
    profile = origin.profile.model_copy(update={"synthetic": True, "likeness": likeness})
    write_json(run / ORIGIN, origin.model_copy(update={"profile": profile}), beside=(TRAINING_IMAGES,))
    write_bundle(run, tmp_path / "a.ptxdist")
    for model in (run, tmp_path / "a.ptxdist"):
        predictor = Predictor.load(model, device="cpu")
        assert predictor.caution == SYNTHETIC
        assert predictor.predict(image).unlike == "brighter than nearly all of them"
        assert predictor.predict(next(iter(files(small_dataset).values()))).unlike == ""
    assert SYNTHETIC.encode() in read_members(tmp_path / "a.ptxdist")[1]["README.md"]
    assert SYNTHETIC in describe(load_model(run)[0])["use"]


def test_what_cannot_be_loaded_is_refused(finished_run: Path) -> None:
    with pytest.raises(CheckpointError, match="no model"):
        Predictor.load()
    for image in ([[1.0]], None):
        with pytest.raises(DicomError, match=r"give the path of a file, or a NumPy array \(rows, columns\)"):
            Predictor.load(finished_run, device="cpu").predict(image)  # type: ignore[arg-type]
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(SettingsError, match="no GPU"):
            Predictor.load(finished_run, device="gpu")


def test_work_ahead_keeps_the_order_is_bounded_and_raises_at_its_turn() -> None:
    taken: list[int] = []

    def numbers() -> Any:
        for number in range(20):
            taken.append(number)
            yield number

    def check(number: int) -> int:
        if number == 11:
            raise DicomError("eleven")
        return number * 2

    results = ahead(check, numbers(), threads=3, most=4)
    assert [next(results) for _ in range(5)] == [0, 2, 4, 6, 8]
    assert len(taken) <= 9
    with pytest.raises(DicomError, match="eleven"):
        list(results)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ptxdist-ahead")]


@pytest.mark.parametrize(("page", "run"), [("README.md", "runs/first"), ("docs/predict.md", "runs/exp4")])
def test_the_documented_lines_predict(
    page: str, run: str, finished_run: Path, small_dataset: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (Path(__file__).parents[2] / page).read_text().split("```python\n")[1].split("```")[0]
    path = next(iter(files(small_dataset).values()))
    for name, real in ((run, finished_run), ("image.dcm", path)):
        assert code.count(f'"{name}"') == 1
        code = code.replace(name, str(real))
    names: dict[str, Any] = {}
    exec(code, names)
    prediction = names["prediction"]
    assert capsys.readouterr().out == f"{prediction.score} {prediction.area_px}\n"
    assert prediction.probability.shape == prediction.mask.shape


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, ptxdist; assert 'torch' not in sys.modules; ptxdist.Predictor; assert 'torch' in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_each_pass_of_a_folder_has_one_thread(finished_run: Path, small_dataset: Any) -> None:
    """So the files are equal for any number of threads; a single image has all of them, since somebody waits for it."""
    used: list[int] = []

    class Recording(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            used.append(torch.get_num_threads())
            return image.float()

    predictor = Predictor.load(finished_run, device="cpu")
    predictor.models, predictor.flip_averaging = (Recording(),), False
    paths, before = list(files(small_dataset).values())[:5], torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert [path for path, _ in predictor.predict_many(paths)] == paths
        assert used == [1, 1]
        predictor.predict(paths[0])
        assert used == [1, 1, 2]
    finally:
        torch.set_num_threads(before)
