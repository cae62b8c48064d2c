"""The charts of a report: which numbers of a run are drawn over which axes, and the alternative text of each chart.

Each function returns a list of charts, which is empty when there are no numbers. `charts` draws them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import cv2
import numpy as np
import numpy.typing as npt

from ptxdist.records import EpochMetrics, EvaluationResult, PipelineResult, Reliability, TunedPoint
from ptxdist.report.charts import Axis, Point, Series, cell_axis, linear_axis, log_axis, plot, surface
from ptxdist.report.page import Chart, Legend, Row, Table, data_uri
from ptxdist.scores.headline import digits, number
from ptxdist.scores.names import AUROC, DICES
from ptxdist.scores.tables import CaseRow

FEW = 10  # things in a bin of a reliability plot; the share of fewer is not reliable
PLATEAU = 0.005  # points of the surface this close to the best are equally good in practice
_MARKED_POINTS = 40  # with more points in a line, marks would hide it


def learning_curves(result: PipelineResult) -> list[Chart]:
    """Loss, Dice and learning rate over the epochs of all stages in turn; [] without epochs."""
    place, parts, rules = 0, list[list[tuple[float, EpochMetrics]]](), list[tuple[float, str]]()
    for stage in result.stages:
        rules.append((place + 0.5, f"stage {stage.stage}: {stage.size_px} pixels"))
        parts.append([])
        for item in stage.history:
            place += not item.averaged  # averaged weights are behind the last epoch
            parts[-1].append((place + 0.5 * item.averaged, item))
    if not place:
        return []
    x = linear_axis("epoch, all stages", 0.5, place + 0.5, whole=True)

    def series(name: str, style: int, value: Callable[[EpochMetrics], float | None]) -> Series:
        known = (((at, found) for at, item in part if (found := value(item)) is not None) for part in parts)
        return Series(name, style, tuple(map(tuple, known)), marks=place <= _MARKED_POINTS)

    bests = [stage.best for stage in result.stages]
    best = [(at, item) for part in parts for at, item in part if item in bests]
    loss = (series("training", 1, lambda item: item.train_loss), series("validation", 2, lambda item: item.val_loss))
    dice = [
        series(score.name, style, lambda item, score=score: score.of(item.at_full))  # type: ignore[misc]
        for style, score in enumerate(DICES, start=1)
    ]
    rate = (series("learning rate", 1, lambda item: item.learning_rate if item.learning_rate > 0 else None),)
    nothing = bests[-1].at_full.all_empty_dice
    rates = [point[1] for part in rate[0].parts for point in part]
    return [
        _curves("Loss per case", x, _loss_axis(loss), loss, rules, ring=[
            (at, item.val_loss) for at, item in best
        ]),
        _curves("Dice on held-out images", x, linear_axis("Dice at the original resolution", 0, 1), dice, rules,
            level=nothing,
            ring=[(at, item.at_full.kaggle_dice) for at, item in best],
        ),
        _curves("Learning rate", x, log_axis("learning rate", min(rates), max(rates)) if rates and
            max(rates) > 10 * min(rates) else linear_axis("learning rate", 0, max(rates, default=1)), rate, rules),
    ]  # fmt: skip


def _curves(
    title: str,
    x: Axis,
    y: Axis,
    lines: Sequence[Series],
    rules: Sequence[tuple[float, str]],
    level: float | None = None,
    ring: Sequence[Point] = (),
) -> Chart:
    spoken = []
    for item in lines:
        points = [point for part in item.parts for point in part]
        if points:
            spoken.append(f"{item.name} from {points[0][1]:.4g} (first) to {points[-1][1]:.4g} (last)")
    legend = [Legend(item.style, item.name) for item in lines]
    if level is not None:
        legend.append(Legend(0, f"predicting nothing: Kaggle Dice {level:.2f}"))
        spoken.append(legend[-1].name)
    levels = () if level is None else (level,)
    words = f"Line chart, {title}: {'; '.join(spoken)}."
    drawing = plot(x, y, lines, words=words, rules=rules, levels=levels, rings=ring)
    return Chart(title, drawing, tuple(legend) if len(legend) > 1 else ())


def _loss_axis(lines: Sequence[Series]) -> Axis:
    """From 0; logarithmic if the first losses are so high that later ones could not be distinguished."""
    values = sorted(point[1] for line in lines for part in line.parts for point in part)
    if values and values[0] > 0 and values[-1] > 5 * values[len(values) // 2]:
        return log_axis("loss (logarithmic)", values[0] / 1.1, values[-1] * 1.1)
    return linear_axis("loss", 0, max(values, default=1.0))


def size_against_dice(rows: Sequence[CaseRow]) -> list[Chart]:
    """Dice of each positive case over the area of its mask, missed ones marked; [] without positive cases."""
    positive = [row for row in rows if row.positive]
    if not positive:
        return []
    found, missed = (
        [(float(row.truth_px), row.kaggle_dice) for row in positive if bool(row.predicted_px) == hit]
        for hit in (True, False)
    )
    areas = [area for area, _ in (*found, *missed)]
    x = log_axis(
        "area of the true mask in pixels of the original image (logarithmic)", min(areas) / 1.2, max(areas) * 1.2
    )
    series = (
        Series("anything predicted", 1, (tuple(found),), line=False),
        Series("missed: no pixel predicted", 2, (tuple(missed),), line=False),
    )
    words = (
        f"Scatter plot of {len(positive)} positive images: Dice over the area of the true mask, "
        f"{min(areas):,.0f} to {max(areas):,.0f} pixels; {len(missed)} are missed. {_thirds(found + missed)}"
    )
    return [
        Chart(
            "Dice of each positive image",
            plot(x, linear_axis("Dice", 0, 1), series, words=words),
            tuple(Legend(item.style, item.name, line=False) for item in series),
            note=_thirds(found + missed),
        )
    ]


def _thirds(points: Sequence[Point]) -> str:
    """A sentence with the mean Dice of the smallest, middle and largest third of the masks; "" below nine points."""
    if len(points) < 9:
        return ""
    ordered = sorted(points)
    third = len(ordered) // 3
    parts = (ordered[:third], ordered[third:-third], ordered[-third:])
    means = [sum(dice for _, dice in part) / len(part) for part in parts]
    return (
        f"Mean Dice: {means[0]:.2f} for the smallest third of the masks, {means[1]:.2f} for the middle third, "
        f"{means[2]:.2f} for the largest third."
    )


def tuned_surface(tuned: TunedPoint) -> list[Chart]:
    """Kaggle Dice over threshold and smallest area, with the chosen point and the plateau around it; [] if empty."""
    values = np.array(tuned.surface, dtype=float).T  # (areas, thresholds); None becomes nan
    known = ~np.isnan(values)
    if not known.any():
        return []
    best, lowest = float(values[known].max()), float(values[known].min())
    plateau = known & (values >= best - PLATEAU)
    threshold = tuned.point.bottom if tuned.kind == "triplet" else tuned.point.top
    chosen = (
        float(np.argmin(np.abs(np.array(tuned.thresholds) - threshold))),
        float(np.argmin(np.abs(np.array(tuned.areas_px) - tuned.point.min_area_px))),
    )
    name = "bottom threshold" if tuned.kind == "triplet" else "threshold"
    areas, thresholds = (np.flatnonzero(plateau.any(axis)) for axis in (1, 0))
    words = (
        f"Kaggle Dice from {lowest:.3f} to {best:.3f}. Within {PLATEAU:g} of the best: "
        f"{int(plateau.sum())} of {int(known.sum())} points, {name}s {tuned.thresholds[thresholds[0]]:g} to "
        f"{tuned.thresholds[thresholds[-1]]:g}, smallest areas {tuned.areas_px[areas[0]]:,} to "
        f"{tuned.areas_px[areas[-1]]:,} pixels."
    )
    drawing = surface(
        cell_axis(name, [f"{value:g}" for value in tuned.thresholds]),
        cell_axis("smallest area kept, pixels", [f"{value:,}" for value in tuned.areas_px]),
        _colours((values - lowest) / max(best - lowest, 1e-12)),
        words=f"Surface of the Kaggle Dice over {name} and smallest area. {words}",
        inside=plateau,
        ring=chosen,
    )
    fixed = [f"image threshold {tuned.point.image:g}"] if tuned.point.image else []
    fixed += [f"top threshold {tuned.point.top:g}"] if tuned.kind == "triplet" else []
    at = f" ({', '.join(fixed)})" if fixed else ""
    return [
        Chart(
            f"{'Threshold' if tuned.kind == 'pair' else 'Two thresholds'} and smallest area{at}",
            drawing,
            note=f"Ring: the chosen point. Outline: the plateau. {words}",
            scale=(f"{lowest:.3f}", _colours(np.linspace(0, 1, 64)[None]), f"{best:.3f}"),
        )
    ]


def _colours(shares: npt.NDArray[np.float64]) -> str:
    """Values 0..1 (rows from below, columns) as a PNG data URI, one pixel each; nan is clear. Palette: cividis."""
    known = ~np.isnan(shares)
    grey = np.where(known, np.round(255 * np.nan_to_num(shares)), 0).astype(np.uint8)
    colour = cv2.cvtColor(cv2.applyColorMap(grey, cv2.COLORMAP_CIVIDIS), cv2.COLOR_BGR2BGRA)
    colour[~known, 3] = 0
    _, content = cv2.imencode(".png", colour[::-1])
    return data_uri("image/png", content.tobytes())


def roc_curve(evaluation: EvaluationResult) -> list[Chart]:
    """The ROC curve of the score, with the working points on it; [] without both kinds of images."""
    if not evaluation.roc:
        return []
    points = tuple((1 - point.specificity, point.sensitivity) for point in evaluation.working)
    series = [Series("score", 1, (evaluation.roc,), marks=False)]
    legend = [Legend(1, "score of an image"), Legend(0, "chance")]
    if points:
        series.append(Series("working points", 2, (points,), line=False))
        legend.append(Legend(2, "working points, cross-fitted", line=False))
    places = digits(evaluation.intervals.get(AUROC.field))
    area = "" if evaluation.auroc is None else f", AUROC {number(evaluation.auroc, places)}"
    axes = linear_axis("1 - specificity", 0, 1), linear_axis("sensitivity", 0, 1)
    words = f"ROC curve of the score of {evaluation.scores.cases:,} images{area}."
    return [Chart(f"ROC curve{area}", plot(*axes, series, words=words, diagonal=True), tuple(legend), square=True)]


def reliability(found: Reliability) -> list[Chart]:
    """Observed share over predicted probability; both agree on the diagonal."""
    things = "pixels" if found.things == "px" else found.things
    points = tuple(zip(found.predicted, found.observed, strict=True))
    rows = tuple(
        Row(f"{predicted:.4f}", (f"{observed:.4f}", f"{count:,}"))
        for predicted, observed, count in zip(found.predicted, found.observed, found.counts, strict=True)
    )
    axes = linear_axis("mean predicted probability", 0, 1), linear_axis("observed share", 0, 1)
    is_few = [count < FEW for count in found.counts]
    few = tuple(point for point, alone in zip(points, is_few, strict=True) if alone)
    # Lines are interrupted at bins of few things.
    runs = groupby(zip(is_few, points, strict=True), key=lambda item: item[0])
    many = tuple(tuple(point for _, point in run) for alone, run in runs if not alone)
    series = [Series(things, 1, many), Series("few", 5, (few,), line=False)]
    legend = [Legend(1, f"bins of {things}"), Legend(0, "perfect calibration")]
    if few:
        legend.append(Legend(5, f"fewer than {FEW} {things}", line=False))
    words = (
        f"Reliability of {things}, {sum(found.counts):,} in {len(points)} bins; expected calibration error "
        f"{found.error:.2g}."
    )
    return [
        Chart(
            f"{things.capitalize()}: calibration error {found.error:.2g}",
            plot(*axes, series, words=words, diagonal=True),
            tuple(legend),
            numbers=Table(f"Bins of {things}", ("mean predicted", "observed", things), rows),
            square=True,
        )
    ]
