"""What a report's page holds, and its HTML: one file with everything inside, no script, nothing fetched.

Owns: the records a page is made of and their rendering (templates/report.html, report.css; every text is escaped by
jinja2). Refuses: nothing. Called by: `report`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ptxdist.report.charts import swatch
from ptxdist.report.gallery import SIDE_PX, Gallery

TEMPLATES = Path(__file__).resolve().parent / "templates"
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Legend:
    """One entry of a legend: a style of `charts`, its name, and whether it is a line."""

    style: int
    name: str
    line: bool = True


@dataclass(frozen=True)
class Row:
    """One line of a table; `kind` is "", "chosen", "baseline" or "group" (a heading), `note` a word beside the name."""

    name: str
    cells: tuple[str | Markup, ...] = ()
    kind: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table with a caption; `head` names all columns, the first one that of the rows' names."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Chart:
    """A drawn chart with its legend, a note, and its numbers as a table to unfold; `square` keeps both axes alike."""

    title: str
    drawing: Markup
    legend: tuple[Legend, ...] = ()
    note: str = ""
    numbers: Table | None = None
    scale: tuple[str, str, str] | None = None  # of a surface: lowest value, picture of the colours, highest value
    square: bool = False


@dataclass(frozen=True)
class Tile:
    """A headline number: its value and 95 % interval as text ("" where there is none), and what to compare it with."""

    name: str
    value: str
    interval: str
    baseline: str
    definition: str
    drawing: Markup


@dataclass(frozen=True)
class Forest:
    """Rows of subgroups with their intervals drawn beside each other over one axis, whose ticks are `foot`."""

    table: Table
    foot: Markup


@dataclass(frozen=True)
class Page:
    """Everything a page shows. A section without content is left out, with its entry in the contents."""

    name: str
    purpose: str
    lead: str
    warnings: Pairs
    tiles: tuple[Tile, ...]
    scores: Table
    operating: tuple[Chart, ...]
    operating_words: tuple[str, ...]
    operating_forest: Forest
    forests: tuple[Forest, ...]
    calibration: tuple[Chart, ...]
    sizes: tuple[Chart, ...]
    galleries: tuple[Gallery, ...]
    curves: tuple[Chart, ...]
    stages: Table
    reconciliation: Pairs
    sides: Table
    leakage: Table | None
    leakage_words: tuple[str, ...]
    evidence: tuple[str, ...]
    rejected: Pairs
    card: tuple[tuple[str, tuple[str, ...]], ...]
    definitions: Pairs
    foot: str

    @property
    def pictures(self) -> int:
        """How many pictures all galleries have."""
        return sum(len(gallery.pictures) for gallery in self.galleries)


def render(page: Page) -> str:
    """The page as HTML text."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    template = environment.get_template("report.html")
    return template.render(page=page, style=style, swatch=swatch, side_px=SIDE_PX)
