"""What a report says about the data: how labels and files fit together, the two sides of the split, what it leaks.

Groups are counted; no single patient is described.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from ptxdist.cache.catalog import Case, Catalog
from ptxdist.cache.summary import percent, reconciliation, share, split_doubts, spread
from ptxdist.records import SharedPatients
from ptxdist.report.page import Block, Columns, Facts, Folded, Row, Table, Values
from ptxdist.report.tables import shared_table

_REASONS_SHOWN = 10
_VALUES_SHOWN = 4
UNKNOWN_PATIENTS = "images of one patient may be on both sides of the split, and the scores may be too high"


def data_card(catalog: Catalog, shared: SharedPatients | None) -> tuple[Block, ...]:
    """All blocks about the data; `shared` are the scores by whether the patient is in training."""
    blocks: list[Block] = [
        Facts(tuple(_leakage(catalog))),
        *shared_table(shared),
        Columns((Values("Label table and image files", reconciliation(catalog)), _sides(catalog))),
    ]
    if rejected := _rejected(catalog):
        blocks.append(Values("Rejected files, by reason", rejected))
    if catalog.evidence:
        blocks.append(Folded("How the encoding of the masks was detected", (Facts(catalog.evidence),)))
    return tuple(blocks)


def _leakage(catalog: Catalog) -> Iterator[str]:
    leakage = catalog.leakage
    if leakage.grouped_by == "nothing":
        yield (
            "Patients are not known: every image has a PatientID of its own, none, or the same as all, and no map was "
            f"given. So {UNKNOWN_PATIENTS}."
        )
    else:
        yield (
            f"Patients are known from the {leakage.grouped_by}: {leakage.groups:,}, of them "
            f"{leakage.positive_groups:,} with {catalog.finding.one}. "
            f"{leakage.shared_cases:,} of {leakage.val_cases:,} held-out images share a patient with training; in a "
            f"random split of this size {percent(leakage.random_shared)} of them would, and "
            f"{percent(leakage.random_shared_positive)} of the positive ones."
        )
    yield from (f"{doubt[0].upper()}{doubt[1:]}." for doubt in split_doubts(catalog))
    yield (
        f"Near-duplicates: {leakage.near_duplicates:,} pairs of images look the same, "
        f"{leakage.near_duplicates_shared:,} of them with one image on each side."
    )
    proof = "proven by the masks themselves, except for left and right" if catalog.dialect_proven else ""
    yield f"Encoding of the masks: {catalog.dialect}, {proof or 'which the masks do not prove'}."


def _sides(catalog: Catalog) -> Table:
    """Counts of the images in training and of those held out."""
    parts = [[case for case in catalog.cases if case.split == side] for side in ("train", "val")]

    def row(name: str, value: Callable[[Sequence[Case]], str]) -> Row:
        return Row(name, tuple(map(value, parts)))

    def share_of(matches: Callable[[Case], bool]) -> Callable[[Sequence[Case]], str]:
        return lambda part: f"{(hits := sum(map(matches, part))):,} ({share(hits, len(part))})"

    def same(field: str, value: str) -> Callable[[Case], bool]:
        return lambda case: bool(getattr(case, field) == value)

    def ages(part: Sequence[Case]) -> str:
        known = [case.age for case in part if case.age is not None]
        return f"{spread(known)} years" if known else "not known"

    def areas(part: Sequence[Case]) -> str:
        known = [case.area_px for case in part if case.masks]
        return f"{spread(known)} pixels" if known else "none"

    rows = [row("images", lambda part: f"{len(part):,}")]
    if catalog.leakage.grouped_by != "nothing":
        rows.append(row("patients", lambda part: f"{len({case.group for case in part}):,}"))
    rows.append(row(f"with {catalog.finding.one}", share_of(lambda case: bool(case.masks))))
    rows.append(row("with several masks", share_of(lambda case: len(case.masks or ()) > 1)))
    for field in ("view", "sex"):
        values = Counter(str(getattr(case, field)) for part in parts for case in part)
        for value, _ in values.most_common(_VALUES_SHOWN):
            rows.append(row(f"{field} {value or 'not known'}", share_of(same(field, value))))
    rows.append(row("median age (5 % to 95 %)", ages))
    rows.append(row("median mask area (5 % to 95 %)", areas))
    return Table("Training and held-out images", ("", "training", "held out"), tuple(rows))


def _rejected(catalog: Catalog) -> tuple[tuple[str, str], ...]:
    """Reasons for rejecting files, the most frequent first, and how many files each."""
    without_ids = (re.sub(r"\b[\d.]{20,}\b", "…", reject.reason) for reject in catalog.rejects)
    return tuple((reason, f"{count:,}") for reason, count in Counter(without_ids).most_common(_REASONS_SHOWN))
