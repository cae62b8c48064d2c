"""Names and values as tables: caches, checks.

Owns: how numbers are laid out for people. Refuses: nothing. Called by: `cli`, `training`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from ptxdist.console.terminal import out, say

if TYPE_CHECKING:
    from ptxdist.cache.catalog import Catalog
    from ptxdist.cache.verify import Damage
_DAMAGES_SHOWN = 20


def show_pairs(title: str, pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values as a two-column table."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in pairs:
        table.add_row(name, value)
    out.print(table)


def show_catalog(catalog: Catalog) -> None:
    """Print how table and files fit together, the split, and what it leaks."""
    counts, leakage, sides = catalog.reconciliation, catalog.leakage, catalog.sides()
    show_pairs(
        "reconciliation of table and files",
        [
            ("table: dialect of the masks", catalog.dialect + ("" if catalog.dialect_proven else " (not proven)")),
            ("table: rows", f"{counts.table_rows:,}"),
            ("table: images", f"{counts.table_images:,}"),
            ("  positive", f"{counts.table_positive:,}"),
            ("  with several masks", f"{counts.table_several_masks:,}"),
            ("  with overlapping masks, united", f"{counts.table_overlapping:,}"),
            ("  without a file", f"{counts.ids_without_file:,}"),
            ("files: images", f"{counts.files:,}"),
            ("  rejected", f"{len(catalog.rejects):,}"),
            ("  copies of another one", f"{counts.duplicates:,}"),
            ("files: others, left alone", f"{counts.other_files:,}"),
            ("images: labelled", f"{counts.labelled:,}"),
            ("  positive", f"{counts.positive:,}"),
            (
                "  mask area in px: median (5 % to 95 %)",
                _spread_of([case.area_px for case in catalog.cases if case.masks]),
            ),
            ("images: without a row, unlabelled", f"{counts.unlabelled:,}"),
            *(
                (f"split: {side}", f"{sides[side]['cases']:,} ({sides[side]['positive']:,} positive)")
                for side in ("train", "val")
            ),
            (f"groups by {leakage.grouped_by}", f"{leakage.groups:,} ({leakage.positive_groups:,} with a positive)"),
            ("  val images whose group is in train", f"{leakage.shared_cases:,}"),
            (
                "  the same in a random split",
                f"{leakage.random_shared:.0%} ({leakage.random_shared_positive:.0%} of positive)",
            ),
            ("near-duplicates, pairs of images", f"{leakage.near_duplicates:,}"),
            ("  with one in train, one in val", f"{leakage.near_duplicates_shared:,}"),
        ],
    )
    if not catalog.dialect_proven:
        say(f"warning: the masks are read as {catalog.dialect}: {'; '.join(catalog.evidence)}")
    if leakage.near_duplicates_shared:
        say("warning: some validation images look like training images, see near_duplicates.csv in the cache")
    if leakage.grouped_by == "nothing":
        say(
            "warning: PatientID groups nothing (there is none, or one for every image), so a patient may be on both "
            "sides of the split; give --patients map.csv if it is known who is who"
        )


def _spread_of(values: Sequence[int]) -> str:
    if not values:
        return ""
    ordered = sorted(values)
    low, middle, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.05, 0.5, 0.95))
    return f"{middle:,} ({low:,} to {high:,})"


def show_damages(cache: Path, mended: Sequence[Damage], wrong: Sequence[Damage]) -> None:
    """Print what a check of a cache has found, or that all is well."""
    for title, damages in (("mended", mended), ("wrong", wrong)):
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
        out.print(f"{cache} is whole", soft_wrap=True)


def show_findings(findings: Sequence[tuple[str, str, str, str, str]]) -> None:
    """Print what `doctor` has found: rows of state (ok, warning, wrong), check, place, finding, and what to do."""
    looks = {"ok": "[green]✓ ok[/]", "warning": "[yellow]! warning[/]", "wrong": "[bold red]✗ wrong[/]"}
    table = Table("", "check", "where", "found, and what to do", header_style="dim")
    for state, check, where, found, advice in findings:
        text = Text(found) if not advice else Text.assemble(found, "\n→ ", (advice, "bold"))
        table.add_row(looks[state], check, where, text)
    out.print(table)
    counts = [f"{sum(row[0] == state for row in findings)} {state}" for state in looks]
    out.print(", ".join(counts))


def number(value: float | None) -> str:
    """A score with four digits; nothing where it is not defined."""
    return "" if value is None else f"{value:.4f}"
