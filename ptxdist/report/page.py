"""The blocks a report's page is made of, and its HTML: one file with everything inside, no script, nothing fetched.

A page is a list of sections, a section a title and blocks. Blocks of one kind that follow each other are drawn by one
macro of templates/blocks.html, which is named after the record; so charts are laid out side by side. A new kind of
block is a record here and a macro there. jinja2 escapes every text.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ptxdist.report.charts import swatch
from ptxdist.scores.tables import CaseRow

TEMPLATES = Path(__file__).resolve().parent / "templates"
SIDE_PX = 512  # of the pictures of cases
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Notice:
    """A warning in a frame: a short sentence, and what it means for the reader."""

    title: str
    text: str


@dataclass(frozen=True)
class Facts:
    """A list of sentences below a heading, if there is one."""

    sentences: tuple[str, ...]
    title: str = ""


@dataclass(frozen=True)
class Terms:
    """Terms and their definitions."""

    pairs: Pairs


@dataclass(frozen=True)
class Row:
    """One row of a table; `kind` is "", "chosen", "baseline" or "group" (a heading), `note` a word beside the name."""

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
class Values:
    """A narrow table of names and values; a name that starts with a blank is part of the one above."""

    caption: str
    pairs: Pairs


@dataclass(frozen=True)
class Columns:
    """Blocks side by side, where the page is wide enough."""

    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Folded:
    """Blocks that are shown by a click on the title."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Legend:
    """One entry of a legend: a style of `charts`, its name, and whether it is a line."""

    style: int
    name: str
    line: bool = True


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
    """A headline number: its value and 95 % interval as text ("" if there is none), and what to compare it with."""

    name: str
    value: str
    interval: str
    baseline: str
    definition: str
    drawing: Markup


@dataclass(frozen=True)
class Forest:
    """A forest plot: rows with their intervals drawn over one axis, whose ticks are `foot`."""

    table: Table
    foot: Markup


@dataclass(frozen=True)
class Picture:
    """One case: its picture as a data URI, the outlines of its masks as SVG path data in a box of SIDE_PX.

    `number` counts all pictures of a page from 1.
    """

    number: int
    row: CaseRow
    source: str
    truth: str
    prediction: str
    words: str


@dataclass(frozen=True)
class Gallery:
    """A titled row of pictures, chosen from `count` cases; `name` is its anchor."""

    name: str
    title: str
    count: int
    pictures: tuple[Picture, ...]


Block = Notice | Facts | Terms | Table | Values | Columns | Folded | Chart | Tile | Forest | Gallery


@dataclass(frozen=True)
class Section:
    """A part of the page with an entry in the contents; it is left out, with its `lead`, when it has no blocks.

    `headline` is what to remember of it, before the lead.
    """

    anchor: str
    title: str
    blocks: tuple[Block, ...]
    lead: str = ""
    headline: str = ""


@dataclass(frozen=True)
class Page:
    """Everything a page shows; `finding` is the name of what is segmented."""

    name: str
    finding: str
    purpose: str
    sections: tuple[Section, ...]
    foot: str


def render(page: Page) -> str:
    """The page as HTML text."""
    environment = templates_in(TEMPLATES)

    def draw(blocks: Iterable[Block]) -> Markup:
        macros = environment.get_template("blocks.html").module
        runs = ((kind.__name__.lower(), list(run)) for kind, run in groupby(blocks, key=type))
        return Markup("").join(getattr(macros, name)(run) for name, run in runs)

    environment.globals |= {"draw": draw, "swatch": swatch, "side_px": SIDE_PX}
    sections = [section for section in page.sections if section.blocks]
    return environment.get_template("report.html").render(page=page, sections=sections, style=style_sheet())


def templates_in(folder: Path) -> Environment:
    """The templates of a folder; every text is escaped, and a name that is not given is an error."""
    return Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip


def style_sheet() -> Markup:
    """The style sheet of a report, which other pages have too."""
    return Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))


def data_uri(kind: str, content: bytes) -> str:
    """A file of this media type as the address of a picture."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
