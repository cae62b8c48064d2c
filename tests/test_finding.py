"""Another finding than pneumothorax: its words and codes are everywhere, and findings are not mixed."""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pydicom
import pytest
from click.testing import CliRunner
from tiny_encoder import TINY

from ptxdist import files
from ptxdist.cache.catalog import read_catalog
from ptxdist.cli import cli
from ptxdist.errors import CatalogError, CheckpointError, RunError, SettingsError
from ptxdist.finding import PNEUMOTHORAX, PNEUMOTHORAX_LIMITS, Limits, load_finding
from ptxdist.labels import rle
from ptxdist.phantoms import anatomy
from ptxdist.predict.bundle import load_model
from ptxdist.predict.elsewhere import evaluate_elsewhere
from ptxdist.predict.predictor import Predictor
from ptxdist.predict.viewer import page_files
from ptxdist.report.model_card import made_from
from ptxdist.resolve import load_settings
from ptxdist.run.plan import plan_run
from ptxdist.rundir import EVALUATION, RESULT, read_evaluation
from ptxdist.scores.compare import compare
from ptxdist.scores.tables import refuse_other_split
from ptxdist.train.device import choose_device
from ptxdist.train.encoders import ENCODERS

LUNG, _ = load_finding("lung")
SIDE = 96
WORD = "pneumothora"  # also in its plural
PIPELINE = """
[model]
encoder = "tiny"
encoder_weights = "none"
decoder_channels = [8, 8, 4, 4, 4]
[[stages]]
size_px = 32
epochs = 1
batch_size = 8
"""


@pytest.fixture(scope="module", autouse=True)
def _encoder() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODERS, "tiny", TINY)
        yield


def ptxdist(*words: object, code: int = 0) -> str:
    """What a command prints, on both streams."""
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
    return done.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_dicom) -> Path:  # type: ignore[no-untyped-def]
    """Lungs of 60 phantoms, the whole way; `said` has what the commands printed."""
    folder = tmp_path_factory.mktemp("lungs")
    rows, said = [], []
    for number in range(60):
        rng = np.random.default_rng((3, number))
        lungs = anatomy.pose(rng, "PA").lungs
        mask = np.maximum(*(anatomy.fill(lung.outline(anatomy.ANGLES) * SIDE / 1024, SIDE) for lung in lungs))
        image = rng.integers(120, 250, (SIDE, SIDE), dtype=np.uint8) // (1 + 2 * mask)
        write_dicom(folder / "dicom" / f"{number}.dcm", image, f"1.2.{number}", StudyInstanceUID="1.2.3",
                    SeriesInstanceUID="1.2.4", PatientID=f"QX7-{number // 2}")  # fmt: skip
        rows.append((f"1.2.{number}", rle.encode(mask)))
    with open(folder / "lungs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("ImageId", "EncodedPixels"), *rows])
    cache, run, bundle = folder / "cache", folder / "run", folder / "model.ptxdist"
    words = ("preprocess", "--dicom", folder / "dicom", "--labels", folder / "lungs.csv", "--out", cache)
    said.append(ptxdist(*words, "--finding", "Lung", "--size", 32, "--folds", 4, "--workers", 1))
    said.append(ptxdist("inspect", cache))
    (folder / "one.toml").write_text(PIPELINE)
    said.append(ptxdist("train", "--without-ray", "--pipeline", folder / "one.toml", "--data", cache, "--run", run))
    said.append(ptxdist("evaluate", run))
    said.append(ptxdist("export", run, "--out", bundle))
    said.append(ptxdist("evaluate", bundle, "--data", cache, "--out", folder / "elsewhere"))
    said.append(ptxdist("report", folder / "elsewhere"))
    predicting = ("predict", bundle, folder / "dicom" / "7.dcm", "--out", folder / "out", "--write", "masks,seg")
    said.append(ptxdist(*predicting, "--threshold", 0.001, "--min-area", 0))
    (folder / "said").write_text("\n".join(said))
    return folder


def test_the_words_and_codes_are_those_of_the_lung_from_cache_to_segmentation(folder: Path) -> None:
    with zipfile.ZipFile(folder / "model.ptxdist") as archive:
        readme, card = (archive.read(name).decode() for name in ("README.md", "card.json"))
    predictor = Predictor.load(folder / "model.ptxdist", device="cpu")
    page, said = page_files(predictor, 1)[""][1].decode(), (folder / "said").read_text()
    report, other = ((folder / name / "report/index.html").read_text() for name in ("run", "elsewhere"))
    catalog, origin = (json.loads((folder / name).read_text().splitlines()[0] if "catalog" in name else
                       (folder / name).read_text()) for name in ("cache/catalog.jsonl", "run/origin.json"))  # fmt: skip

    assert (
        catalog["finding"] == origin["finding"] == json.loads(card)["finding"] == json.loads(json.dumps(asdict(LUNG)))
    )
    assert predictor.cards[0].finding == LUNG
    assert "# Lung segmentation: one" in readme
    assert "finds the px of a lung in" in readme
    for html in (report, other):
        assert "ptxdist report: lung segmentation" in html
        assert " with a lung; false alarms in " in html
    for words in ("research on lung segmentation", "look like a lung", "the outline of a lung"):
        assert words in report, words
    assert "ptxdist viewer: lung segmentation" in page
    assert said.count("with a lung") > 5
    finding = json.loads((folder / "out/findings/1.2.7.json").read_text())
    assert finding["finding"] == "lung"

    segmentation = pydicom.dcmread(folder / "out/seg/1.2.7.dcm")
    segment = segmentation.SegmentSequence[0]
    codes = [getattr(segment, f"SegmentedProperty{name}CodeSequence")[0] for name in ("Type", "Category")]
    assert [(code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning) for code in codes] == [
        ("39607008", "SCT", "Lung"),
        ("91723000", "SCT", "Anatomical Structure"),
    ]
    assert (segment.SegmentLabel, segmentation.ContentLabel) == ("Lung", "LUNG")
    assert segmentation.SeriesDescription == "Lung, research use only"

    texts = {"said": said, "README": readme, "card": card, "page": page}
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".jsonl", ".csv", ".html", ".dcm"):
            texts[str(path)] = path.read_bytes().decode(errors="replace")
    assert len(texts) > 80
    assert [name for name, text in texts.items() if WORD in text.lower()] == []


