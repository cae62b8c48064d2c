"""The report of a real, tiny run: its numbers are the run's, its texts are escaped, and a browser shows all of it."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, CONTRAST, Browser, browser
from safetensors.numpy import load_file
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from ptxdist.cache.catalog import Case
from ptxdist.errors import RunError
from ptxdist.files import write_json
from ptxdist.predict.bundle import describe_run
from ptxdist.records import SYNTHETIC, Intervals, Scores, TunedPoint
from ptxdist.report.charts import Series, linear_axis, plot
from ptxdist.report.page import Chart, Section
from ptxdist.report.report import write_report
from ptxdist.report.sections import RunData, sections
from ptxdist.report.tables import shared_table
from ptxdist.resolve import load_settings
from ptxdist.run.pipeline import run_pipeline
from ptxdist.run.plan import plan_run
from ptxdist.rundir import CASES, EVALUATION, HISTOGRAMS, RESULT, SETTINGS, read_result, read_settings
from ptxdist.scores.analysis import Evaluated, conclude
from ptxdist.scores.counts import CaseCounts
from ptxdist.scores.headline import digits, number, short
from ptxdist.scores.metrics import scores
from ptxdist.scores.tables import FIXED_THRESHOLDS
from ptxdist.train import augment, losses
from ptxdist.train.encoders import ENCODERS, Encoder
from ptxdist.train.features import Features

PURPOSE = "look at <script>alert('purpose')</script> & \"quotes\""
VOID = {"meta", "img", "br", "input"}


class Element:
    """A tag of a page with its attributes, its text and what is inside."""

    def __init__(self, tag: str, attributes: dict[str, str]) -> None:
        self.tag, self.attributes = tag, attributes
        self.inside: list[Element] = []
        self.words: list[str] = []

    def all(self, tag: str) -> Iterator[Element]:
        """Every element of this tag below, in order."""
        for item in self.inside:
            if item.tag == tag:
                yield item
            yield from item.all(tag)

    def everything(self) -> Iterator[Element]:
        """Every element below, in order."""
        for item in self.inside:
            yield item
            yield from item.everything()

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


class Reader(HTMLParser):
    """A page as a tree; ValueError where a tag is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("", {})]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attributes})
        self.open[-1].inside.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.open[-1].inside.append(Element(tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag: str) -> None:
        if self.open.pop().tag != tag:
            raise ValueError(f"</{tag}> at {self.getpos()} closes another tag")

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.words.append(data)


def read(path: Path) -> Element:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert len(reader.open) == 1, "every tag is closed"
    return reader.open[0]


class TinyEncoder(Features):
    """Five convolutions with stride 2 and their outputs, since ResNet-34 takes most of the time of these tests."""

    channels = (8, 8, 8, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(before, 8, 3, 2, 1) for before in (3, 8, 8, 8, 8))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Features of an image (B, 3, H, W)."""
        return list(accumulate(self.layers, lambda features, layer: layer(features).relu(), initial=image))[1:]


@pytest.fixture(scope="module")
def encoder() -> Iterator[str]:
    """The name of an encoder that no user has."""
    ENCODERS["tiny"] = Encoder("Lilliput", TinyEncoder, "this test", "TinyEncoder")
    yield "tiny"
    del ENCODERS["tiny"]


@pytest.fixture(scope="module")
def run(encoder: str, described_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the smoke pipeline at 32 and 64 pixels, with its report; nothing may write to it."""
    settings = load_settings(
        "smoke",
        assignments=[
            "stages.1.size_px=32",
            "stages.2.size_px=64",
            "stages.*.batch_size=4",
            "train.device=cpu",
            f"pipeline.model.encoder={encoder}",
            "pipeline.model.decoder_channels=[16, 8, 8, 8, 8]",
        ],
        options={"data.cache": str(described_cache), "pipeline.purpose": PURPOSE},
    )
    run = tmp_path_factory.mktemp("report") / "run"
    run_pipeline(plan_run(settings, run))
    write_report(run)
    return run


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    return run / "report" / "index.html"


@pytest.fixture(scope="module")
def root(page: Path) -> Element:
    return read(page)


def table(root: Element, caption: str) -> dict[str, list[str]]:
    """Cells of each row of a table, by the row's name."""
    found = next(item for item in root.all("table") if next(item.all("caption")).text.startswith(caption))
    return {
        next(row.all("th")).text: [cell.text for cell in row.all("td")]
        for row in found.all("tr")
        if list(row.all("td")) and list(row.all("th"))
    }


def shown(value: float | None) -> str:
    """With two digits, since the intervals of a dozen images are wide."""
    return "n/a" if value is None else f"{value:.2f}"


def six(found: Scores, intervals: Intervals | None = None) -> list[str]:
    names = ("kaggle_dice", "positive_dice", "pooled_dice", "pooled_iou", "sensitivity", "specificity")
    return [number(getattr(found, name), digits((intervals or {}).get(name))) for name in names]


def used(run: Path) -> TunedPoint:
    """The point that `predict` uses."""
    point = describe_run(run)[0].operating_point
    return next(item for item in read_result(run).evaluation.tuned if item.point == point)


def test_headline_numbers_are_those_of_the_point_that_predict_uses(run: Path, root: Element) -> None:
    evaluation, point = read_result(run).evaluation, used(run)
    tiles = [item for item in root.all("li") if item.attributes.get("class") == "tile"]
    values = [next(part for part in tile.all("div")).text for tile in tiles]
    kaggle, positive, _, _, sensitivity, specificity = six(point.estimate)
    assert values == [kaggle, positive, sensitivity, specificity]
    low, high = point.intervals["kaggle_dice"]
    section = next(item for item in root.all("section") if item.attributes["id"] == "result")
    assert f"Kaggle Dice {kaggle}; predicting nothing scores {shown(evaluation.scores.all_empty_dice)}" in section.text
    assert f"that predict and serve use: tuned {short(point.point)}, scored on images" in section.text
    assert f"95 % interval {shown(low)} to {shown(high)}" in tiles[0].text
    assert f"predicting nothing: {shown(evaluation.scores.all_empty_dice)}" in tiles[0].text


def test_every_operating_point_is_in_the_table(run: Path, root: Element) -> None:
    evaluation = read_result(run).evaluation
    rows = table(root, "Scores at the original resolution")
    wanted = {"threshold 0.5": evaluation.scores, "threshold 0.55": evaluation.at_other_thresholds["0.55"]}
    wanted |= {f"tuned {short(tuned.point)}": tuned.estimate for tuned in evaluation.tuned}
    assert evaluation.tuned, "the cache has patients enough"
    assert next(iter(rows)).startswith(f"tuned {short(used(run).point)} in use")
    assert f"{shown(used(run).scores.kaggle_dice)}, is optimistic" in root.text
    for name, found in wanted.items():
        cells = next(cells for row, cells in rows.items() if row.startswith(name))
        assert [cell.split()[0] for cell in cells] == six(found)
    assert rows["predicting nothing"][0] == shown(evaluation.scores.all_empty_dice)


def test_subgroups_are_those_of_the_point_in_use_and_small_ones_are_folded(run: Path, root: Element) -> None:
    kind, groups = used(run).kind, read_result(run).evaluation.subgroups
    assert all(group.small for group in groups)
    folded = next(item for item in root.all("details") if next(item.all("summary")).text.endswith("conclusions from"))
    with open(run / EVALUATION / CASES, newline="") as file:
        cases = list(csv.DictReader(file))
    for field, caption in (("sensitivity", "Sensitivity"), ("specificity", "Specificity")):
        rows = table(folded, caption)
        for by in ("view", "sex"):
            for name in {case[by] for case in cases}:
                wanted = "1" if field == "sensitivity" else "0"
                marked = [
                    int(case[f"{kind}_predicted_px"]) > 0
                    for case in cases
                    if case[by] == name and case["positive"] == wanted
                ]
                if marked:
                    share = np.mean(marked) if field == "sensitivity" else 1 - np.mean(marked)
                    assert float(rows[name][2].split()[0]) == pytest.approx(share, abs=0.0051)
                    assert rows[name][0] == str(len(marked))
    assert {group.by for group in groups} >= {"view", "sex", "age"}


def test_stages_and_shared_patients_are_those_of_the_run(run: Path, root: Element) -> None:
    result = read_result(run)
    stages = table(root, "Best epoch of each stage")
    for stage in result.stages:
        cells = next(cells for row, cells in stages.items() if row.startswith(f"stage {stage.stage}"))
        assert cells[2:] == [f"{stage.best.val_loss:.4f}", *six(stage.best.at_full)]
    shared = result.evaluation.shared_patients
    assert shared is not None
    assert shared.apart is not None
    assert shared_table(shared) == (), "of no held-out image"
    (both,) = shared_table(shared.model_copy(update={"shared": shared.apart}))
    assert [row.name for row in both.rows] == ["patient is in training", "patient is not in training"]
    wanted = [str(shared.apart.cases), str(shared.apart.positives), *six(shared.apart, shared.apart_intervals)]
    assert [str(cell).split("<")[0] for cell in both.rows[1].cells] == wanted


def test_the_numbers_can_be_computed_again_from_the_table_of_cases(run: Path, root: Element) -> None:
    with open(run / EVALUATION / CASES, newline="") as file:
        rows = list(csv.DictReader(file))
    counts = np.array([[int(row[f"{name}_px"]) for name in ("intersection", "predicted", "truth")] for row in rows])
    again = scores(counts)
    assert again == read_result(run).evaluation.scores
    cells = table(root, "Scores at the original resolution")["threshold 0.5"]
    assert [cell.split()[0] for cell in cells] == six(again)
    kind = used(run).kind
    by_id = {row["case_id"]: row for row in rows}
    cases = [item for item in root.all("figure") if item.attributes.get("class") == "case"]
    assert cases
    for case in cases:
        row = by_id[next(case.all("span")).text or list(case.all("span"))[-1].text]
        overlap, predicted = int(row[f"{kind}_intersection_px"]), int(row[f"{kind}_predicted_px"])
        truth = int(row["truth_px"])
        assert f"Dice {2 * overlap / (predicted + truth):.2f}" in case.text
        assert f"truth {truth:,}, prediction {predicted:,} pixels" in case.text
        assert (
            predicted
            or not next(path for path in case.all("path") if path.attributes["class"] == "prediction").attributes["d"]
        )


def test_the_whole_page_can_be_made_again_from_the_tables_of_the_run(run: Path, page: Path, tmp_path: Path) -> None:
    """Every number, interval and chart comes from cases.csv, those of pixels from histograms.safetensors."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    evaluation = read_result(run).evaluation
    assert not evaluation.scores.equals_all_empty
    thresholds = list(dict.fromkeys((evaluation.threshold, *FIXED_THRESHOLDS)))
    with open(run / EVALUATION / CASES, newline="") as file:
        rows = list(csv.DictReader(file))

    def column(name: str) -> np.ndarray:
        return np.array([float(row[name]) for row in rows])

    def counts(start: str) -> np.ndarray:
        names = (f"{start}intersection_px", f"{start}predicted_px", "truth_px")
        return np.stack([column(name) for name in names], axis=1).astype(np.int64)

    cases = [
        Case(
            *(row["case_id"], "", "", int(row["rows"]), int(row["columns"]), row["group"]),
            ("",) * int(row["masks"]), int(row["truth_px"]), row["view"], row["sex"],
            int(row["age"]) if row["age"] else None, int(row["fold"]),
        )
        for row in rows
    ]  # fmt: skip
    again = CaseCounts(
        loss=np.zeros(len(rows)),
        score=column("score"),
        at_stage=np.zeros((len(rows), 3), np.int64),
        at_full=np.stack([counts(""), *(counts(f"at_{threshold}_") for threshold in thresholds[1:])]),
        histograms=load_file(run / EVALUATION / HISTOGRAMS)["histograms"],
        brightness=column("brightness"),
    )
    assert evaluation.shared_patients is not None
    evaluated = Evaluated(
        cases,
        again,
        [row["group"] for row in rows],
        [bool(int(row["patient_in_training"])) for row in rows],
        evaluation.shared_patients.known_from,
    )
    found, _ = conclude(
        evaluated,
        thresholds,
        min_area_px=evaluation.min_area_px,
        flip_averaging=evaluation.flip_averaging,
        runs=evaluation.runs,
    )
    write_json(copy / EVALUATION / RESULT, found)
    write_json(copy / RESULT, read_result(run).model_copy(update={"evaluation": found}))
    assert write_report(copy).read_bytes() == page.read_bytes()


def test_headline_numbers_are_those_of_other_libraries(run: Path, root: Element) -> None:
    """From cases.csv, without the package's functions."""
    with open(run / EVALUATION / CASES, newline="") as file:
        rows = list(csv.DictReader(file))
    kind = used(run).kind
    overlap, predicted, truth, score = (
        np.array([float(row[name]) for row in rows])
        for name in (f"{kind}_intersection_px", f"{kind}_predicted_px", "truth_px", "score")
    )
    positive, total = truth > 0, predicted + truth
    dice = np.array([2 * float(a) / float(b) if b else 1.0 for a, b in zip(overlap, total, strict=True)])
    observed, expected = calibration_curve(positive, score, n_bins=10)
    size = np.histogram(score, np.linspace(0, 1, 11))[0]
    error = np.average(np.abs(observed - expected), weights=size[size > 0])
    marked = predicted > 0
    wanted = (np.mean(dice), dice[positive].mean(), np.mean(marked[positive]), 1 - np.mean(marked[~positive]))
    tiles = [item for item in root.all("li") if item.attributes.get("class") == "tile"]
    assert [next(part for part in tile.all("div")).text for tile in tiles] == [f"{value:.2f}" for value in wanted]
    assert f"predicting nothing: {np.mean(~positive):.2f}" in tiles[0].text
    titles = [item.text for item in root.all("figcaption")]
    assert any(title.startswith(f"ROC curve, AUROC {roc_auc_score(positive, score):.2f}") for title in titles)
    assert f"Images: calibration error {error:.2g}" in titles


def test_the_model_card_names_encoder_loss_and_augmentation_by_their_own_words(run: Path, root: Element) -> None:
    card = next(item for item in root.all("section") if item.attributes["id"] == "model-card").text
    stage = read_settings(run).pipeline.stages[0]
    assert "U-Net: Lilliput encoder, started from random weights" in card
    assert f"{losses.chosen(stage).words}, augmentation: {augment.in_words(stage.augmentation)}" in card


def test_texts_are_escaped(page: Path, root: Element) -> None:
    text = page.read_text(encoding="utf-8")
    assert not list(root.all("script"))
    assert not list(root.all("b"))
    assert "alert('purpose')" in unescape(text)
    assert "has <script>alert(1)</script> & no pixels" in root.text
    assert "<b>a mask</b> ends past" in root.text


def test_nothing_is_fetched_and_nobody_is_named(page: Path, root: Element, run: Path, described_cache: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "http:" not in text
    assert "https:" not in text
    for element in root.everything():
        for name in ("src", "href"):
            assert element.attributes.get(name, "#").startswith(("#", "data:image/"))
    assert not re.search(r"@import|url\(", text)
    for secret in ("salted-group", "Quagmire", str(described_cache.parent), str(run.parent)):
        assert secret not in text


def test_every_picture_and_chart_has_words(root: Element) -> None:
    assert list(root.all("img"))
    assert all(len(image.attributes["alt"]) > 10 for image in root.all("img"))
    for chart in root.all("svg"):
        hidden = chart.attributes.get("aria-hidden") == "true"
        inside = "x" in chart.attributes or "preserveaspectratio" in chart.attributes  # a part of a chart
        assert hidden or inside or len(chart.attributes["aria-label"]) > 20


def test_headings_are_in_order_and_links_lead_somewhere(root: Element) -> None:
    levels = [int(item.tag[1]) for item in root.everything() if re.fullmatch("h[1-6]", item.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    names = [item.attributes["id"] for item in root.everything() if "id" in item.attributes]
    assert len(names) == len(set(names))
    links = [item.attributes["href"] for item in root.all("a")]
    assert {link.removeprefix("#") for link in links} <= set(names)


def test_overlays_are_files_too(run: Path, root: Element) -> None:
    files = sorted((run / "report" / "overlays").glob("*.png"))
    assert len(files) == len([item for item in root.all("figure") if item.attributes.get("class") == "case"])
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_a_run_that_predicts_nothing_says_so_at_once(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    with open(copy / EVALUATION / CASES, newline="") as file:
        truth = [int(row["truth_px"]) for row in csv.DictReader(file)]
    empty = scores(np.array([[0, 0, area] for area in truth]))
    result = read_result(copy)
    evaluation = result.evaluation.model_copy(update={"scores": empty, "tuned": ()})
    write_json(copy / EVALUATION / RESULT, evaluation)
    write_json(copy / RESULT, result.model_copy(update={"evaluation": evaluation}))
    root = read(write_report(copy))
    warning = next(item for item in root.all("p") if item.attributes.get("class") == "warning")
    assert warning.text.startswith("This run equals predicting nothing.")
    rows = table(root, "Scores at the original resolution")
    assert any(name.endswith("equals predicting nothing") for name in rows)
    assert not list(read(run / "report" / "index.html").all("script"))


def test_a_run_on_phantoms_says_above_its_scores_and_in_the_model_card_what_it_is_for(
    run: Path, tmp_path: Path
) -> None:
    def marked(data: RunData) -> tuple[Section, ...]:
        return sections(dataclasses.replace(data, catalog=dataclasses.replace(data.catalog, synthetic=True)))

    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("*.safetensors"))
    root = read(write_report(copy, sections=marked))
    said = [item.attributes["id"] for item in root.all("section") if SYNTHETIC in item.text]
    assert said == ["result", "model-card"]
    assert SYNTHETIC not in (run / "report" / "index.html").read_text()


@pytest.mark.parametrize("later", [False, True])
def test_a_stage_that_collapsed_and_one_whose_masks_do_not_pay_are_named_with_the_training(
    run: Path, tmp_path: Path, later: bool
) -> None:
    """Runs of older versions too: the report finds it in the epochs."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("stages"))
    settings = json.loads((copy / SETTINGS).read_text().replace('"epochs": 1', '"epochs": 6'))
    write_json(copy / SETTINGS, settings)
    result = read_result(copy)
    poor, empty = scores(np.array([[5, 20, 20], [0, 9, 0], [0, 9, 0]])), scores(np.array([[0, 0, 20], [0, 0, 0]]))
    epochs = [
        result.stages[0].best.model_copy(update={"epoch": number, "at_full": found})
        for number, found in enumerate([empty] * 5 + [poor if later else empty], start=1)
    ]
    stages = (
        result.stages[0].model_copy(update={"history": tuple(epochs), "best": epochs[0]}),
        result.stages[1].model_copy(update={"history": (epochs[0].model_copy(update={"at_full": poor}),)}),
    )
    stages = (stages[0], stages[1].model_copy(update={"best": stages[1].history[0]}))
    write_json(copy / RESULT, result.model_copy(update={"stages": stages}))
    training = next(item for item in read(write_report(copy)).all("section") if item.attributes["id"] == "training")
    found = [item.text for item in training.all("p") if item.attributes.get("class") == "warning"]
    assert len(found) == 2
    assert found[0].startswith("Stage 1 has collapsed to empty masks. In epoch 4 of 6, 0 % of the images get a mask")
    assert ("Later epochs have masks again. " in found[0]) == later
    assert "--set stages.1.dice=batch" in found[0]
    assert found[1].startswith("The masks of stage 2 do not raise the Kaggle Dice. 100 % of the positive and 100 % of")


def test_a_new_chart_is_a_function_and_a_line_in_the_list_of_sections(run: Path, tmp_path: Path) -> None:
    def stages_over_time(data: RunData) -> list[Chart]:
        points = tuple((float(stage.stage), stage.seconds) for stage in data.result.stages)
        axes = linear_axis("stage", 0, 3), linear_axis("seconds", 0, max(point[1] for point in points))
        return [Chart("Seconds of <each> stage", plot(*axes, [Series("all", 1, (points,))], words="Seconds by stage."))]

    def more(data: RunData) -> list[Section]:
        return [*sections(data), Section("time", "Time", (*stages_over_time(data),)), Section("none", "Empty", ())]

    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    root = read(write_report(copy, sections=more))
    found = next(item for item in root.all("section") if item.attributes["id"] == "time")
    assert next(found.all("figcaption")).text == "Seconds of <each> stage"
    assert [item.attributes["aria-label"] for item in found.all("svg") if "role" in item.attributes] == [
        "Seconds by stage."
    ]
    assert [link.text for link in next(root.all("nav")).all("a")][-2:] == ["Definitions", "Time"]


@pytest.mark.parametrize("command", ["report", "compare"])
def test_report_and_compare_load_neither_torch_nor_ray(run: Path, tmp_path: Path, command: str) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("best.safetensors"))
    settings = copy / SETTINGS
    write_json(settings, json.loads(settings.read_text().replace('"tiny"', '"resnet34"')))
    words = [command, str(copy)] if command == "report" else [command, str(run), str(copy)]
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "ptxdist", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert f"ptxdist.{'report.report' if command == 'report' else 'scores.compare'}" in loaded
    assert loaded & {"torch", "torchvision", "ray", "albumentations"} == set()


def test_a_run_of_an_older_version_has_a_report_that_says_what_is_missing(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    old = json.loads((copy / RESULT).read_text())
    for name in ("auroc", "tuned", "calibration", "subgroups", "shared_patients"):
        del old["evaluation"][name]
    write_json(copy / EVALUATION / RESULT, old["evaluation"])
    write_json(copy / RESULT, old)
    root = read(write_report(copy))
    warnings = [item.text for item in root.all("p") if item.attributes.get("class") == "warning"]
    assert any("`ptxdist evaluate RUN` adds them" in text for text in warnings)
    assert not [item for item in root.all("section") if item.attributes["id"] in ("calibration", "subgroups")]
    points = list(table(root, "Scores at the original resolution"))
    assert points == ["threshold 0.5 in use", "threshold 0.55", "predicting nothing"]


def test_the_former_report_stays_until_the_new_one_is_there(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    before = (copy / "report" / "index.html").read_bytes()
    (copy / EVALUATION / CASES).unlink()
    with pytest.raises(RunError, match="ptxdist evaluate"):
        write_report(copy)
    assert (copy / "report" / "index.html").read_bytes() == before


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (chromium, chromium-browser or google-chrome in PATH)")
    with browser(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (360, False)])
def test_a_browser_shows_it_without_complaint(chromium: Browser, page: Path, width: int, dark: bool) -> None:
    chromium.open(page.as_uri(), width, dark=dark)
    assert chromium.complaints() == []
    fetched = [url for url in chromium.requests() if not url.startswith("data:")]
    assert fetched == [page.as_uri()]
    assert chromium.run("[...document.images].length > 0 && [...document.images].every(item => item.naturalWidth > 0)")
    assert chromium.run("document.documentElement.scrollWidth") <= width, "no horizontal scrolling of the page"
    small = (
        "[...document.querySelectorAll('svg.chart')].filter(item => item.getBoundingClientRect().height < 100).length"
    )
    assert chromium.run(small) == 0


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_enough_contrast(chromium: Browser, page: Path, dark: bool) -> None:
    """Contrast of at least 4.5 to 1 (WCAG AA) for all text, in both modes."""
    chromium.open(page.as_uri(), 1280, dark=dark)
    assert chromium.run(CONTRAST) == []


def test_outlines_can_be_switched_off_and_a_case_be_enlarged(chromium: Browser, page: Path) -> None:
    chromium.open(page.as_uri(), 1280)
    visible = "getComputedStyle(document.querySelector('.picture .truth')).visibility"
    assert chromium.run(visible) == "visible"
    chromium.run("document.getElementById('show-truth').click()")
    assert chromium.run(visible) == "hidden"
    width = "document.querySelector('#case-1 img').getBoundingClientRect().width"
    before = chromium.run(width)
    chromium.run("document.querySelector('#case-1 .enlarge').click()")
    chromium.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert chromium.run(width) > 1.5 * before


def test_everything_is_reached_and_used_with_the_keyboard(chromium: Browser, page: Path) -> None:
    chromium.open(page.as_uri(), 1280)
    chromium.press("Tab", 9)
    skip = chromium.run("[document.activeElement.className, document.activeElement.getBoundingClientRect().top >= 0]")
    assert skip == ["skip", True], "the first stop, in sight once it has the focus"
    stops = (
        "[...document.querySelectorAll('a, input, summary, [tabindex=\"0\"]')].filter(item => item.checkVisibility())"
    )
    wanted = chromium.run(f"({stops}).length")
    assert wanted > 20
    reached = 1
    while chromium.run("document.activeElement !== document.body") and reached <= wanted:
        assert chromium.run("getComputedStyle(document.activeElement).outlineStyle") == "solid", "one sees where one is"
        if chromium.run("document.activeElement.id") == "show-truth":
            chromium.press(" ", 32, " ")
        chromium.press("Tab", 9)
        reached += chromium.run("document.activeElement !== document.body")
    assert reached == wanted
    assert chromium.run("getComputedStyle(document.querySelector('.picture .truth')).visibility") == "hidden"
    chromium.run("document.querySelector('#case-1 .enlarge').focus()")
    chromium.press("Enter", 13, "\r")
    assert chromium.run("location.hash") == "#case-1"


def test_it_prints_in_black_on_white_and_nothing_is_cut_off(chromium: Browser, page: Path, tmp_path: Path) -> None:
    """At the width of A4 without margins, in dark mode too."""
    chromium.open(page.as_uri(), 688, dark=True)
    try:
        scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
        chromium.call("Emulation.setEmulatedMedia", media="print", features=scheme)
        assert chromium.run("document.documentElement.scrollWidth") <= 688
        wide = "[...document.querySelectorAll('.wide')].filter(item => item.scrollWidth > item.clientWidth + 1).length"
        assert chromium.run(wide) == 0
        assert chromium.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert chromium.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    finally:
        chromium.call("Emulation.setEmulatedMedia", media="")
    chromium.print_pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(("width", "height"), [(360, 700), (700, 360)])
def test_outlines_lie_on_an_enlarged_image_of_any_window(
    chromium: Browser, page: Path, width: int, height: int
) -> None:
    chromium.open(f"{page.as_uri()}#case-1", width, height)
    box = (
        "(({x, y, width, height}) => [x, y, width, height])"
        "(document.querySelector('#case-1 %s').getBoundingClientRect())"
    )
    image, outlines = (chromium.run(box % tag) for tag in ("img", "svg"))
    assert image == pytest.approx(outlines, abs=0.5)
    assert image[2] == pytest.approx(image[3], abs=0.5), "a square, as the radiograph"
    assert image[0] >= 0
    assert image[0] + image[2] <= width
