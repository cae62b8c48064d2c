"""Whether an image is unlike those that a model was trained on: exposure, sharpness, size, and what lies where.

Owns: these measures, and from which value on an image is unlike. They are taken of the square that the network gets, in
the same way from a store and from a file. The range of a measure is that from 0.1 % to 99.9 % of the training images,
widened on both sides by a quarter of the range from 5 % to 95 %. Of 848 real images in three folds, at most one is
outside when held out; inverted all of them are, upside down three in four, and for a model of phantoms six in ten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from ptxdist.records import Likeness, Measure

FEWEST = 100  # training images; with 50, more than two in a hundred images of the same source are outside
MOST = 2000  # images that are looked at, evenly spaced
_AT = (0.001, 0.05, 0.95, 0.999)
_MARGIN = 0.25
_LAYOUT_PX = 16


class _Measure(NamedTuple):
    """Least margin of a measure, and the words for images below and above its range; "" where there is none."""

    margin: float
    below: str
    above: str


_MEASURES: dict[Measure, _Measure] = {
    "brightness": _Measure(5, "darker", "brighter"),  # mean grey level
    "contrast": _Measure(3, "of less contrast", "of more contrast"),  # standard deviation of the grey levels
    "sharpness": _Measure(0.1, "blurrier", "sharper or noisier"),  # middle: finest structures : next coarser, log
    "size": _Measure(2, "smaller", "larger"),  # log2 of the original's longer side: a factor of 4
    # Correlation with the mean training image.
    "layout": _Measure(0.05, "of another layout (another view or part of the body, turned, or inverted)", ""),
}


class Look(NamedTuple):
    """What is measured of one image: `values` of all measures but the layout, `layout` float32 (256,) of norm 1."""

    values: tuple[float, ...]
    layout: npt.NDArray[np.float32]


def look(square: npt.NDArray[np.uint8], side_px: int) -> Look:
    """Measure an image, uint8 (size, size), whose original has a longer side of `side_px` pixels."""
    edge = len(square) // 4
    middle = square[edge : len(square) - edge, edge : len(square) - edge].astype(np.float32)
    fine, coarse = (cv2.GaussianBlur(middle, (0, 0), sigma) for sigma in (1.0, 2.0))
    (_, finest), (_, next_one) = map(_mean_and_deviation, (middle - fine, fine - coarse))
    sharpness = float(np.log((finest + 0.01) / (next_one + 0.01)))
    small = cv2.resize(square, (_LAYOUT_PX, _LAYOUT_PX), interpolation=cv2.INTER_AREA)
    return Look((*_mean_and_deviation(square), sharpness, float(np.log2(side_px))), _unit(small.astype(np.float32)))


def likeness_of(looks: Sequence[Look]) -> Likeness | None:
    """What training images look like; None for fewer than `FEWEST`, which say too little about others."""
    if len(looks) < FEWEST:
        return None
    layouts = np.stack([each.layout for each in looks])
    total = layouts.sum(0)
    to_the_others = [float(_unit(total - layout) @ layout) for layout in layouts]
    table = np.column_stack([[each.values for each in looks], to_the_others])
    ranges = dict(zip(_MEASURES, np.quantile(table, _AT, axis=0).T.round(4).tolist(), strict=True))
    span = max(float(np.ptp(total)), 1e-6)
    mean = np.round(255 * (total - total.min()) / span).astype(np.uint8)
    return Likeness(ranges={name: tuple(row) for name, row in ranges.items()}, layout=mean.tobytes().hex())


def unlike(found: Look, training: Likeness) -> str:
    """In which way an image is unlike the training images, in words; "" if it is not."""
    mean = np.frombuffer(bytes.fromhex(training.layout), np.uint8).astype(np.float32)
    values = (*found.values, float(_unit(mean) @ found.layout))
    words = {}
    for (name, measure), value in zip(_MEASURES.items(), values, strict=True):
        least, low, high, most = training.ranges[name]
        margin = max(measure.margin, _MARGIN * (high - low))
        words[name] = measure.below if value < least - margin else measure.above if value > most + margin else ""
    layout = words.pop("layout")
    said = ", ".join(filter(None, words.values()))
    return "; ".join(filter(None, (said and f"{said} than nearly all of them", layout)))


def _mean_and_deviation(grey: npt.NDArray[np.generic]) -> tuple[float, float]:
    mean, deviation = cv2.meanStdDev(grey)
    return float(mean[0, 0]), float(deviation[0, 0])


def _unit(layout: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    flat = layout.reshape(-1) - layout.mean()
    return np.asarray(flat / max(float(np.linalg.norm(flat)), 1e-6), np.float32)
