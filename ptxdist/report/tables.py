"""The tables of a report: headline numbers, operating points, stages, subgroups, shared patients."""

from __future__ import annotations

from markupsafe import Markup

from ptxdist.records import (
    Elsewhere,
    EvaluationResult,
    Intervals,
    PipelineResult,
    Scores,
    SharedPatients,
    Subgroup,
    TunedPoint,
)
from ptxdist.report.charts import draw_interval, linear_axis, ruler
from ptxdist.report.page import Block, Facts, Forest, Row, Table, Tile
from ptxdist.scores.elsewhere import different
from ptxdist.scores.names import AUROC, ECE, SCORES, TOO_FEW, Score

SUBGROUP_SCORES = ("positive_dice", "sensitivity", "specificity")
NOTHING = "equals predicting nothing"
_UNIT, _HALVES = linear_axis("", 0, 1), linear_axis("", 0, 1, ticks=2)


def number(value: float | None) -> str:
    """A score with four digits; "n/a" if it is not defined."""
    return "n/a" if value is None else f"{value:.4f}"


def tiles(evaluation: EvaluationResult) -> tuple[Tile, ...]:
    """The headline numbers: all scores, the AUROC, and the calibration error of the images."""
    scores, intervals = evaluation.scores, evaluation.intervals
    found = [(score, score.of(scores), intervals.get(score.field)) for score in SCORES.values()]
    if evaluation.calibration:  # else the evaluation is of an older version
        found.append((AUROC, evaluation.auroc, intervals.get(AUROC.field)))
    found += [(ECE, part.error, None) for part in evaluation.calibration if part.things == "images"]
    return tuple(_tile(score, value, interval, score.baseline_of(scores)) for score, value, interval in found)


def _tile(score: Score, value: float | None, interval: tuple[float, float] | None, baseline: float) -> Tile:
    missing = "" if value is None or score is ECE else "not given: too few patients"
    words = f"{number(interval[0])} to {number(interval[1])}" if interval else missing
    drawing = draw_interval(_UNIT, value, interval, level=baseline)
    return Tile(score.name, number(value), words, f"{score.without}: {number(baseline)}", score.definition, drawing)


def _cells(scores: Scores, intervals: Intervals | None = None) -> tuple[str | Markup, ...]:
    """All scores of one row; with intervals, each with its own below it."""
    if intervals is None:
        return tuple(number(score.of(scores)) for score in SCORES.values())
    return tuple(
        Markup('{}<br><span class="small">{}</span>').format(
            number(score.of(scores)), _short(intervals, score.field, score.of(scores))
        )
        for score in SCORES.values()
    )


def _short(intervals: Intervals | None, field: str, value: float | None) -> str:
    if intervals is None:
        return ""
    found = intervals.get(field)
    return f"{found[0]:.2f} to {found[1]:.2f}" if found else "" if value is None else TOO_FEW


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
    rows.append(
        Row("predicting nothing", tuple(number(score.baseline_of(scores)) for score in SCORES.values()), "baseline")
    )
    return Table(
        "Scores at the original resolution", ("masks from", *(score.name for score in SCORES.values())), tuple(rows)
    )


def _own(evaluation: EvaluationResult) -> str:
    if evaluation.point is not None:
        return "the model's own point"
    smallest = f", at least {evaluation.min_area_px:,} pixels" if evaluation.min_area_px else ""
    return f"threshold {evaluation.threshold:g}{smallest}"


def operating_points(evaluation: EvaluationResult) -> tuple[Block, ...]:
    """What was tuned, in sentences, and the Kaggle Dice of all points as a forest plot; () if nothing was tuned.

    Marks are hollow where a point is scored on the images that it was tuned on.
    """
    if not evaluation.tuned:
        return ()
    level, field = evaluation.scores.all_empty_dice, "kaggle_dice"
    rows = [_forest_row(_own(evaluation), evaluation.scores, evaluation.intervals, field, level)]
    for threshold, other in evaluation.at_other_thresholds.items():
        rows.append(_forest_row(f"threshold {threshold}", other, None, field, level))
    for tuned in evaluation.tuned:
        rows.append(_forest_row(f"tuned {tuned.kind} (cross-fitted)", tuned.estimate, tuned.intervals, field, level))
        rows.append(_forest_row(f"tuned {tuned.kind} (optimistic)", tuned.scores, None, field, level, few=True))
    forest = _forest("Kaggle Dice; dashed: predicting nothing", rows)
    own = (
        ()
        if evaluation.point is None or evaluation.elsewhere is None
        else (f"The model's own point, from {evaluation.elsewhere.point_from}: {evaluation.point.words}.",)
    )
    return Facts((*own, *map(_tuned_words, evaluation.tuned))), forest


