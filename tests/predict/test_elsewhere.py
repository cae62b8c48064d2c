"""Evaluation on another cache: the model's own point, tuned ones beside it, images that it was trained on."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result

from ptxdist import files
from ptxdist.cache.catalog import read_catalog
from ptxdist.cache.fingerprints import Fingerprints, look_at
from ptxdist.cache.manifest import read_manifest, write_manifest
from ptxdist.cache.preprocess import PreprocessResult, preprocess
from ptxdist.cache.salt import read_salt
from ptxdist.cache.store import open_store
from ptxdist.cli import cli
from ptxdist.errors import CatalogError, RunError, StoreError
from ptxdist.labels import rle
from ptxdist.predict.bundle import describe_run, load_model, point_at, read_members, write_bundle
from ptxdist.predict.elsewhere import evaluate_elsewhere
from ptxdist.predict.export import export_model
from ptxdist.predict.predictor import Predictor
from ptxdist.records import EvaluationResult, OperatingPoint, Platt
from ptxdist.report.report import write_report
from ptxdist.rundir import (
    EVALUATION,
    ORIGIN,
    PREDICTIONS,
    RESULT,
    TRAINING_IMAGES,
    read_evaluation,
    read_origin,
    read_result,
)
from ptxdist.scores.compare import by_data
from ptxdist.scores.metrics import scores
from ptxdist.scores.working import Wanted

POINT = OperatingPoint(top=0.55, min_area_px=700, bottom=0.4)


@pytest.fixture(scope="module")
def bundle(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an operating point that is no threshold."""
    path = tmp_path_factory.mktemp("bundle") / "model.ptxdist"
    write_bundle(finished_run, path, (POINT, "a test"))
    return path


@pytest.fixture(scope="module")
def other(small_dataset, write_dicom, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    """A cache of 12 new images, and of 4 of `small_dataset` that were brightened, encoded and named anew."""
    folder, random, rows = tmp_path_factory.mktemp("other"), np.random.default_rng(4), []
    for number, (image, mask) in enumerate(
        zip(small_dataset.images.values(), small_dataset.masks.values(), strict=True)
    ):
        if number >= 16:
            break
        if number >= 4:
            image = cv2.GaussianBlur(random.integers(0, 256, image.shape, dtype=np.uint8), (9, 9), 0)
            image = cv2.normalize(image, None, 60, 255, cv2.NORM_MINMAX)
        else:
            image = cv2.convertScaleAbs(image, alpha=0.9, beta=15)
        write_dicom(folder / "dicom" / f"9.9.{number}.dcm", image, f"9.9.{number}", ViewPosition="AP")
        rows.append((f"9.9.{number}", rle.encode(mask)))
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("ImageId", "EncodedPixels"), *rows])
    preprocess(folder / "dicom", folder / "labels.csv", folder / "cache", sizes_px=(64, 96), folds=2)
    return folder / "cache"


@pytest.fixture(scope="module")
def evaluated(bundle: Path, other: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EvaluationResult]:
    folder = tmp_path_factory.mktemp("elsewhere") / "new" / "folder"
    return folder, evaluate_elsewhere([bundle], other, folder=folder)


def test_masks_are_those_of_predict_at_the_models_point(
    bundle: Path, other: Path, evaluated: tuple[Path, EvaluationResult]
) -> None:
    folder, result = evaluated
    assert read_evaluation(folder) == result
    assert result.point == POINT
    assert (result.scores.cases, result.scores.positives) == (16, 6)
    cases = {case.case_id: case for case in read_catalog(other).labelled}
    with open(folder / PREDICTIONS, newline="") as file:
        masks = {row["ImageId"]: row["EncodedPixels"] for row in csv.DictReader(file)}
    counts = []
    for path in sorted((other.parent / "dicom").iterdir()):
        found = Predictor.load(bundle, device="cpu").predict(path)
        case = cases[found.case_id]
        mask = rle.decode(masks[found.case_id], case.rows, case.columns).astype(bool)
        assert (mask != found.mask).mean() < 1e-3  # another batch rounds differently
        truth = rle.decode(case.masks or (), case.rows, case.columns).astype(bool)
        counts.append(((mask & truth).sum(), mask.sum(), truth.sum()))
    assert any(count[1] for count in counts)
    assert result.scores == scores(np.array(counts, np.int64))


