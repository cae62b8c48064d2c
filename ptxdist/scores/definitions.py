"""Every Dice in use for these data, under its exact definition, and what each may be compared with.

Papers and tools call different numbers "Dice". All are functions of the counts of each image here: int64 (n, 4), the
pixels of intersection, prediction, truth and image, in the order of the predictions. Sources, in public repositories:

    nnU-Net v2     MIC-DKFZ/nnUNet, nnunetv2/evaluation/evaluate_predictions.py: `np.nanmean` of 2 TP / (2 TP + FP + FN)
    GLoRIA, MGCA   marshuang80/gloria, gloria/lightning/segmentation_model.py, and HKU-MedAI/MGCA,
                   mgca/models/ssl_segmenter.py: `get_dice`, and `shared_epoch_end`, which averages batches
    MRM            RL4M/MRM-pytorch, Siim_Segmentation/mmseg/core/evaluation/metrics.py: `medDice` of `eval_metrics`,
                   which Siim_Segmentation/test.sh asks for
    mmsegmentation the same file: `mDice` of `total_area_to_metrics`, averaged over the classes in `datasets/custom.py`
    flattened      Ayat-Abedalla/Ens4B-UNet, metric_loss.py: the smoothed Dice of `dice_loss`, here of masks
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ptxdist.scores import metrics
from ptxdist.scores.counts import Counts
from ptxdist.scores.names import SCORES

BATCH, GLORIA_BATCH = 16, 8  # of the source's full recipe at 512 pixels; of MGCA's code (GLoRIA's is not public)
SMOOTH = 1.0
DRAWS = 1000

Floats = npt.NDArray[np.float64]
Chosen = npt.NDArray[np.bool_]
Function = Callable[[Counts], float | None]
Ratio = Callable[[Counts], tuple[Floats, Floats]]


def _all(counts: Counts) -> Chosen:
    return np.ones(len(counts), bool)


def _positive(counts: Counts) -> Chosen:
    return np.asarray(counts[:, 2] > 0)


def _negative(counts: Counts) -> Chosen:
    return np.asarray(counts[:, 2] == 0)


def _not_empty(counts: Counts) -> Chosen:
    return np.asarray(counts[:, 1] + counts[:, 2] > 0)


@dataclass(frozen=True)
class Definition:
    """One score: name, definition, what its value may be compared with, and the function of the counts.

    The function returns None where the score is not defined, and is called with at least one image; that of a score
    which needs more than counts always returns None. `used` says which images contribute. `digits` are shown behind the
    point.

    The interval is that of the score `same_as` of `metrics.scores`; else, of a score that is a ratio of two sums over
    images and within 0..1, that of `ratio`, which returns both parts of each image; else that of `resampled`.
    """

    name: str
    definition: str
    compare: str
    of: Function = lambda counts: None
    used: Callable[[Counts], Chosen] = _all
    same_as: str = ""
    ratio: Ratio | None = None
    digits: int = 4


def of_ratio(upper: Floats, lower: Floats) -> float | None:
    """The ratio of the two sums; None if that of `lower` is 0."""
    return float(upper.sum() / lower.sum()) if lower.any() else None


def nnunet_parts(counts: Counts) -> tuple[Floats, Floats]:
    """Dice of each image where truth or prediction has a pixel, and 1; 0 and 0 for the other images."""
    used = _not_empty(counts)
    return metrics.image_dice(counts) * used, used.astype(np.float64)


def gloria_parts(counts: Counts) -> tuple[Floats, Floats]:
    """Dice of each image, 1 for two empty masks, and 1, both divided by the number of images in its batch of 8.

    So each batch counts the same, and the score differs from the mean over images only if the last batch is smaller.
    """
    starts = np.arange(0, len(counts), GLORIA_BATCH)
    sizes = np.diff(starts, append=len(counts))
    weight = 1 / np.repeat(sizes, sizes)
    return metrics.image_dice(counts) * weight, weight


def flattened_dice(counts: Counts) -> float:
    """Mean over batches of 16 images in order of (2 I + 1) / (P + T + 1), pixels summed over the batch.

    The last batch may be smaller and counts as much as the others. 1 for a batch without any mask.
    """
    sums = np.add.reduceat(counts, np.arange(0, len(counts), BATCH), axis=0)
    return float(((2 * sums[:, 0] + SMOOTH) / (sums[:, 1] + sums[:, 2] + SMOOTH)).mean())


def kaggle_dice(counts: Counts) -> float:
    """Mean over images of the Dice; 1 where truth and prediction are empty, 0 where one of them is."""
    return float(metrics.image_dice(counts).mean())


def mmseg_dice(counts: Counts) -> float:
    """Mean of two Dice values, of the mask and of the background, each over the pixels of all images together.

    Without any mask in truth and prediction, that of the background alone, 1.
    """
    both, predicted, true, pixels = (int(number) for number in counts.sum(axis=0))
    pairs = [(both, predicted + true), (pixels - predicted - true + both, 2 * pixels - predicted - true)]
    found = [2 * common / total for common, total in pairs if total]
    return sum(found) / len(found)


def false_alarm_px(counts: Counts) -> float | None:
    """Mean number of predicted pixels in the images without a true mask; None without such an image."""
    negative = counts[:, 2] == 0
    return float(counts[negative, 1].mean()) if negative.any() else None


def _standard(field: str, used: Callable[[Counts], Chosen], compare: str) -> Definition:
    """A score that every other command shows too."""
    score = SCORES[field]
    return Definition(
        score.name, score.definition, compare, lambda counts: score.of(metrics.scores(counts)), used, same_as=field
    )


def _ratio(name: str, definition: str, compare: str, used: Callable[[Counts], Chosen], parts: Ratio) -> Definition:
    return Definition(name, definition, compare, lambda counts: of_ratio(*parts(counts)), used, ratio=parts)


DEFINITIONS = {
    "kaggle_dice": _standard(
        "kaggle_dice",
        _all,
        "The leaderboards of the SIIM-ACR challenge, and papers that use its metric on full-size masks (1024 pixels). "
        "A number is only as good as its distance from predicting nothing; other images have another such baseline.",
    ),
    "positive_dice": _standard(
        "positive_dice",
        _positive,
        "Papers that say that they score only positive images, and two readers of the same images. It does not see "
        "false alarms.",
    ),
    "pooled_dice": _standard(
        "pooled_dice",
        _not_empty,
        "Papers that sum pixels over the test set: \"global\", \"micro\" or \"dataset\" Dice, pixel-wise F1. Not the "
        "pseudo Dice in nnU-Net's training log, which is of random patches.",
    ),
    "nnunet_dice": _ratio(
        "nnU-Net Dice",
        "Mean Dice of the images where truth or prediction has a pixel. Images where both are empty are left out; a "
        "false alarm counts 0.",
        "`foreground_mean` in the summary.json of nnU-Net v2, and MONAI's DiceMetric only if every image is positive "
        "(it leaves out all images with an empty truth).",
        _not_empty,
        nnunet_parts,
    ),
    "flattened_dice": Definition(
        f"Flattened Dice, batches of {BATCH}",
        f"Mean over batches of {BATCH} images in the order of the predictions: (2 I + 1) / (P + T + 1), pixels summed "
        "over the batch. The order matters; the interval is that of a random order.",
        "Dice in Keras-style training logs, such as Ens4B-UNet's 1 - dice_loss, and only roughly: those are of "
        "probabilities, at the training size, in shuffled batches of another size (its notebooks use 10). Each of "
        "these changes it.",
        flattened_dice,
    ),
    "gloria_dice": _ratio(
        "GLoRIA / MGCA Dice",
        f"Mean over batches of {GLORIA_BATCH} images, in the order of the predictions, of their mean Dice per image; "
        "both empty = 1, one empty = 0.",
        "SIIM numbers of GLoRIA, MGCA and papers that took over their code, for masks at their training size (MGCA: "
        "224 pixels) and threshold 0.5. Their code splits the rows of the label table and not the images, so an image "
        "with several masks can be in training and in test, each with a part of its masks as truth.",
        _all,
        gloria_parts,
    ),
    "mrm_dice": Definition(
        "MRM Dice (medDice)",
        "Mean Dice of each image, averaged over all images; both empty = 1, one empty = 0. The same as Kaggle Dice.",
        "`Dice.front` of MRM and papers that took over its code, on MRM's own split. `mDice` in the same log is half "
        "of it, since it is averaged with a 0 for the background.",
        kaggle_dice,
        same_as="kaggle_dice",
    ),
    "mmseg_dice": Definition(
        "mmsegmentation mDice",
        "Mean of the pooled Dice of the mask and that of the background.",
        "`mDice` of mmsegmentation with two classes. Predicting nothing scores about 0.5, so it looks high.",
        mmseg_dice,
    ),
    "sensitivity": _standard("sensitivity", _positive, "Detection rates per image, at this threshold."),
    "specificity": _standard("specificity", _negative, "Specificities per image, at this threshold."),
    "false_alarm_px": Definition(
        "False-alarm pixels",
        "Mean number of predicted pixels in a negative image.",
        "Only images of the same size; a lower number is better.",
        false_alarm_px,
        _negative,
        digits=0,
    ),
}  # fmt: skip


def resampled(
    functions: Mapping[str, Callable[[npt.NDArray[np.intp]], float | None]], group: npt.NDArray[np.intp]
) -> dict[str, tuple[float, float]]:
    """95 % percentile interval of each function, from a bootstrap of 1,000 draws over groups (patients).

    `group` (n,) is the number of each image's group, from 0. A function is called with the places of the images of a
    draw, each as often as its group is drawn, in random order: repeated images in one batch would raise or lower a
    score of batches. Draws where it returns None are left out. A function has no entry if it returns None in all draws,
    or if the limits are equal, which would claim a certainty that there is not.
    """
    if not functions:
        return {}
    random, places, groups = np.random.default_rng(0), np.arange(len(group)), int(group.max()) + 1
    values: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(DRAWS):
        times = np.bincount(random.integers(0, groups, groups), minlength=groups)
        drawn = random.permutation(np.repeat(places, times[group]))
        for name, function in functions.items():
            if (value := function(drawn)) is not None:
                values[name].append(value)
    edges = {name: np.quantile(found, (0.025, 0.975)) for name, found in values.items() if found}
    return {name: (float(low), float(high)) for name, (low, high) in edges.items() if low < high}
