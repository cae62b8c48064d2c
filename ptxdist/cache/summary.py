"""A catalog as names and values, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Sequence

from ptxdist.cache.catalog import Catalog


def reconciliation(catalog: Catalog) -> tuple[tuple[str, str], ...]:
    """How the label table and the files fit together; a name that starts with a blank is part of the one above."""
    counts, areas = catalog.reconciliation, [case.area_px for case in catalog.cases if case.masks]
    return (
        ("rows of the label table", f"{counts.table_rows:,}"),
        ("images in the label table", f"{counts.table_images:,}"),
        (" with a pneumothorax", f"{counts.table_positive:,}"),
        (" with several masks", f"{counts.table_several_masks:,}"),
        (" with overlapping masks, united", f"{counts.table_overlapping:,}"),
        (" without a file", f"{counts.ids_without_file:,}"),
        ("image files", f"{counts.files:,}"),
        (" rejected", f"{len(catalog.rejects):,}"),
        (" copies of another file", f"{counts.duplicates:,}"),
        ("other files, not used", f"{counts.other_files:,}"),
        ("images with a label", f"{counts.labelled:,}"),
        (" with a pneumothorax", f"{counts.positive:,} ({share(counts.positive, counts.labelled)})"),
        (" median mask area (5 % to 95 %)", f"{spread(areas)} pixels" if areas else "none"),
        ("images without a label, not used", f"{counts.unlabelled:,}"),
    )


def percent(value: float) -> str:
    """A share 0..1 as 27.5 %, with a blank that does not break."""
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def share(part: int, whole: int) -> str:
    """A part of a whole in per cent; "none" if there is no whole."""
    return percent(part / whole) if whole else "none"


def spread(values: Sequence[int]) -> str:
    """The median of at least one value, and the 5th and 95th percentile."""
    ordered = sorted(values)
    low, middle, high = (ordered[round(place * (len(ordered) - 1))] for place in (0.05, 0.5, 0.95))
    return f"{middle:,} ({low:,} to {high:,})"