def test_tuned_points_are_cross_fitted_and_compared_with_the_models_own(
    evaluated: tuple[Path, EvaluationResult],
) -> None:
    result = evaluated[1]
    assert [tuned.kind for tuned in result.tuned] == ["pair", "triplet"]
    for tuned in result.tuned:
        assert tuned.gains is not None
        assert tuned.gains["kaggle_dice"] == pytest.approx(tuned.estimate.kaggle_dice - result.scores.kaggle_dice)
        low, high = (tuned.gain_intervals or {})["kaggle_dice"]
        assert low <= tuned.gains["kaggle_dice"] <= high
    assert set(result.at_other_thresholds) == {"0.5", "0.55"}
    assert result.min_area_px == 0  # of fixed thresholds; the point's own smallest area is not theirs
    assert (result.at_other_thresholds["0.5"].sensitivity or 0) >= (result.at_other_thresholds["0.55"].sensitivity or 0)


def test_images_of_the_training_are_recognised_and_left_out_beside(
    finished_run: Path,
    small_cache: tuple[Path, PreprocessResult],
    other: Path,
    evaluated: tuple[Path, EvaluationResult],
    tmp_path: Path,
) -> None:
    training = {case.case_id for case in read_catalog(small_cache[0]).labelled if case.split == "train"}
    alike = {f"9.9.{number}" for number in range(4) if f"1.2.826.0.1.{1000 + number}" in training}
    about = evaluated[1].elsewhere
    assert about is not None
    assert about.seen is not None
    assert (about.seen.equal, set(about.seen.case_ids)) == (0, alike)
    assert about.seen.without is not None
    assert about.seen.without.cases == 16 - len(alike)
    own = evaluate_elsewhere([finished_run], small_cache[0], folder=tmp_path / "own").elsewhere
    assert own is not None
    assert own.seen is not None
    assert (own.seen.equal, own.seen.alike, set(own.seen.case_ids)) == (len(training), 0, training)
    assert own.seen.patients == 0  # the split keeps patients together
    held_out = evaluate_elsewhere([finished_run], small_cache[0], folder=tmp_path / "val", split="val")
    assert held_out.elsewhere is not None
    assert held_out.elsewhere.seen is not None
    assert held_out.elsewhere.seen.case_ids == ()
    assert held_out.elsewhere.seen.without == held_out.scores


def test_patients_are_compared_where_both_caches_have_the_key_of_the_site(
    small_dataset,
    tmp_path: Path,  # type: ignore[no-untyped-def]
) -> None:
    data, key = small_dataset, tmp_path / "key"
    key.write_bytes(b"sixteen secret bytes, or more")
    one, two = tmp_path / "one", tmp_path / "two"
    for out in (one, two):
        preprocess(data.dicom, data.labels, out, patients=data.patients, patient_key=key, sizes_px=(64,))
    found = []
    for out in (one, two):
        catalog = read_catalog(out)
        rows = np.array([row for row, case in enumerate(catalog.labelled) if case.split == "train"], np.int64)
        found.append(look_at(open_store(out, 64), catalog, rows if out is one else np.arange(23), read_salt(out))[0])
    same = found[1].patients_in(found[0])
    assert same is not None
    groups = {case.group for case in read_catalog(one).labelled if case.split == "train"}
    assert same.tolist() == [case.group in groups for case in read_catalog(two).labelled]
    assert data.patients.read_text().split(",")[-1].strip() not in found[0].write()
    with pytest.raises(CatalogError, match="was made without this --patient-key; make a new cache"):
        preprocess(
            data.dicom, data.labels, one, patients=data.patients, patient_key=write(tmp_path / "other", b"q" * 16)
        )
    with pytest.raises(CatalogError, match=r"has 5 bytes; a key has at least 16"):
        preprocess(data.dicom, data.labels, tmp_path / "x", patient_key=write(tmp_path / "short", b"short"))
    with pytest.raises(CatalogError, match=r"cannot be read: No such file"):
        preprocess(data.dicom, data.labels, tmp_path / "x", patient_key=tmp_path / "none")
    assert not (tmp_path / "x").exists()


