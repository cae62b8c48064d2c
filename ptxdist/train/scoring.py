"""From a model and cases to counts, at the stage's size and at the original resolution.

Owns: how logits become probabilities, how these become a case's score, how a probability map becomes a mask at the
original resolution (bilinear up-sampling of probabilities, threshold last, small masks emptied) and how truth is
counted there. No map is kept: each rank fills in the counts of its cases, and the others' are zero there, so that sums
over the ranks are identical for any number of ranks. On a CPU each block of cases is scored by one thread, so that the
counts are those of any number of threads too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptxdist.cache.catalog import Case
from ptxdist.cache.store import Store
from ptxdist.labels import rle
from ptxdist.records import OperatingPoint
from ptxdist.scores.counts import LEVELS, CaseCounts
from ptxdist.train.dataset import VAL_BLOCK, Batch, Indices, batches, validation_shares
from ptxdist.train.device import autocast, one_thread_each
from ptxdist.train.distributed import barrier, rank, sum_over_ranks, world_size
from ptxdist.train.losses import Loss, heads
from ptxdist.train.unet import Output

_BLOCK_ROWS = 1024
_TOP_SHARE = 256  # one in so many pixels is among the highest ones, which are part of a case's score


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
    loss: Loss | None = None,
    flip_averaging: bool = False,
    min_area_px: int = 0,
    point: OperatingPoint | None = None,
    histograms: bool = False,
    on_cases: Callable[[int], None] = lambda done: None,
    on_mask: Callable[[int, npt.NDArray[np.bool_]], None] | None = None,
) -> CaseCounts:
    """Run the model over `indices` (positions in the store, whose i-th case is `cases[i]`), shared among the ranks.

    `on_cases` is called with the number of cases that this rank has finished, `on_mask` with each position and its mask
    bool (rows, columns) at the first threshold. With a `point`, full-size masks at the first threshold are those at
    the point. No indices give empty arrays.
    """
    position = {int(index): row for row, index in enumerate(indices)}
    losses = torch.zeros(len(indices), loss.width if loss else 0, dtype=torch.float64)
    score = torch.zeros(len(indices), dtype=torch.float64)
    at_stage = torch.zeros(len(indices), 3, dtype=torch.int64)
    at_full = torch.zeros(len(thresholds), len(indices), 3, dtype=torch.int64)
    detailed = len(indices) if histograms else 0
    levels, brightness = torch.zeros(detailed, 2, LEVELS, dtype=torch.int32), torch.zeros(detailed, dtype=torch.float64)
    model.eval()

    @torch.no_grad()
    def predict(batch: Batch) -> tuple[Batch, Predicted, Tensor | None]:
        with autocast(device, precision):
            predicted = predict_probability(model, batch.image, flip_averaging)
        return batch, predicted, None if loss is None else loss.parts(predicted.output, batch.mask.float() / 255)

    done = 0
    shares = validation_shares(indices, rank(), world_size())
    # No name holds these iterators: after an error, its traceback would keep them, and torch at one thread.
    for batch, (_, probability, image_probability), parts in one_thread_each(
        predict, batches(store, shares, device=device), device, VAL_BLOCK * store.size_px**2
    ):
        rows = [position[int(index)] for index in batch.index]
        if parts is not None:
            losses[rows] = parts.cpu()
        score[rows] = case_score(probability, image_probability).double().cpu()
        at_stage[rows] = count(probability >= thresholds[0], batch.mask >= 128).cpu()
        if histograms:
            brightness[rows] = batch.image.double().mean((1, 2, 3)).cpu()
        for row, index, image in zip(rows, batch.index.tolist(), probability, strict=True):
            case = cases[index]
            full = to_original(image[0], case.rows, case.columns)
            masks = [_drop_small(full >= threshold, min_area_px) for threshold in thresholds]
            if point is not None:
                masks[0] = mask_at(full, point, float(score[row]))
            # Most cases are empty, and most validated masks too: then the truth need not be decoded.
            needed = case.masks and (histograms or any(bool(mask.any()) for mask in masks))
            area = None
            if needed:
                area = torch.from_numpy(rle.decode(case.masks or (), case.rows, case.columns)).bool().to(full.device)
            for number, mask in enumerate(masks):
                overlap = 0 if area is None else _area(mask & area)
                at_full[number, row] = torch.tensor([overlap, _area(mask), case.area_px])
            if histograms:
                levels[row] = _histogram(full, area)
            if on_mask is not None:
                on_mask(index, masks[0].cpu().numpy())
        done += len(rows)
        on_cases(done)
    tables = (losses, score, at_stage, at_full, levels, brightness)
    barrier()  # this rank's share may have taken minutes less than that of a slower machine
    return CaseCounts(*(sum_over_ranks(part.to(device)).cpu().numpy() for part in tables))


class Predicted(NamedTuple):
    """What is predicted for B images of H x W pixels; probabilities are float32.

    `output` is what the network returned for the images as they are; `probability` (B, 1, H, W); `image` (B,) the image
    head's probability that the image is positive, None for a network without one.
    """

    output: Output
    probability: Tensor
    image: Tensor | None


def predict_probability(
    model: Callable[[Tensor], Output], image: Tensor, flip_averaging: bool, *, one_pass: bool = False
) -> Predicted:
    """Run the model over images (B, 1, H, W); B = 0 gives empty tensors.

    With `flip_averaging` each probability is the mean of the image's and of the mirror image's, maps mirrored back. The
    mirror images are a second pass, or with `one_pass` the second half of a batch twice as large.
    """
    if not flip_averaging:
        output = model(image)
        return Predicted(output, *_probabilities(output))
    if one_pass:
        output, mirrored = _split(model(torch.cat((image, image.flip(-1)))), image.shape[0])
    else:
        output, mirrored = model(image), model(image.flip(-1))
    (own, own_head), (other, other_head) = _probabilities(output), _probabilities(mirrored)
    head = None if own_head is None or other_head is None else (own_head + other_head) / 2
    return Predicted(output, (own + other.flip(-1)) / 2, head)


def case_score(probability: Tensor, image: Tensor | None) -> Tensor:
    """How positive each case looks, (B,) in 0..1, from `Predicted.probability` and `Predicted.image`.

    Without an image head it is the highest probability of the map. With one, three quarters are the head's probability
    and one quarter is the mean of the highest pixels, one in 256: together they order images better than either does.
    """
    pixels = probability.flatten(1)
    if image is None:
        return pixels.amax(1)
    return (3 * image + pixels.topk(max(1, pixels.shape[1] // _TOP_SHARE), dim=1).values.mean(1)) / 4


def _split(output: Output, count: int) -> tuple[Output, Output]:
    """What was returned for the first `count` images, and for the others."""
    if isinstance(output, Tensor):
        return output[:count], output[count:]
    mask, image = output
    return (mask[:count], image[:count]), (mask[count:], image[count:])


def _probabilities(output: Output) -> tuple[Tensor, Tensor | None]:
    mask, image = heads(output)
    return mask.float().sigmoid(), None if image is None else image.float().sigmoid()


def count(prediction: Tensor, truth: Tensor) -> Tensor:
    """Pixels of intersection, predicted and truth of each image, int64 (B, 3), on the device of the masks.

    `prediction` and `truth` are bool (B, 1, H, W) or (B, H, W), of the same shape; B = 0 gives (0, 3).
    """
    masks = torch.stack((prediction & truth, prediction, truth), dim=1)
    return masks.flatten(2).sum(2)


def to_original(probability: Tensor, rows: int, columns: int) -> Tensor:
    """Probabilities (size, size) of the padded square, up-sampled bilinearly and cut to the image (rows, columns)."""
    side = max(rows, columns)
    square = F.interpolate(probability[None, None], size=(side, side), mode="bilinear", align_corners=False)[0, 0]
    top, left = (side - rows) // 2, (side - columns) // 2
    return square[top : top + rows, left : left + columns]


def _drop_small(mask: Tensor, min_area_px: int) -> Tensor:
    return mask if not min_area_px or _area(mask) >= min_area_px else torch.zeros_like(mask)


def _area(mask: Tensor) -> int:
    return int(torch.count_nonzero(mask))  # `sum` would make eight bytes of each pixel


def to_levels(probability: Tensor) -> Tensor:
    """Level of each probability, int32 0..LEVELS - 1 of the same shape: level k from k / LEVELS on, exactly."""
    scaled = probability * LEVELS
    levels = scaled.to(torch.int32).clamp_(0, LEVELS - 1)
    # The product is rounded. The few pixels so close to an edge that this may matter are compared with the edge.
    close = (scaled - scaled.round()).abs() < 4 * LEVELS * torch.finfo(probability.dtype).eps
    edges = torch.arange(1, LEVELS, dtype=torch.float64, device=probability.device) / LEVELS
    levels[close] = torch.bucketize(probability[close], edges.to(probability.dtype), right=True, out_int32=True)
    return levels


def mask_at(probability: Tensor, point: OperatingPoint, score: float) -> Tensor:
    """The mask, bool of the same shape, that an operating point makes of probabilities at the original resolution.

    `score` is the case's (`case_score`); it matters for a point with an `image` threshold only.
    """
    if not point.admits(score) or _area(probability >= point.top) < point.min_area_px:
        return torch.zeros_like(probability, dtype=torch.bool)
    return probability >= point.bottom


def _histogram(full: Tensor, area: Tensor | None) -> Tensor:
    counts = torch.zeros(2, LEVELS, dtype=torch.int64, device=full.device)
    for start in range(0, len(full), _BLOCK_ROWS):  # `to_levels` takes 20 bytes for each pixel
        levels = to_levels(full[start : start + _BLOCK_ROWS]).flatten()
        inside = levels[:0] if area is None else levels[area[start : start + _BLOCK_ROWS].flatten()]
        counts += torch.stack([torch.bincount(part, minlength=LEVELS) for part in (levels, inside)])
    return counts.int().cpu()
