"""The tables of a report: headline numbers, operating points, stages, subgroups, shared patients.

Owns: which numbers stand in which table, their names, definitions and baselines. Refuses: nothing. Called by: `report`.
"""

from __future__ import annotations

from markupsafe import Markup

from ptxdist.records import EvaluationResult, Intervals, PipelineResult, Scores, SharedPatients, Subgroup
from ptxdist.report.charts import draw_interval, linear_axis, ruler
from ptxdist.report.page import Forest, Row, Table, Tile

# name in Scores: (name, definition, what predicting nothing scores; None: the share of negative images)
SCORES: dict[str, tuple[str, str, float | None]] = {
    "kaggle_dice": (
        "Kaggle Dice",
        "Dice of each image at the original resolution, averaged over all images; both empty = 1, one empty = 0.",
        None,
    ),
    "positive_dice": ("Positives-only Dice", "The same average over the images that have a pneumothorax.", 0.0),
    "pooled_dice": ("Pooled Dice", "One Dice over the px of all images together.", 0.0),
    "pooled_iou": ("Pooled IoU", "Intersection over union of the px of all images together.", 0.0),
    "sensitivity": ("Sensitivity", "Share of the images with a pneumothorax in which any px is predicted.", 0.0),
    "specificity": ("Specificity", "Share of the images without one in which no px is predicted.", 1.0),
}
AUROC = (
    "AUROC",
    "Chance that an image with a pneumothorax has a higher score than one without; score: highest probability.",
)
ECE = (
    "ECE of images",
    "Expected calibration error: how far the score of an image is from the share of such images that are positive.",
)
SUBGROUP_SCORES = ("positive_dice", "sensitivity", "specificity")
NOTHING = "equals predicting nothing"
_UNIT, _HALVES = linear_axis("", 0, 1), linear_axis("", 0, 1, ticks=2)


def number(value: float | None) -> str:
    """A score with four digits, "n/a" where it is not defined."""
    return "n/a" if value is None else f"{value:.4f}"


def tiles(evaluation: EvaluationResult) -> tuple[Tile, ...]:
    """The headline numbers: all scores, the AUROC, and the calibration error of the images."""
    scores, intervals, found = evaluation.scores, evaluation.intervals, []
    for field, (name, definition, _) in SCORES.items():
        level = "predicting nothing", _baseline(scores, field)
        found.append(_tile(name, definition, getattr(scores, field), intervals.get(field), level))
    if evaluation.calibration:  # else the evaluation is of an older version
        found.append(_tile(*AUROC, evaluation.auroc, intervals.get("auroc"), ("chance", 0.5)))
    for part in evaluation.calibration:
        if part.things == "images":
            found.append(_tile(*ECE, part.error, part.interval, ("one score for all", 0.0)))
    return tuple(found)


def _tile(
    name: str,
    definition: str,
    value: float | None,
    interval: tuple[float, float] | None,
    level: tuple[str, float],
) -> Tile:
    """`level` is what to compare with: its name and its value."""
    words = f"{number(interval[0])} to {number(interval[1])}" if interval else ""
    against, baseline = level
    drawing = draw_interval(_UNIT, value, interval, level=baseline)
    return Tile(name, number(value), words, f"{against}: {number(baseline)}", definition, drawing)


def _baseline(scores: Scores, field: str) -> float:
    value = SCORES[field][2]
    return scores.all_empty_dice if value is None else value


def _cells(scores: Scores, intervals: Intervals | None = None) -> tuple[str | Markup, ...]:
    """All scores of one row; with intervals, each with its own below it."""
    plain = tuple(number(getattr(scores, field)) for field in SCORES)
    if intervals is None:
        return plain
    return tuple(
        Markup('{}<br><span class="small">{}</span>').format(text, _short(intervals, field))
        for text, field in zip(plain, SCORES, strict=True)
    )


def _short(intervals: Intervals, field: str) -> str:
    found = intervals.get(field)
    return f"{found[0]:.2f} to {found[1]:.2f}" if found else ""


def _note(scores: Scores) -> str:
    return NOTHING if scores.equals_all_empty else ""


def score_table(evaluation: EvaluationResult) -> Table:
    """All scores at every operating point, and of predicting nothing."""
    scores = evaluation.scores
    rows = [Row(_own(evaluation), _cells(scores, evaluation.intervals), "chosen", _note(scores))]
    for threshold, other in evaluation.at_other_thresholds.items():
        rows.append(Row(f"threshold {threshold}", _cells(other), "", _note(other)))
    for tuned in evaluation.tuned:
        rows.append(
            Row(
                f"tuned {tuned.kind} (cross-fitted)", _cells(tuned.estimate, tuned.intervals), "", _note(tuned.estimate)
            )
        )
        rows.append(Row(f"tuned {tuned.kind} (optimistic)", _cells(tuned.scores), "baseline", _note(tuned.scores)))
    rows.append(Row("predicting nothing", tuple(number(_baseline(scores, field)) for field in SCORES), "baseline"))
    return Table(
        "Scores at the original resolution", ("masks from", *(name for name, _, _ in SCORES.values())), tuple(rows)
    )


