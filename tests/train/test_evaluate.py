"""An evaluation: the same for any number of ranks, every number in cases.csv, ensembles and folds."""

from __future__ import annotations

import csv
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.numpy import load_file
from sklearn.calibration import calibration_curve
from torchmetrics.functional.classification import binary_calibration_error

from ptxdist.cache.catalog import FILE_NAME, read_catalog, write_catalog
from ptxdist.cache.preprocess import preprocess
from ptxdist.config import ModelSettings, PipelineSettings, Settings, StageSettings
from ptxdist.errors import LabelError, RunError
from ptxdist.labels import rle
from ptxdist.records import EvaluationResult, StageResult
from ptxdist.rundir import CASES, HISTOGRAMS, PREDICTIONS, read_evaluation
from ptxdist.scores.compare import as_markdown, compare
from ptxdist.scores.counts import LEVELS
from ptxdist.scores.headline import points
from ptxdist.scores.intervals import score_intervals
from ptxdist.scores.metrics import auroc, scores
from ptxdist.scores.operating import tune
from ptxdist.scores.tables import COLUMNS, FIXED_THRESHOLDS, read_cases
from ptxdist.train.checkpoint import save_weights
from ptxdist.train.evaluate import Ensemble, Member, evaluate
from ptxdist.train.unet import build_unet

CPU = torch.device("cpu")
MODEL = ModelSettings(encoder_weights="none")
_AGE_NAMES = {"30": "under 40", "50": "40 to 59", "70": "60 and over"}
COUNTS = ("intersection_px", "predicted_px", "truth_px")


def member(folder: Path, *, seed: int = 0, fold: int = 0, image_head: bool = False) -> Member:
    """A run with random weights, whose probabilities are spread out enough to make masks."""
    torch.manual_seed(seed)
    network = MODEL.model_copy(update={"image_head": True, "encoder": "small"}) if image_head else MODEL
    model = build_unet(network)
    with torch.no_grad():
        model.head.weight.mul_(8.0)
        model.head.bias.add_(20.0 * image_head)  # then only the image threshold leaves a mask empty
    weights = folder / f"weights-{seed}.safetensors"
    sha256 = save_weights(model.state_dict(), weights)
    stage = StageSettings(size_px=32, epochs=1, batch_size=4, threshold=0.6)
    settings = Settings(pipeline=PipelineSettings(name="tiny", fold=fold, model=network, stages=(stage,)))
    return Member(
        folder,
        settings,
        StageResult.model_construct(stage=1, size_px=32, weights=weights.name, weights_sha256=sha256),
    )


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / CASES, newline="") as file:
        return list(csv.DictReader(file))


def mask_size(row: dict[str, str]) -> str:
    share = int(row["truth_px"]) / (int(row["rows"]) * int(row["columns"]))
    names = ("under 0.2 % of the image", "0.2 to 1 %", "1 to 2 %", "2 % and over")
    return names[int(np.searchsorted((0.002, 0.01, 0.02), share, "right"))] if share else ""


def counts_of(rows: Sequence[dict[str, str]], names: Sequence[str] = COUNTS) -> np.ndarray:
    return np.array([[int(row[name]) for name in names] for row in rows], np.int64).reshape(-1, 3)


@pytest.fixture(scope="module")
def evaluated(folds: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EvaluationResult]:
    folder = tmp_path_factory.mktemp("one")
    return folder, evaluate([member(folder)], folds, folder, device=CPU)


def test_the_result_is_written_and_every_case_held_out_is_in_the_table_once(
    folds: Path, evaluated: tuple[Path, EvaluationResult]
) -> None:
    folder, result = evaluated
    assert read_evaluation(folder) == result
    assert 0 < result.scores.kaggle_dice < 1
    rows = table(folder)
    assert tuple(rows[0]) == COLUMNS
    assert [row["case_id"] for row in rows] == [case.case_id for case in read_catalog(folds).labelled if case.fold == 0]
    with open(folder / PREDICTIONS, newline="") as file:
        masks = {row["ImageId"]: row["EncodedPixels"] for row in csv.DictReader(file)}
    for row in rows:
        assert rle.decode((masks[row["case_id"]],), 128, 128).astype(bool).sum() == int(row["predicted_px"])


