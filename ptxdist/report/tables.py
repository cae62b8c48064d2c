"""The tables of a report: headline numbers, operating points, stages, subgroups, shared patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
from ptxdist.report.page import Block, Facts, Folded, Forest, Row, Table, Tile
from ptxdist.scores.elsewhere import different
from ptxdist.scores.headline import Shown, Span, digits, found, number, points
from ptxdist.scores.names import SCORES, TOO_FEW, Score

SUBGROUP_SCORES = ("positive_dice", "sensitivity", "specificity")
NOTHING = "equals predicting nothing"
_HEADLINES = ("kaggle_dice", "positive_dice", "sensitivity", "specificity")
_UNIT, _HALVES = linear_axis("", 0, 1), linear_axis("", 0, 1, ticks=2)


def tiles(evaluation: EvaluationResult) -> tuple[Tile, ...]:
    """Four headline numbers at the point in use."""
    used = points(evaluation)[0]
    hits, alarms = found(used.scores)
    counted = {"sensitivity": f"{hits} images with a mask", "specificity": f"false alarms in {alarms} images"}
    return tuple(_tile(SCORES[field], used, counted.get(field, "")) for field in _HEADLINES)


def _tile(score: Score, used: Shown, counted: str) -> Tile:
    value, span, baseline = score.of(used.scores), used.intervals.get(score.field), score.baseline_of(used.scores)
    places, words = digits(span), interval(span) or ("" if value is None else "not given: too few patients")
    beside = f"{score.without}: {number(baseline, places)}" + (f"; {counted}" if counted and value is not None else "")
    drawing = draw_interval(_UNIT, value, span, level=baseline)
    return Tile(score.name, number(value, places), words, beside, score.definition, drawing)


def _places(intervals: Intervals) -> dict[str, int]:
    """How many digits each score is shown with."""
    return {field: digits(intervals.get(field)) for field in SCORES}


def _cells(scores: Scores, places: Mapping[str, int], intervals: Intervals | None = None) -> tuple[str | Markup, ...]:
    """All scores of one row; with intervals, each with its own below it."""
    values = [(score.field, score.of(scores)) for score in SCORES.values()]
    if not intervals:
        return tuple(number(value, places[field]) for field, value in values)
    return tuple(_with_interval(value, places[field], intervals.get(field)) for field, value in values)


def _with_interval(value: float | None, places: int, span: Span) -> Markup:
    return Markup('{}<br><span class="small">{}</span>').format(number(value, places), _short(span, value))


def _short(span: Span, value: float | None) -> str:
    return interval(span) or ("" if value is None else TOO_FEW)


def interval(span: Span) -> str:
    """An interval with the digits that it is worth; "" if there is none."""
    return f"{number(span[0], digits(span))} to {number(span[1], digits(span))}" if span else ""


def _note(scores: Scores) -> str:
    return NOTHING if scores.equals_all_empty else ""


def score_table(evaluation: EvaluationResult) -> Table:
    """All scores at every operating point, first the one in use, and of predicting nothing."""
    used = points(evaluation)
    places, scores = _places(used[0].intervals), evaluation.scores
    rows = [
        Row(
            item.name,
            _cells(item.scores, places, item.intervals),
            "chosen" if item is used[0] else "",
            ", ".join(filter(None, ("in use" if item is used[0] else "", _note(item.scores)))),
        )
        for item in used
    ]
    nothing = (number(score.baseline_of(scores), places[field]) for field, score in SCORES.items())
    rows.append(Row("predicting nothing", tuple(nothing), "baseline"))
    head = ("masks from", *(score.name for score in SCORES.values()))
    return Table("Scores at the original resolution, with 95 % intervals", head, tuple(rows))


def operating_points(evaluation: EvaluationResult) -> tuple[str, ...]:
    """What the points are and how they were tuned, in sentences; () if nothing was tuned."""
    words = [_tuned_words(evaluation, tuned) for tuned in evaluation.tuned]
    if evaluation.point is not None and evaluation.elsewhere is not None:
        words.insert(0, f"The model's own point, from {evaluation.elsewhere.point_from}: {evaluation.point.words}.")
    return tuple(words)


def _tuned_words(evaluation: EvaluationResult, tuned: TunedPoint) -> str:
    field, gain = "kaggle_dice", ""
    kind = "Threshold and smallest area" if tuned.kind == "pair" else "Two thresholds and smallest area"
    places = digits(points(evaluation)[0].intervals.get(field))
    if tuned.gains:
        span = (tuned.gain_intervals or {}).get(field)
        words = f" ({span[0]:+.{places}f} to {span[1]:+.{places}f})" if span else ""
        gain = f" It is {tuned.gains[field]:+.{places}f}{words} against the model's own point."
    return (
        f"{kind}: {tuned.point.words}. Its Kaggle Dice on the images that it was chosen on, "
        f"{number(tuned.scores.kaggle_dice, places)}, is optimistic. The table has the cross-fitted one, "
        f"{number(tuned.estimate.kaggle_dice, places)}: patients are divided into {tuned.folds} folds, and each image "
        f"is masked by the point chosen on the other folds.{gain}"
    )


def subgroups(used: Shown, groups: Sequence[Subgroup]) -> tuple[Block, ...]:
    """Forest plots of the subgroups beside all images, those of small groups folded; () without subgroups."""
    small = [group for group in groups if group.small]
    blocks: list[Block] = [*_forests(used, [group for group in groups if not group.small])]
    if small:
        title = f"{len(small)} small groups, with too few images to draw conclusions from"
        blocks.append(Folded(title, _forests(used, small)))
    return tuple(blocks)


def _forests(used: Shown, groups: Sequence[Subgroup]) -> tuple[Forest, ...]:
    """A forest plot for each of SUBGROUP_SCORES, without the groups in which the score is not defined."""
    found = []
    for field in SUBGROUP_SCORES if groups else ():
        level, name = getattr(used.scores, field), SCORES[field].name
        rows = [_forest_row("all images", used.scores, used.intervals, field, level)]
        by = ""
        for group in groups:
            if getattr(group.scores, field) is None:
                continue
            if group.by != by:
                rows.append(Row(group.by, kind="group"))
            by = group.by
            rows.append(_forest_row(group.name, group.scores, group.intervals, field, level, few=group.small))
        found.append(Forest(Table(name, ("", "n", "", "value, interval"), tuple(rows)), ruler(_HALVES)))
    return tuple(found)


def _forest_row(
    name: str, scores: Scores, intervals: Intervals, field: str, level: float | None, *, few: bool = False
) -> Row:
    counted = scores.cases - scores.positives if field == "specificity" else scores.positives
    value, span = getattr(scores, field), intervals.get(field)
    cells = (
        f"{counted:,}",
        draw_interval(_UNIT, value, span, level=level, few=few),
        Markup('{}<span class="small"> {}</span>').format(number(value, digits(span)), _short(span, value)),
    )
    return Row(name, cells, "few" if few else "")


def stage_table(result: PipelineResult) -> Table:
    """The best epoch of each stage, with as many digits as the evaluation."""
    rows, places = [], _places(points(result.evaluation)[0].intervals)
    for stage in result.stages:
        best = stage.best
        cells = (str(stage.epochs), "averaged" if best.averaged else str(best.epoch), f"{best.val_loss:.4f}")
        name = f"stage {stage.stage}, {stage.size_px} pixels"
        rows.append(Row(name, (*cells, *_cells(best.at_full, places)), "", _note(best.at_full)))
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
                    _with_interval(value, digits(span), span)
                    for value, span in (
                        (point.sensitivity, point.intervals.get("sensitivity")),
                        (point.specificity, point.intervals.get("specificity")),
                    )
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
    words = [f"{line[:1].upper()}{line[1:]}." for line in different(about)]
    if about.there is None:
        return (Facts(tuple(words)),)
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
        if low == high:
            words.append(f"The {name} is {form.format(low)} here and in the training, without any spread.")
            continue
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
    return (
        Facts(tuple(words)),
        *found,
        Table("Images, positive images and views", ("", "images", "positive", *views), tuple(rows)),
    )


def shared_table(found: SharedPatients | None) -> tuple[Table, ...]:
    """Scores of the held-out images whose patient is in training, and of the others; () if none is known to be."""
    if found is None or found.shared is None:
        return ()
    sides = (
        ("patient is in training", found.shared, found.shared_intervals),
        ("patient is not in training", found.apart, found.apart_intervals),
    )
    rows = tuple(
        Row(name, (f"{scores.cases:,}", f"{scores.positives:,}", *_cells(scores, _places(intervals), intervals)))
        for name, scores, intervals in sides
        if scores
    )
    caption = "Held-out images whose patient is in training, and the others; masks at the threshold of the last stage"
    return (Table(caption, ("", "images", "positive", *(score.name for score in SCORES.values())), rows),)
