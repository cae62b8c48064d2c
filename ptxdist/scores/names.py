"""What each score is called, how it is defined, and what it is worth without a model: the one table for all output.

Terminal, Markdown, report, TensorBoard and Ray's dashboard take their names from here. A score is a field of
`records.Scores`; its interval has the same name in `records.Intervals`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ptxdist.records import Scores


@dataclass(frozen=True)
class Score:
    """One score: its field, its name, its short name beside "Dice", its definition.

    `baseline` is its value without a model, of the kind that `without` names; None: the share of negative images.
    """

    field: str
    name: str
    short: str
    baseline: float | None
    definition: str
    without: str = "predicting nothing"

    def of(self, scores: Scores) -> float | None:
        """Its value in a set of scores; None where it is not defined."""
        value: float | None = getattr(scores, self.field)
        return value

    def baseline_of(self, scores: Scores) -> float:
        """Its value without a model, on the same cases."""
        return scores.all_empty_dice if self.baseline is None else self.baseline


_ALL = (
    Score("kaggle_dice", "Kaggle Dice", "Kaggle", None,
          "Dice of each image at the original resolution, averaged over all images; both empty = 1, one empty = 0."),
    Score("positive_dice", "Positives-only Dice", "positives only", 0.0,
          "The same average over the positive images."),
    Score("pooled_dice", "Pooled Dice", "pooled", 0.0,
          "One Dice over the pixels of all images together."),
    Score("pooled_iou", "Pooled IoU", "IoU", 0.0,
          "Intersection over union of the pixels of all images together."),
    Score("sensitivity", "Sensitivity", "sensitivity", 0.0,
          "Share of the positive images in which any pixel is predicted."),
    Score("specificity", "Specificity", "specificity", 1.0,
          "Share of the negative images in which no pixel is predicted."),
)  # fmt: skip
SCORES = {score.field: score for score in _ALL}
DICES = tuple(score for score in _ALL if score.field.endswith("_dice"))  # those that are shown for each epoch

TOO_FEW = "too few"  # patients: what stands in place of an interval

# Scores of an evaluation that are not fields of `Scores`.
AUROC = Score(
    "auroc", "AUROC", "AUROC", 0.5,
    "Probability that a positive image has a higher score than a negative one.", "chance",
)  # fmt: skip
ECE = Score(
    "error", "ECE of images", "ECE", 0.0,
    "Expected calibration error: how far the score of an image is from the share of such images that are positive. "
    "Too large in small samples, so without an interval.",
    "one score for all",
)  # fmt: skip


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts in Markdown."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def dice_metrics(scores: Scores) -> dict[str, float]:
    """The Dice scores and their baseline by their names in TensorBoard and MLflow; undefined ones are left out."""
    named = {f"dice/{score.short.lower()}": score.of(scores) for score in DICES}
    named["dice/predicting nothing"] = scores.all_empty_dice
    return {name: value for name, value in named.items() if value is not None}
