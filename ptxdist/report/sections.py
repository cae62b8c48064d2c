"""What a report shows, in which order: the list of its sections.

To add a chart, write a function in `figures` that returns it and add a line to the list of blocks of a section.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ptxdist.cache.catalog import Catalog
from ptxdist.config import Settings
from ptxdist.records import SYNTHETIC, Elsewhere, Environment, EvaluationResult, Origin, PipelineResult, Subgroup
from ptxdist.report import figures, tables
from ptxdist.report.data_card import UNKNOWN_PATIENTS, data_card
from ptxdist.report.gallery import ERRORS
from ptxdist.report.model_card import model_card
from ptxdist.report.page import Block, Facts, Folded, Gallery, Notice, Section, Terms
from ptxdist.scores.analysis import SMALL_CASES, SMALL_POSITIVES, subgroups
from ptxdist.scores.elsewhere import seen_before
from ptxdist.scores.headline import WIDE, digits, number, points, sentences
from ptxdist.scores.intervals import FEWEST
from ptxdist.scores.names import AUROC, ECE, SCORES
from ptxdist.scores.tables import CaseRow
from ptxdist.scores.watchdog import why_not
from ptxdist.train import collapse


@dataclass(frozen=True)
class RunData:
    """Everything a report is made from: the records of a finished run, the catalog of its cache, drawn cases."""

    settings: Settings
    result: PipelineResult
    environment: Environment
    catalog: Catalog
    rows: Sequence[CaseRow]
    galleries: Sequence[Gallery]
    origin: Origin | None = None


def sections(run: RunData) -> tuple[Section, ...]:
    """The sections of a run's report; those without blocks are not shown."""
    result, evaluation, catalog = run.result, run.result.evaluation, run.catalog
    return (
        *_result(evaluation, _warnings(evaluation, catalog), run.galleries),
        *_about_scores(evaluation, catalog, run.rows, run.galleries),
        Section(
            "training", "Training", (*_learning(run), tables.stage_table(result), *figures.learning_curves(result))
        ),
        Section("data", "Data", data_card(catalog, evaluation.shared_patients)),
        Section("model-card", "Model card", model_card(run.settings, result, catalog, run.environment, run.origin)),
        Section("definitions", "Definitions", (_definitions(evaluation, catalog),)),
    )


def sections_elsewhere(
    evaluation: EvaluationResult, catalog: Catalog, rows: Sequence[CaseRow], galleries: Sequence[Gallery]
) -> tuple[Section, ...]:
    """The sections of the report of an evaluation on data from elsewhere, whose catalog is given."""
    about = evaluation.elsewhere
    assert about is not None
    return (
        *_result(evaluation, [*_seen(about), *_warnings(evaluation, catalog)], galleries),
        Section(
            "differences",
            "What is different here",
            tables.profiles(about),
            lead="The evaluated images beside those that the model was trained on. Marks: medians. Bars: 5th to 95th "
            "percentile.",
        ),
        *_about_scores(evaluation, catalog, rows, galleries),
        Section("data", "Data", data_card(catalog, None)),
        Section("definitions", "Definitions", (_definitions(evaluation, catalog),)),
    )


def _seen(about: Elsewhere) -> Iterator[Notice]:
    if about.seen is None:
        yield Notice(
            "Whether the model was trained on some of these images is not known.",
            "It has no fingerprints of its training images: it was trained by an older ptxdist.",
        )
    elif about.seen.case_ids:
        ids, without, rest = about.seen.case_ids, about.seen.without, "No other image is left."
        if without is not None:
            rest = (
                f"Without them, {without.cases:,} images with {without.positives:,} positive: Kaggle Dice "
                f"{number(without.kaggle_dice)} (predicting nothing {number(without.all_empty_dice)}), "
                f"positives-only Dice {number(without.positive_dice)}, pooled Dice {number(without.pooled_dice)}."
            )
        yield Notice(
            "The model was trained on some of these images or patients.",
            f"{seen_before(about.seen)}: {', '.join(ids[:3])}{', …' if len(ids) > 3 else ''}. {rest}",
        )


def _result(
    evaluation: EvaluationResult, warnings: Iterable[Notice], galleries: Sequence[Gallery]
) -> tuple[Section, Section]:
    """The headline numbers, and the images on which the model is wrong."""
    return (
        Section(
            "result",
            "Result",
            (*warnings, *tables.tiles(evaluation)),
            lead=_lead(evaluation),
            headline=" ".join(sentences(evaluation)),
        ),
        Section("cases", "Misses and false alarms", tuple(galleries[:ERRORS]), lead=_outlines(evaluation)),
    )


