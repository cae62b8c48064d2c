"""Run folder -> a report to look at: one HTML page with its pictures inside, and the pictures as files.

Owns: what is shown and how. Refuses: unfinished runs. Called by: `cli`. Everything comes from the files of the run and
from the cache; no network is run, no patient identifier is shown.
"""

from __future__ import annotations

import base64
import csv
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ptxdist.data import rle
from ptxdist.data.catalog import Case, Catalog, read_catalog
from ptxdist.data.draw import Colour, encode, outline, save
from ptxdist.data.preprocess import fit_square
from ptxdist.data.store import Store, open_store
from ptxdist.rundir import (
    CASES,
    EVALUATION,
    PREDICTIONS,
    REPORT,
    EpochMetrics,
    PipelineResult,
    Scores,
    read_metrics,
    read_result,
    read_settings,
)

DEFINITIONS = {
    "Kaggle Dice": "per-image Dice at the original resolution, averaged over all images; both empty = 1, one empty = 0",
    "positives-only Dice": "the same average over images that have a pneumothorax",
    "pooled Dice": "one Dice over the pixels of all images together",
    "sensitivity": "images with a pneumothorax in which any pixel is predicted",
    "specificity": "images without one in which no pixel is predicted",
}
_GALLERY = 4


@dataclass(frozen=True)
class Shown:
    """One validation case as the report shows it; `index` is its place in the store."""

    index: int
    case: Case
    dice: float
    prediction: str


