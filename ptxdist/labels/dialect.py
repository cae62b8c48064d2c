"""How a label table writes its masks: four dialects of run-length text, and the proof of which one a table uses.

Owns: the dialects, their translation into the challenge's (`rle`), and the choice. Refuses: a table that looks wrong in
every dialect. Called by: `catalog` and `cli`. What a reading looks like, and what cannot be right, is `evidence`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ptxdist.errors import LabelError, SettingsError
from ptxdist.labels import rle
from ptxdist.labels.evidence import ENOUGH_IMAGES, Order, Reading, Size, fit_masks, measure
from ptxdist.labels.rle import Spans, Starts


@dataclass(frozen=True)
class Dialect:
    """How a mask is written: pairs `start length`, the px numbered down the columns or along the rows of the image.

    A relative start is the gap from the end of the former run, an absolute one the number of a px, the first being 1.
    """

    starts: Starts
    order: Order

    @property
    def name(self) -> str:
        """Such as `relative-columns`."""
        return f"{self.starts}-{self.order}"


SIIM = Dialect("relative", "columns")
DIALECTS = (SIIM, Dialect("relative", "rows"), Dialect("absolute", "columns"), Dialect("absolute", "rows"))


def parse_dialect(name: str) -> Dialect:
    """The dialect of this name; SettingsError names the four when there is none."""
    for dialect in DIALECTS:
        if dialect.name == name:
            return dialect
    known = ", ".join(dialect.name for dialect in DIALECTS)
    raise SettingsError(f"unknown dialect of a label table: {name!r}; expected one of {known}")


def to_siim(text: str, dialect: Dialect, rows: int, columns: int) -> str:
    """The same mask as the challenge writes it, touching runs joined; `-1` stays.

    A text that is in the challenge's dialect already comes back as it is, without blanks around it and unchecked.
    Raises LabelError as `rle.read_spans`.
    """
    if dialect == SIIM:
        return text.strip()
    spans = rle.read_spans(text, dialect.starts, rows, columns)
    return rle.encode_spans(spans if dialect.order == "columns" else _down_columns(spans, rows, columns))


def _down_columns(spans: Spans, rows: int, columns: int) -> Spans:
    """Spans down the columns of a mask from those along its rows; only the rows that it touches are drawn."""
    if len(spans) == 0:
        return spans
    first, last = int(spans[0, 0]) // columns, (int(spans[-1, 1]) - 1) // columns + 1
    edges = np.zeros((last - first) * columns + 1, np.int8)
    edges[spans[:, 0] - first * columns] += 1
    edges[spans[:, 1] - first * columns] -= 1
    lines = last - first + 1  # one more, which is empty, so that no run goes on in the next column
    down = np.zeros((columns, lines), np.int8)
    down[:, :-1] = np.cumsum(edges[:-1]).reshape(-1, columns).T
    column, row = np.divmod(np.flatnonzero(np.diff(down.reshape(-1), prepend=0)), lines)
    return np.asarray(column * rows + first + row, np.int64).reshape(-1, 2)


# --- which dialect it is --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Detection:
    """The dialect of a table, whether somebody named it (`given`), what is proven, and why, in short sentences.

    What is not proven is not contradicted either: there are too few masks to rule out the others.
    """

    dialect: Dialect
    given: bool
    starts_proven: bool
    order_proven: bool
    evidence: tuple[str, ...]
    readings: tuple[Reading, ...] = ()


def detect_dialect(
    masks: Mapping[str, Sequence[str]],
    sizes: Mapping[str, Size],
    dialect: Dialect | None = None,
    where: Callable[[str, str], str] = lambda case_id, text: "the label table",
) -> Detection:
    """Find the dialect of a table from the raw texts of its masks by image id, and the (rows, columns) of the files.

    Masks of images without a file do not have to fit; they are further evidence, and only where all files have one
    size, which is then taken for theirs. Where there are too few masks to tell, the dialect nearest to the challenge's
    is taken, and the evidence says so. A `dialect` that is given is not judged, but its masks have to fit. `where`
    names the place of a mask for an error, from its image id and text. Raises LabelError without any size, for a mask
    that does not fit where most do, and when the table looks wrong in every dialect.
    """
    if not sizes:
        raise LabelError("the dialect of a label table cannot be told without the size of a single image")
    tried = (dialect,) if dialect else DIALECTS
    fits = {starts: fit_masks(masks, sizes, starts) for starts in dict.fromkeys(each.starts for each in tried)}
    best = min(tried, key=lambda each: len(fits[each.starts].misfits))  # the first one of equals
    fit = fits[best.starts]
    if fit.misfits and (dialect or 2 * len(fit.misfits) <= fit.masks):
        case_id, text, reason = fit.misfits[0]
        raise LabelError(
            f"{where(case_id, text)}: the mask of {case_id} does not fit its image: {reason} (read as {best.name}, as "
            f"{fit.masks - len(fit.misfits)} of {fit.masks} masks can be; --dialect NAME reads the table as another)"
        )
    readings = {each: measure(each.name, each.order, fits[each.starts]) for each in tried}
    if dialect:
        fault = readings[dialect].fault
        doubt = [f"the table looks wrong as {dialect.name}, which was asked for: {fault}"] if fault else []
        evidence = (*_describe(readings[dialect]), *doubt)
        return Detection(dialect, True, False, False, evidence, tuple(readings.values()))
    return _conclude(readings)


def _conclude(readings: Mapping[Dialect, Reading]) -> Detection:
    """The first dialect without a fault; the faults of the others are the proof."""
    sound = [each for each in DIALECTS if not readings[each].fault]
    if not sound:
        raise LabelError(
            "the label table looks wrong in every dialect: "
            + "; ".join(f"{reading.dialect}: {reading.fault}" for reading in readings.values())
            + ". If you know how its masks are written, name it with --dialect NAME"
        )
    chosen = sound[0]  # the nearest to the challenge's
    others = [each for each in DIALECTS if each.starts != chosen.starts]
    twin = next(each for each in DIALECTS if each.starts == chosen.starts and each != chosen)
    verdicts = [
        f"not ruled out: {rival.name}; {chosen.name} is taken, which is nearer to the challenge's"
        if rival in sound
        else f"not {rival.name}: {readings[rival].fault}"
        for rival in ((others[0], twin) if readings[chosen].masks else ())
    ]
    return Detection(
        chosen,
        given=False,
        starts_proven=not any(each in sound for each in others),
        order_proven=twin not in sound,
        evidence=(*_describe(readings[chosen]), *verdicts),
        readings=tuple(readings.values()),
    )


def _describe(reading: Reading) -> list[str]:
    """What was measured, in sentences."""
    if not reading.masks:
        return ["there is no mask to tell the dialect by"]
    found = [f"{reading.masks - reading.misfits:,} of {reading.masks:,} masks fit their image"]
    if reading.line_share is not None:
        line = reading.dialect.rpartition("-")[2].removesuffix("s")
        found.append(f"{reading.line_share:.0%} of neighbouring runs start one {line} apart")
    if reading.median_area is not None:
        found.append(f"the masks of an image cover {reading.median_area:.2%} of it (median)")
    if reading.constant_dice is not None:
        found.append(f"the best constant mask has a mean Dice of {reading.constant_dice:.2f}")
    if reading.left_right is not None:
        found.append(
            f"the mean mask is {reading.left_right:.2f} like its left-right mirror and {reading.up_down:.2f} like its "
            "up-down mirror"
        )
    if reading.images < ENOUGH_IMAGES:
        found.append(f"too few positive images to judge areas and anatomy ({reading.images}, from {ENOUGH_IMAGES} on)")
    return found
