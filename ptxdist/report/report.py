"""Run folder -> a report to look at: one HTML page with its pictures inside, and the pictures as files.

Owns: what is shown. Refuses: unfinished runs. Called by: `cli`. Everything comes from the files of the run and from the
cache; no network is run, no patient identifier is shown. How it looks stands in `page` and `charts`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ptxdist import __version__
from ptxdist.cache.catalog import Catalog, hold_out, read_catalog
from ptxdist.cache.duplicates import read_pairs
from ptxdist.cache.manifest import read_manifest
from ptxdist.cache.store import Store, open_store, store_path
from ptxdist.errors import RunError
from ptxdist.records import EvaluationResult
from ptxdist.report import model_card, tables
from ptxdist.report.figures import PLATEAU, learning_curves, reliability, size_against_dice, tuned_surface
from ptxdist.report.gallery import draw_galleries
from ptxdist.report.page import Page, Pairs, Row, Table, render
from ptxdist.rundir import CASES, ENVIRONMENT, REPORT, read_metrics, read_result, read_settings
from ptxdist.scores.names import AUROC, ECE, SCORES
from ptxdist.scores.tables import read_cases, read_predictions, refuse_other_split
from ptxdist.storage.caches import local_cache


def write_report(run: Path) -> Path:
    """Write RUN/report anew and return the path of its index.html.

    Raises RunError when the run is not finished, its tables are gone or its cache was split anew, StoreError when its
    cache is gone.
    """
    if (run / CASES).is_file():
        raise RunError(f"{run} is an evaluation; a report is made of a run, such as one of those that were evaluated")
    settings, result = read_settings(run), read_result(run)
    cache = local_cache(settings.data.cache, [settings.pipeline.stages[-1].size_px], data=settings.data)
    catalog = read_catalog(cache)
    refuse_other_split(run, catalog, fold := settings.pipeline.fold)
    if fold:
        catalog = hold_out(catalog, fold, read_pairs(cache))
    store = _sharpest_store(cache, settings.pipeline.stages[-1].size_px)
    rows, predictions, evaluation = read_cases(run), read_predictions(run), result.evaluation
    draft = run / (REPORT + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    (draft / "overlays").mkdir(parents=True)
    galleries = draw_galleries(rows, predictions, catalog.labelled, store, draft / "overlays")
    environment = _read_environment(run)
    page = Page(
        name=settings.pipeline.name,
        purpose=settings.pipeline.purpose,
        lead=_lead(evaluation),
        warnings=_warnings(evaluation, catalog),
        tiles=tables.tiles(evaluation),
        scores=tables.score_table(evaluation),
        operating=tuple(chart for chart in map(tuned_surface, evaluation.tuned) if chart),
        operating_words=tables.tuned_words(evaluation),
        operating_forest=tables.operating_forest(evaluation),
        forests=tables.subgroup_forests(evaluation),
        calibration=tuple(map(reliability, evaluation.calibration)),
        sizes=tuple(size_against_dice(rows)),
        galleries=tuple(galleries),
        curves=tuple(learning_curves(result, read_metrics(run))),
        stages=tables.stage_table(result),
        reconciliation=model_card.reconciliation(catalog),
        sides=Table(
            "Who trains and who validates",
            ("", "training", "held out"),
            tuple(Row(name, (train, val)) for name, train, val in model_card.sides(catalog)),
        ),
        leakage=tables.shared_table(shared) if (shared := evaluation.shared_patients) else None,
        leakage_words=model_card.leakage_words(catalog),
        evidence=catalog.evidence,
        rejected=model_card.rejected(catalog),
        card=model_card.model_card(settings, result, catalog, environment),
        definitions=_definitions(),
        foot=f"Written by ptxdist {__version__} from the files of the run. It fetches nothing and runs no script.",
    )
    (draft / "index.html").write_text(render(page), encoding="utf-8")
    shutil.rmtree(run / REPORT, ignore_errors=True)
    draft.replace(run / REPORT)
    return run / REPORT / "index.html"


def _sharpest_store(cache: Path, size_px: int) -> Store:
    """The largest finished store of a cache, for pictures; the last stage's own where there is no other."""
    there = {size: record for size, record in read_manifest(cache).sizes.items() if store_path(cache, size).is_dir()}
    whole = [size for size, record in there.items() if record.complete]
    return open_store(cache, max([size_px, *whole]))


def _read_environment(run: Path) -> dict[str, Any]:
    path = run / ENVIRONMENT
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _lead(evaluation: EvaluationResult) -> str:
    scores, folds = evaluation.scores, evaluation.folds
    how = ["with" if evaluation.flip_averaging else "without", "horizontal-flip averaging"]
    if evaluation.runs > 1:
        how += ["over", f"{evaluation.runs} runs"]
    if len(folds) > 1:
        how += [f"; {len(folds)} folds together, each scored by the run that has not seen it"]
    return (
        f"{scores.cases:,} held-out images, {scores.positives:,} with a pneumothorax, at their original resolution, "
        f"{' '.join(how)}. Bars: 95 % intervals from a bootstrap over patients. Dashed: the number without any model."
    ).replace(" ;", ";")


def _warnings(evaluation: EvaluationResult, catalog: Catalog) -> Pairs:
    scores, found = evaluation.scores, []
    if scores.equals_all_empty:
        found.append(
            (
                "This run equals predicting nothing.",
                "Not a single px is predicted in any held-out image. The Kaggle Dice is the share of images without a "
                "pneumothorax, and says nothing of the model.",
            )
        )
    elif scores.kaggle_dice <= scores.all_empty_dice:
        found.append(
            (
                "This run is no better than predicting nothing.",
                f"Its Kaggle Dice is {tables.number(scores.kaggle_dice)}; empty masks for all images score "
                f"{tables.number(scores.all_empty_dice)}.",
            )
        )
    if catalog.leakage.grouped_by == "nothing":
        found.append(
            (
                "Patients are not known.",
                "One patient may stand on both sides of the split, and the scores may be too good.",
            )
        )
    elif catalog.leakage.shared_cases:
        found.append(
            (
                "Some patients are on both sides of the split.",
                f"{catalog.leakage.shared_cases:,} held-out images share a patient with training; see Data.",
            )
        )
    if not evaluation.calibration:
        found.append(
            (
                "This run was evaluated by an older ptxdist.",
                "Operating points, subgroups and calibration are missing; `ptxdist evaluate RUN` adds them.",
            )
        )
    return tuple(found)


def _definitions() -> Pairs:
    return (
        *((score.name, score.definition) for score in (*SCORES.values(), AUROC, ECE)),
        (
            "95 % interval",
            "Percentile interval of a bootstrap that draws patients, not images: images of one patient are alike.",
        ),
        (
            "Threshold",
            "A px belongs to the mask from this probability on; smaller masks than the area given are emptied.",
        ),
        (
            "Tuned point",
            "The operating point with the best Kaggle Dice. Optimistic: scored on the images that it was chosen on. "
            "Cross-fitted: each image scored at the point that was chosen on other patients.",
        ),
        (
            "Plateau",
            f"Operating points whose Kaggle Dice is within {PLATEAU:g} of the best one's: the choice is not sharp.",
        ),
        ("Small group", "A subgroup with too few images to conclude anything from."),
        ("px", "Areas are in px of the original image."),
    )
