"""Results in the terminal: the scores of a run, runs beside each other, and the scores of other tools' predictions.

A result is a sentence and a table of at most five rows that fits 80 columns; the report has the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from ptxdist.console.tables import indented, number
from ptxdist.console.terminal import out
from ptxdist.records import Elsewhere, EvaluationResult, Intervals, Scores, StageResult, WorkingPoint
from ptxdist.scores import headline
from ptxdist.scores.elsewhere import NOT_KNOWN, compared, seen_before
from ptxdist.scores.headline import Span, counts, digits, points
from ptxdist.scores.names import AUROC, DICES, SCORES, TOO_FEW

if TYPE_CHECKING:
    from ptxdist.scores.compare import Comparison
    from ptxdist.scores.external import ExternalScores

_HEADS = [score.short.replace(" ", "\n") for score in DICES]
_HEADS[0] = f"Dice:\n{_HEADS[0]}"
_BESIDE = 3  # other operating points in the table of a result


def show_result(evaluation: EvaluationResult) -> None:
    """Print a sentence, and the scores at the operating point in use beside those at others."""
    for sentence in headline.sentences(evaluation):
        out.print(sentence, style="bold")
    out.print(_scores(evaluation))
    out.print(f"{_images(evaluation)}; intervals are by patient.")
    _show_point(evaluation)
    if evaluation.working:
        out.print(_working(evaluation.working))
        out.print(
            f"PPV and NPV at a prevalence of {evaluation.working[0].prevalence:.3g}; "
            "all numbers but the score are cross-fitted"
        )
    if evaluation.elsewhere is not None:
        _show_elsewhere(evaluation.elsewhere)


def show_stages(stages: Sequence[StageResult]) -> None:
    """Print the best epoch of each stage of a run."""
    table = Table(title="validation, at the original resolution", title_justify="left")
    for name in ("", "epochs", "best", "loss", *_HEADS):
        table.add_column(name, justify="right" if name else "left", no_wrap=bool(name))
    for stage in stages:
        best = f"{stage.best.epoch}{' avg' if stage.best.averaged else ''}"
        name = f"stage {stage.stage}, {stage.size_px} px" + (" (reused)" if stage.reused_from else "")
        table.add_row(name, str(stage.epochs), best, f"{stage.best.val_loss:.4f}", *_dices(stage.best.at_full))
    out.print(table)


def _scores(evaluation: EvaluationResult) -> Table:
    """Scores in rows; columns are the point in use with its intervals, other points, and predicting nothing."""
    used, *others = points(evaluation)
    kind = evaluation.best_tuned.kind if evaluation.best_tuned else ""
    others = [item for item in others if item.tuned in ("", kind)][: _BESIDE if evaluation.point is None else 2]
    scores, spans = used.scores, used.intervals
    table = _plain("", "in use", "95 % interval", *(item.column for item in others), "nothing")

    def add(name: str, value: str, span: str, beside: Sequence[str], nothing: str) -> None:
        table.add_row(name, Text(value, "bold"), span, *beside, nothing)

    for field, name in (("kaggle_dice", "Kaggle Dice"), ("positive_dice", "Dice of positives")):
        score, places = SCORES[field], digits(spans.get(field))
        value, *beside = (headline.number(score.of(item.scores), places) for item in (used, *others))
        nothing = headline.number(score.baseline_of(scores), places)
        if score.of(scores) is not None:
            add(name, value, _span(spans.get(field)), beside, nothing)
    hits, alarms = zip(*(counts(item.scores) for item in (used, *others)), strict=True)
    positives, negatives = scores.positives, scores.cases - scores.positives
    if positives:
        span = spans.get("sensitivity")
        interval = f"{span[0] * positives:,.0f} to {span[1] * positives:,.0f}" if span else TOO_FEW
        add("positives found", f"{hits[0]:,} of {positives:,}", interval, [f"{item:,}" for item in hits[1:]], "0")
    if negatives:
        span = spans.get("specificity")
        interval = f"{(1 - span[1]) * negatives:,.0f} to {(1 - span[0]) * negatives:,.0f}" if span else TOO_FEW
        add("false alarms", f"{alarms[0]:,} of {negatives:,}", interval, [f"{item:,}" for item in alarms[1:]], "0")
    if evaluation.auroc is not None:
        span = evaluation.intervals.get(AUROC.field)
        add("AUROC", headline.number(evaluation.auroc, digits(span)), _span(span), [""] * len(others), "0.5")
    return table


def _plain(*heads: str) -> Table:
    """A table without lines, whose columns are to the right of the first one."""
    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    for place, name in enumerate(heads):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    return table


def _span(span: Span) -> str:
    return f"{span[0]:.{digits(span)}f} to {span[1]:.{digits(span)}f}" if span else TOO_FEW


def _images(evaluation: EvaluationResult) -> str:
    kind = "held-out images" if evaluation.elsewhere is None else "images from elsewhere"
    return f"{evaluation.scores.cases:,} {kind}, {evaluation.scores.positives:,} positive"


def _show_point(evaluation: EvaluationResult) -> None:
    """What the point in use is, and what tuning on these images would change."""
    used, best = points(evaluation)[0], evaluation.best_tuned
    if evaluation.elsewhere is None or evaluation.point is None:
        out.print(f"in use: {used.name}")
        if used.tuned:
            out.print("  tuned for the Kaggle Dice, and scored on images that it was not tuned on")
        return
    out.print(f"in use: {headline.short(evaluation.point)}\n  from {evaluation.elsewhere.point_from}")
    if best is not None and best.gains:
        field = "kaggle_dice"
        span = (best.gain_intervals or {}).get(field)
        out.print(
            f"tuned here: {headline.short(best.point)}\n  Kaggle Dice {best.gains[field]:+.2f} "
            f"({f'{span[0]:+.2f} to {span[1]:+.2f}' if span else TOO_FEW}) against the point in use"
        )


def _working(found: Sequence[WorkingPoint]) -> Table:
    """Working points with their cross-fitted numbers."""
    table = _plain("working point", "score", "sensitivity", "specificity", "flagged", "PPV", "NPV")
    for point in found:
        shares = []
        for name in ("sensitivity", "specificity"):
            span = point.intervals.get(name)
            shares.append(f"{getattr(point, name):.2f} ({f'{span[0]:.2f}-{span[1]:.2f}' if span else TOO_FEW})")
        values = (headline.number(point.ppv), headline.number(point.npv))
        table.add_row(point.name, f"{point.threshold:.3g}", *shares, f"{100 * point.flagged:.0f} %", *values)
    return table


def _show_elsewhere(about: Elsewhere) -> None:
    if about.seen is None:
        out.print("Whether the model was trained on some of these images is not known.")
    elif not about.seen.case_ids:
        which = "images" if about.seen.patients is None else "images and patients"
        out.print(f"None of these {which} is among those that the model was trained on.")
    else:
        out.print(Text("The model was trained on some of these images:", "bold"))
        out.print(f"  {seen_before(about.seen)}")
        ids, more = ", ".join(about.seen.case_ids[:3]), ", …" if len(about.seen.case_ids) > 3 else ""
        out.print(f"  {ids}{more}", soft_wrap=True)
        if (without := about.seen.without) is not None:
            dice = f"Kaggle Dice {headline.number(without.kaggle_dice)}"
            out.print(f"  without them {dice}, of positive images {headline.number(without.positive_dice)}")
    properties = compared(about)
    if not properties:
        out.print(NOT_KNOWN)
    table = _plain("different from the training images", "here", "in the training")
    for item in properties:
        if item.differs:
            table.add_row(item.name, item.here, item.there)
    if table.row_count:
        out.print(table)
    if same := [item.name for item in properties if not item.differs]:
        out.print(f"not clearly different: {', '.join(name.removeprefix('median ') for name in same)}")


def show_comparison(comparison: Comparison) -> None:
    """Print which run is best, then runs beside each other: scores, differences from the first run, intervals."""
    first = comparison.runs[0].scores
    best = max(comparison.runs, key=lambda run: run.scores.kaggle_dice)
    places = digits(best.intervals.get("kaggle_dice"))
    dice, nothing = (headline.number(value, places) for value in (best.scores.kaggle_dice, first.all_empty_dice))
    out.print(
        f"Best Kaggle Dice: {dice}, {best.run}; predicting nothing scores {nothing}.", style="bold", soft_wrap=True
    )
    table = _plain("", *(name.removeprefix("Dice:\n") for name in _HEADS))
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    for run in comparison.runs:
        table.add_row(run.run, *_dices(run.scores))
        table.add_row("  95 % interval", *_intervals("{:.3f} to {:.3f}", run.scores, run.intervals), style="dim")
        if run.at_threshold is not None:
            table.add_row("  at the stage's threshold", *_dices(run.at_threshold), style="dim")
        if run.differences:
            found = (run.differences.get(score.field) for score in DICES)
            table.add_row("  difference", *("" if value is None else f"{value:+.4f}" for value in found))
            spans = _intervals("{:+.3f} to {:+.3f}", run.scores, run.difference_intervals)
            table.add_row("  95 % interval", *spans, style="dim")
    table.add_row("predicting nothing", *(f"{score.baseline_of(first):.4f}" for score in DICES), style="dim")
    out.print(table)
    images = f"{comparison.cases:,} images that all runs have evaluated, {first.positives:,} positive"
    out.print(f"{images};\ndifferences are from the first run; masks are those at the point in use:")
    for run in comparison.runs:
        tuned = "" if run.at_threshold is None else ", scored on images that it was not tuned on"
        out.print(f"  {run.run}: {run.point}{tuned}", soft_wrap=True)


def show_external(result: ExternalScores) -> None:
    """Print the scores of another tool's predictions, and what each is and may be compared with."""
    from ptxdist.scores.external import cells

    out.print(f"{result.predictions}; truth: {result.truth}")
    table = _plain("", "value", "95 % interval", "nothing", "constant mask")
    for score in result.scores.values():
        table.add_row(score.name, *cells(score))
    out.print(table)
    out.print(
        f"{result.cases:,} images, {result.positives:,} positive, {result.hits:,} of them with a predicted pixel; 95 % "
        f"intervals by {result.unit} ({result.groups:,})"
    )
    if result.only_predicted or result.only_true:
        out.print(f"left out: {result.only_predicted:,} images without truth, {result.only_true:,} without prediction")
    for score in result.scores.values():
        out.print(Text.assemble("\n", (score.name, "bold"), "\n", indented(score.definition)))
        out.print(indented(f"Compare with: {score.compare}"))


def _intervals(form: str, scores: Scores, intervals: Intervals) -> list[str]:
    """The interval of each Dice score; a score that is not defined has none."""
    found = ((intervals.get(score.field), score.of(scores)) for score in DICES)
    return [form.format(*span) if span else "" if value is None else TOO_FEW for span, value in found]


def _dices(scores: Scores) -> list[str]:
    return [number(score.of(scores)) for score in DICES]
