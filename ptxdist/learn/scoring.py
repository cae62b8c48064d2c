"""A model over cases -> counts: at the stage's size and at the original resolution, streaming.

Owns: how a probability map becomes a mask at the original resolution (bilinear up-sampling of probabilities, threshold
last, small masks emptied) and how truth is counted there. Refuses: nothing. Called by: `loop`, `evaluate`. No map is
kept: per case only counts stay, and each rank fills in its own, so that sums are identical for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptxdist.data import rle
from ptxdist.data.catalog import Case
from ptxdist.data.store import Store
from ptxdist.learn.dataset import Indices, batches, validation_shares
from ptxdist.learn.distributed import rank, sum_over_ranks, world_size
from ptxdist.learn.losses import bce_dice_per_image
from ptxdist.learn.metrics import count

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CaseCounts:
    """Counts of n cases in the order asked for: intersection, predicted, truth in px.

    `loss` float64 (n,); `score` float64 (n,), the highest probability; `at_stage` int64 (n, 3) at the first threshold;
    `at_full` int64 (thresholds, n, 3) at the original resolution.
    """

    loss: npt.NDArray[np.float64]
    score: npt.NDArray[np.float64]
    at_stage: Counts
    at_full: Counts


@torch.no_grad()
def score_cases(
    model: nn.Module,
    store: Store,
    cases: Sequence[Case],
    indices: Indices,
    *,
    thresholds: Sequence[float],
    device: torch.device,
    precision: torch.dtype = torch.float32,
    flip_averaging: bool = False,
    min_area_px: int = 0,
    on_cases: Callable[[int], None] = lambda done: None,
    on_mask: Callable[[int, npt.NDArray[np.bool_]], None] | None = None,
) -> CaseCounts:
    """Run the model over `indices` (positions in the store, whose i-th case is `cases[i]`), shared among the ranks.

    `on_cases` hears how many cases this rank has finished; `on_mask` gets each position and its mask bool
    (rows, columns) at the first threshold. No indices give empty arrays.
    """
    position = {int(index): row for row, index in enumerate(indices)}
    loss, score = (torch.zeros(len(indices), dtype=torch.float64) for _ in range(2))
    at_stage = torch.zeros(len(indices), 3, dtype=torch.int64)
    at_full = torch.zeros(len(thresholds), len(indices), 3, dtype=torch.int64)
    model.eval()
    done = 0
    for batch in batches(store, validation_shares(indices, rank(), world_size()), device=device):
        rows = [position[int(index)] for index in batch.index]
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = model(batch.image).float()
            mirrored = model(batch.image.flip(-1)).float() if flip_averaging else None
        truth = batch.mask.float() / 255
        probability = logits.sigmoid()
        if mirrored is not None:
            probability = (probability + mirrored.sigmoid().flip(-1)) / 2
        loss[rows] = bce_dice_per_image(logits, truth).double().cpu()
        score[rows] = probability.flatten(1).amax(1).double().cpu()
        at_stage[rows] = count(probability >= thresholds[0], truth >= 0.5).cpu()
        for row, index, image in zip(rows, batch.index.tolist(), probability, strict=True):
            case = cases[index]
            full = to_original(image[0], case.rows, case.columns)
            for number, threshold in enumerate(thresholds):
                mask = _drop_small(full >= threshold, min_area_px)
                at_full[number, row] = _count_against(mask, case)
                if number == 0 and on_mask is not None:
                    on_mask(index, mask.cpu().numpy())
        done += len(rows)
        on_cases(done)
    return CaseCounts(*(sum_over_ranks(part.to(device)).cpu().numpy() for part in (loss, score, at_stage, at_full)))


def to_original(probability: Tensor, rows: int, columns: int) -> Tensor:
    """Probabilities (size, size) of the padded square, up-sampled bilinearly and cut to the image (rows, columns)."""
    side = max(rows, columns)
    square = F.interpolate(probability[None, None], size=(side, side), mode="bilinear", align_corners=False)[0, 0]
    top, left = (side - rows) // 2, (side - columns) // 2
    return square[top : top + rows, left : left + columns]


def _drop_small(mask: Tensor, min_area_px: int) -> Tensor:
    return mask if not min_area_px or int(mask.sum()) >= min_area_px else torch.zeros_like(mask)


def _count_against(mask: Tensor, case: Case) -> Tensor:
    predicted = int(mask.sum())
    if not case.masks or not predicted:  # most cases: the truth need not be decoded
        return torch.tensor([0, predicted, case.area_px])
    truth = torch.from_numpy(rle.decode(case.masks, case.rows, case.columns)).to(mask.device)
    return torch.tensor([int((mask & truth.bool()).sum()), predicted, case.area_px])
