"""Results in the terminal: the scores of a run, runs beside each other, and the scores of other tools' predictions.

Every score is printed with its 95 % interval and with its value without a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from ptxdist.console.tables import number
from ptxdist.console.terminal import out
from ptxdist.records import (
    Elsewhere,
    EvaluationResult,
    Intervals,
    Reliability,
    Scores,
    StageResult,
    WorkingPoint,
)
from ptxdist.scores.elsewhere import different, seen_before
from ptxdist.scores.names import AUROC, DICES, SCORES, TOO_FEW, Score

if TYPE_CHECKING:
    from ptxdist.scores.compare import Comparison
    from ptxdist.scores.external import ExternalScores

_HEADS = [score.short.replace(" ", "\n") for score in DICES]
_HEADS[0] = f"Dice:\n{_HEADS[0]}"


def show_result(stages: Sequence[StageResult], evaluation: EvaluationResult | None) -> None:
    """Print the table of a run: for each stage epochs, loss and Dice scores, then the evaluation."""
    table = Table(title="validation, at the original resolution", title_justify="left")
    for name in ("", "epochs", "best", "loss", *_HEADS):
        table.add_column(name, justify="right" if name else "left", no_wrap=bool(name))
    for stage in stages:
        best = f"{stage.best.epoch}{' avg' if stage.best.averaged else ''}"
        name = f"stage {stage.stage}, {stage.size_px} px" + (" (reused)" if stage.reused_from else "")
        table.add_row(name, str(stage.epochs), best, f"{stage.best.val_loss:.4f}", *_dices(stage.best.at_full))
    if evaluation is not None:
        table.add_section()
        flip = ", flip averaging" if evaluation.flip_averaging else ""
        own = f"evaluation\n(threshold {evaluation.threshold}{flip})"
        if evaluation.point is not None:
            own = f"the model's own point{flip}"
        _add_scores(table, own, evaluation.scores, evaluation.intervals, "bold")
        for threshold, scores in evaluation.at_other_thresholds.items():
            table.add_row(f"(threshold {threshold})", "", "", "", *_dices(scores))
        for tuned in evaluation.tuned:
            name = f"tuned {tuned.kind}, estimated on\ncases it was not tuned on"
            _add_scores(table, name, tuned.estimate, tuned.intervals)
        table.add_row("predicting nothing", "", "", "", *_baselines(evaluation.scores), style="dim")
    out.print(table)
    if evaluation is not None:
        _show_details(evaluation)


def _show_details(evaluation: EvaluationResult) -> None:
    scores, intervals = evaluation.scores, evaluation.intervals

    def described(score: Score, value: float | None) -> str:
        name = score.name if score.name.isupper() else score.name[:1].lower() + score.name[1:]
        baseline = f"({score.without} {score.baseline_of(scores):g})"
        span = intervals.get(score.field)
        bracket = f" [{span[0]:.2f}-{span[1]:.2f}]" if span else f" [{TOO_FEW}]" if value is not None else ""
        return f"{name} {number(value)}{bracket} {baseline}"

    images = "held-out images" if evaluation.elsewhere is None else f"images of {evaluation.elsewhere.data}"
    out.print(f"{scores.cases:,} {images}, {scores.positives:,} positive; 95 % intervals by patient in brackets")
    sensitivity, specificity, iou = (
        described(SCORES[field], SCORES[field].of(scores)) for field in ("sensitivity", "specificity", "pooled_iou")
    )
    out.print(f"per image: {sensitivity}, {specificity}, {described(AUROC, evaluation.auroc)}")
    out.print(iou)
    for part in evaluation.calibration:
        out.print(_calibration(part))
    if evaluation.point is not None and evaluation.elsewhere is not None:
        out.print(f"own point (from {evaluation.elsewhere.point_from}): {evaluation.point.words}")
    for tuned in evaluation.tuned:
        out.print(
            f"tuned {tuned.kind}: {tuned.point.words} (on the cases it was tuned on {number(tuned.scores.kaggle_dice)})"
        )
        if tuned.gains:
            out.print(f"  gain over the own point: {_gains(tuned.gains, tuned.gain_intervals or {})}")
    for working in evaluation.working:
        out.print(_working(working))
    if evaluation.elsewhere is not None:
        _show_elsewhere(evaluation.elsewhere)


def _working(point: WorkingPoint) -> str:
    """A working point as a sentence, with its cross-fitted numbers."""
    shares = []
    for name in ("sensitivity", "specificity"):
        span = point.intervals.get(name)
        bracket = f"[{span[0]:.2f}-{span[1]:.2f}]" if span else f"[{TOO_FEW}]"
        shares.append(f"{name} {number(getattr(point, name))} {bracket}")
    return (
        f"working point {point.name}: score from {point.threshold:g} on; on cases it was not chosen on "
        f"{', '.join(shares)}, {100 * point.flagged:.0f} % of the images flagged; at a prevalence of "
        f"{point.prevalence:.3g} PPV {number(point.ppv)}, NPV {number(point.npv)}"
    )


def _gains(gains: Mapping[str, float], intervals: Intervals) -> str:
    """The differences of the Dice scores, with their intervals."""
    found = []
    for score in DICES:
        if score.field in gains:
            span = intervals.get(score.field)
            bracket = f"[{span[0]:+.3f} to {span[1]:+.3f}]" if span else f"[{TOO_FEW}]"
            found.append(f"{score.short} {gains[score.field]:+.4f} {bracket}")
    return ", ".join(found)


def _show_elsewhere(about: Elsewhere) -> None:
    if about.seen is None:
        out.print("whether the model was trained on some of these images is not known: it has no fingerprints")
    elif not about.seen.case_ids:
        which = "images" if about.seen.patients is None else "images and patients"
        out.print(f"none of these {which} is among those that the model was trained on")
    else:
        without = about.seen.without
        rest = (
            ""
            if without is None
            else f"; without them Kaggle Dice {number(without.kaggle_dice)}, "
            + (f"positives only {number(without.positive_dice)}")
        )
        ids, more = ", ".join(about.seen.case_ids[:3]), ", …" if len(about.seen.case_ids) > 3 else ""
        found = f"the model was trained on some of these images: {seen_before(about.seen)}"
        out.print(Text.assemble((found, "bold"), f": {ids}{more}{rest}"))
    for line in different(about):
        out.print(line)


def _calibration(part: Reliability) -> str:
    share = sum(n * o for n, o in zip(part.counts, part.observed, strict=True)) / sum(part.counts)
    things = "pixels" if part.things == "px" else part.things
    return (
        f"calibration error of {things} {number(part.error)} "
        f"(probability 0 for all: {number(share)}; their positive share {share:.4f} for all: 0)"
    )


def _add_scores(table: Table, name: str, scores: Scores, intervals: Intervals, style: str = "") -> None:
    table.add_row(name, "", "", "", *_dices(scores), style=style)
    table.add_row("  95 % interval", "", "", "", *_intervals("{:.2f}-{:.2f}", scores, intervals))


def show_comparison(comparison: Comparison) -> None:
    """Print runs beside each other: scores, differences from the first run, and the intervals of both."""
    table = Table(title="the same cases, at the original resolution", title_justify="left")
    for name in ("run", *_HEADS):
        table.add_column(name, justify="left" if name == "run" else "right")
    for run in comparison.runs:
        table.add_row(run.run, *_dices(run.scores))
        table.add_row("  95 % interval", *_intervals("{:.3f} to {:.3f}", run.scores, run.intervals))
        if run.differences:
            found = (run.differences.get(score.field) for score in DICES)
            table.add_row("  difference", *("" if value is None else f"{value:+.4f}" for value in found))
            table.add_row("  95 % interval", *_intervals("{:+.3f} to {:+.3f}", run.scores, run.difference_intervals))
        table.add_section()
    first = comparison.runs[0].scores
    table.add_row("predicting nothing", *_baselines(first), style="dim")
    out.print(table)
    out.print(f"{comparison.cases:,} images that all runs have evaluated, {first.positives:,} positive")


def show_external(result: ExternalScores) -> None:
    """Print the scores of another tool's predictions, and what each is and may be compared with."""
    from ptxdist.scores.external import COLUMNS, cells

    table = Table(title=f"{result.predictions}; truth: {result.truth}", title_justify="left")
    for name in ("", *COLUMNS):
        table.add_column(name, justify="right" if name else "left", no_wrap=name == COLUMNS[1])
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
        out.print(Text.assemble("\n", (score.name, "bold"), f": {score.definition}\n  Compare with: {score.compare}"))


def _intervals(form: str, scores: Scores, intervals: Intervals) -> list[str]:
    """The interval of each Dice score; a score that is not defined has none."""
    found = ((intervals.get(score.field), score.of(scores)) for score in DICES)
    return [form.format(*span) if span else "" if value is None else TOO_FEW for span, value in found]


def _dices(scores: Scores) -> list[str]:
    return [number(score.of(scores)) for score in DICES]


def _baselines(scores: Scores) -> list[str]:
    return [f"{score.baseline_of(scores):.4f}" for score in DICES]
