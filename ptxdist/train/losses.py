"""The losses a stage can train with; each is computed from logits, and trained and validated alike.

Owns: LOSSES. To add a loss, write a function and add a line to LOSSES. A loss of a set of cases is

    mean over the cases of per_case(logits, target)  +  whole(sum over the cases of sums(logits, target))

in training over a global batch, in validation over all cases. The second part is optional: it serves losses that are
not a mean over cases, such as a Dice over all pixels of a batch. The sum is the same for any number of ranks.
In both parts a negative case, one whose mask is empty, counts `negative_weight` times. With an image head,
`image_weight` times the head's binary cross-entropy is added to each case, negative or not.
`bce_dice` is

    mean over pixels of BCE(logit, t)  +  1 - (2 sum(p t) + s) / (sum(p) + sum(t) + s),   p = sigmoid(logit)

with a smoothing s of 1 pixel, the usual value. It makes the Dice of an empty prediction of an empty mask 1, so its loss
is 0, and changes the Dice of larger masks very little. Targets may be area fractions; then even p = t has a Dice loss
above 0 wherever t is neither 0 nor 1, since sum(p t) < sum(t) there.

The two Dice terms are often confused in papers and code. Per image, an image without a mask asks for an empty
prediction as loudly as any other image asks for its mask. Over the batch, all pixels are one image, and images without
a mask matter by their false positives only.

torch is imported in functions only, so that a report can name a loss without loading it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ptxdist.config import StageSettings, nearest
from ptxdist.errors import SettingsError

if TYPE_CHECKING:
    from torch import Tensor

    from ptxdist.train.unet import Output

SMOOTHING_PX = 1.0

Function = Callable[["Tensor", "Tensor"], "Tensor"]


@dataclass(frozen=True)
class Loss:
    """A loss. Logits are B1HW of any floating type, targets B1HW floating, 0..1; results are float32.

    `words` name it in reports. `per_case` gives (B,), and (0,) for no cases. `sums` gives (k,), sums over the given
    cases, and zeros for none; `whole` gives a scalar from them. `batch` is the variant that `dice = "batch"` chooses.
    These three see the logits of the mask. `image_weight` is the weight of the BCE of an image head, if there is one.
    """

    words: str
    per_case: Function
    sums: Function | None = None
    whole: Callable[[Tensor], Tensor] | None = None
    batch: Loss | None = None
    image_weight: float = 0.0
    negative_weight: float = 1.0

    @property
    def width(self) -> int:
        """Number of columns of `parts`."""
        import torch

        empty = torch.zeros(0, 1, 1, 1)
        return 1 + (len(self.sums(empty, empty)) if self.sums else 0)

    def of_cases(self, output: Output, target: Tensor) -> Tensor:
        """`per_case` of what a network has returned, with the weighted loss of its image head: float32 (B,)."""
        logits, image = heads(output)
        loss = self.per_case(logits, target)
        if self.negative_weight != 1:
            loss = loss * (1 - (1 - self.negative_weight) * (~is_positive(target)).float())
        return loss if image is None else loss + self.image_weight * image_bce(image, target)

    def of_all(self, output: Output, target: Tensor) -> Tensor | None:
        """`sums` of what a network has returned, float32 (k,); None for a loss without them."""
        if self.sums is None:
            return None
        logits, _ = heads(output)
        if self.negative_weight == 1:
            return self.sums(logits, target)
        positive = is_positive(target)
        negatives = self.sums(logits[~positive], target[~positive])
        return self.sums(logits[positive], target[positive]) + self.negative_weight * negatives

    def parts(self, output: Output, target: Tensor) -> Tensor:
        """For each case `of_cases` and, if there are any, its `sums`: float64 (B, width)."""
        import torch

        columns = [self.of_cases(output, target)[:, None].double()]
        if self.sums is not None:
            logits, _ = heads(output)
            rows = [self.of_all(logits[i : i + 1], target[i : i + 1]) for i in range(len(logits))]
            columns.append(torch.stack([row.double() for row in rows if row is not None]))
        return torch.cat(columns, dim=1)

    def total(self, parts: npt.NDArray[np.float64]) -> float:
        """The loss of n >= 1 cases from their `parts` (n, width)."""
        import torch

        mean = float(np.ascontiguousarray(parts[:, 0]).mean())
        return mean if self.whole is None else mean + float(self.whole(torch.from_numpy(parts[:, 1:].sum(0))))


def heads(output: Output) -> tuple[Tensor, Tensor | None]:
    """What a network has returned as (mask logits, image logits), these None without an image head."""
    return output if isinstance(output, tuple) else (output, None)


def chosen(stage: StageSettings) -> Loss:
    """The loss of a stage, with its weights.

    SettingsError with the nearest name when there is none of this name, or no variant for its `dice`.
    """
    if stage.loss not in LOSSES:
        raise SettingsError(f"unknown loss '{stage.loss}'{nearest(stage.loss, LOSSES)}")
    loss = LOSSES[stage.loss]
    if stage.dice == "batch":
        if loss.batch is None:
            raise SettingsError(f"the loss '{stage.loss}' has no Dice over the batch; leave out dice = '{stage.dice}'")
        loss = loss.batch
    return replace(loss, image_weight=stage.image_weight, negative_weight=stage.negative_weight)


def bce_dice_per_image(logits: Tensor, target: Tensor) -> Tensor:
    """BCE plus Dice loss of each image, float32 (B,), at least 0. Computed in float32, also under autocast."""
    logits, target = logits.float().flatten(1), target.float().flatten(1)
    probability = logits.sigmoid()
    overlap = (probability * target).sum(1)
    dice: Tensor = (2 * overlap + SMOOTHING_PX) / (probability.sum(1) + target.sum(1) + SMOOTHING_PX)
    return bce_per_image(logits, target) + 1 - dice


def bce_per_image(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of each image, float32 (B,): its mean over the pixels."""
    import torch.nn.functional as F

    logits, target = logits.float().flatten(1), target.float().flatten(1)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)


def image_bce(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of image logits (B,), float32 (B,)."""
    import torch.nn.functional as F

    return F.binary_cross_entropy_with_logits(logits.float(), is_positive(target).float(), reduction="none")


def is_positive(target: Tensor) -> Tensor:
    """Whether the targets B1HW of the cases are not all 0, bool (B,)."""
    return target.flatten(1).any(1)


def dice_sums(logits: Tensor, target: Tensor) -> Tensor:
    """Overlap, sum of probabilities and sum of targets over all pixels, float32 (3,)."""
    import torch

    probability, target = logits.float().sigmoid(), target.float()
    return torch.stack(((probability * target).sum(), probability.sum(), target.sum()))


def dice_loss(sums: Tensor) -> Tensor:
    """1 - Dice of all pixels as if they were one image, from `dice_sums`; a scalar."""
    overlap, predicted, true = sums
    dice: Tensor = (2 * overlap + SMOOTHING_PX) / (predicted + true + SMOOTHING_PX)
    return 1 - dice


def over_ranks(own: Tensor) -> Tensor:
    """The sum of the ranks' tensors, with the gradient of this rank's part.

    So the value is the same on every rank, and the sum of the ranks' gradients is that of the whole. Every rank must
    call it equally often; one may have no cases.
    """
    from ptxdist.train.distributed import sum_over_ranks

    return own + (sum_over_ranks(own.detach().clone()) - own.detach())


LOSSES = {
    "bce_dice": Loss(
        "BCE and Dice loss (Dice per image)",
        bce_dice_per_image,
        batch=Loss("BCE and Dice loss (Dice per batch)", bce_per_image, dice_sums, dice_loss),
    ),
}
