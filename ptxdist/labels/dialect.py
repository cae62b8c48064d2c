"""Detection of the encoding of a label table's masks: one of four dialects of run-length text.

Owns: the dialects, their conversion to the challenge's (`rle`), and the choice between them. Refuses: a table that fits
no dialect. `evidence` measures a table read in one dialect, and finds what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ptxdist.errors import LabelError, SettingsError
from ptxdist.finding import PNEUMOTHORAX_LIMITS, Limits
from ptxdist.labels import rle
from ptxdist.labels.evidence import ENOUGH_IMAGES, Order, Reading, Size, fit_masks, measure
from ptxdist.labels.rle import Spans, Starts


@dataclass(frozen=True)
class Dialect:
    """An encoding of masks: pairs `start length`, pixels numbered down the columns or along the rows of the image.

    A relative start is the gap from the end of the previous run, an absolute one the number of a pixel, counted from 1.
    """

    starts: Starts
    order: Order

    @property
    def name(self) -> str:
        """For example `relative-columns`."""
        return f"{self.starts}-{self.order}"


OTHER_FINDING = "masks of another finding need --finding"
SIIM = Dialect("relative", "columns")
DIALECTS = (SIIM, Dialect("relative", "rows"), Dialect("absolute", "columns"), Dialect("absolute", "rows"))


def parse_dialect(name: str) -> Dialect:
    """The dialect of this name. Raises SettingsError, which lists the four names, when there is none."""
    for dialect in DIALECTS:
        if dialect.name == name:
            return dialect
    known = ", ".join(dialect.name for dialect in DIALECTS)
    raise SettingsError(f"unknown mask encoding --dialect {name!r}; expected one of {known}")


def to_siim(text: str, dialect: Dialect, rows: int, columns: int) -> str:
    """The same mask in the challenge's dialect, with adjacent runs joined; `-1` stays `-1`.

    `rows` and `columns` are those of the image. A text in the challenge's dialect is only stripped of blanks, and not
    checked. Raises LabelError as `rle.read_spans`.
    """
    if dialect == SIIM:
        return text.strip()
    return rle.encode_spans(read_union((text,), dialect, rows, columns))


def read_union(texts: Sequence[str], dialect: Dialect, rows: int, columns: int) -> Spans:
    """Union of the masks of one image as spans down its columns, int64 (n, 2), as `rle.read_spans` returns.

    `rows` and `columns` are those of the image. (0, 2) for no texts, or only `-1`. Raises LabelError as
    `rle.read_spans`.
    """
    spans = rle.unite([rle.read_spans(text, dialect.starts, rows, columns) for text in texts])
    return spans if dialect.order == "columns" else down_columns(spans, rows, columns)


def down_columns(spans: Spans, rows: int, columns: int) -> Spans:
    """Spans down the columns of a mask from those along its rows; draws only the rows that it touches.

    Both are int64 (n, 2), increasing and without overlap; (0, 2) stays (0, 2).
    """
    if len(spans) == 0:
        return spans
    first, last = int(spans[0, 0]) // columns, (int(spans[-1, 1]) - 1) // columns + 1
    edges = np.zeros((last - first) * columns + 1, np.int8)
    edges[spans[:, 0] - first * columns] += 1
    edges[spans[:, 1] - first * columns] -= 1
    lines = last - first + 1  # one empty row more, so that no run continues in the next column
    down = np.zeros((columns, lines), np.int8)
    down[:, :-1] = np.cumsum(edges[:-1]).reshape(-1, columns).T
    column, row = np.divmod(np.flatnonzero(np.diff(down.reshape(-1), prepend=0)), lines)
    return np.asarray(column * rows + first + row, np.int64).reshape(-1, 2)


# --- which dialect it is --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Detection:
    """The dialect of a table, whether the user gave it (`given`), what is proven, and the evidence in short sentences.

    Not proven means that the masks do not rule out the others: too few masks for the starts or the order, rows (which
    look like columns of masks that are turned by 90 degrees), or masks that may be upside down.
    """

    dialect: Dialect
    given: bool
    starts_proven: bool
    order_proven: bool
    upright_proven: bool
    evidence: tuple[str, ...]
    readings: tuple[Reading, ...] = ()

    @property
    def proven(self) -> bool:
        """Whether all is proven, and no single mask is implausible. No evidence tells left from right."""
        huge = any(reading.huge for reading in self.readings if reading.dialect == self.dialect.name)
        return self.starts_proven and self.order_proven and self.upright_proven and not huge


def detect_dialect(
    masks: Mapping[str, Sequence[str]],
    sizes: Mapping[str, Size],
    dialect: Dialect | None = None,
    where: Callable[[str, str], str] = lambda case_id, text: "the label table",
    option: str = "--dialect",
    limits: Limits = PNEUMOTHORAX_LIMITS,
) -> Detection:
    """Find the dialect of a table from the raw texts of its masks by image id, and the (rows, columns) of the files.

    Masks of images without a file do not have to fit; they add evidence only if all files have the same size, which is
    then assumed for them. With too few masks to decide, the dialect nearest to the challenge's is chosen, and the
    evidence says so. A given `dialect` is not judged, but its masks have to fit. `where` returns the place of a mask
    for an error message, from its image id and text; `option` is what gives a dialect. `limits` are those of the
    finding. Raises LabelError without any size, for a mask that does not fit where most do, and when the table fits no
    dialect.
    """
    if not sizes:
        raise LabelError("the mask encoding of a label table cannot be detected without the size of any image")
    tried = (dialect,) if dialect else DIALECTS
    found = dict.fromkeys(each.starts for each in tried)
    fits = {starts: fit_masks(masks, sizes, starts, limits) for starts in found}
    best = min(tried, key=lambda each: len(fits[each.starts].misfits))  # the first of equals
    fit = fits[best.starts]
    if fit.misfits and (dialect or 2 * len(fit.misfits) <= fit.masks):
        case_id, text, reason = fit.misfits[0]
        raise LabelError(
            f"{where(case_id, text)}: the mask of {case_id} does not fit its image: {reason} (read as {best.name}, "
            f"which fits {fit.masks - len(fit.misfits)} of {fit.masks} masks; correct the mask, or give another "
            f"encoding with {option})"
        )
    readings = {each: measure(each.name, each.order, fits[each.starts]) for each in tried}
    if dialect:
        fault = readings[dialect].fault
        doubt = [f"the table looks wrong as {dialect.name}, which was given: {fault}"] if fault else []
        evidence = (*_describe(readings[dialect]), *doubt)
        return Detection(dialect, True, False, False, False, evidence, tuple(readings.values()))
    return _conclude(readings, option)


def _conclude(readings: Mapping[Dialect, Reading], option: str) -> Detection:
    """Choose the first dialect without a fault; the faults of the others are the proof."""
    sound = [each for each in DIALECTS if not readings[each].fault]
    if not sound:
        raise LabelError(
            "the label table fits no mask encoding: "
            + "; ".join(f"{reading.dialect}: {reading.fault}" for reading in readings.values())
            + f". If you know the encoding of its masks, give it with {option}; {OTHER_FINDING}"
        )
    chosen = sound[0]  # the nearest to the challenge's
    others = [each for each in DIALECTS if each.starts != chosen.starts]
    twin = next(each for each in DIALECTS if each.starts == chosen.starts and each != chosen)
    verdicts = [
        f"not ruled out: {rival.name}; {chosen.name} is assumed, which is nearer to the challenge's"
        if rival in sound
        else f"not {rival.name}: {readings[rival].fault}"
        for rival in ((others[0], twin) if readings[chosen].masks else ())
    ]
    if twin not in sound and chosen.order == "rows":
        verdicts.append(f"not ruled out: {twin.name} of masks that are turned by 90 degrees")
    return Detection(
        chosen,
        given=False,
        starts_proven=not any(each in sound for each in others),
        order_proven=twin not in sound and chosen.order == "columns",
        upright_proven=readings[chosen].upright,
        evidence=(*_describe(readings[chosen]), *verdicts),
        readings=tuple(readings.values()),
    )


def check_mask_files(
    masks: Mapping[str, Sequence[str]],
    sizes: Mapping[str, Size],
    where: Path,
    kind: str = "mask images",
    limits: Limits = PNEUMOTHORAX_LIMITS,
) -> Detection:
    """Judge masks of any format but tables by the evidence for tables; `masks` are texts of `rle` by image id.

    `sizes`, `limits` and the sample are as in `detect_dialect`. The masks have no dialect: rows mean transposed images.
    Raises LabelError when the masks are transposed, upside down, inverted, or otherwise none; they are of this `kind`,
    from `where`.
    """
    fit = fit_masks(masks, sizes, "relative", limits)
    upright, transposed = (measure(each.name, each.order, fit) for each in DIALECTS[:2])
    if upright.fault:
        raise LabelError(
            f"{where}: the {kind} look wrong: {upright.fault}. Compare some with their radiographs and write them "
            f"again; if they are right, give them as a table with --dialect; {OTHER_FINDING}"
        )
    evidence = _describe(upright)
    if upright.masks:
        evidence.append(f"not transposed: {transposed.fault}" if transposed.fault else "not ruled out: transposed")
    readings = (upright, transposed)
    return Detection(SIIM, False, True, bool(transposed.fault), upright.upright, tuple(evidence), readings)


def _describe(reading: Reading) -> list[str]:
    """The measurements, in sentences."""
    if not reading.masks:
        return ["there is no mask to detect the encoding from"]
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
            f"the mean mask correlates {reading.left_right:.2f} with its left-right mirror and {reading.up_down:.2f} "
            "with its up-down mirror (left and right are not told apart)"
        )
    if reading.upper is not None:
        found.append(f"{reading.upper:.0%} of a mask is in the upper half of its image (mean)")
    if not reading.upright:
        found.append("not ruled out: upside down")
    if reading.huge:
        more = ", …" if len(reading.huge) > 3 else ""
        names = ", ".join(reading.huge[:3]) + more
        found.append(
            f"{len(reading.huge):,} masks cover more than {reading.inverted_above} of their image and may be "
            f"inverted: {names}"
        )
    if reading.images < ENOUGH_IMAGES:
        found.append(f"too few positive images to judge areas and anatomy ({reading.images} of {ENOUGH_IMAGES})")
    return found
