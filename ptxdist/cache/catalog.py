"""The catalog of a cache: its cases, what is known of each, and how files and tables fit together.

Owns: `catalog.jsonl`. Its first line describes the catalog, each further line is one case, so it can be read at any
size. A path is never written: folders may be named after patients.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ptxdist import files, places
from ptxdist.cache.manifest import refuse_damaged_table
from ptxdist.cache.split import FOLDS, Leakage, measure_leakage
from ptxdist.errors import StoreError, system_says
from ptxdist.finding import PNEUMOTHORAX, FindingType
from ptxdist.labels.dialect import SIIM

SCHEMA = 2
FILE_NAME = places.CATALOG


@dataclass(frozen=True)
class Case:
    """One image: its file, its labels, and its side of the split.

    `digest` is a hash of the file's bytes, `group` a salted hash that the images of a patient share. `masks` are
    run-length texts as in SIIM-ACR, () for a negative case and None for an unlabelled one; `area_px` is the area of
    their union. `split` is train, val, unlabelled, rejected (its pixels could not be read) or removed (its file or its
    row of the table is gone; its row in the stores is zeros).
    """

    case_id: str
    digest: str
    decoder: str
    rows: int
    columns: int
    group: str
    masks: tuple[str, ...] | None
    area_px: int = 0
    view: str = ""
    sex: str = ""
    age: int | None = None
    fold: int = -1
    split: str = "unlabelled"


REMOVED = Case("", "", "", 1, 1, "", masks=(), split="removed")


@dataclass(frozen=True)
class Reject:
    """A file that cannot be used, and why; `path` is "" in a catalog that was read from a cache."""

    path: str
    reason: str


@dataclass(frozen=True)
class Reconciliation:
    """Counts that say how the label table and the files fit together.

    `without_patient` are labelled images that the patient map, or else PatientID, does not know though it knows others.
    """

    table_rows: int
    table_images: int
    table_positive: int
    table_several_masks: int
    table_overlapping: int
    files: int
    other_files: int
    duplicates: int
    labelled: int
    positive: int
    unlabelled: int
    ids_without_file: int
    without_patient: int = 0


@dataclass(frozen=True)
class Catalog:
    """The cases of a cache: the labelled ones in the order of their rows in the stores, then the unlabelled ones.

    `missing` are ids of the table without a file. `dialect` is the mask encoding of the table; `dialect_proven` says
    whether the masks rule out every other one, and `evidence` how. `seed` and `folds` are those of the split. `finding`
    is what the masks show. `synthetic` says that all images are phantoms, as far as is known.
    """

    cases: tuple[Case, ...]
    reconciliation: Reconciliation
    leakage: Leakage
    rejects: tuple[Reject, ...]
    missing: tuple[str, ...]
    dialect: str = SIIM.name
    dialect_proven: bool = False
    evidence: tuple[str, ...] = ()
    seed: int = 0
    folds: int = FOLDS
    finding: FindingType = PNEUMOTHORAX
    synthetic: bool = False

    @property
    def labelled(self) -> tuple[Case, ...]:
        """The rows of the stores: cases with a row in the table, and `REMOVED` ones."""
        return tuple(case for case in self.cases if case.masks is not None)

    def summary(self) -> dict[str, Any]:
        """Reconciliation, split, leakage and rejects as plain JSON values."""
        return {
            "finding": self.finding.name,
            **({"synthetic": True} if self.synthetic else {}),
            "dialect": {"name": self.dialect, "proven": self.dialect_proven, "evidence": list(self.evidence)},
            "reconciliation": asdict(self.reconciliation),
            "split": self.sides(),
            "leakage": asdict(self.leakage),
            "rejects": [asdict(reject) for reject in self.rejects],
        }

    def sides(self) -> dict[str, dict[str, int]]:
        """Numbers of cases and of positive cases on each side of the split."""
        return {
            side: {
                "cases": sum(case.split == side for case in self.cases),
                "positive": sum(case.split == side and bool(case.masks) for case in self.cases),
            }
            for side in ("train", "val", "unlabelled", "rejected", "removed")
        }


def leakage_of(cases: Iterable[Case], grouped_by: str) -> Leakage:
    """What the split of these cases leaks, whatever their order; cases on neither side do not count."""
    sides = sorted((case for case in cases if case.split in ("train", "val")), key=lambda case: case.case_id)
    groups, positive = [case.group for case in sides], [bool(case.masks) for case in sides]
    return measure_leakage(groups, positive, [case.split == "val" for case in sides], grouped_by)


def hold_out(catalog: Catalog, fold: int, pairs: Iterable[tuple[str, str]]) -> Catalog:
    """The catalog with another fold held out: its sides and its leakage. `pairs` are the ids of near-duplicates."""
    side = {case.case_id: "val" if case.fold == fold else "train" for case in catalog.cases if case.fold >= 0}
    cases = tuple(replace(case, split=side.get(case.case_id, case.split)) for case in catalog.cases)
    shared = sum({side.get(a), side.get(b)} == {"train", "val"} for a, b in pairs)
    leakage = leakage_of(cases, catalog.leakage.grouped_by)
    former = catalog.leakage.near_duplicates
    return replace(
        catalog, cases=cases, leakage=replace(leakage, near_duplicates=former, near_duplicates_shared=shared)
    )


def write_catalog(catalog: Catalog, path: Path) -> None:
    """Write catalog.jsonl atomically, without paths."""
    files.write_whole(path, catalog_text(catalog), error=None)


def catalog_text(catalog: Catalog) -> str:
    """The text of catalog.jsonl."""
    head = {
        "schema": SCHEMA,
        "reconciliation": asdict(catalog.reconciliation),
        "leakage": asdict(catalog.leakage),
        "rejects": [reject.reason for reject in catalog.rejects],
        "missing": list(catalog.missing),
        "dialect": catalog.dialect,
        "dialect_proven": catalog.dialect_proven,
        "evidence": catalog.evidence,
        "seed": catalog.seed,
        "folds": catalog.folds,
        **({} if catalog.finding == PNEUMOTHORAX else {"finding": asdict(catalog.finding)}),
        **({"synthetic": True} if catalog.synthetic else {}),
    }
    lines = (json.dumps(record) + "\n" for record in (head, *map(vars, catalog.cases)))
    return "".join(lines)


def read_catalog(cache: Path, *, as_it_is: bool = False) -> Catalog:
    """Catalog of a cache; StoreError when it is missing, damaged or of another schema.

    With `as_it_is`, it is not compared with its checksum.
    """
    path = cache / FILE_NAME
    if not path.is_file():
        raise StoreError(f"{cache} is not a ptxdist cache (no {FILE_NAME}); make one with `ptxdist preprocess`")
    if not as_it_is:
        refuse_damaged_table(cache, FILE_NAME)
    try:
        with open(path, encoding="utf-8") as file:
            head = files.parse_json(file.readline())
            if head["schema"] != SCHEMA:
                advice = "update ptxdist" if head["schema"] > SCHEMA else "rerun `ptxdist preprocess`"
                raise StoreError(f"{path} has schema {head['schema']}, this ptxdist reads {SCHEMA}: {advice}")
            cases, counts = tuple(_cases(map(files.parse_json, file))), Reconciliation(**head["reconciliation"])
            found = sum(case.split != "removed" for case in cases)
            if found != counts.labelled + counts.unlabelled:
                raise ValueError(f"{found} cases instead of {counts.labelled + counts.unlabelled}")
            return Catalog(
                cases=cases,
                reconciliation=counts,
                leakage=Leakage(**head["leakage"]),
                rejects=tuple(Reject("", reason) for reason in head["rejects"]),
                missing=tuple(head["missing"]),
                dialect=head["dialect"],
                dialect_proven=head["dialect_proven"],
                evidence=tuple(head["evidence"]),
                seed=head["seed"],
                folds=head["folds"],
                finding=FindingType.of(head["finding"]) if "finding" in head else PNEUMOTHORAX,
                synthetic=head.get("synthetic", False) is True,
            )
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {system_says(error, 'rerun `ptxdist preprocess`')}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(f"{path} is damaged ({error}); rerun `ptxdist preprocess`") from error


def _cases(records: Iterable[dict[str, Any]]) -> Iterator[Case]:
    for record in records:
        masks = record.pop("masks")
        yield REMOVED if record["split"] == "removed" else Case(**record, masks=None if masks is None else tuple(masks))