def write_report(run: Path) -> Path:
    """Write RUN/report anew and return the path of its index.html.

    Raises RunError when the run is not finished, StoreError when its cache is gone.
    """
    settings, result, metrics = read_settings(run), read_result(run), read_metrics(run)
    cache = Path(settings.data.cache)
    catalog = read_catalog(cache)
    store = open_store(cache, settings.pipeline.stages[-1].size_px)
    draft = run / (REPORT + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    (draft / "overlays").mkdir(parents=True)
    galleries = []
    for title, shown in choose(run, catalog).items():
        figures = []
        for number, item in enumerate(shown, start=1):
            picture = _overlay(item, store)
            save(picture, draft / "overlays" / f"{title.split(',')[0].replace(' ', '-')}-{number}.png")
            figures.append(_figure(item, encode(picture, ".jpg")))
        galleries.append(
            f"<h3>{escape(title)}</h3>" + (f"<div class=gallery>{''.join(figures)}</div>" if figures else "<p>none</p>")
        )
    page = _page(settings.pipeline.name, settings.pipeline.purpose, result, metrics, catalog, "".join(galleries))
    (draft / "index.html").write_text(page, encoding="utf-8")
    shutil.rmtree(run / REPORT, ignore_errors=True)
    draft.replace(run / REPORT)
    return run / REPORT / "index.html"


def choose(run: Path, catalog: Catalog) -> dict[str, list[Shown]]:
    """Cases worth looking at: best, median and worst found ones, missed ones, false alarms."""
    position = {case.case_id: (index, case) for index, case in enumerate(catalog.labelled)}
    with open(run / EVALUATION / PREDICTIONS, newline="") as file:
        predictions = {row["ImageId"]: row["EncodedPixels"] for row in csv.DictReader(file)}
    with open(run / EVALUATION / CASES, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["case_id"] in position]

    def pick(chosen: Sequence[dict[str, str]]) -> list[Shown]:
        return [
            Shown(*position[row["case_id"]], float(row["kaggle_dice"]), predictions[row["case_id"]])
            for row in chosen[:_GALLERY]
        ]

    found = sorted(
        (row for row in rows if row["positive"] == "1" and int(row["predicted_px"])),
        key=lambda row: -float(row["kaggle_dice"]),
    )
    missed = [row for row in rows if row["positive"] == "1" and not int(row["predicted_px"])]
    alarms = [row for row in rows if row["positive"] == "0" and int(row["predicted_px"])]
    middle = max(0, (len(found) - _GALLERY) // 2)
    return {
        "best, among those found": pick(found),
        "median, among those found": pick(found[middle:]),
        "worst, among those found": pick(found[::-1]),
        "missed, largest first": pick(sorted(missed, key=lambda row: -int(row["truth_px"]))),
        "false alarms, largest first": pick(sorted(alarms, key=lambda row: -int(row["predicted_px"]))),
    }


def _overlay(item: Shown, store: Store) -> Colour:
    case = item.case
    truth, prediction = (
        fit_square(rle.decode(masks, case.rows, case.columns)) for masks in (case.masks or (), (item.prediction,))
    )
    return outline(store.sample(item.index)[0], truth, prediction)


def _figure(item: Shown, picture: bytes) -> str:
    predicted = rle.area_px([item.prediction], item.case.rows, item.case.columns)
    words = f"Dice {item.dice:.2f}, truth {item.case.area_px:,} px, predicted {predicted:,} px"
    source = base64.b64encode(picture).decode()
    return (
        f'<figure><img alt="Radiograph with outlines; {words}" src="data:image/jpeg;base64,{source}" loading=lazy>'
        f"<figcaption>{words}<br><small>{escape(item.case.case_id)}</small></figcaption></figure>"
    )


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _row(name: str, scores: Scores, *cells: str) -> str:
    values = (scores.kaggle_dice, scores.positive_dice, scores.pooled_dice, scores.sensitivity, scores.specificity)
    note = " (equals predicting nothing)" if scores.equals_all_empty else ""
    return f"<tr><th>{escape(name)}{note}</th>" + "".join(
        f"<td>{cell}</td>" for cell in (*cells, *map(_number, values))
    )


def _page(
    name: str, purpose: str, result: PipelineResult, metrics: list[EpochMetrics], catalog: Catalog, galleries: str
) -> str:
    evaluation, counts, leakage = result.evaluation, catalog.reconciliation, catalog.leakage
    stage_rows = "".join(
        _row(
            f"stage {stage.stage}, {stage.size_px} px",
            stage.best.at_full,
            f"{stage.epochs}",
            f"{stage.best.epoch}{' (averaged)' if stage.best.averaged else ''}",
            f"{stage.best.val_loss:.4f}",
        )
        for stage in result.stages
    )
    fixed = "".join(
        _row(f"threshold {threshold}", scores) for threshold, scores in evaluation.at_other_thresholds.items()
    )
    head = "<th>Kaggle Dice<th>positives-only Dice<th>pooled Dice<th>sensitivity<th>specificity"
    definitions = "".join(f"<dt>{escape(term)}<dd>{escape(text)}" for term, text in DEFINITIONS.items())
    grouping = (
        f"Groups by {leakage.grouped_by}: {leakage.shared_cases} of {leakage.val_cases} validation images share a "
        f"patient with training; a random split of this size would give {leakage.random_shared:.0%} "
        f"({leakage.random_shared_positive:.0%} of the positive ones)."
        if leakage.grouped_by != "nothing"
        else "Nothing is known of patients: PatientID groups nothing and no map was given, so patients may be on both "
        "sides of the split and the numbers may be too good."
    )
    return f"""<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<title>ptxdist: {escape(name)}</title>
<style>
:root {{ color-scheme: light dark; --ink: light-dark(#1b1f24, #e6e8ea); --paper: light-dark(#fff, #14171a);
  --line: light-dark(#d5d9de, #3a4047); --soft: light-dark(#5a646e, #9aa4ae); }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }} .wide {{ overflow-x: auto; }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; font-weight: normal; }}
th:first-child {{ text-align: left; }} thead th, .head th {{ color: var(--soft); }}
.gallery {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }}
figure {{ margin: 0; break-inside: avoid; }} img {{ width: 100%; border-radius: .3rem; }}
figcaption, small, dd {{ color: var(--soft); }} small {{ overflow-wrap: anywhere; }} dd {{ margin: 0 0 .4rem 1.5rem; }}
.key span {{ border-bottom: 3px solid #009e73; }} .key span + span {{ border-bottom: 3px dashed #e69f00; }}
svg text {{ fill: var(--soft); font-size: 12px; }} svg line {{ stroke: var(--line); }}
</style>
<h1>{escape(name)}</h1>
<p>{escape(purpose)}. Research use only; not a medical device.</p>
<h2>Result on {evaluation.scores.cases} held-out images, {evaluation.scores.positives} with a pneumothorax</h2>
<div class=wide><table><tr class=head><th>at the original resolution{head}
{_row(f"threshold {evaluation.threshold} (the stage's own)", evaluation.scores)}{fixed}
<tr><th>predicting nothing at all<td>{_number(evaluation.scores.all_empty_dice)}<td>0.0000<td>0.0000<td>0.0000<td>1.0000
</table></div>
<p>{"With" if evaluation.flip_averaging else "Without"} horizontal-flip averaging; smallest mask kept
{evaluation.min_area_px} px.</p>
<h2>Stages</h2>
<div class=wide><table><tr class=head><th>best epoch of each<th>epochs<th>best<th>loss{head}{stage_rows}</table></div>
{_curves(metrics)}
<h2>Cases</h2>
<p class=key><span>truth</span> &nbsp; <span>prediction</span></p>
{galleries}
<h2>Data</h2>
<p>{counts.files:,} files: {counts.labelled:,} labelled ({counts.positive:,} positive), {counts.unlabelled:,} without a
row in the table, {len(catalog.rejects):,} rejected. The table has {counts.table_rows:,} rows for
{counts.table_images:,} images, {counts.ids_without_file:,} of them without a file. {grouping}</p>
<h2>Definitions</h2><dl>{definitions}</dl>
</html>
"""


def _curves(metrics: list[EpochMetrics]) -> str:
    """Validation Dice and loss over the epochs of all stages, as an inline SVG."""
    points = [item for item in metrics if not item.averaged]
    if len(points) < 2:
        return ""
    width, height, left, top = 900, 260, 40, 20
    highest = min(2.0, max(1.0, *(item.val_loss for item in points)))  # a loss above 2 says no more than 2

    def line(values: Sequence[float | None], colour: str, dash: str) -> str:
        step = (width - left - 20) / (len(points) - 1)
        places = " ".join(
            f"{left + number * step:.1f},{top + (height - 2 * top) * (1 - min(value, highest) / highest):.1f}"
            for number, value in enumerate(values)
            if value is not None
        )
        return f'<polyline points="{places}" fill=none stroke="{colour}" stroke-width=2.5 stroke-dasharray="{dash}" />'

    ticks = "".join(
        f"<line x1={left} x2={width - 20} y1={y:.1f} y2={y:.1f} /><text x=4 y={y + 4:.1f}>{highest * share:.2f}</text>"
        for share in (0, 0.25, 0.5, 0.75, 1)
        for y in [top + (height - 2 * top) * (1 - share)]
    )
    starts = "".join(
        f'<line x1={x:.1f} x2={x:.1f} y1={top} y2={height - top} stroke-dasharray="3 3" />'
        f"<text x={x + 4:.1f} y={top + 12}>stage {item.stage}</text>"
        for number, item in enumerate(points)
        if number == 0 or points[number - 1].stage != item.stage
        for x in [left + number * (width - left - 20) / (len(points) - 1)]
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role=img aria-label="Validation loss and Dice by epoch" width=100%>'
        + ticks
        + starts
        + line([item.val_loss for item in points], "#0072b2", "")
        + line([item.at_full.kaggle_dice for item in points], "#009e73", "")
        + line([item.at_full.positive_dice for item in points], "#e69f00", "7 4")
        + f"<text x={left} y={height - 4}>epochs; blue: validation loss, green: Kaggle Dice, "
        "orange dashed: positives-only Dice</text></svg>"
    )
