"""Image files + label table (+ patient map) -> Catalog: which cases there are, what is known of them, who learns what.

Owns: the join of files and tables, the order of the cases, and the file `catalog.jsonl` of a cache (its first line
describes the catalog, each further line is one case, so that it stays readable at any size).
Refuses: folders without a usable file, masks that do not fit their image.
Called by: `preprocess` (builds), `learn` and `cli` (read). Files without a row are unlabelled, never negative.

A cache that is renewed keeps its order and its split: a case stays in its row and its fold, a new one takes the row
of a removed one or goes to the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ptxdist import files
from ptxdist.cache.scan import ScannedFile, scan
from ptxdist.cache.split import FOLDS, Leakage, assign_folds, measure_leakage
from ptxdist.dicom.radiograph import Header, hash_text
from ptxdist.errors import CatalogError, LabelError, SettingsError, StoreError
from ptxdist.executor import Executor, serial
from ptxdist.labels import rle
from ptxdist.labels.dialect import SIIM, Dialect, detect_dialect, parse_dialect, to_siim
from ptxdist.labels.tables import MaskFolder, line_of, read_labels, read_mask_folder, read_patients

SCHEMA = 2
FILE_NAME = "catalog.jsonl"
_MAX_REMOVED_SHARE = 0.25  # with more rows of removed cases, all cases are put in order anew


@dataclass(frozen=True)
class Case:
    """One image: its file, what the table says of it, and the side of the split it is on.

    `digest` is a hash of the file's bytes, `group` a salted one that joins the images of one patient. `masks` are the
    run-length texts of the table, () for a negative case and None for an unlabelled one; `area_px` is the area of their
    union. `split` is train, val, unlabelled, rejected (its pixels could not be read), or removed (its file or row is
    gone; its row of the stores is zeros).
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
    """One file that cannot be used, and why; `path` is "" in what is read from a cache, which keeps no paths."""

    path: str
    reason: str


@dataclass(frozen=True)
class Reconciliation:
    """How the label table and the files fit together; all numbers are counts."""

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