def _about_scores(
    evaluation: EvaluationResult, catalog: Catalog, rows: Sequence[CaseRow], galleries: Sequence[Gallery]
) -> tuple[Section, ...]:
    """The sections that every evaluation has."""
    tuning: tuple[Block, ...] = tuple(chart for tuned in evaluation.tuned for chart in figures.tuned_surface(tuned))
    if words := tables.operating_points(evaluation):
        tuning = (Folded("How the points were tuned", (Facts(words), *tuning)),)
    return (
        Section(
            "operating-point",
            "Operating points",
            (tables.score_table(evaluation), *tuning),
            lead="First the point in use. Tuned points have the best Kaggle Dice, and are scored on images that they "
            "were not tuned on. To miss fewer images, find a working point with ptxdist evaluate --sensitivity 0.95.",
        ),
        Section(
            "images",
            "Image by image",
            (*figures.roc_curve(evaluation), *figures.size_against_dice(rows), *tables.working_points(evaluation)),
            lead=_auroc(evaluation),
        ),
        Section(
            "subgroups",
            "Subgroups",
            tables.subgroups(points(evaluation)[0], _groups(evaluation, catalog, rows)),
            lead="Masks of the point in use. Bars: 95 % intervals by patient. Dashed: all images.",
        ),
        Section(
            "calibration",
            "Calibration",
            tuple(chart for part in evaluation.calibration for chart in figures.reliability(part)),
            lead="Does a probability of 0.7 mean seven in ten? On the diagonal it does. Below the diagonal the model "
            "predicts too high probabilities, above it too low ones.",
        ),
        Section("more-cases", "Found images", tuple(galleries[ERRORS:]), lead=_outlines(evaluation)),
    )


def _lead(evaluation: EvaluationResult) -> str:
    scores, folds = evaluation.scores, evaluation.folds
    how = f"{'with' if evaluation.flip_averaging else 'without'} horizontal-flip averaging"
    if evaluation.runs > 1:
        how += f" over {evaluation.runs} {'runs' if evaluation.elsewhere is None else 'models'}"
    if len(folds) > 1 and evaluation.elsewhere is None:
        how += f"; {len(folds)} folds together, each scored by the run that was not trained on it"
    images = "held-out images" if evaluation.elsewhere is None else "images from elsewhere"
    return (
        f"{scores.cases:,} {images} at their original resolution, {how}. {_used(evaluation)} "
        "Bars: 95 % intervals by patient. Dashed: the value without a model."
    )


def _used(evaluation: EvaluationResult) -> str:
    """Which operating point the headline numbers are at."""
    used = points(evaluation)[0]
    if evaluation.elsewhere is not None:
        return f"Masks are those of {used.name}, which predict and serve use."
    honest = ", scored on images that it was not tuned on" if used.tuned else ""
    return f"Masks are those of the operating point that predict and serve use: {used.name}{honest}."


def _auroc(evaluation: EvaluationResult) -> str:
    marks = "In the chart of Dice each mark is a positive image, with its mask of the point in use."
    if evaluation.auroc is None:
        return marks
    span = evaluation.intervals.get(AUROC.field)
    interval = tables.interval(span) or "no interval: too few patients"
    return (
        f"The score of an image tells positive from negative images with an AUROC of "
        f"{number(evaluation.auroc, digits(span))} ({interval}; chance 0.5), wherever the mask is. {marks}"
    )


def _groups(evaluation: EvaluationResult, catalog: Catalog, rows: Sequence[CaseRow]) -> Sequence[Subgroup]:
    """The subgroups at the point in use, of the images that are still in the catalog."""
    if points(evaluation)[0].kept or not evaluation.subgroups:
        return evaluation.subgroups
    by_id = {case.case_id: case for case in catalog.labelled}
    rows = [row for row in rows if row.case_id in by_id]
    counts = np.array([row.counts for row in rows], np.int64)
    brightness = np.array([row.brightness for row in rows])
    return tuple(subgroups([by_id[row.case_id] for row in rows], counts, brightness, [row.group for row in rows]))


