"""Results as tables in the terminal: a run, and runs beside each other.

Owns: which numbers people see at the end of a command, each beside its interval and what predicting nothing scores.
Refuses: nothing. Called by: `cli`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ptxdist.console.tables import number
from ptxdist.console.terminal import out
from ptxdist.records import Comparison, EvaluationResult, Intervals, Reliability, Scores, StageResult

_DICES = ("kaggle_dice", "positive_dice", "pooled_dice")


def show_result(stages: Sequence[StageResult], evaluation: EvaluationResult | None) -> None:
    """Print the table of a run: per stage epochs, loss and the three Dice scores, then the evaluation."""
    table = Table(title="validation, at the original resolution", title_justify="left")
    for name in ("", "epochs", "best", "loss", "Dice:\nKaggle", "positives\nonly", "pooled"):
        table.add_column(name, justify="right" if name else "left", no_wrap=bool(name))
    for stage in stages:
        best = f"{stage.best.epoch}{' avg' if stage.best.averaged else ''}"
        name = f"stage {stage.stage}, {stage.size_px} px" + (" (reused)" if stage.reused_from else "")
        table.add_row(name, str(stage.epochs), best, f"{stage.best.val_loss:.4f}", *_dice(stage.best.at_full))
    if evaluation is not None:
        table.add_section()
        flip = ", flip averaging" if evaluation.flip_averaging else ""
        own = f"evaluation\n(threshold {evaluation.threshold}{flip})"
        _add_scores(table, own, evaluation.scores, evaluation.intervals, "bold")
        for threshold, scores in evaluation.at_other_thresholds.items():
            table.add_row(f"(threshold {threshold})", "", "", "", *_dice(scores))
        for tuned in evaluation.tuned:
            name = f"tuned {tuned.kind}, estimated on\ncases it was not tuned on"
            _add_scores(table, name, tuned.estimate, tuned.intervals)
        nothing = f"{evaluation.scores.all_empty_dice:.4f}"
        table.add_row("predicting nothing", "", "", "", nothing, "0.0000", "0.0000", style="dim")
    out.print(table)
    if evaluation is not None:
        _show_details(evaluation)


def _show_details(evaluation: EvaluationResult) -> None:
    scores, spans = evaluation.scores, evaluation.intervals
    out.print(f"{scores.cases:,} held-out images, {scores.positives:,} positive; 95 % intervals in brackets")
    out.print(
        f"per image: sensitivity {number(scores.sensitivity)}{_bracket(spans, 'sensitivity')} (predicting nothing 0), "
        f"specificity {number(scores.specificity)}{_bracket(spans, 'specificity')} (predicting nothing 1), "
        f"AUROC {number(evaluation.auroc)}{_bracket(spans, 'auroc')} (chance 0.5)"
    )
    out.print(f"pooled IoU {number(scores.pooled_iou)}{_bracket(spans, 'pooled_iou')} (predicting nothing 0)")
    for part in evaluation.calibration:
        out.print(_calibration(part))
    for tuned in evaluation.tuned:
        point = tuned.point
        low = "" if point.bottom == point.top else f", then all px from {point.bottom:g} on"
        out.print(
            f"tuned {tuned.kind}: at least {point.min_area_px:,} px from {point.top:g} on{low} "
            f"(on the cases it was tuned on {number(tuned.scores.kaggle_dice)})"
        )


def _calibration(part: Reliability) -> str:
    share = sum(n * o for n, o in zip(part.counts, part.observed, strict=True)) / sum(part.counts)
    span = {"error": part.interval} if part.interval else {}
    return (
        f"calibration error of {part.things} {number(part.error)}{_bracket(span, 'error')} (probability 0 for all "
        f"{number(share)}, their share {share:.4f} for all 0)"
    )


def _add_scores(table: Table, name: str, scores: Scores, intervals: Intervals, style: str = "") -> None:
    table.add_row(name, "", "", "", *_dice(scores), style=style)
    if intervals:
        spans = (intervals.get(name) for name in _DICES)
        table.add_row("  95 % interval", "", "", "", *(f"{s[0]:.2f}-{s[1]:.2f}" if s else "" for s in spans))


def show_comparison(comparison: Comparison) -> None:
    """Print runs beside each other: scores with intervals, and differences from the first run with theirs."""
    table = Table(title="the same cases, at the original resolution", title_justify="left")
    for name in ("run", "Dice:\nKaggle", "positives\nonly", "pooled"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for run in comparison.runs:
        table.add_row(run.run, *_dice(run.scores))
        if run.intervals:
            table.add_row("  95 % interval", *(_interval(run.intervals, name) for name in _DICES))
        if run.differences:
            found = (run.differences.get(name) for name in _DICES)
            table.add_row("  difference", *("" if value is None else f"{value:+.4f}" for value in found))
        if run.difference_intervals:
            table.add_row("  95 % interval", *(_interval(run.difference_intervals, name, "+") for name in _DICES))
        table.add_section()
    first = comparison.runs[0].scores
    table.add_row("predicting nothing", f"{first.all_empty_dice:.4f}", "0.0000", "0.0000", style="dim")
    out.print(table)
    out.print(f"{comparison.cases:,} images that all runs have evaluated, {first.positives:,} positive")


def _interval(intervals: Intervals, name: str, sign: str = "") -> str:
    return f"{intervals[name][0]:{sign}.3f} to {intervals[name][1]:{sign}.3f}" if name in intervals else ""


def _bracket(intervals: Intervals, name: str) -> str:
    return f" \\[{intervals[name][0]:.2f}-{intervals[name][1]:.2f}]" if name in intervals else ""


def _dice(scores: Scores) -> tuple[str, str, str]:
    return number(scores.kaggle_dice), number(scores.positive_dice), number(scores.pooled_dice)
