"""A catalog as names and values, for the terminal and for the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ptxdist.cache.catalog import Catalog

_LARGE_GROUP, _LARGE_SHARE = 3, 0.2  # of one patient, more is doubtful; the real table has 61 of 12,047


def reconciliation(catalog: Catalog) -> tuple[tuple[str, str], ...]:
    """How the label table and the files fit together; a name that starts with a blank is part of the one above."""
    shown = f" with {catalog.finding.one}"
    counts, areas = catalog.reconciliation, [case.area_px for case in catalog.cases if case.masks]
    return (
        ("rows of the label table", f"{counts.table_rows:,}"),
        ("images in the label table", f"{counts.table_images:,}"),
        (shown, f"{counts.table_positive:,}"),
        (" with several masks", f"{counts.table_several_masks:,}"),
        (" with overlapping masks, united", f"{counts.table_overlapping:,}"),
        (" without a file", f"{counts.ids_without_file:,}"),
        ("image files", f"{counts.files:,}"),
        (" rejected", f"{len(catalog.rejects):,}"),
        (" copies of another file", f"{counts.duplicates:,}"),
        ("other files, not used", f"{counts.other_files:,}"),
        ("images with a label", f"{counts.labelled:,}"),
        (shown, f"{counts.positive:,} ({share(counts.positive, counts.labelled)})"),
        (" median mask area (5 % to 95 %)", f"{spread(areas)} pixels" if areas else "none"),
        ("images without a label, not used", f"{counts.unlabelled:,}"),
    )


def split_doubts(catalog: Catalog) -> tuple[str, ...]:
    """What is doubtful about the split of a catalog and its groups, in sentences; () if nothing is."""
    leakage, source = catalog.leakage, catalog.leakage.grouped_by
    groups = Counter(case.group for case in catalog.cases if case.fold >= 0)
    images, largest = sum(groups.values()), max(groups.values(), default=0)
    sides = catalog.sides()
    train, val = sides["train"]["positive"], sides["val"]["positive"]
    doubts = []
    if images and train + val == images:
        doubts.append(f"no image without {catalog.finding.one} has a label, so a model cannot learn what is none")
        if unlabelled := catalog.reconciliation.unlabelled:
            doubts[0] += f"; if the {unlabelled:,} images without a label have none, give --unlisted negative"
    if bool(train) != bool(val):
        doubts.append(f"no image for {'training' if val else 'validation'} has {catalog.finding.one}")
    if source == "nothing":
        return tuple(doubts)
    if leakage.groups == images:
        doubts.append(f"the {source} gives every image a patient of its own, so it keeps nothing together")
    if largest > max(_LARGE_GROUP, _LARGE_SHARE * images):
        doubts.append(
            f"{largest:,} of {images:,} images are of one patient by {source}, all on one side of the split; if this "
            "is a placeholder for many patients, give these with --patients"
        )
    if missing := catalog.reconciliation.without_patient:
        doubts.append(f"{missing:,} of {images:,} images have no patient by {source}; each counts as one of its own")
    return tuple(doubts)


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