def _tuned_words(tuned: TunedPoint) -> str:
    gain = ""
    if tuned.gains:
        span = (tuned.gain_intervals or {}).get("kaggle_dice")
        words = f" ({span[0]:+.4f} to {span[1]:+.4f})" if span else ""
        gain = f" It is {tuned.gains['kaggle_dice']:+.4f}{words} against the model's own point."
    return (
        f"Tuned {tuned.kind}: {tuned.point.words}. Its Kaggle Dice on the "
        f"images that it was chosen on is {number(tuned.scores.kaggle_dice)}, which is optimistic. The number to "
        f"report is the cross-fitted one, {number(tuned.estimate.kaggle_dice)}: patients are divided into "
        f"{tuned.folds} folds, and each image is masked by the point chosen on the other folds.{gain}"
    )


def subgroup_forests(evaluation: EvaluationResult) -> tuple[Forest, ...]:
    """A forest plot for each of SUBGROUP_SCORES, without the groups in which the score is not defined."""
    found = []
    for field in SUBGROUP_SCORES if evaluation.subgroups else ():
        level, name = getattr(evaluation.scores, field), SCORES[field].name
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
    intervals: Intervals | None,
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
        draw_interval(_UNIT, value, (intervals or {}).get(field), level=level, few=few),
        Markup('{}<span class="small"> {}</span>').format(number(value), _short(intervals, field, value)),
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
            Row(
                f"stage {stage.stage}, {stage.size_px} pixels", (*cells, *_cells(best.at_full)), "", _note(best.at_full)
            )
        )
    head = ("", "epochs", "best", "loss", *(score.name for score in SCORES.values()))
    return Table("Best epoch of each stage, on held-out images at the original resolution", head, tuple(rows))


def working_points(evaluation: EvaluationResult) -> tuple[Table, ...]:
    """The working points with their confusion matrices; () if none were asked for."""
    if not evaluation.working:
        return ()
    rows = [
        Row(
            point.name,
            (
                f"{point.threshold:.4g}",
                f"{point.hits:,} / {point.misses:,}",
                f"{point.alarms:,} / {point.rejections:,}",
                *(
                    Markup('{}<br><span class="small">{}</span>').format(
                        number(getattr(point, name)), _short(point.intervals, name, getattr(point, name))
                    )
                    for name in ("sensitivity", "specificity")
                ),
                f"{100 * point.flagged:.0f} %",
                f"{100 * point.prevalence:.3g} %",
                number(point.ppv),
                number(point.npv),
            ),
        )
        for point in evaluation.working
    ]
    head = (
        "", "score from", "positive: flagged / not", "negative: flagged / not", "sensitivity", "specificity", "flagged",
        "prevalence", "PPV", "NPV",
    )  # fmt: skip
    caption = "Working points: each case is flagged by the threshold that was chosen on other patients"
    return (Table(caption, head, tuple(rows)),)


def profiles(about: Elsewhere) -> tuple[Block, ...]:
    """The evaluated images beside the training images: in words, a forest plot for each property, numbers, views."""
    words = Facts(tuple(f"{line[:1].upper()}{line[1:]}." for line in different(about)))
    if about.there is None:
        return (words,)
    sides = (("evaluated here", about.here), ("trained on", about.there))
    found: list[Block] = []
    for name, field, form in (
        ("area of a mask, share of the image", "mask_share", "{:.2%}"),
        ("mean grey level of an image", "brightness", "{:.0f}"),
        ("age in years", "age", "{:.0f}"),
        ("longer side in pixels", "side_px", "{:,.0f}"),
    ):
        known = [(side, getattr(profile, field)) for side, profile in sides if getattr(profile, field)]
        if len(known) < len(sides):
            continue
        low, high = min(values[0] for _, values in known), max(values[-1] for _, values in known)
        axis = linear_axis("", low - 0.05 * (high - low), high + 0.05 * (high - low), ticks=3)
        rows = [
            Row(
                side,
                (
                    "",
                    draw_interval(axis, values[2], (values[0], values[-1]), level=None),
                    f"{form.format(values[2])}, {form.format(values[0])} to {form.format(values[-1])}",
                ),
            )
            for side, values in known
        ]
        found.append(Forest(Table(name, ("", "", "", "median, 5 to 95 %"), tuple(rows)), ruler(axis)))
    views = sorted({*about.here.views, *about.there.views})
    share = [[f"{100 * side.views.get(view, 0) / side.images:.0f} %" for view in views] for _, side in sides]
    rows = [
        Row(name, (f"{side.images:,}", f"{100 * side.positives / side.images:.1f} %", *cells))
        for (name, side), cells in zip(sides, share, strict=True)
    ]
    return words, *found, Table("Images, positive images and views", ("", "images", "positive", *views), tuple(rows))


def shared_table(found: SharedPatients | None) -> tuple[Table, ...]:
    """Scores of the held-out images whose patient is in training, and of the others; () if patients are not known."""
    if found is None:
        return ()
    sides = (
        ("patient is in training", found.shared, found.shared_intervals),
        ("patient is not in training", found.apart, found.apart_intervals),
    )
    rows = tuple(
        Row(name, (f"{scores.cases:,}", f"{scores.positives:,}", *_cells(scores, intervals)))
        for name, scores, intervals in sides
        if scores
    )
    caption = f"Held-out images whose patient is in training, and the others (patients from the {found.known_from})"
    return (Table(caption, ("", "images", "positive", *(score.name for score in SCORES.values())), rows),)
