"""A model with an image head: its masks are those of the evaluation, from a run, a bundle, an export and the viewer."""

from __future__ import annotations

import csv
import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from serving import make_predictor

from ptxdist import Predictor
from ptxdist.cache.preprocess import PreprocessResult
from ptxdist.errors import CheckpointError
from ptxdist.labels import rle
from ptxdist.predict.bundle import load_model, read_members, write_bundle
from ptxdist.predict.export import ABOUT, describe, export_model, load
from ptxdist.predict.parity import Run, largest_difference
from ptxdist.predict.viewer import page_files
from ptxdist.predict.worker import reply_to
from ptxdist.records import OperatingPoint
from ptxdist.report.report import write_report
from ptxdist.resolve import load_settings
from ptxdist.run.pipeline import run_pipeline
from ptxdist.run.plan import plan_run
from ptxdist.rundir import CASES, EVALUATION, PREDICTIONS

SIZE_PX = 96
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(small_cache: tuple[Path, PreprocessResult], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small network with an image head, as `finished_run`."""
    assignments = (
        "model.encoder=small", "model.decoder_channels=[8, 4, 4, 4, 4]", "model.image_head=true",
        "stages.2.threshold=0.45", "stages.*.learning_rate=0.01", "train.precision=fp32", "train.device=cpu",
    )  # fmt: skip
    settings = load_settings("smoke", assignments=assignments, options={"data.cache": str(small_cache[0])})
    folder = tmp_path_factory.mktemp("headed") / "run"
    run_pipeline(plan_run(settings, folder))
    return folder


@pytest.fixture(scope="module")
def evaluated(run: Path) -> dict[str, tuple[float, str]]:
    """Score and mask of each held-out case, as the evaluation has written them."""
    with open(run / EVALUATION / CASES, newline="") as table, open(run / EVALUATION / PREDICTIONS, newline="") as masks:
        rows = zip(csv.DictReader(table), csv.DictReader(masks), strict=True)
        return {row["case_id"]: (float(row["score"]), mask["EncodedPixels"]) for row, mask in rows}


@pytest.fixture(scope="module")
def point(evaluated: dict[str, tuple[float, str]]) -> OperatingPoint:
    """A point whose image threshold some cases reach, with masks as the evaluation's."""
    scores = sorted(score for score, mask in evaluated.values() if mask != "-1")
    assert scores[0] < scores[-1], "there is something to tell apart"
    return OperatingPoint(image=round((scores[0] + scores[-1]) / 2, 4), top=0.45, min_area_px=0, bottom=0.45)


@pytest.fixture(scope="module")
def paths(small_dataset: Any, evaluated: dict[str, tuple[float, str]]) -> list[Path]:
    """The files of the held-out cases."""
    files = {path.stem: path for path in small_dataset.dicom.rglob("*.dcm")}
    return [files[case_id] for case_id in evaluated]


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The two exports of the run by their suffix."""
    folder = tmp_path_factory.mktemp("exported")
    files = {suffix: folder / f"model{suffix}" for suffix in (".onnx", ".pt2")}
    for path in files.values():
        result = export_model(run, path)
        assert result.difference is not None
        assert result.limit is not None
        assert result.difference <= result.limit
    return files


def test_run_and_bundle_give_a_held_out_case_the_mask_of_the_evaluation(
    run: Path, evaluated: dict[str, tuple[float, str]], point: OperatingPoint, paths: list[Path], tmp_path: Path
) -> None:
    write_bundle(run, tmp_path / "model.ptxdist")
    assert read_members(tmp_path / "model.ptxdist")[0].evaluation.image_head
    for model in (run, tmp_path / "model.ptxdist"):
        predictor = Predictor.load(model, device="cpu", operating_point=point)
        found = [prediction for _, prediction in predictor.predict_many(paths)]
        masks = []
        for prediction, (score, mask) in zip(found, evaluated.values(), strict=True):
            assert prediction.score == pytest.approx(score, abs=1e-5)
            assert rle.encode(prediction.mask) == (mask if score >= point.image else "-1")
            masks.append(prediction.mask.any())
        assert any(masks)
        assert not all(masks)


def shift(run: Run, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The outputs of an export, with scores that are too high."""
    probability, score = run(image)
    return probability, score + np.float32(0.1)


def test_exports_give_the_score_of_the_checkpoint(
    run: Path, exported: dict[str, Path], paths: list[Path], small_dataset: Any
) -> None:
    predictor = Predictor.load(run, device="cpu")
    images = np.stack([image[:SIZE_PX, :SIZE_PX] for image in list(small_dataset.images.values())[:5]])
    with torch.no_grad():
        probability, score = (part.numpy() for part in predictor.probabilities(list(images), SIZE_PX, fewest=1))
    for suffix, path in exported.items():
        again = load(path.read_bytes(), suffix)
        for batch in (1, 2, 5):
            found = again(images[:batch, None])
            assert [part.shape for part in found] == [(batch, 1, SIZE_PX, SIZE_PX), (batch,)]
            assert np.abs(found[0][:, 0] - probability[:batch]).max() <= 1e-4
            assert np.abs(found[1] - score[:batch]).max() <= 1e-4
        wrong = largest_difference(predictor, functools.partial(shift, again), list(images))
        assert wrong == pytest.approx(0.1, abs=1e-4), "the score is compared too"
    session = onnxruntime.InferenceSession(exported[".onnx"])
    outputs = [(output.name, output.type, output.shape) for output in session.get_outputs()]
    assert outputs[1] == ("score", "tensor(float)", ["batch"])
    about = json.loads(session.get_modelmeta().custom_metadata_map[ABOUT])
    assert about == json.loads(json.dumps(describe(predictor.cards[0])))
    assert (about["score"]["name"], about["score"]["shape"]) == ("score", ["batch"])
    assert "unless the score reaches image" in about["after"]


def test_the_documented_lines_apply_the_image_threshold(
    exported: dict[str, Path], run: Path, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "predict.md").read_text(), re.DOTALL)
    (lines,) = (block for block in blocks if "onnxruntime" in block)
    prediction = Predictor.load(run, device="cpu").predict(paths[0])
    (tmp_path / "image.dcm").write_bytes(paths[0].read_bytes())
    middle = float(np.median(prediction.probability))
    monkeypatch.chdir(tmp_path)
    proto = onnx.load(exported[".onnx"])
    for image, empty in ((prediction.score - 0.01, False), (prediction.score + 0.01, True)):
        own = OperatingPoint(image=image, top=middle, min_area_px=0, bottom=middle)
        proto.metadata_props[0].value = json.dumps({"size_px": SIZE_PX, "operating_point": own.model_dump()})
        onnx.save(proto, "model.onnx")
        found: dict[str, Any] = {}
        exec(lines, found)
        assert found["mask"].shape == prediction.mask.shape
        assert found["mask"].any() != empty