def test_findings_are_not_mixed_in_silence(folder: Path, cache: Path, tmp_path: Path) -> None:
    lungs, run, bundle = folder / "cache", folder / "run", folder / "model.ptxdist"
    again = ("preprocess", "--dicom", folder / "dicom", "--labels", folder / "lungs.csv", "--out", lungs)
    said = ptxdist(*again, "--size", 32, "--workers", 1, code=CatalogError.exit_code)
    assert "show lung, not pneumothorax: give --finding 'lung', or another cache with --out" in " ".join(said.split())
    with pytest.raises(RunError, match=r"one segments lung, and the masks in .* show pneumothorax"):
        evaluate_elsewhere([bundle], cache, folder=tmp_path / "elsewhere")
    card, network = load_model(bundle)
    with pytest.raises(CheckpointError, match="one segments lung and other pneumothorax; use models of one finding"):
        Predictor([card, card.model_copy(update={"finding": PNEUMOTHORAX, "name": "other"})], [network] * 2,
                  choose_device("cpu"))  # fmt: skip
    former = read_evaluation(run / EVALUATION)
    (tmp_path / "other").mkdir()
    for name in ("cases.csv", "predictions.csv"):
        (tmp_path / "other" / name).write_bytes((run / EVALUATION / name).read_bytes())
    files.write_json(tmp_path / "other" / RESULT, former.model_copy(update={"finding": PNEUMOTHORAX}))
    with pytest.raises(RunError, match=r"other is about pneumothorax and .*run about lung"):
        compare([run, tmp_path / "other"])


def test_fine_tuning_a_model_of_another_finding_is_possible_and_said(folder: Path, cache: Path, tmp_path: Path) -> None:
    place = str(folder / "one.toml")
    options = {"data.cache": str(cache), "pipeline.model.init": str(folder / "model.ptxdist")}
    parent = plan_run(load_settings(place, options=options), tmp_path / "run").origin.parent
    assert parent is not None
    assert parent.finding == LUNG
    assert "It was trained for another finding: lung." in made_from(parent)
    same = {**options, "data.cache": str(folder / "cache")}
    parent = plan_run(load_settings(place, options=same), tmp_path / "same").origin.parent
    assert parent is not None
    assert parent.finding is None


def test_phantoms_show_no_lungs_to_learn(folder: Path, tmp_path: Path) -> None:
    settings = load_settings(
        str(folder / "one.toml"), assignments=["stages.1.phantoms=8"], options={"data.cache": str(folder / "cache")}
    )
    with pytest.raises(SettingsError, match=r"stages\.1\.phantoms draws .*, and the masks in .* show lung; leave this"):
        plan_run(settings, tmp_path / "run")


def test_a_cache_that_was_made_anew_with_another_finding_is_not_that_of_the_run(folder: Path, cache: Path) -> None:
    with pytest.raises(RunError, match="run segments lung, and the masks in its cache show pneumothorax now"):
        refuse_other_split(folder / "run", read_catalog(cache), 0)


def test_the_findings_of_the_package() -> None:
    assert (PNEUMOTHORAX.name, PNEUMOTHORAX.code[0], PNEUMOTHORAX.category[0]) == (
        "pneumothorax",
        "36118008",
        "49755003",
    )
    assert Limits(
        median_area=1 / 2000, large_area=1 / 4, inverted_above=1 / 2, constant_dice=0.5, mirror_lead=0.4,
        upper=(0.3, 0.7), parts=1,
    ) == PNEUMOTHORAX_LIMITS  # fmt: skip
    for name in ("pleural effusion", "Pleural_Effusion", "nodule", "consolidation", "LUNG"):
        assert load_finding(name)[0].is_other(PNEUMOTHORAX)


def test_a_finding_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[heart]\none = "a heart"\ncode = ["80891009", "Heart"]\nmasks.large_area = 0.4\n')
    found, limits = load_finding(str(path))
    assert (found.name, found.title, found.code) == ("heart", "Heart", ("80891009", "Heart"))
    assert limits == Limits(large_area=0.4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "cannot be read: No such file"),
        ("[heart", "is not TOML"),
        ("", "describes 0 findings; a cache has one"),
        ('one = "a heart"', "one stands outside a table, such as [pneumothorax]"),
        ('[heart]\none = "a heart"', "heart.code: Field required"),
        ('[heart]\none = "a heart"\ncode = ["x", "Heart"]', "heart: Value error, a code has 6 to 16 digits"),
        (
            '[heart]\none = "a heart"\ncode = ["80891009", "Heart"]\nplural = "hearts"',
            "heart.plural: Unexpected keyword",
        ),
        ('[heart]\none = "a heart"\ncode = ["80891009", "Heart"]\nmasks.upper = 1', "heart.masks.upper: Input should"),
    ],
)
def test_a_file_that_describes_no_finding_is_refused(tmp_path: Path, text: str | None, expected: str) -> None:
    path = tmp_path / "mine.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_finding(str(path))
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)
    with pytest.raises(SettingsError, match="unknown finding 'heart'; known are pneumothorax, pleural effusion, nod"):
        load_finding("heart")
