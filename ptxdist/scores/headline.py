"""What people read first of an evaluation: the operating point that is used, its scores beside others, a sentence.

Report and terminal take their points, their sentences and their number of digits from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ptxdist.records import EvaluationResult, Intervals, OperatingPoint, Scores

WIDE, NARROW = 0.05, 0.005  # an interval as wide as this has two digits, a narrower one three or four
MISSES = 0.8  # a sensitivity this low, of a point chosen for the Kaggle Dice, needs a word
Span = tuple[float, float] | None


@dataclass(frozen=True)
class Shown:
    """An operating point with its scores; `intervals` are {} where they were not computed.

    `column` is its `name` above a column of the terminal. `tuned` is the kind of a tuned point, whose scores are those
    of images that it was not chosen on; "" for other points. `kept` says whether the masks in predictions.csv are of
    this point.
    """

    name: str
    column: str
    scores: Scores
    intervals: Intervals
    tuned: str = ""
    kept: bool = False


def points(evaluation: EvaluationResult) -> tuple[Shown, ...]:
    """The points of an evaluation, once each: first the one that `predict`, `serve` and `export` use.

    That is the model's own point in an evaluation elsewhere, otherwise the tuned point with the best estimate; without
    tuned points the threshold of the last stage.
    """
    smallest = f", ≥ {evaluation.min_area_px:,} pixels" if evaluation.min_area_px else ""
    own = Shown(
        f"threshold {evaluation.threshold:g}{smallest}" if evaluation.point is None else "the model's own point",
        f"at {evaluation.threshold:g}" if evaluation.point is None else "own point",
        evaluation.scores,
        evaluation.intervals,
        kept=True,
    )
    tuned = [
        Shown(
            f"tuned {short(item.point)}",
            "tuned here" if evaluation.point else "tuned",
            item.estimate,
            item.intervals,
            item.kind,
        )
        for item in sorted(evaluation.tuned, key=lambda item: item is not evaluation.best_tuned)
    ]
    fixed = [
        Shown(f"threshold {threshold}", f"at {threshold}", scores, {})
        for threshold, scores in evaluation.at_other_thresholds.items()
    ]
    if evaluation.point is not None or not tuned:
        return (own, *tuned, *fixed)
    return (tuned[0], own, *fixed, *tuned[1:])


def short(point: OperatingPoint) -> str:
    """A point in a few words: "threshold 0.45", "thresholds 0.6 and 0.3, ≥ 512 pixels"."""
    found = (
        f"threshold {point.top:g}" if point.top == point.bottom else f"thresholds {point.top:g} and {point.bottom:g}"
    )
    found += f", ≥ {point.min_area_px:,} pixels" if point.min_area_px else ""
    return found + (f", score ≥ {point.image:g}" if point.image else "")


def sentences(evaluation: EvaluationResult) -> Iterator[str]:
    """What the point in use finds, and its Kaggle Dice beside that of predicting nothing; each fits a line of 80.

    Where that point misses one positive image in five or more, a last sentence says how to find more of them.
    """
    used = points(evaluation)[0]
    scores, one = used.scores, evaluation.finding.one
    hits, alarms = found(scores)
    if scores.equals_all_empty:
        yield f"Finds nothing: not a pixel is predicted in any of the {scores.cases:,} images."
    elif scores.positives:
        yield f"Finds {hits} with {one}; false alarms in {alarms} without."
    else:
        yield f"No image is positive; false alarms in {alarms} images."
    places = digits(used.intervals.get("kaggle_dice"))
    dice, nothing = number(scores.kaggle_dice, places), number(scores.all_empty_dice, places)
    better = scores.kaggle_dice > scores.all_empty_dice
    yield f"Kaggle Dice {dice}; predicting nothing scores {nothing}{'' if better else ', which is no worse'}."
    if used.tuned and not evaluation.working and scores.sensitivity is not None and scores.sensitivity <= MISSES:
        yield "To find more: ptxdist evaluate RUN --sensitivity 0.95, then predict with --at."


def found(scores: Scores) -> tuple[str, str]:
    """Positive images that get a mask, and negative ones that get one: "17 of 20", "3 of 14"."""
    hits, alarms = counts(scores)
    return f"{hits:,} of {scores.positives:,}", f"{alarms:,} of {scores.cases - scores.positives:,}"


def counts(scores: Scores) -> tuple[int, int]:
    """How many positive images, and how many negative ones, get a mask."""
    hits, rejections = (scores.sensitivity or 0) * scores.positives, scores.specificity or 0
    return round(hits), round((1 - rejections) * (scores.cases - scores.positives))


def digits(span: Span) -> int:
    """How many digits of a score are worth showing: two if its interval is wide or not known, else three or four."""
    width = 1.0 if span is None else span[1] - span[0]
    return 2 if width >= WIDE else 3 if width >= NARROW else 4


def number(value: float | None, places: int = 2) -> str:
    """A score with so many digits; "n/a" if it is not defined."""
    return "n/a" if value is None else f"{value:.{places}f}"
