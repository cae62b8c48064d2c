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

Function = Callable[[Counts], float | None]


@dataclass(frozen=True)
class Definition:
    """One score: name, definition, what its value may be compared with, and the function of the counts.

    The function returns None where the score is not defined, and is called with at least one image; that of a score
    which needs more than counts always returns None. `digits` are shown behind the point. `interval` is the score of
    `metrics.scores` whose interval it has; "": none of them, its interval comes from `resampled`.
    """

    name: str
    definition: str
    compare: str
    of: Function = lambda counts: None
    digits: int = 4
    interval: str = ""


def nnunet_dice(counts: Counts) -> float | None:
    """Mean Dice of the images where truth or prediction has a pixel; None without such an image."""
    total = counts[:, 1] + counts[:, 2]
    used = total > 0
    return float((2 * counts[used, 0] / total[used]).mean()) if used.any() else None


def flattened_dice(counts: Counts) -> float:
    """Mean over batches of 16 images in order of (2 I + 1) / (P + T + 1), pixels summed over the batch.

    The last batch may be smaller and counts as much as the others. 1 for a batch without any mask.
    """
    sums = np.add.reduceat(counts, np.arange(0, len(counts), BATCH), axis=0)
    return float(((2 * sums[:, 0] + SMOOTH) / (sums[:, 1] + sums[:, 2] + SMOOTH)).mean())


def gloria_dice(counts: Counts) -> float:
    """Mean over batches of 8 images in order of their mean Dice per image, where two empty masks are 1.

    It differs from the mean over all images only if the last batch is smaller, since that counts as much as the others.
    """
    starts = np.arange(0, len(counts), GLORIA_BATCH)
    sums = np.add.reduceat(metrics.image_dice(counts), starts)
    return float((sums / np.diff(starts, append=len(counts))).mean())


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


def _standard(field: str, compare: str) -> Definition:
    score = SCORES[field]
    return Definition(
        score.name, score.definition, compare, lambda counts: score.of(metrics.scores(counts)), interval=field
    )


DEFINITIONS = {
    "kaggle_dice": _standard(
        "kaggle_dice",
        "The leaderboards of the SIIM-ACR challenge, and papers that use its metric on full-size masks (1024 pixels). "
        "A number is only as good as its distance from predicting nothing; other images have another such baseline.",
    ),
    "positive_dice": _standard(
        "positive_dice",
        "Papers that say that they score only images with a pneumothorax, and two readers of the same images. It does "
        "not see false alarms.",
    ),
    "pooled_dice": _standard(
        "pooled_dice",
        "Papers that sum pixels over the test set: \"global\", \"micro\" or \"dataset\" Dice, pixel-wise F1. Not the "
        "pseudo Dice in nnU-Net's training log, which is of random patches.",
    ),
    "nnunet_dice": Definition(
        "nnU-Net Dice",
        "Mean Dice of the images where truth or prediction has a pixel. Images where both are empty are left out; a "
        "false alarm counts 0.",
        "`foreground_mean` in the summary.json of nnU-Net v2, and MONAI's DiceMetric only if every image is positive "
        "(it leaves out all images with an empty truth).",
        nnunet_dice,
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
    "gloria_dice": Definition(
        "GLoRIA / MGCA Dice",
        f"Mean over batches of {GLORIA_BATCH} images, in the order of the predictions, of their mean Dice per image; "
        "both empty = 1, one empty = 0.",
        "SIIM numbers of GLoRIA, MGCA and papers that took over their code, for masks at their training size (MGCA: "
        "224 pixels) and threshold 0.5. Their code splits the rows of the label table and not the images, so an image "
        "with several masks can be in training and in test, each with a part of its masks as truth.",
        gloria_dice,
    ),
    "mrm_dice": Definition(
        "MRM Dice (medDice)",
        "Mean Dice of each image, averaged over all images; both empty = 1, one empty = 0. The same as Kaggle Dice.",
        "`Dice.front` of MRM and papers that took over its code, on MRM's own split. `mDice` in the same log is half "
        "of it, since it is averaged with a 0 for the background.",
        kaggle_dice,
        interval="kaggle_dice",
    ),
    "mmseg_dice": Definition(
        "mmsegmentation mDice",
        "Mean of the pooled Dice of the mask and that of the background.",
        "`mDice` of mmsegmentation with two classes. Predicting nothing scores about 0.5, so it looks high.",
        mmseg_dice,
    ),
    "sensitivity": _standard("sensitivity", "Detection rates per image, at this threshold."),
    "specificity": _standard("specificity", "Specificities per image, at this threshold."),
    "false_alarm_px": Definition(
        "False-alarm pixels",
        "Mean number of predicted pixels in an image without a pneumothorax.",
        "Only images of the same size; a lower number is better.",
        false_alarm_px,
        digits=0,
    ),
}  # fmt: skip


def resampled(
    functions: Mapping[str, Callable[[npt.NDArray[np.intp]], float | None]], group: npt.NDArray[np.intp], draws: int
) -> dict[str, tuple[float, float]]:
    """95 % percentile interval of each function, from a bootstrap over groups (patients).

    `group` (n,) is the number of each image's group. A function is called with the places of the images of a draw, each
    as often as its group is drawn, in random order: repeated images in one batch would raise or lower a score of
    batches. Draws where it returns None are left out. A function has no entry if it returns None in all draws, if the
    limits are equal, which claims a certainty that there is not, or if there are fewer than two groups.
    """
    groups = int(group.max()) + 1
    if groups < 2:
        return {}
    random, places = np.random.default_rng(0), np.arange(len(group))
    values: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(draws):
        times = np.bincount(random.integers(0, groups, groups), minlength=groups)
        drawn = random.permutation(np.repeat(places, times[group]))
        for name, function in functions.items():
            if (value := function(drawn)) is not None:
                values[name].append(value)
    edges = {name: np.quantile(found, (0.025, 0.975)) for name, found in values.items() if found}
    return {name: (float(low), float(high)) for name, (low, high) in edges.items() if low < high}