def test_the_viewers_answer_states_the_rule_and_applies_it(run: Path, paths: list[Path]) -> None:
    predictor = Predictor.load(run, device="cpu")
    score = predictor.predict(paths[0]).score
    assert b"Of the image as a whole and of its highest pixels" in page_files(predictor, 1)[""][1]
    for image, empty in ((score - 0.01, False), (score + 0.01, True)):
        predictor.operating_point = OperatingPoint(image=image, top=0.01, min_area_px=3, bottom=0.01)
        found = json.loads(reply_to(paths[0].read_bytes(), False, predictor).body)
        assert found["operating_point"] == {"image": image, "top": 0.01, "min_area_px": 3, "bottom": 0.01}
        assert found["rule"] == predictor.operating_point.words
        assert (found["area_px"] == 0) == empty


def test_models_with_and_without_an_image_head_do_not_go_together(run: Path) -> None:
    card, network = load_model(run)
    other = make_predictor(OperatingPoint(top=0.5, min_area_px=0, bottom=0.5))
    with pytest.raises(CheckpointError, match="only one has an image head"):
        Predictor([card, *other.cards], [network, *other.models], other.device)


def test_report_says_what_the_score_is(run: Path) -> None:
    page = write_report(run).read_text(encoding="utf-8")
    assert "three parts the image head&#39;s probability" in page