def test_every_number_can_be_computed_again_from_the_table(evaluated: tuple[Path, EvaluationResult]) -> None:
    folder, result = evaluated
    rows = table(folder)
    own = counts_of(rows)
    assert result.scores == scores(own)
    assert [float(row["kaggle_dice"]) for row in rows] == pytest.approx(
        [scores(own[number : number + 1]).kaggle_dice for number in range(len(own))], abs=1e-6
    )
    score, positive = np.array([float(row["score"]) for row in rows]), own[:, 2] > 0
    assert result.auroc == pytest.approx(auroc(score, positive))
    assert len(result.tuned) == 2
    for tuned in result.tuned:
        names = (f"{tuned.kind}_intersection_px", f"{tuned.kind}_predicted_px", "truth_px")
        assert tuned.estimate == scores(counts_of(rows, names))
    for threshold in FIXED_THRESHOLDS:
        names = (f"at_{threshold}_intersection_px", f"at_{threshold}_predicted_px", "truth_px")
        assert result.at_other_thresholds[str(threshold)] == scores(counts_of(rows, names))
    dark, bright = np.quantile([float(row["brightness"]) for row in rows], (1 / 3, 2 / 3))
    exposures = {"dark third": (0.0, dark), "middle third": (dark, bright), "bright third": (bright, 256.0)}
    for group in result.subgroups:
        if group.by in ("view", "sex"):
            inside = [row for row in rows if row[group.by] == group.name]
        elif group.by == "exposure":
            low, high = exposures[group.name]
            inside = [row for row in rows if low <= float(row["brightness"]) < high]
        elif group.by == "age":
            inside = [row for row in rows if _AGE_NAMES[row["age"]] == group.name]
        elif group.by == "masks":
            inside = [row for row in rows if row["masks"] == {"one": "1"}[group.name]]
        else:
            inside = [row for row in rows if mask_size(row) == group.name]
        assert group.scores == scores(counts_of(inside))
        assert group.intervals == score_intervals(counts_of(inside), [row["group"] for row in inside])
    groups = [row["group"] for row in rows]
    assert result.intervals.keys() == score_intervals(own, groups, image_score=score).keys()
    assert result.intervals["kaggle_dice"] == score_intervals(own, groups)["kaggle_dice"]
    for by in ("view", "sex", "age", "exposure"):
        assert sum(group.scores.cases for group in result.subgroups if group.by == by) == len(rows)
    assert all(group.small for group in result.subgroups), "twenty cases are few"


def test_points_with_an_image_threshold_are_in_the_tables_too(folds: Path, tmp_path: Path) -> None:
    result = evaluate([member(tmp_path, image_head=True)], folds, tmp_path, device=CPU)
    assert read_evaluation(tmp_path) == result
    assert result.image_head
    rows = table(tmp_path)
    ids, groups = [row["case_id"] for row in rows], [row["group"] for row in rows]
    truth, score = counts_of(rows)[:, 2], np.array([float(row["score"]) for row in rows])
    histograms = load_file(tmp_path / HISTOGRAMS)["histograms"]
    for tuned in result.tuned:
        found = tune(histograms, truth, ids, groups, tuned.kind, score)
        assert found is not None
        assert found[0] == tuned
        names = (f"{tuned.kind}_intersection_px", f"{tuned.kind}_predicted_px", "truth_px")
        assert (found[1] == counts_of(rows, names)).all()
    assert any(point.image > 0 for tuned in result.tuned for point in (tuned.point, *tuned.points))


def test_calibration_is_scikit_learn_s_and_torchmetrics(evaluated: tuple[Path, EvaluationResult]) -> None:
    folder, result = evaluated
    px, images, *_ = result.calibration
    rows = table(folder)
    positive, score = (np.array([float(row[name]) for row in rows]) for name in ("positive", "score"))
    observed, predicted = calibration_curve(positive, score, n_bins=10)
    assert images.observed == pytest.approx(observed)
    assert images.predicted == pytest.approx(predicted, abs=1e-5)
    gaps = np.abs(np.array(images.observed) - images.predicted)
    assert images.error == pytest.approx(np.average(gaps, weights=images.counts))
    error = binary_calibration_error(torch.from_numpy(score), torch.from_numpy(positive).int(), n_bins=10)
    assert images.error == pytest.approx(float(error), abs=1e-5)
    assert sum(images.counts) == len(rows)
    hist = load_file(folder / HISTOGRAMS)["histograms"].sum(0)
    assert sum(px.counts) == hist[0].sum() == 128 * 128 * len(rows)
    assert sum(o * n for o, n in zip(px.observed, px.counts, strict=True)) == pytest.approx(hist[1].sum())