def test_models_are_compared_over_data_sets_in_one_table(
    bundle: Path,
    other: Path,
    small_cache: tuple[Path, PreprocessResult],
    evaluated: tuple[Path, EvaluationResult],
    tmp_path: Path,
) -> None:
    own = tmp_path / "own"
    result = evaluate_elsewhere([bundle], small_cache[0], folder=own, split="val")
    again = tmp_path / "again"
    shutil.copytree(evaluated[0], again)
    done = CliRunner().invoke(cli, ["compare", str(evaluated[0]), str(own), str(again), "--markdown"])
    assert done.exit_code == 0, done.stderr
    head, _, model, nothing = done.stdout.splitlines()
    assert "16 images, 6 positive" in head
    assert f"{result.scores.cases} images, {result.scores.positives} positive" in head
    assert model.startswith(f"| smoke | {evaluated[1].scores.kaggle_dice:.4f} (")
    assert f"| {result.scores.kaggle_dice:.4f}" in model
    assert "| 0.6250; 0.0000 |" in nothing
    assert [len(part.comparison.runs) for part in by_data([evaluated[0], own, again])] == [2, 1]
    shown = CliRunner().invoke(cli, ["compare", str(evaluated[0]), str(own)])
    assert shown.stdout.count("images that all runs have evaluated") == 2


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_what_is_different_here_is_in_the_result(evaluated: tuple[Path, EvaluationResult], finished_run: Path) -> None:
    about, origin = evaluated[1].elsewhere, read_origin(finished_run)
    assert about is not None
    assert about.there is not None
    assert origin is not None
    assert about.there == origin.profile
    assert about.here.views == {"AP": 16}
    assert set(about.there.views) == {"PA"}
    assert about.here.brightness[2] > about.there.brightness[2] + 10
    assert about.point_from == "a test"
    assert about.here.side_px == (128.0, 176.0, 208.0, 232.0, 256.0)


def test_the_mean_of_two_models_and_models_without_fingerprints(
    bundle: Path, finished_run: Path, other: Path, evaluated: tuple[Path, EvaluationResult], tmp_path: Path
) -> None:
    old = tmp_path / "run"
    shutil.copytree(finished_run, old)
    origin = read_origin(old)
    assert origin is not None
    (old / TRAINING_IMAGES).unlink()
    (old / ORIGIN).write_text(origin.model_copy(update={"profile": None}).model_dump_json())
    write_bundle(old, tmp_path / "old.ptxdist")
    assert TRAINING_IMAGES not in read_members(tmp_path / "old.ptxdist")[1]
    result = evaluate_elsewhere([bundle, tmp_path / "old.ptxdist"], other, folder=tmp_path / "both")
    assert result.runs == 2
    assert result.elsewhere is not None
    assert result.elsewhere.seen is None
    assert load_model(tmp_path / "old.ptxdist")[0].profile is None
    alone = evaluated[1]
    assert result.auroc == pytest.approx(alone.auroc)  # twice the same network
    assert result.scores.kaggle_dice == pytest.approx(alone.scores.kaggle_dice, abs=0.01)


def test_caches_and_folders_that_do_not_fit_are_refused(
    bundle: Path,
    finished_run: Path,
    other: Path,
    small_dataset,
    tmp_path: Path,  # type: ignore[no-untyped-def]
) -> None:
    data = small_dataset
    preprocess(data.dicom, data.labels, tmp_path / "64", patients=data.patients, sizes_px=(64,))
    with pytest.raises(StoreError, match=r"has 64 px, and smoke needs 96 px: `ptxdist preprocess … --size 96`"):
        evaluate_elsewhere([bundle], tmp_path / "64", folder=tmp_path / "out")
    manifest = read_manifest(tmp_path / "64")
    manifest.transform = 3
    write_manifest(tmp_path / "64", manifest)
    with pytest.raises(StoreError, match=r"written with transform 3, and transform 2 is needed; rerun `ptxdist prep"):
        evaluate_elsewhere([bundle], tmp_path / "64", folder=tmp_path / "out")
    preprocess(data.dicom, data.labels, tmp_path / "64", patients=data.patients, sizes_px=(64,))
    assert read_manifest(tmp_path / "64").transform == 2
    with pytest.raises(StoreError, match="is not a ptxdist cache"):
        evaluate_elsewhere([bundle], tmp_path, folder=tmp_path / "out")
    damaged = tmp_path / "damaged"
    shutil.copytree(finished_run, damaged)
    (damaged / TRAINING_IMAGES).write_text("pixels\n")
    with pytest.raises(RunError, match=r"training-images.csv has another checksum than when it was written"):
        evaluate_elsewhere([damaged], other, folder=tmp_path / "out")
    for taken, kind in ((finished_run, "a run"), (other, "a cache"), (bundle, "a bundle")):
        with pytest.raises(RunError, match=f"is {kind} of .*; give --out a folder of its own"):
            evaluate_elsewhere([bundle], other, folder=taken)
    with pytest.raises(RunError, match=r"is a run of .*; expected a folder of `ptxdist evaluate`"):
        export_model(bundle, tmp_path / "x.ptxdist", evaluation=finished_run)
    assert not (tmp_path / "out").exists()