@dataclass(frozen=True)
class Catalog:
    """Labelled cases in the order of their rows in the stores, then the unlabelled ones; and how all fit together.

    `missing` are table ids without a file, `dialect` says how masks are written in the table, `seed` and `folds` made
    the split. `dialect_proven` says whether any other dialect was ruled out by the masks themselves, `evidence` how.
    `paths` has the file of each case below the scanned folder; it is not kept in a cache.
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
    paths: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def labelled(self) -> tuple[Case, ...]:
        """The rows of the stores: cases with a row in the table, and the places of removed ones."""
        return tuple(case for case in self.cases if case.masks is not None)

    def summary(self) -> dict[str, Any]:
        """Reconciliation, split, leakage and rejects as plain JSON values."""
        return {
            "dialect": {"name": self.dialect, "proven": self.dialect_proven, "evidence": list(self.evidence)},
            "reconciliation": asdict(self.reconciliation),
            "split": self.sides(),
            "leakage": asdict(self.leakage),
            "rejects": [asdict(reject) for reject in self.rejects],
        }

    def sides(self) -> dict[str, dict[str, int]]:
        """Numbers of cases and of positive ones on each side of the split."""
        return {
            side: {
                "cases": sum(case.split == side for case in self.cases),
                "positive": sum(case.split == side and bool(case.masks) for case in self.cases),
            }
            for side in ("train", "val", "unlabelled", "rejected", "removed")
        }


def build_catalog(
    images: Path,
    labels: Path,
    *,
    patients: Path | None = None,
    former: Catalog | None = None,
    folds: int = FOLDS,
    seed: int = 0,
    salt: bytes = b"",
    dialect: str | None = None,
    skip: Collection[Path] = (),
    executor: Executor = serial,
    on_file: Callable[[int, int], None] = lambda done, total: None,
) -> Catalog:
    """Read the headers below `images`, join them with the tables, and split; `on_file` hears (files done, files).

    Without a `former` catalog the result depends on the content of the files only, not on their order; with one, cases
    keep their rows and folds. `labels` is a table or a folder of mask images; a table's `dialect` is found out and
    proven, unless it is given. `skip` are folders to pass over.
    Raises CatalogError when no usable file is found, LabelError as `read_labels`, `read_patients`, `detect_dialect`,
    and for a mask that does not fit its image.
    """
    written_as = parse_dialect(dialect) if dialect else None
    if written_as and labels.is_dir():
        raise SettingsError(f"{labels} holds mask images, which have no dialect; leave out --dialect {dialect}")
    folder = read_mask_folder(labels, executor) if labels.is_dir() else None
    table = folder.masks if folder else read_labels(labels)
    patient_of = read_patients(patients) if patients else {}
    scanned, others = scan(images, salt=salt, skip=(*skip, labels), executor=executor, on_file=on_file)
    headers: dict[str, tuple[Header, ScannedFile]] = {}
    paths: dict[str, str] = {}
    rejects: list[Reject] = []
    duplicates = 0
    for found in scanned:
        header = found.header
        if header is None:
            rejects.append(Reject(found.path, found.reason))
            continue
        twin = headers.get(header.case_id)
        if twin is None:
            headers[header.case_id] = header, found
            paths[header.case_id] = found.path
        elif twin[1].digest == found.digest:
            duplicates += 1
        else:
            # No path in a reason: reasons are kept in the cache, and folders may be named after patients.
            rejects.append(Reject(found.path, f"has another content than the file used for its id {header.case_id}"))
    if not headers:
        raise CatalogError(f"{images}: none of {len(scanned)} files is usable; the first one {rejects[0].reason}")
    if not headers.keys() & table.keys():
        raise CatalogError(
            f"none of the {len(headers)} images in {images} has a row in {labels}: do both belong to the same data set?"
        )
    if patients and not headers.keys() & patient_of.keys():
        raise LabelError(f"{patients}: none of the {len(headers)} images in it; its first column must be the image id")
    sizes = {case_id: (header.rows, header.columns) for case_id, (header, _) in headers.items()}
    if folder:
        _refuse_other_sizes(labels, folder, sizes)
        written_as, proven = SIIM, True  # as `read_mask_folder` has written them
        evidence: tuple[str, ...] = (f"{len(table):,} mask images have the size of their radiographs",)
    else:
        detection = detect_dialect(
            table, sizes, written_as, lambda case_id, text: f"{labels}, line {line_of(labels, case_id, text)}"
        )
        written_as, evidence = detection.dialect, detection.evidence
        proven = detection.starts_proven and detection.order_proven
    cases = {name: _join(header, found, table.get(name), written_as) for name, (header, found) in headers.items()}
    grouped, grouped_by = _group([cases[case_id] for case_id in sorted(cases)], patient_of, salt)
    # A map makes another split; one more image of a known PatientID only joins two cases.
    same_rule = former is not None and (former.seed, former.folds, former.leakage.grouped_by == "patient map") == (
        seed, folds, bool(patient_of)
    )  # fmt: skip
    before = {case.case_id: case.fold for case in former.cases if case.fold >= 0} if former and same_rule else {}
    split = _split(grouped, folds, seed, before)
    rows = _arrange([case for case in split if case.masks is not None], former)
    missing = tuple(case_id for case_id in table if case_id not in cases)
    return Catalog(
        cases=(*rows, *(case for case in split if case.masks is None)),
        reconciliation=_reconcile(table, written_as, split, len(scanned), others, duplicates, len(missing)),
        leakage=leakage_of(split, grouped_by),
        rejects=tuple(rejects),
        missing=missing,
        dialect="mask images" if folder else written_as.name,
        dialect_proven=proven,
        evidence=evidence,
        seed=seed,
        folds=folds,
        paths=paths,
    )


def _refuse_other_sizes(labels: Path, folder: MaskFolder, sizes: Mapping[str, tuple[int, int]]) -> None:
    for case_id, size in folder.sizes.items():
        if case_id in sizes and sizes[case_id] != size:
            mask, image = (f"{columns}x{rows} px" for rows, columns in (size, sizes[case_id]))
            raise LabelError(f"{labels}: the mask of {case_id} has {mask}, its image {image}; they must be of one size")


def _join(header: Header, found: ScannedFile, texts: tuple[str, ...] | None, dialect: Dialect) -> Case:
    masks = None if texts is None else tuple(to_siim(text, dialect, header.rows, header.columns) for text in texts)
    return Case(
        case_id=header.case_id,
        digest=found.digest,
        decoder=header.decoder,
        rows=header.rows,
        columns=header.columns,
        group=header.patient,
        masks=masks,
        area_px=rle.area_px(masks or (), header.rows, header.columns),
        view=header.view,
        sex=header.sex,
        age=header.age,
    )


def _group(cases: list[Case], patient_of: Mapping[str, str], salt: bytes) -> tuple[list[Case], str]:
    """Cases with their final group: the map's patient, else the PatientID, else the case itself."""
    if patient_of:
        names = [
            f"patient {patient_of[case.case_id]}" if case.case_id in patient_of else case.case_id for case in cases
        ]
        return [replace(case, group=hash_text(name, salt)) for case, name in zip(cases, names, strict=True)], (
            "patient map"
        )
    cases = [case if case.group else replace(case, group=hash_text(case.case_id, salt)) for case in cases]
    groups = len({case.group for case in cases})
    return cases, "PatientID" if groups < len(cases) else "nothing"


