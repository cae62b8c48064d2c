"""Charts as inline SVG: axes with round ticks, lines, points, intervals and surfaces.

Places are in per cent of the plot, so that a chart takes the width of its column while its text keeps the size of the
page, on a phone and on paper too. Paths cannot use per cent, so they are drawn in a stretched box of 100 by 100.
Colours, dashes and marks are classes of the page's style sheet; series differ in all three, not in colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

Point = tuple[float, float]
Grid = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Axis:
    """One axis from `low` to `high` (low < high; both above 0 where `log`), with a tick at each of `ticks`."""

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False
    names: tuple[str, ...] = ()  # of the ticks, if they are not their values

    def place(self, value: float) -> float:
        """Position of a value along the axis, in per cent; values beyond an end are placed at that end."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = (math.log(max(item, self.low)) for item in (low, high, at))
        return 100 * min(1.0, max(0.0, (at - low) / (high - low)))


@dataclass(frozen=True)
class Series:
    """Named points drawn in one of the styles 1 to 4; lines connect the points within each of `parts`."""

    name: str
    style: int
    parts: tuple[tuple[Point, ...], ...]
    line: bool = True
    marks: bool = True


def linear_axis(label: str, low: float, high: float, *, ticks: int = 5, whole: bool = False) -> Axis:
    """An axis from low to high with about `ticks` steps of 1, 2 or 5 times a power of ten; `whole`: whole numbers."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    step = 10.0 ** math.floor(math.log10((high - low) / ticks))
    step *= next(times for times in (1, 2, 5, 10) if (high - low) / (step * times) <= ticks)
    step = max(1.0, step) if whole else step
    first = math.ceil(low / step - 1e-9)
    places = [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]
    return Axis(label, low, high, tuple(places))


def log_axis(label: str, low: float, high: float) -> Axis:
    """A logarithmic axis from low to high (both above 0); ticks at powers of ten, and between them if there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for times in ((1,), (1, 3), (1, 2, 5)):
        ticks = [
            m * 10.0**p for p in range(first, last + 1) for m in times if low * 0.999 <= m * 10.0**p <= high * 1.001
        ]
        if len(ticks) >= 3:
            break
    return Axis(label, low, max(high, low * 1.001), tuple(ticks), log=True)