def test_fingerprints_are_the_same_for_any_order_and_damaged_ones_are_named() -> None:
    random = np.random.default_rng(0)
    looks = random.integers(0, 2**63, (3, 4)).astype(np.uint64)
    one = Fingerprints(("b" * 16, "a" * 16, "c" * 16), looks, ("saltsaltb", "saltsalta", "saltsaltc"))
    other = Fingerprints(("c" * 16, "b" * 16, "a" * 16), looks[[2, 0, 1]], ("saltsaltc", "saltsaltb", "saltsalta"))
    assert one.write() == other.write()
    again = Fingerprints.read(one.write(), "model")
    assert again.pixels == ("a" * 16, "b" * 16, "c" * 16)
    near = looks[:1] ^ np.uint64(2**6 - 1)  # 24 bits of 256
    equal, alike = Fingerprints(("d" * 16,), near, ("",)).seen_in(again)
    assert (equal.tolist(), alike.tolist()) == ([False], [True])
    far = near ^ np.array([[2**20 * 7, 0, 0, 0]], np.uint64)
    assert not Fingerprints(("d" * 16,), far, ("",)).seen_in(again)[1].any()
    assert not one.seen_in(Fingerprints((), np.zeros((0, 4), np.uint64), ()))[1].any()
    new = Fingerprints(("e" * 16,) * 2, looks[:2], ("saltsaltb", "saltsaltz"))
    assert (of := new.patients_in(one)) is not None
    assert of.tolist() == [True, False]
    assert Fingerprints(("e" * 16,), looks[:1], ("pepperpeb",)).patients_in(one) is None
    assert Fingerprints(("e" * 16,), looks[:1], ("",)).patients_in(one) is None
    for text in (
        "pixels\nab\n",
        "pixels,look,patient\nab,zz,\n",
        "pixels,look,patient\nab,00ff,\n",
        "pixels,look\na,b\n",
    ):
        with pytest.raises(StoreError, match="model: the fingerprints of its training images are damaged"):
            Fingerprints.read(text, "model")


def test_the_report_shows_what_is_different_and_names_images_of_the_training(
    evaluated: tuple[Path, EvaluationResult],
) -> None:
    folder, result = evaluated
    page = write_report(folder).read_text()
    for words in (
        "The model was trained on some of these images or patients.",
        "What is different here",
        "Different: ",
        "views 100 % AP here, 100 % PA in the training",
        "trained on</th>",
        "mean grey level of an image",
        "The model&#39;s own point, from a test",
        "against the model&#39;s own point",
        "images from elsewhere",
    ):
        assert words in page, words
    assert str(folder) not in page
    assert result.elsewhere is not None
    assert result.elsewhere.data not in page


def test_the_command_prints_the_own_point_first_and_the_images_of_the_training(
    bundle: Path, other: Path, tmp_path: Path
) -> None:
    def run(*words: object) -> Result:
        return CliRunner().invoke(cli, ["evaluate", str(bundle), *map(str, words)])

    done = run("--data", other, "--out", tmp_path / "out")
    text = " ".join(done.stdout.split())
    assert done.exit_code == 0, done.stderr
    assert text.startswith("Finds ")
    assert text.index("in use 95 % interval") < text.index("tuned here")
    assert "The model was trained on some of these images: 0 have the same pixels as a training image, " in text
    assert "median grey level " in text
    assert ") against the point in use" in text
    for words, code, message in (
        (("--data", other), 8, "name a folder for the evaluation with --out"),
        (("--split", "val", "--out", tmp_path / "x"), 3, "--split goes with --data"),
    ):
        refused = run(*words)
        assert (refused.exit_code, message in refused.stderr) == (code, True)


