"""Names and values as tables in the terminal: caches, their damage, the checks of `doctor`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from ptxdist.console.terminal import out, say

if TYPE_CHECKING:
    from ptxdist.cache.catalog import Catalog
    from ptxdist.cache.verify import Damage
_DAMAGES_SHOWN, _INDENT = 20, 4 * " "


def show_pairs(title: str, pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values as a table; a name that starts with a blank is part of the one above."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in pairs:
        table.add_row(name, value)
    out.print(table)


def show_settings(rows: Sequence[tuple[str, str, str, str]]) -> None:
    """Print settings: key, type, default ("" if there is none) and meaning."""
    for key, kind, default, meaning in rows:
        value = f" = {default}" if default else ""
        out.print(Text.assemble((key, "bold"), f"{value}  ", (kind, "dim")), soft_wrap=True)
        out.print(indented(meaning))


def indented(text: str) -> Text:
    """A text in lines of the terminal's width, each after four blanks."""
    return Text(textwrap.fill(text, out.width, initial_indent=_INDENT, subsequent_indent=_INDENT))


def show_catalog(catalog: Catalog) -> None:
    """Print how label table and files fit together, the split, and what it leaks."""
    from ptxdist.cache.summary import percent, reconciliation

    leakage, shown = catalog.leakage, f"with {catalog.finding.one}"
    sides = (
        (f"split: {side}", f"{counts['cases']:,} ({counts['positive']:,} {shown})")
        for side, counts in catalog.sides().items()
        if side in ("train", "val")
    )
    pairs = (
        ("encoding of the masks", catalog.dialect + ("" if catalog.dialect_proven else " (not proven)")),
        *reconciliation(catalog),
        *sides,
        (f"groups by {leakage.grouped_by}", f"{leakage.groups:,} ({leakage.positive_groups:,} {shown})"),
        (" val images whose group is in train", f"{leakage.shared_cases:,}"),
        (
            " the same in a random split",
            f"{percent(leakage.random_shared)} ({percent(leakage.random_shared_positive)} of the positive ones)",
        ),
        ("near-duplicates, pairs of images", f"{leakage.near_duplicates:,}"),
        (" with one in train, one in val", f"{leakage.near_duplicates_shared:,}"),
    )
    show_pairs("label table, image files and split", pairs)
    _show_doubts(catalog)


def _show_doubts(catalog: Catalog) -> None:
    from ptxdist.cache.summary import split_doubts

    leakage = catalog.leakage
    if not catalog.dialect_proven:
        say(f"warning: the encoding of the masks, {catalog.dialect}, is not proven: {'; '.join(catalog.evidence)}")
    if leakage.near_duplicates_shared:
        say("warning: some validation images look like training images; see near_duplicates.csv in the cache")
    for doubt in split_doubts(catalog):
        say(f"warning: {doubt}")
    if catalog.synthetic:
        say("all images are synthetic: what a model learns from them means nothing for a real radiograph")
    if leakage.grouped_by == "nothing":
        say(
            "warning: patients are not known (every image has a PatientID of its own, none, or the same as all), so "
            "images of one patient may be on both sides of the split; give --patients map.csv if there is a map"
        )


def show_damages(cache: Path, mended: Sequence[Damage], wrong: Sequence[Damage]) -> None:
    """Print what a check of a cache has found, or that it is complete."""
    for title, damages in (("repaired", mended), ("wrong", wrong)):
        if damages:
            table = Table(title=f"{title}: {len(damages)}", title_justify="left")
            for name in ("file", "what", "cases"):
                table.add_column(name, overflow="fold")
            for item in damages[:_DAMAGES_SHOWN]:
                more = " …" if len(item.cases) > 3 else ""
                table.add_row(item.path, item.reason, ", ".join(item.cases[:3]) + more)
            out.print(table)
            if len(damages) > _DAMAGES_SHOWN:
                out.print(f"and {len(damages) - _DAMAGES_SHOWN} more; --json lists all")
    if not wrong:
        out.print(f"{cache} has no damage", soft_wrap=True)


def show_findings(findings: Sequence[tuple[str, str, str, str, str]]) -> None:
    """Print what `doctor` has found: rows of state (ok, warning, wrong), check, place, finding, and what to do."""
    looks = {
        "ok": Text("✓ ok", "green"),
        "warning": Text("! warning", "yellow"),
        "wrong": Text("✗ wrong", "bold red"),
    }
    table = Table("", "check", "where", "found, and what to do", header_style="dim")
    for state, check, where, found, advice in findings:
        text = Text(found) if not advice else Text.assemble(found, "\n→ ", (advice, "bold"))
        table.add_row(looks[state], check, where, text)
    out.print(table)
    counts = [f"{sum(row[0] == state for row in findings)} {state}" for state in looks]
    out.print(", ".join(counts))


def number(value: float | None) -> str:
    """A score with four digits; "" if it is not defined."""
    return "" if value is None else f"{value:.4f}"