def _split(cases: list[Case], folds: int, seed: int, known: Mapping[str, int]) -> list[Case]:
    """Cases with fold and split: fold 0 validates."""
    labelled = [case for case in cases if case.masks is not None]
    groups, areas = [case.group for case in labelled], [case.area_px for case in labelled]
    found = assign_folds([case.case_id for case in labelled], groups, areas, folds=folds, seed=seed, known=known)
    fold_of = {case.case_id: fold for case, fold in zip(labelled, found, strict=True)}
    return [
        replace(case, fold=fold_of[case.case_id], split="train" if fold_of[case.case_id] else "val")
        if case.case_id in fold_of
        else case
        for case in cases
    ]


def leakage_of(cases: Iterable[Case], grouped_by: str) -> Leakage:
    """What the split of these cases leaks; cases on neither side do not count, nor does the order of the cases."""
    sides = sorted((case for case in cases if case.split in ("train", "val")), key=lambda case: case.case_id)
    groups, positive = [case.group for case in sides], [bool(case.masks) for case in sides]
    return measure_leakage(groups, positive, [case.split == "val" for case in sides], grouped_by)


def hold_out(catalog: Catalog, fold: int, pairs: Iterable[tuple[str, str]]) -> Catalog:
    """The catalog as a run sees it that holds out another fold: sides, and what that split leaks.

    `pairs` are the ids of near-duplicates.
    """
    side = {case.case_id: "val" if case.fold == fold else "train" for case in catalog.cases if case.fold >= 0}
    cases = tuple(replace(case, split=side.get(case.case_id, case.split)) for case in catalog.cases)
    shared = sum({side.get(a), side.get(b)} == {"train", "val"} for a, b in pairs)
    leakage = leakage_of(cases, catalog.leakage.grouped_by)
    former = catalog.leakage.near_duplicates
    return replace(
        catalog, cases=cases, leakage=replace(leakage, near_duplicates=former, near_duplicates_shared=shared)
    )


def _arrange(cases: Sequence[Case], former: Catalog | None) -> list[Case]:
    """Labelled cases in the order of their rows: as in the former catalog, new ones in free rows or at the end."""
    left = {case.case_id: case for case in cases}
    rows = [left.pop(case.case_id, REMOVED) for case in former.labelled] if former else []
    new = iter(left.values())
    rows = [next(new, REMOVED) if case is REMOVED else case for case in rows]
    rows += new
    while rows and rows[-1] is REMOVED:
        rows.pop()
    return list(cases) if rows.count(REMOVED) > _MAX_REMOVED_SHARE * len(rows) else rows


def _reconcile(
    table: Mapping[str, tuple[str, ...]],
    dialect: Dialect,
    cases: Sequence[Case],
    files: int,
    other_files: int,
    duplicates: int,
    missing: int,
) -> Reconciliation:
    several = [masks for masks in table.values() if len(masks) > 1]
    return Reconciliation(
        table_rows=sum(max(1, len(masks)) for masks in table.values()),
        table_images=len(table),
        table_positive=sum(bool(masks) for masks in table.values()),
        table_several_masks=len(several),
        table_overlapping=sum(rle.overlap(masks, dialect.starts) for masks in several),
        files=files,
        other_files=other_files,
        duplicates=duplicates,
        labelled=sum(case.masks is not None for case in cases),
        positive=sum(bool(case.masks) for case in cases),
        unlabelled=sum(case.masks is None for case in cases),
        ids_without_file=missing,
    )


def write_catalog(catalog: Catalog, path: Path) -> None:
    """Write catalog.jsonl atomically, without paths."""
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
    }
    lines = (json.dumps(record) + "\n" for record in (head, *map(vars, catalog.cases)))
    files.write_whole(path, "".join(lines), error=None)


def read_catalog(cache: Path) -> Catalog:
    """Catalog of a cache; StoreError when there is none, or one of another ptxdist."""
    path = cache / FILE_NAME
    if not path.is_file():
        raise StoreError(f"{cache} is not a ptxdist cache (no {FILE_NAME}); make one with `ptxdist preprocess`")
    try:
        with open(path, encoding="utf-8") as file:
            head = json.loads(file.readline())
            if head["schema"] != SCHEMA:
                advice = "update ptxdist" if head["schema"] > SCHEMA else "run `ptxdist preprocess` again"
                raise StoreError(f"{path} has schema {head['schema']}, this ptxdist reads {SCHEMA}: {advice}")
            cases, counts = tuple(_cases(map(json.loads, file))), Reconciliation(**head["reconciliation"])
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
            )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(f"{path} is damaged ({error}); run `ptxdist preprocess` again") from error


def _cases(records: Iterable[dict[str, Any]]) -> Iterator[Case]:
    for record in records:
        masks = record.pop("masks")
        yield REMOVED if record["split"] == "removed" else Case(**record, masks=None if masks is None else tuple(masks))