def _own(evaluation: EvaluationResult) -> str:
    smallest = f", {evaluation.min_area_px:,} px" if evaluation.min_area_px else ""
    return f"threshold {evaluation.threshold:g}{smallest}"


def tuned_words(evaluation: EvaluationResult) -> tuple[str, ...]:
    """What was tuned and what that is worth, a sentence or two for each kind of point."""
    found = []
    for tuned in evaluation.tuned:
        point = tuned.point
        how = (
            f"top threshold {point.top:g}, bottom threshold {point.bottom:g}"
            if tuned.kind == "triplet"
            else f"threshold {point.top:g}"
        )
        found.append(
            f"Tuned {tuned.kind}: {how}, masks below {point.min_area_px:,} px emptied. On the images that it was "
            f"chosen on it scores a Kaggle Dice of {number(tuned.scores.kaggle_dice)}, which is optimistic. "
            f"Cross-fitted over {tuned.folds} folds of patients, each image at the point chosen on the others, it is "
            f"{number(tuned.estimate.kaggle_dice)}: the number to report."
        )
    return tuple(found)


def operating_forest(evaluation: EvaluationResult) -> Forest:
    """Kaggle Dice of the operating points beside each other; hollow where a point is scored on what it was tuned on."""
    level = evaluation.scores.all_empty_dice
    rows = [_forest_row(_own(evaluation), evaluation.scores, evaluation.intervals, "kaggle_dice", level)]
    for threshold, other in evaluation.at_other_thresholds.items():
        rows.append(_forest_row(f"threshold {threshold}", other, {}, "kaggle_dice", level))
    for tuned in evaluation.tuned:
        rows.append(
            _forest_row(f"tuned {tuned.kind} (cross-fitted)", tuned.estimate, tuned.intervals, "kaggle_dice", level)
        )
        rows.append(_forest_row(f"tuned {tuned.kind} (optimistic)", tuned.scores, {}, "kaggle_dice", level, few=True))
    return _forest("Kaggle Dice; dashed: predicting nothing", rows)


def subgroup_forests(evaluation: EvaluationResult) -> tuple[Forest, ...]:
    """A forest plot for each of SUBGROUP_SCORES; groups in which a score is not defined are left out of its plot."""
    found = []
    for field in SUBGROUP_SCORES if evaluation.subgroups else ():
        level, name = getattr(evaluation.scores, field), SCORES[field][0]
        rows = [_forest_row("all images", evaluation.scores, evaluation.intervals, field, level)]
        by = ""
        for group in evaluation.subgroups:
            if getattr(group.scores, field) is None:
                continue
            if group.by != by:
                rows.append(Row(group.by, kind="group"))
            by = group.by
            rows.append(_subgroup_row(group, field, level))
        found.append(_forest(name, rows))
    return tuple(found)


def _subgroup_row(group: Subgroup, field: str, level: float | None) -> Row:
    return _forest_row(group.name, group.scores, group.intervals, field, level, few=group.small, note="small")


def _forest_row(
    name: str,
    scores: Scores,
    intervals: Intervals,
    field: str,
    level: float | None,
    *,
    few: bool = False,
    note: str = "",
) -> Row:
    counted = {
        "positive_dice": scores.positives,
        "sensitivity": scores.positives,
        "specificity": scores.cases - scores.positives,
    }
    value = getattr(scores, field)
    cells = (
        f"{counted.get(field, scores.cases):,}",
        draw_interval(_UNIT, value, intervals.get(field), level=level, few=few),
        Markup('{}<span class="small"> {}</span>').format(number(value), _short(intervals, field)),
    )
    return Row(name, cells, "few" if few else "", note if few else "")


def _forest(name: str, rows: list[Row]) -> Forest:
    return Forest(Table(name, ("", "n", "", "value, interval"), tuple(rows)), ruler(_HALVES))


def stage_table(result: PipelineResult) -> Table:
    """The best epoch of each stage."""
    rows = []
    for stage in result.stages:
        best = stage.best
        cells = (str(stage.epochs), "averaged" if best.averaged else str(best.epoch), f"{best.val_loss:.4f}")
        rows.append(
            Row(f"stage {stage.stage}, {stage.size_px} px", (*cells, *_cells(best.at_full)), "", _note(best.at_full))
        )
    head = ("", "epochs", "best", "loss", *(name for name, _, _ in SCORES.values()))
    return Table("Best epoch of each stage, on held-out images at the original resolution", head, tuple(rows))


def shared_table(found: SharedPatients) -> Table:
    """Scores of the held-out images whose patient is in training, and of the others."""
    sides = (
        ("patient is in training", found.shared, found.shared_intervals),
        ("patient is not", found.apart, found.apart_intervals),
    )
    rows = tuple(
        Row(name, (f"{scores.cases:,}", f"{scores.positives:,}", *_cells(scores, intervals)))
        for name, scores, intervals in sides
        if scores
    )
    caption = f"Held-out images whose patient is in training, and the others (patients from the {found.known_from})"
    return Table(caption, ("", "images", "positive", *(name for name, _, _ in SCORES.values())), rows)
