"""What each score is called, how it is defined, and what it is worth without a model: the one table for all output.

Terminal, Markdown, report, TensorBoard and Ray's dashboard take their names from here. A score is a field of
`records.Scores`; its interval has the same name in `records.Intervals`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ptxdist.records import Scores


@dataclass(frozen=True)
class Score:
    """One score: its field, its name, the short name for a column below "Dice" and for metrics, and its definition.

    `baseline` is its value without a model, of the kind that `without` names; None: the share of negative images.
    """

    field: str
    name: str
    short: str
    definition: str
    baseline: float | None
    without: str = "predicting nothing"

    def of(self, scores: Scores) -> float | None:
        """Its value in a set of scores; None where it is not defined."""
        value: float | None = getattr(scores, self.field)
        return value

    def baseline_of(self, scores: Scores) -> float:
        """Its value without a model, on the same cases."""
        return scores.all_empty_dice if self.baseline is None else self.baseline


SCORES = {
    score.field: score
    for score in (
        Score(
            "kaggle_dice",
            "Kaggle Dice",
            "Kaggle",
            "Dice of each image at the original resolution, averaged over all images; both empty = 1, one empty = 0.",
            None,
        ),
        Score(
            "positive_dice",
            "Positives-only Dice",
            "positives only",
            "The same average over the images that have a pneumothorax.",
            0.0,
        ),
        Score("pooled_dice", "Pooled Dice", "pooled", "One Dice over the pixels of all images together.", 0.0),
        Score("pooled_iou", "Pooled IoU", "IoU", "Intersection over union of the pixels of all images together.", 0.0),
        Score(
            "sensitivity",
            "Sensitivity",
            "sensitivity",
            "Share of the images with a pneumothorax in which any pixel is predicted.",
            0.0,
        ),
        Score(
            "specificity",
            "Specificity",
            "specificity",
            "Share of the images without a pneumothorax in which no pixel is predicted.",
            1.0,
        ),
    )
}
DICES = tuple(score for score in SCORES.values() if score.field.endswith("_dice"))  # those with a value for each epoch

# Scores of an evaluation that are no fields of `Scores`.
AUROC = Score(
    "auroc",
    "AUROC",
    "AUROC",
    "Probability that an image with a pneumothorax has a higher score than one without; the score of an image is its "
    "highest probability.",
    0.5,
    "chance",
)
ECE = Score(
    "error",
    "ECE of images",
    "ECE",
    "Expected calibration error: how far the score of an image is from the share of such images that are positive.",
    0.0,
    "one score for all",
)


def dice_metrics(scores: Scores) -> dict[str, float]:
    """The Dice scores and their baseline by their names in TensorBoard and MLflow; undefined ones are left out."""
    named = {f"dice/{score.short.lower()}": score.of(scores) for score in DICES}
    named["dice/predicting nothing"] = scores.all_empty_dice
    return {name: value for name, value in named.items() if value is not None}
