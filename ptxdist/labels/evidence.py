"""Measurements of a label table's masks when they are read in one dialect, and the faults that these show.

Owns: the measures of a reading. Their limits depend on the finding (`finding.Limits`); the values in comments here are
those of the challenge's table.

Reading masks in a wrong dialect raises no error: it gives masks in wrong places. Its signs are:
- masks extend past their image, or their runs are not in order (distinguishes relative from absolute starts);
- neighbouring runs do not start one line of the image apart (also distinguishes columns from rows in oblong images);
- the masks are far too small or far too large, or cover most of their image (they are inverted);
- one constant mask would fit them all, because every mask is at the start of the image;
- the masks lie on their side: when read correctly, their mean shows two lungs side by side, similar to its left-right
  mirror and not to its up-down mirror (distinguishes columns from rows in square images, where all else is equal);
- the masks are upside down: a pneumothorax is mostly in the upper half of the image, where the air rises to, and a
  pleural effusion in the lower half.

Masks that are mirrored left to right, and masks in columns from rows turned by 90 degrees, look alike in all of these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from ptxdist.errors import LabelError
from ptxdist.finding import PNEUMOTHORAX_LIMITS, Limits
from ptxdist.labels import rle
from ptxdist.labels.rle import Spans, Starts

ENOUGH_IMAGES = 50  # fewer are not judged by areas, constant mask or anatomy
ENOUGH_RUNS = 100  # fewer pairs of neighbours are not judged; one mask has 128 runs (median)
LINE_SHARE = 0.5  # of neighbours start one line apart: 0.94 (0.82 along rows); 0.001 with wrong starts
VALLEY = 0.8  # the middle columns of the mean have 0.40 of the lower of the two peaks beside them
_SAMPLE = 500
_GRID, _CELLS = 64, 16
_POSITIONS = 2**20  # the constant mask is searched on at most this many positions

Order = Literal["columns", "rows"]
Floats = npt.NDArray[np.float64]
Size = tuple[int, int]


@dataclass(frozen=True)
class Reading:
    """A table read in one dialect; a measure is None when there are too few masks.

    `misfits` of `masks` do not fit their image. Measured on a sample of `images`: the share of neighbouring runs that
    start one line apart; the masks' share of their image (median and ninth decile); mean Dice of the best constant
    mask; correlation of the mean mask with its left-right and its up-down mirror; its value in the middle columns as a
    share of the lower of the peaks on both sides; mean share of a mask in the upper half of its image. `upright` says
    whether that proves that the masks are not upside down. `huge` are the ids of images of which more than the share
    `inverted_above` is covered. `fault` says why the dialect must be wrong; "" when nothing does.
    """

    dialect: str
    masks: int
    misfits: int
    images: int = 0
    line_share: float | None = None
    median_area: float | None = None
    large_area: float | None = None
    constant_dice: float | None = None
    left_right: float | None = None
    up_down: float | None = None
    valley: float | None = None
    upper: float | None = None
    upright: bool = False
    huge: Sequence[str] = ()
    inverted_above: str = "half"
    fault: str = ""


@dataclass(frozen=True)
class MaskedImage:
    """One positive image of the sample: its size, the spans of each of its masks, and those of their union."""

    rows: int
    columns: int
    masks: Sequence[Spans]
    union: Spans


@dataclass(frozen=True)
class Fit:
    """The masks read with one kind of starts; the same for columns and rows.

    `masks` is their number, `misfits` are (image id, text, reason) of those that do not fit their image, `images` is a
    sample of the images, `huge` are the ids of images of which more than `limits.inverted_above` is covered, of
    `positives`.
    """

    masks: int
    misfits: Sequence[tuple[str, str, str]]
    images: Sequence[MaskedImage]
    huge: Sequence[str]
    positives: int
    limits: Limits

    @cached_property
    def area_shares(self) -> list[float]:
        """Share of each sampled image that its masks cover, 0..1."""
        return [float(np.diff(image.union).sum()) / (image.rows * image.columns) for image in self.images]

    @cached_property
    def down_columns(self) -> tuple[float | None, Floats]:
        """`_line_share` and `_mean_mask` of masks whose pixels are numbered down the columns."""
        return _line_share(self.images, "columns", self.limits.parts), _mean_mask(self.images, "columns")

    @cached_property
    def along_rows(self) -> tuple[float | None, Floats]:
        """The same of masks along the rows, which in square images are those down the columns, turned."""
        if all(image.rows == image.columns for image in self.images):
            return self.down_columns[0], self.down_columns[1].T
        return _line_share(self.images, "rows", self.limits.parts), _mean_mask(self.images, "rows")

    @cached_property
    def constant_dice(self) -> float | None:
        """As `_constant_dice`, computed once for columns and rows."""
        return _constant_dice(self.images)


def fit_masks(
    masks: Mapping[str, Sequence[str]],
    sizes: Mapping[str, Size],
    starts: Starts,
    limits: Limits = PNEUMOTHORAX_LIMITS,
) -> Fit:
    """Read the masks by image id for images of these (rows, columns), and sample up to 500 positive images.

    Masks of images with a size are counted, and all of them have to fit. The others only fill up the sample, and only
    if all sizes are equal; they are then assumed to have that size.
    """
    one_size = next(iter(sizes.values())) if len(set(sizes.values())) == 1 else None
    owned = [case_id for case_id in masks if masks[case_id] and case_id in sizes]
    guests = [case_id for case_id in masks if masks[case_id] and case_id not in sizes] if one_size else []
    sample = _spaced(owned, _SAMPLE)
    sample += _spaced(guests, _SAMPLE - len(sample))
    chosen = set(sample)
    misfits, images, huge, positives = [], [], [], 0
    left = rle.MOST_RUNS  # those of the sample are kept in memory
    for case_id in dict.fromkeys((*owned, *sample)):
        rows, columns = sizes.get(case_id) or one_size or (0, 0)
        spans = []
        for text in masks[case_id]:
            try:
                spans.append(rle.read_spans(text, starts, rows, columns))
            except LabelError as error:
                misfits += [(case_id, text, str(error))] if case_id in sizes else []
        if not any(map(len, spans)):
            continue
        positives += 1
        union = rle.unite(spans)
        huge += [case_id] * bool(np.diff(union).sum() > limits.inverted_above * rows * columns)
        runs = sum(map(len, spans))
        if case_id in chosen and runs <= left:
            left -= runs
            images.append(MaskedImage(rows, columns, spans, union))
    return Fit(sum(len(masks[case_id]) for case_id in owned), misfits, images, huge, positives, limits)


def _spaced(names: Sequence[str], most: int) -> list[str]:
    """At most `most` of the names, evenly spaced."""
    places = np.linspace(0, len(names), min(len(names), most), endpoint=False).astype(int)
    return [names[place] for place in places]


def measure(dialect: str, order: Order, fit: Fit) -> Reading:
    """Measure the masks in one order; `dialect` is its name. Masks that do not fit their image are a fault at once."""
    limits = fit.limits
    most = "half" if limits.inverted_above == 0.5 else f"{limits.inverted_above:.0%}"
    reading = Reading(dialect, fit.masks, len(fit.misfits), len(fit.images), huge=fit.huge, inverted_above=most)
    if fit.misfits:
        counts = f"{reading.misfits:,} of {reading.masks:,} masks do not fit their image"
        return replace(reading, fault=f"{counts} (the first one: {fit.misfits[0][2]})")
    line_share, mean = fit.down_columns if order == "columns" else fit.along_rows
    reading = replace(reading, line_share=line_share)
    if reading.images < ENOUGH_IMAGES:
        return replace(reading, fault=_fault(reading, order, fit))
    areas = sorted(fit.area_shares)  # as np.quantile, which first imports numpy.ma
    median_area, large_area = np.interp(np.multiply((0.5, 0.9), len(areas) - 1), range(len(areas)), areas).tolist()
    left_right, up_down, valley = _stance(mean)
    upper = float(mean[: _CELLS // 2].sum() / mean.sum()) if mean.any() else None
    reading = replace(
        reading,
        median_area=median_area,
        large_area=large_area,
        constant_dice=fit.constant_dice,
        left_right=left_right,
        up_down=up_down,
        valley=valley,
        upper=upper,
        upright=upper is not None and _stand(upper, limits) > 0,
    )
    sideways = _stands(*_stance(mean.T), limits.mirror_lead)
    return replace(reading, fault=_fault(reading, order, fit, sideways))


def _stand(upper: float, limits: Limits) -> int:
    """1 for masks that are clearly upright, -1 for masks that are upside down, else 0."""
    if limits.upper is None:
        return 0
    wrong, right = limits.upper
    if wrong > right:  # of a finding in the lower half
        upper, wrong, right = -upper, -wrong, -right
    return 1 if upper > right else -1 if upper < wrong else 0


def _fault(reading: Reading, order: Order, fit: Fit, sideways: bool = False) -> str:
    limits = fit.limits
    if reading.line_share is not None and reading.line_share < LINE_SHARE:
        return f"only {reading.line_share:.0%} of neighbouring runs start one {order[:-1]} apart"
    if reading.median_area is not None and reading.median_area < limits.median_area:
        return f"half of the masks cover less than {reading.median_area:.3%} of their image"
    if reading.large_area is not None and reading.large_area > limits.large_area:
        return f"one in ten masks covers {reading.large_area:.0%} of its image or more"
    if 2 * len(reading.huge) > fit.positives:
        count = f"{len(reading.huge):,} of {fit.positives:,} positive images"
        return f"{count} are covered by more than {reading.inverted_above}, so the masks are probably inverted"
    if reading.constant_dice is not None and reading.constant_dice > limits.constant_dice:
        return f"one constant mask fits them all (mean Dice {reading.constant_dice:.2f})"
    return _stance_fault(reading, sideways, limits)


def _stance_fault(reading: Reading, sideways: bool, limits: Limits) -> str:
    if sideways:
        return (
            f"the masks lie on their side: their mean correlates {reading.up_down:.2f} with its up-down mirror and "
            f"{reading.left_right:.2f} with its left-right mirror; for two lungs it is the other way round"
        )
    if reading.upper is not None and _stand(reading.upper, limits) < 0:
        share, half = max((1 - reading.upper, "lower"), (reading.upper, "upper"))
        return f"the masks are upside down: {share:.0%} of a mask is in the {half} half of its image (mean)"
    return ""


def _line_share(images: Sequence[MaskedImage], order: Order, parts: int) -> float | None:
    """Share of neighbouring runs that start one line apart, within a sixteenth; in oblong images if there are enough.

    A line has as many pixels as the image has rows when they are numbered down the columns. If it may cross several
    `parts` of a mask, one of so many runs before is enough.
    """
    near, pairs = {True: 0, False: 0}, {True: 0, False: 0}
    for image in images:
        line = image.rows if order == "columns" else image.columns
        oblong = abs(image.rows - image.columns) > (image.rows + image.columns) / 16
        for mask in image.masks:
            starts = mask[:, 0]
            apart = np.zeros(max(0, len(starts) - 1), bool)
            for before in range(1, min(parts, len(apart)) + 1):
                apart[before - 1 :] |= np.abs(starts[before:] - starts[:-before] - line) <= line / 16
            near[oblong] += int(apart.sum())
            pairs[oblong] += len(apart)
    if pairs[True] >= ENOUGH_RUNS:
        return near[True] / pairs[True]
    return sum(near.values()) / sum(pairs.values()) if sum(pairs.values()) >= ENOUGH_RUNS else None


def _constant_dice(images: Sequence[MaskedImage]) -> float | None:
    """Mean Dice of the best mask of the pixels that n masks share, at the most common size; None with too few."""
    (rows, columns), count = Counter((image.rows, image.columns) for image in images).most_common(1)[0]
    if count < ENOUGH_IMAGES:
        return None
    unions = [image.union for image in images if (image.rows, image.columns) == (rows, columns)]
    firsts = np.cumsum([0, *map(len, unions[:-1])])
    step = -(-rows * columns // _POSITIONS)
    edges = np.concatenate(unions) // step
    areas = np.maximum(np.add.reduceat(edges[:, 1] - edges[:, 0], firsts), 1)
    # Between two neighbours among all edges, every position is in the same masks.
    is_edge = np.zeros(rows * columns // step + 1, bool)
    is_edge[edges] = True
    positions = np.flatnonzero(is_edge)
    begins, ends = (np.cumsum(is_edge, dtype=np.int32) - 1)[edges].T
    changes = [np.bincount(each, minlength=len(positions)) for each in (begins, ends)]
    shared, lengths = np.cumsum(changes[0] - changes[1])[:-1], np.diff(positions)
    scores = []
    for least in sorted(set(np.geomspace(1, max(1, shared.max()), 16).astype(int).tolist())):
        before = np.concatenate(([0], np.cumsum(lengths * (shared >= least))))  # pixels of the mask before each edge
        common = np.add.reduceat(before[ends] - before[begins], firsts)
        scores.append(float((2 * common / (areas + before[-1])).mean()))
    return max(scores)


def _mean_mask(images: Sequence[MaskedImage], order: Order) -> Floats:
    """Mean of the masks with equal weights, float64 (16, 16): rows from the top, columns from the left."""
    total = np.zeros((_GRID, _GRID))
    for image in images:
        lines, along = (image.columns, image.rows) if order == "columns" else (image.rows, image.columns)
        centres = (np.arange(_GRID) + 0.5) / _GRID
        positions = ((centres * lines).astype(int)[:, None] * along + (centres * along).astype(int)).reshape(-1)
        # The number of edges before a position is odd where it is inside.
        passed = np.bincount(np.searchsorted(positions, image.union.reshape(-1)), minlength=len(positions) + 1)
        inside = (np.cumsum(passed[:-1]) % 2).reshape(_GRID, _GRID)
        total += inside / max(1, inside.sum())
    cells = total.reshape(_CELLS, _GRID // _CELLS, _CELLS, _GRID // _CELLS).mean(axis=(1, 3))
    return np.asarray(cells.T if order == "columns" else cells)


def _stance(mean: Floats) -> tuple[float, float, float]:
    """Correlation of a mean mask with its left-right and its up-down mirror, and its middle relative to the peaks."""
    centred = mean - mean.mean()
    power = float((centred**2).sum()) or 1.0
    profile = mean.sum(axis=0)
    half = _CELLS // 2
    peak = min(profile[: half - 1].max(), profile[half + 1 :].max())
    return (
        float((centred * centred[:, ::-1]).sum()) / power,
        float((centred * centred[::-1]).sum()) / power,
        float(profile[half - 1 : half + 1].mean() / peak) if peak > 0 else 1.0,
    )


def _stands(left_right: float, up_down: float, valley: float, lead: float) -> bool:
    """Whether a mean mask clearly shows two lungs side by side."""
    return left_right - up_down >= lead and valley < VALLEY