def _outlines(evaluation: EvaluationResult) -> str:
    if points(evaluation)[0].kept:
        return ""
    kept = next(point for point in points(evaluation) if point.kept).name
    return (
        f"Chosen and counted at the point in use. Outlines are of the masks at {kept}; none is drawn where the point "
        "in use leaves no mask."
    )


def _warnings(evaluation: EvaluationResult, catalog: Catalog) -> Iterator[Notice]:
    used, name = points(evaluation)[0], "This run" if evaluation.elsewhere is None else "The model"
    scores, places = used.scores, digits(used.intervals.get("kaggle_dice"))
    trained_on = evaluation.elsewhere.there if evaluation.elsewhere else catalog
    if trained_on is not None and trained_on.synthetic:
        yield Notice("Synthetic images.", SYNTHETIC)
    if scores.equals_all_empty:
        yield Notice(
            f"{name} equals predicting nothing.",
            "No pixel is predicted in any of the images. The Kaggle Dice is the share of negative images and says "
            "nothing about the model.",
        )
    elif scores.kaggle_dice <= scores.all_empty_dice:
        yield Notice(
            f"{name} is no better than predicting nothing.",
            f"Its Kaggle Dice is {number(scores.kaggle_dice, places)}; empty masks for all images score "
            f"{number(scores.all_empty_dice, places)}.",
        )
    if catalog.leakage.grouped_by == "nothing":
        narrow = "Each image counts as one patient, so intervals may be too narrow."
        yield Notice("Patients are not known.", narrow if evaluation.elsewhere else f"{UNKNOWN_PATIENTS.capitalize()}.")
    elif catalog.leakage.shared_cases and not evaluation.elsewhere:
        yield Notice(
            "Some patients are on both sides of the split.",
            f"{catalog.leakage.shared_cases:,} held-out images share a patient with training; see Data.",
        )
    if not evaluation.calibration:
        yield Notice(
            "This run was evaluated by an older ptxdist.",
            "Operating points, subgroups and calibration are missing; `ptxdist evaluate RUN` adds them.",
        )


def _learning(run: RunData) -> Iterator[Notice]:
    """Stages that have collapsed, or whose masks are not worth predicting."""
    for stage in run.result.stages:
        name, best = f"Stage {stage.stage}", stage.best.at_full
        settings = run.settings.pipeline.stages[stage.stage - 1]
        if (lost := collapse.find(stage.history, settings, stage.stage)) is not None:
            later = "Later epochs have masks again. " if lost.over else ""
            yield Notice(f"{name} has collapsed to empty masks.", f"{lost.words} {later}{lost.cure}")
        elif reason := why_not(best, settings):
            yield Notice(f"The masks of {name.lower()} do not raise the Kaggle Dice.", reason)


def _definitions(evaluation: EvaluationResult, catalog: Catalog) -> Terms:
    return Terms(
        (
            ("Positive image", f"An image with {catalog.finding.one}; it has a mask."),
            *((score.name, score.definition) for score in (*SCORES.values(), AUROC, ECE)),
            (
                "95 % interval",
                "Wilson's interval, whose error comes from leaving out one patient after the other, since images of "
                f"one patient are alike. A score from fewer than {FEWEST} patients has none, nor has the ECE, which in "
                "small samples is too large.",
            ),
            (
                "Threshold",
                "The probability from which on a pixel belongs to the mask. A mask below the smallest area is emptied.",
            ),
            (
                "Tuned point",
                "The operating point with the best Kaggle Dice. Optimistic: scored on the images that it was chosen "
                "on. Cross-fitted, as in tiles and table: each image is scored at the point that was chosen on other "
                "patients.",
            ),
            (
                "Plateau",
                f"Operating points whose Kaggle Dice is within {figures.PLATEAU:g} of the best one. On a large plateau "
                "the exact choice matters little.",
            ),
            (
                "Score",
                "How positive an image looks, 0 to 1: "
                + (
                    "three parts the image head's probability and one part the mean of the highest pixels of the map, "
                    "one in 256. A mask is empty below the image threshold, if there is one."
                    if evaluation.image_head
                    else "the highest probability of its map."
                ),
            ),
            ("Small group", f"A subgroup with fewer than {SMALL_CASES} images or {SMALL_POSITIVES} positive ones."),
            ("Areas", "In pixels of the original image."),
            (
                "Digits",
                f"Two where the 95 % interval is at least {WIDE:g} wide or not given, three or four where it is "
                "narrower. result.json has all digits.",
            ),
        )
    )
