"""The training loss: binary cross-entropy plus soft Dice, from logits; the Dice per image, or of a whole batch.

Owns: the formulas. Refuses: nothing. Called by: `loop` (which averages over the global batch), `scoring`.

    loss = mean over px of BCE(logit, t)  +  1 - (2 sum(p t) + s) / (sum(p) + sum(t) + s),   p = sigmoid(logit)

The smoothing s = 1 px, the usual value, makes the Dice of an empty prediction of an empty mask 1, so its loss is 0, and
leaves it all but unchanged from a few px on. Targets may be area fractions; then even p = t has a Dice loss above 0
wherever t is neither 0 nor 1, since sum(p t) < sum(t) there.

The two Dice terms are mixed up in papers and code, and are not the same: per image, an image without a mask asks for an
empty prediction as loudly as any other image asks for its mask; flattened over the batch, all px are one image, and
images without a mask matter by their false positives only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ptxdist.train.distributed import sum_over_ranks

SMOOTHING_PX = 1.0


def bce_dice_per_image(logits: Tensor, target: Tensor) -> Tensor:
    """Loss of each image, float32 (B,), at least 0; differentiable; shape (0,) for an empty batch.

    `logits` B1HW of any floating type, `target` B1HW floating, 0..1. Computed in float32, also under autocast.
    """
    logits, target = logits.float().flatten(1), target.float().flatten(1)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
    probability = logits.sigmoid()
    overlap = (probability * target).sum(1)
    dice = (2 * overlap + SMOOTHING_PX) / (probability.sum(1) + target.sum(1) + SMOOTHING_PX)
    return cross_entropy + 1 - dice


def bce_per_image(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of each image, float32 (B,): its mean over the px. Arguments as `bce_dice_per_image`."""
    logits, target = logits.float().flatten(1), target.float().flatten(1)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)


def dice_loss_of_batch(logits: Tensor, target: Tensor) -> Tensor:
    """1 - Dice of all px of the global batch, over all ranks, as if they were one image; a scalar, float32.

    The value is the same on every rank; the gradient is this rank's part of it, so that the sum of the ranks' gradients
    is that of the whole. Every rank must call it equally often; one may have no images. Arguments as above.
    """
    probability, target = logits.float().sigmoid(), target.float()
    own = torch.stack(((probability * target).sum(), probability.sum(), target.sum()))
    overlap, predicted, true = own + (sum_over_ranks(own.detach().clone()) - own.detach())
    dice: Tensor = (2 * overlap + SMOOTHING_PX) / (predicted + true + SMOOTHING_PX)
    return 1 - dice