def test_histograms_count_the_masks_of_the_fixed_threshold(evaluated: tuple[Path, EvaluationResult]) -> None:
    folder, result = evaluated
    hist = load_file(folder / HISTOGRAMS)["histograms"].astype(np.int64)
    truth = counts_of(table(folder))[:, 2]
    above = hist[:, :, LEVELS // 2 :].sum(2)
    again = scores(np.stack((above[:, 1], above[:, 0], truth), axis=1))
    assert again == result.at_other_thresholds["0.5"]
    assert (hist[:, 1].sum(1) == truth).all()


def on_rank(rank: int, ranks: int, cache: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'meet'}", rank=rank, world_size=ranks)
    own = folder / str(rank)
    own.mkdir()
    result = evaluate([member(own)], cache, own / "evaluation", device=CPU)  # as on machines without a shared folder
    (folder / f"{rank}.json").write_text(result.model_dump_json())
    dist.destroy_process_group()


def test_ranks_together_write_what_one_process_writes(
    folds: Path, evaluated: tuple[Path, EvaluationResult], tmp_path: Path
) -> None:
    """20 cases are three blocks: the second rank has one of them."""
    torch.multiprocessing.start_processes(on_rank, (2, folds, tmp_path), nprocs=2, start_method="forkserver")
    one, two = evaluated[0], tmp_path / "0" / "evaluation"
    for name in (CASES, PREDICTIONS, HISTOGRAMS):
        assert (two / name).read_bytes() == (one / name).read_bytes(), name
    first, second = (read_evaluation(folder).model_copy(update={"seconds": 0.0}) for folder in (one, two))
    assert first == second
    assert [(tmp_path / f"{rank}.json").read_text() for rank in range(2)] == [
        read_evaluation(two).model_dump_json()
    ] * 2
    assert not (tmp_path / "1" / "evaluation").exists()


def test_an_ensemble_averages_probabilities() -> None:
    torch.manual_seed(0)
    models = [build_unet(MODEL).eval() for _ in range(2)]
    image = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = torch.stack([model(image).sigmoid() for model in models]).mean(0)
        assert torch.allclose(Ensemble(models)(image).sigmoid(), expected, atol=1e-6)
        assert torch.equal(Ensemble(models[:1])(image), models[0](image))


def test_an_ensemble_averages_the_probabilities_of_image_heads_too() -> None:
    torch.manual_seed(0)
    models = [build_unet(MODEL.model_copy(update={"image_head": True})).eval() for _ in range(2)]
    image = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = [
            torch.stack(parts).sigmoid().mean(0) for parts in zip(*[model(image) for model in models], strict=True)
        ]
        for found, mean in zip(Ensemble(models)(image), expected, strict=True):
            torch.testing.assert_close(found.sigmoid(), mean)
        torch.testing.assert_close(Ensemble(models[:1])(image), models[0](image))


def test_runs_of_one_fold_are_an_ensemble_and_of_two_folds_are_pooled(
    folds: Path, evaluated: tuple[Path, EvaluationResult], tmp_path: Path
) -> None:
    folder, single = evaluated
    first = {row["case_id"]: row for row in table(folder)}
    two = evaluate([member(tmp_path), member(tmp_path, seed=1)], folds, tmp_path / "two", device=CPU)
    assert (two.runs, two.folds) == (2, (0,))
    assert two.scores != single.scores
    both = evaluate([member(tmp_path), member(tmp_path, fold=1)], folds, tmp_path / "both", device=CPU)
    assert (both.runs, both.folds, both.scores.cases) == (2, (0, 1), 40)
    pooled = table(tmp_path / "both")
    assert sorted(row["case_id"] for row in pooled) == sorted(case.case_id for case in read_catalog(folds).labelled)
    for row in pooled:
        if row["fold"] == "0":
            assert counts_of([row]).tolist() == counts_of([first[row["case_id"]]]).tolist()


def test_runs_that_do_not_go_together_are_refused(folds: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="held out fold 2"):
        evaluate([member(tmp_path, fold=2)], folds, tmp_path / "x", device=CPU)
    small = member(tmp_path)
    large = replace(small, stage=small.stage.model_copy(update={"size_px": 64}))
    with pytest.raises(RunError, match="64 pixels"):
        evaluate([small, large], folds, tmp_path / "x", device=CPU)
    pipeline = small.settings.pipeline
    headed = pipeline.model_copy(update={"model": pipeline.model.model_copy(update={"image_head": True})})
    other = Member(tmp_path / "headed", small.settings.model_copy(update={"pipeline": headed}), small.stage)
    for members in ([small, other], [other, small]):
        with pytest.raises(RunError, match=f"headed has an image head and {small.run} has none"):
            evaluate(members, folds, tmp_path / "x", device=CPU)
    cache = Path(shutil.copytree(folds, tmp_path / "cache"))
    write_catalog(replace(read_catalog(cache), folds=3), cache / FILE_NAME)
    with pytest.raises(RunError, match="no labelled case in fold 2"):
        evaluate([member(tmp_path, fold=2)], cache, tmp_path / "x", device=CPU)
    assert not (tmp_path / "x").exists()


def test_patients_in_training_are_told_apart_by_a_map(
    folds: Path, evaluated: tuple[Path, EvaluationResult], tmp_path: Path
) -> None:
    """The cache keeps patients together; the map says that four held-out images belong to patients of training."""
    assert evaluated[1].shared_patients is not None
    assert (evaluated[1].shared_patients.shared, evaluated[1].shared_patients.known_from) == (None, "catalog")
    labelled = read_catalog(folds).labelled
    held = [case for case in labelled if case.fold == 0]
    taught = [case for case in labelled if case.fold == 1]
    patients = [f"taught-{number}" for number in range(len(taught))]
    rows = zip(
        [case.case_id for case in (*taught, *held)], [*patients, *patients[:4], *"abcdefghijklmnop"], strict=True
    )
    (tmp_path / "map.csv").write_text("image,patient\n" + "".join(f"{a},{b}\n" for a, b in rows))
    mapped = tmp_path / "mapped"
    result = evaluate([member(tmp_path)], folds, mapped, device=CPU, patients=tmp_path / "map.csv").shared_patients
    assert result is not None
    assert result.shared is not None
    assert result.apart is not None
    assert (result.known_from, result.shared.cases, result.apart.cases) == ("patient map", 4, len(held) - 4)
    sides = {row["case_id"]: row["patient_in_training"] for row in table(mapped)}
    assert sides == {case.case_id: str(int(number < 4)) for number, case in enumerate(held)}
    assert result.shared == scores(counts_of(table(mapped)[:4]))
    assert "taught-" not in (mapped / CASES).read_text(), "only hashes of patients are written"


def test_a_patient_map_that_cannot_be_used_is_refused_before_the_long_work(
    folds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "map.csv").write_text("image,patient\nnobody,1\n")
    monkeypatch.setattr(sys.modules[evaluate.__module__], "score_cases", None)
    with pytest.raises(LabelError, match=r"map\.csv"):
        evaluate([member(tmp_path)], folds, tmp_path / "out", device=CPU, patients=tmp_path / "map.csv")


def test_leakage_of_real_patients_is_what_the_map_says(real_data: Path, tmp_path: Path) -> None:
    """A cache made without the map, as everybody's is; half of the images of patients who have three or more here."""
    siim = real_data / "siim-real"
    with open(siim / "nih_id.csv", newline="") as file:
        patient = {row["Kaggle_ID"]: row["NIH_ID"][:8] for row in csv.DictReader(file)}
    files = sorted((siim / "dicom-images").rglob("*.dcm"))
    images = Counter(patient.get(path.stem) for path in files)
    (tmp_path / "dicom").mkdir()
    many = [path for path in files if path.stem in patient and images[patient[path.stem]] > 2]
    single = [path for path in files if path.stem in patient and images[patient[path.stem]] == 1]
    for path in (*many[:60], *single[:60]):
        (tmp_path / "dicom" / path.name).symlink_to(path)
    cache = tmp_path / "cache"
    catalog = preprocess(tmp_path / "dicom", siim / "train-rle.csv.gz", cache, sizes_px=(32,)).catalog
    assert catalog.leakage.grouped_by == "nothing"
    out = tmp_path / "evaluation"
    found = evaluate([member(tmp_path)], cache, out, device=CPU, patients=siim / "nih_id.csv").shared_patients
    taught = {patient[case.case_id] for case in catalog.labelled if case.fold != 0}
    held_out = [case for case in catalog.labelled if case.fold == 0]
    shared = {case.case_id for case in held_out if patient[case.case_id] in taught}
    assert 0 < len(shared) < len(held_out)
    assert {row["case_id"] for row in table(out) if row["patient_in_training"] == "1"} == shared
    assert found is not None
    assert found.shared is not None
    assert found.apart is not None
    assert (found.known_from, found.shared.cases) == ("patient map", len(shared))
    assert found.apart.cases == len(held_out) - len(shared)
    assert found.shared.positives == sum(bool(case.masks) for case in held_out if case.case_id in shared)
    assert not [name for name in set(patient.values()) if f",{name}," in (out / CASES).read_text()]


def test_where_nobody_knows_the_patients_nothing_is_said_of_them(folds: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(folds, tmp_path / "cache"))
    catalog = read_catalog(cache)
    write_catalog(replace(catalog, leakage=replace(catalog.leakage, grouped_by="nothing")), cache / FILE_NAME)
    result = evaluate([member(tmp_path)], cache, tmp_path / "x", device=CPU)
    assert result.shared_patients is None
    assert {row["patient_in_training"] for row in table(tmp_path / "x")} == {""}


def test_a_comparison_is_of_the_same_cases_with_paired_differences(
    folds: Path, evaluated: tuple[Path, EvaluationResult], tmp_path: Path
) -> None:
    first, second = evaluated[0], tmp_path / "second"
    evaluate([member(tmp_path, seed=1)], folds, second / "evaluation", device=CPU)
    found = compare([first, second, first])
    used = [points(read_evaluation(folder))[0] for folder in (first, second / "evaluation")]
    own = [
        np.array([row.counts for row in read_cases(folder, point.tuned)])
        for folder, point in zip((first, second), used, strict=True)
    ]
    assert [run.run for run in found.runs] == [first.name, "second", first.name]
    assert found.runs[0].differences == {}
    assert found.runs[1].scores == scores(own[1]) == used[1].scores, "both commands speak of the point in use"
    assert used[1].tuned
    assert found.runs[1].point == used[1].name
    assert found.runs[1].at_threshold == read_evaluation(second / "evaluation").scores
    difference = scores(own[1]).kaggle_dice - scores(own[0]).kaggle_dice
    assert found.runs[1].differences["kaggle_dice"] == pytest.approx(difference)
    low, high = found.runs[1].difference_intervals["kaggle_dice"]
    assert low <= difference <= high
    assert found.runs[2].differences["kaggle_dice"] == 0.0
    low, high = found.runs[2].difference_intervals["kaggle_dice"]
    assert low == -high < 0, "no patient of these few differs: a bound on what others might"
    text = as_markdown(found)
    assert f"{scores(own[1]).kaggle_dice:.4f}" in text
    assert f"{difference:+.4f}" in text
    assert text.count("\n|") == 5


def test_runs_that_cannot_be_compared_are_refused(
    folds: Path, evaluated: tuple[Path, EvaluationResult], tmp_path: Path
) -> None:
    evaluate([member(tmp_path, fold=1)], folds, tmp_path / "other", device=CPU)
    with pytest.raises(RunError, match="no case in common"):
        compare([evaluated[0], tmp_path / "other"])
    with pytest.raises(RunError, match="holds no evaluation"):
        compare([evaluated[0], tmp_path / "nowhere"])
    path = tmp_path / "other" / CASES
    path.write_text(path.read_text().replace("truth_px", "truth"))
    with pytest.raises(RunError, match=r"cases.csv has another checksum than when it was written; rerun"):
        compare([tmp_path / "other"])
