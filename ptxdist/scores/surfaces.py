"""Distances between the outlines of predicted and true masks, by MONAI (the extra `surfaces`).

    hd95_px        95 % Hausdorff distance: for each mask the 95th percentile of the distances of its edge pixels from
                   the other mask's edge, the larger of both; in pixels of the image; 0 for equal masks
    surface_dice   share of the edge pixels of both masks that are at most 3 pixels from the other mask's edge, 0..1

An edge pixel is in the mask and has one of its four neighbours outside the mask or the image. Both are defined only for
hits: images where truth and prediction have a pixel. Sources: `monai.metrics.compute_hausdorff_distance` (percentile
95) and `compute_surface_dice` (Nikolov et al. 2021; without subvoxels).
"""

from __future__ import annotations

import warnings

import numpy as np

from ptxdist.files import require_extra
from ptxdist.labels.evidence import Size
from ptxdist.labels.rle import Spans
from ptxdist.scores.definitions import Definition

TOLERANCE_PX = 3  # about 1 mm in the challenge's images of 1024 x 1024 pixels
SURFACES = {
    "hd95_px": Definition(
        "HD95 of hits, pixels",
        "Mean over the hits of the 95 % Hausdorff distance between the edges of the masks; images where truth or "
        "prediction is empty are left out.",
        "HD95 of MONAI at the same image size, in pixels; a lower number is better. A model that predicts only easy "
        "cases looks good: read it with the sensitivity.",
        digits=1,
    ),
    "surface_dice": Definition(
        f"Surface Dice of hits, {TOLERANCE_PX} pixels",
        f"Mean over the hits of the share of edge pixels within {TOLERANCE_PX} pixels of the other mask's edge; images "
        "where truth or prediction is empty are left out.",
        "Normalised surface Dice with the same tolerance at the same image size.",
    ),
}


def require_surfaces() -> None:
    """SettingsError when the extra is not installed."""
    require_extra("surfaces", "the distance between outlines", "monai")


def surface_scores(predicted: Spans, true: Spans, size: Size) -> tuple[float, float]:
    """`hd95_px` and `surface_dice` of one image; (NaN, NaN) when a mask is empty.

    Masks are spans down the columns, int64 (n, 2); `size` is (rows, columns) of the image.
    """
    if not len(predicted) or not len(true):
        return float("nan"), float("nan")
    pair = _draw_cropped((predicted, true), size)
    with warnings.catch_warnings(action="ignore"):  # MONAI 1.6 warns of its own calls
        from monai.metrics import compute_hausdorff_distance, compute_surface_dice
        from monai.utils.type_conversion import convert_to_tensor

        both = [convert_to_tensor(mask[None, None]) for mask in pair]
        distance = compute_hausdorff_distance(*both, include_background=True, percentile=95)
        dice = compute_surface_dice(*both, class_thresholds=[TOLERANCE_PX], include_background=True)
    return float(distance), float(dice)


def _draw_cropped(masks: tuple[Spans, Spans], size: Size) -> list[np.ndarray[tuple[int, int], np.dtype[np.bool_]]]:
    """The masks, transposed, in the columns that they touch; MONAI takes the outside of an array for background."""
    rows = size[0]
    first = min(int(mask[0, 0]) for mask in masks) // rows
    last = (max(int(mask[-1, 1]) for mask in masks) - 1) // rows
    drawn = []
    for spans in masks:
        edges = np.zeros((last - first + 1) * rows + 1, np.int8)
        np.add.at(edges, spans[:, 0] - first * rows, 1)
        np.add.at(edges, spans[:, 1] - first * rows, -1)
        drawn.append(np.cumsum(edges[:-1], dtype=np.int8).reshape(-1, rows).astype(bool))
    return drawn