def test_a_tuned_point_and_a_working_point_travel_with_a_bundle(
    finished_run: Path, other: Path, bundle: Path, tmp_path: Path
) -> None:
    """Evaluated on other data, exported with what was tuned there, used by `predict`."""
    said: list[str] = []

    def run(*words: object, code: int = 0) -> str:
        done = CliRunner().invoke(cli, [str(word) for word in words])
        assert done.exit_code == code, done.stderr
        said.append(done.stderr)
        return " ".join((done.stdout if not code else done.stderr).split())

    there, local = tmp_path / "there", tmp_path / "local.ptxdist"
    text = run(
        "evaluate", bundle, "--data", other, "--out", there, "--sensitivity", 0.8, "--specificity", 0.75,
        "--prevalence", 0.05,
    )  # fmt: skip
    assert "working point score sensitivity specificity flagged PPV NPV sensitivity=0.8 " in text
    assert "PPV and NPV at a prevalence of 0.05; all numbers but the score are cross-fitted" in text
    use = f"`ptxdist export {bundle} --point {there} --at sensitivity=0.8 --out …` makes a model with this point"
    assert f"`ptxdist report {there}` writes a page of it; {use}" in said[-1], "said whole, to be pasted"
    result = read_evaluation(there)
    assert [point.name for point in result.working] == ["sensitivity=0.8", "specificity=0.75"]
    best = max(result.tuned, key=lambda tuned: tuned.estimate.kaggle_dice)
    run("export", bundle, "--point", there, "--out", local)
    card = load_model(local)[0]
    assert card.operating_point == best.point
    assert card.operating_point_from.startswith(f"the {best.kind} tuned on 16 images (6 positive) of other data")
    assert read_members(local)[1][TRAINING_IMAGES] == read_members(bundle)[1][TRAINING_IMAGES]
    flagging = tmp_path / "flagging.ptxdist"
    run("export", bundle, "--point", there, "--at", "sensitivity=0.8", "--out", flagging)
    point = load_model(flagging)[0].operating_point
    assert (point.image, point.min_area_px) == (result.working[0].threshold, 0)
    run("predict", flagging, other.parent / "dicom", "--out", tmp_path / "predicted", "--write", "masks")
    findings = [json.loads(path.read_text()) for path in (tmp_path / "predicted" / "findings").iterdir()]
    for finding in findings:
        if finding["score"] < point.image:
            assert finding["area_px"] == 0
    assert sum(finding["score"] >= point.image for finding in findings) >= 0.8 * 6
    page = write_report(there).read_text()
    assert "ROC curve" in page
    assert "sensitivity=0.8" in page
    for words, code, message in (
        (("export", bundle, "--point", tmp_path, "--out", tmp_path / "x.ptxdist"), 8, "holds no evaluation"),
        (
            ("export", finished_run, "--at", "sensitivity=0.5", "--out", tmp_path / "x.ptxdist"),
            3,
            "has no working point",
        ),
        (("predict", bundle, other, "--at", "high", "--out", tmp_path / "x"), 3, "give one such as sensitivity=0.95"),
        (("evaluate", bundle, "--data", other, "--out", there, "--prevalence", 0.1), 3, "goes with --sensitivity"),
    ):
        assert message in run(*words, code=code)
    both = evaluate_elsewhere([bundle, bundle], other, folder=tmp_path / "both")
    assert len(both.elsewhere.weights_sha256 if both.elsewhere else ()) == 2
    assert "is no evaluation of smoke alone" in run(
        "export", bundle, "--point", tmp_path / "both", "--out", tmp_path / "x.ptxdist", code=8
    )
    assert not (tmp_path / "x.ptxdist").exists()


def test_a_run_that_was_evaluated_with_a_working_point_predicts_at_it_and_calibrated(
    finished_run: Path, other: Path, tmp_path: Path
) -> None:
    own = tmp_path / "run"
    shutil.copytree(finished_run, own)
    evaluation = read_evaluation(own / EVALUATION)
    working = evaluate_elsewhere(
        [own], other, folder=tmp_path / "there", working=Wanted((("specificity", 0.7),))
    ).working
    changed = evaluation.model_copy(update={"working": working, "platt": Platt(slope=2.0, intercept=-1.0)})
    result = read_result(own).model_copy(update={"evaluation": changed})
    files.write_json(own / RESULT, result)
    predictor = Predictor.load(own, device="cpu", at="specificity=0.7")
    assert predictor.operating_point.image == working[0].threshold
    high = OperatingPoint(top=0.95, min_area_px=0, bottom=0.95)
    card = describe_run(own)[0].at(high, "tuned to empty masks")
    assert point_at(card, "specificity=0.7")[0].bottom <= evaluation.threshold < 0.95, "flagged images keep their masks"
    prediction = predictor.predict(next((other.parent / "dicom").iterdir()))
    odds = np.log(prediction.score / (1 - prediction.score))
    assert prediction.calibrated == pytest.approx(1 / (1 + np.exp(1 - 2 * odds)))
    assert Predictor.load(own, own, device="cpu").predict(next((other.parent / "dicom").iterdir())).calibrated is None
