"""The training loss: binary cross-entropy plus soft Dice, per image, from logits.

Owns: the formula. Refuses: nothing. Called by: `loop` (which averages over the global batch), `evaluate`.

    loss = mean over px of BCE(logit, t)  +  1 - (2 sum(p t) + s) / (sum(p) + sum(t) + s),   p = sigmoid(logit)

The smoothing s = 1 px, the usual value, makes the Dice of an empty prediction of an empty mask 1, so its loss is 0, and
leaves it all but unchanged from a few px on. Targets may be area fractions; then even p = t has a Dice loss above 0
wherever t is neither 0 nor 1, since sum(p t) < sum(t) there.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

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