def cell_axis(label: str, names: Sequence[str], *, most: int = 10) -> Axis:
    """An axis of cells of equal width, the first centred at 0; at most `most` are named, by the shortest names."""
    step = -(-len(names) // most)
    shown = min((range(start, len(names), step) for start in range(step)), key=lambda r: sum(len(names[i]) for i in r))
    return Axis(label, -0.5, len(names) - 0.5, tuple(map(float, shown)), names=tuple(names[place] for place in shown))


def tick_text(value: float) -> str:
    """A tick's value: 0.25, 40, 10,000, 1e-4."""
    if value == 0 or 1e-3 <= abs(value) < 1000:
        return f"{value:g}"
    if abs(value) < 1e-3:
        digits, _, exponent = f"{value:.0e}".partition("e")
        return f"{digits}e{int(exponent)}"
    return f"{value:,.0f}"


def plot(
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    *,
    words: str,
    rules: Sequence[tuple[float, str]] = (),
    levels: Sequence[float] = (),
    rings: Sequence[Point] = (),
    diagonal: bool = False,
) -> Markup:
    """Lines and points over two axes; `words` are the alternative text.

    `rules` are named places on the x axis, `levels` values on the y axis, `rings` highlighted points; `diagonal` draws
    y = x.
    """
    marked = sorted(x.place(place) for place, _ in rules)
    inside = [_rule(x.place(place), name, marked) for place, name in rules]
    inside += [_path("level", [[(0, 100 - y.place(value)), (100, 100 - y.place(value))]]) for value in levels]
    if diagonal:
        inside.append(_path("level", [[(0, 100), (100, 0)]]))
    for item in series:
        parts = [[(x.place(a), 100 - y.place(b)) for a, b in part] for part in item.parts]
        if item.line:
            inside.append(_path(f"line s{item.style}", [part for part in parts if len(part) > 1]))
        inside += [mark(item.style, *point) for part in parts for point in part if item.marks or len(part) == 1]
    inside += [
        Markup('<circle class="ring" cx="{:.2f}%" cy="{:.2f}%" r="7"/>').format(x.place(a), 100 - y.place(b))
        for a, b in rings
    ]
    return _frame(x, y, inside, words)


def surface(x: Axis, y: Axis, picture: str, *, words: str, inside: Grid, ring: Point) -> Markup:
    """A picture of cells (a data URI, one pixel each, stretched over the plot) over two cell axes.

    The cells that are true in `inside`, bool (rows, columns) from below, are outlined; `ring` marks one cell.
    """
    drawn = [
        Markup('<image href="{}" width="100%" height="100%" preserveAspectRatio="none" class="pixels"/>').format(
            picture
        )
    ]
    sides, place = _sides(inside), (x.place(ring[0]), 100 - y.place(ring[1]))
    for kind in ("halo", "edge"):
        drawn.append(_path(kind, [[(x.place(a), 100 - y.place(b)) for a, b in side] for side in sides]))
        drawn.append(Markup('<circle class="{}" cx="{:.2f}%" cy="{:.2f}%" r="6"/>').format(kind, *place))
    return _frame(x, y, drawn, words)


def _sides(inside: Grid) -> list[tuple[Point, Point]]:
    """The sides between true and other cells, in units of cells; the centre of the first cell is (0, 0)."""
    found: list[tuple[Point, Point]] = []
    framed = np.pad(inside, 1)
    for row, column in zip(*np.nonzero(framed[1:, 1:] != framed[:-1, 1:]), strict=True):
        found.append(((column - 0.5, row - 0.5), (column + 0.5, row - 0.5)))
    for row, column in zip(*np.nonzero(framed[1:, 1:] != framed[1:, :-1]), strict=True):
        found.append(((column - 0.5, row - 0.5), (column - 0.5, row + 0.5)))
    return found


def draw_interval(
    axis: Axis, value: float | None, span: tuple[float, float] | None, *, level: float | None, few: bool = False
) -> Markup:
    """One row of a forest plot: the value and its interval on the axis, and a `level` to compare with.

    It is hidden from screen readers, since the numbers beside it say the same.
    """
    parts = []
    if level is not None:
        parts.append(
            Markup('<line class="level" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="100%"/>').format(axis.place(level))
        )
    if span is not None:
        ends = [axis.place(end) for end in span]
        parts.append(Markup('<line class="span" x1="{:.2f}%" x2="{:.2f}%" y1="50%" y2="50%"/>').format(*ends))
        parts += [
            Markup('<svg x="{:.2f}%" y="50%" overflow="visible"><path class="span" d="M0-4V4"/></svg>').format(end)
            for end in ends
        ]
    if value is not None:
        parts.append(mark(5 if few else 1, axis.place(value), 50))
    return Markup('<svg class="interval" aria-hidden="true">{}</svg>').format(Markup("").join(parts))


def ruler(axis: Axis) -> Markup:
    """The ticks of an axis, for the foot of a forest plot."""
    ticks = [
        Markup('<text x="{:.2f}%" y="11" class="x">{}</text>').format(axis.place(tick), tick_text(tick))
        for tick in axis.ticks
    ]
    return Markup('<svg class="interval ruler" aria-hidden="true">{}</svg>').format(Markup("").join(ticks))


_SHAPES = {
    1: "M-3.5,0a3.5,3.5 0 1,0 7,0a3.5,3.5 0 1,0 -7,0Z",  # circle
    2: "M-3.2-3.2H3.2V3.2H-3.2Z",  # square
    3: "M0-4.2L4,3H-4Z",  # triangle
    4: "M0-4.5L4.5,0L0,4.5L-4.5,0Z",  # diamond
    5: "M-3.5,0a3.5,3.5 0 1,0 7,0a3.5,3.5 0 1,0 -7,0Z",  # circle, drawn hollow
}


def mark(style: int, x: float, y: float) -> Markup:
    """The mark of a style at a place in per cent."""
    return Markup('<svg x="{:.2f}%" y="{:.2f}%" overflow="visible"><path class="mark s{}" d="{}"/></svg>').format(
        x, y, style, _SHAPES[style]
    )


def swatch(style: int, *, line: bool = True) -> Markup:
    """A sample of a series, for a legend; style 0 is a level to compare with."""
    if style == 0:
        return Markup(
            '<svg class="swatch" viewBox="0 0 30 14" aria-hidden="true"><path class="level" d="M0,7H30"/></svg>'
        )
    stroke = Markup('<path class="line s{}" d="M0,7H30"/>').format(style) if line else ""
    return Markup('<svg class="swatch" viewBox="0 0 30 14" aria-hidden="true">{}{}</svg>').format(
        stroke, Markup('<path class="mark s{}" transform="translate(15,7)" d="{}"/>').format(style, _SHAPES[style])
    )


def _path(kind: str, parts: Sequence[Sequence[Point]]) -> Markup:
    drawn = " ".join("M" + "L".join(f"{x:.2f},{y:.2f}" for x, y in part) for part in parts)
    if not drawn:
        return Markup("")
    return Markup(
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="100%" overflow="visible">'
        '<path class="{}" d="{}"/></svg>'
    ).format(kind, drawn)


def _rule(place: float, name: str, all_places: Sequence[float]) -> Markup:
    """A vertical rule; its name is above the plot, to its right, or to its left at the right edge."""
    at_edge = place > 80 or (len(all_places) > 1 and place == all_places[-1] and place > 70)
    return Markup(
        '<line class="rule" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="100%"/>'
        '<text x="{0:.2f}%" y="-6" text-anchor="{1}">{2}</text>'
    ).format(place, "end" if at_edge else "start", name)


def _named(axis: Axis) -> Iterable[tuple[float, str]]:
    return zip(axis.ticks, axis.names or map(tick_text, axis.ticks), strict=True)


def _frame(x: Axis, y: Axis, inside: Sequence[Markup], words: str) -> Markup:
    ticks = [
        Markup(
            '<line class="tick" x1="0" x2="100%" y1="{0:.2f}%" y2="{0:.2f}%"/>'
            '<text x="0" y="{0:.2f}%" dx="-7" dy=".35em" text-anchor="end">{1}</text>'
        ).format(100 - y.place(tick), name)
        for tick, name in _named(y)
    ]
    ticks += [
        Markup(
            '<line class="tick" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="100%"/>'
            '<text x="{0:.2f}%" y="100%" dy="18" text-anchor="middle">{1}</text>'
        ).format(x.place(tick), name)
        for tick, name in _named(x)
    ]
    return Markup(
        '<div class="plot"><div class="ylabel" aria-hidden="true">{}</div>'
        '<svg class="chart" role="img" aria-label="{}">{}{}</svg>'
        '<div class="xlabel" aria-hidden="true">{}</div></div>'
    ).format(y.label, words, Markup("").join(ticks), Markup("").join(inside), x.label)
