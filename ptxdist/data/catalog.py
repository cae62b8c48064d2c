"""DICOM tree + label table (+ patient map) -> Catalog: which cases there are, what is known of them, who learns what.

Owns: the search for DICOM files, their join with the tables, and the file `catalog.jsonl` of a cache (its first line
describes the catalog, each further line is one case, so that it stays readable at any size).
Refuses: folders without a usable DICOM file, masks that do not fit their image.
Called by: `preprocess` (builds), `learn` and `cli` (read). Files without a row are unlabelled, never negative.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ptxdist.data import rle
from ptxdist.data.dicom import Header, read_bytes, read_header
from ptxdist.data.labels import line_of, read_labels, read_patients
from ptxdist.data.split import Leakage, assign_folds, measure_leakage
from ptxdist.errors import CatalogError, DicomError, LabelError, StoreError

SCHEMA = 1
FILE_NAME = "catalog.jsonl"


@dataclass(frozen=True)
class Case:
    """One image: its file, what the table says of it, and the side of the split it is on.

    `masks` are the run-length texts of the table, () for a negative case and None for an unlabelled one; `area_px` is
    the area of their union; `group` joins the images of one patient (a salted hash, or the case itself);
    `split` is train, val, unlabelled, or rejected (its pixels could not be read).
    """

    case_id: str
    path: str
    digest: str
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


@dataclass(frozen=True)
class Reject:
    """One file that cannot be used, and why."""

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
    """Cases in the order of their ids, with the split; `missing` are table ids without a file."""

    cases: tuple[Case, ...]
    reconciliation: Reconciliation
    leakage: Leakage
    rejects: tuple[Reject, ...]
    missing: tuple[str, ...]

    @property
    def labelled(self) -> tuple[Case, ...]:
        """The cases that go into the stores."""
        return tuple(case for case in self.cases if case.masks is not None)

    def summary(self) -> dict[str, Any]:
        """Reconciliation, split, leakage and rejects as plain JSON values."""
        return {
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
            for side in ("train", "val", "unlabelled", "rejected")
        }


def find_files(root: Path) -> tuple[list[Path], int]:
    """DICOM candidates below a folder, sorted, and the number of other files; links to folders are not followed.

    A candidate ends in .dcm, .dicom or .ima, or has no suffix (a UID's last number is none).
    """
    if not root.is_dir():
        raise CatalogError(f"{root}: no such folder; give the folder that holds the DICOM files")
    found, others = [], 0

    def unreadable(error: OSError) -> None:  # left to itself, os.walk passes over what it may not read
        raise CatalogError(f"{error.filename}: this folder cannot be read: {error.strerror}") from error

    for folder, _, names in os.walk(root, onerror=unreadable):
        for name in names:
            suffix = Path(name).suffix.lower()
            if name.startswith(".") or not (suffix in ("", ".dcm", ".dicom", ".ima") or suffix[1:].isdigit()):
                others += 1
            else:
                found.append(Path(folder) / name)
    return sorted(found), others


def build_catalog(
    dicom: Path,
    labels: Path,
    *,
    patients: Path | None = None,
    seed: int = 0,
    salt: bytes = b"",
    on_file: Callable[[int, int], None] = lambda done, total: None,
) -> Catalog:
    """Read every header below `dicom`, join it with the tables, and split; `on_file` hears (files done, files).

    The result depends on the content of the files only, not on their order. Raises CatalogError when no usable DICOM
    file is found, LabelError as `read_labels`, `read_patients`, and for a mask that does not fit its image.
    """
    table = read_labels(labels)
    patient_of = read_patients(patients) if patients else {}
    files, other_files = find_files(dicom)
    if not files:
        raise CatalogError(f"{dicom}: no DICOM files (*.dcm) in it or below it ({other_files} other files)")
    cases: dict[str, Case] = {}
    rejects: list[Reject] = []
    duplicates = 0
    for number, path in enumerate(files, start=1):
        name = path.relative_to(dicom).as_posix()
        try:
            content = read_bytes(path)
            header = read_header(content, salt)
        except DicomError as error:
            rejects.append(Reject(name, str(error)))
        else:
            digest = hashlib.sha256(content).hexdigest()[:32]
            known = cases.get(header.case_id)
            if known is None:
                cases[header.case_id] = _join(header, name, digest, table, labels)
            elif known.digest == digest:
                duplicates += 1
            else:
                rejects.append(Reject(name, f"has the SOPInstanceUID of {known.path}, with another content"))
        on_file(number, len(files))
    if not cases:
        raise CatalogError(f"{dicom}: none of {len(files)} files is usable; the first one {rejects[0].reason}")
    if not any(case.masks is not None for case in cases.values()):
        raise CatalogError(
            f"none of the {len(cases)} images in {dicom} has a row in {labels}: do both belong to the same data set?"
        )
    if patients and not any(case_id in patient_of for case_id in cases):
        raise LabelError(f"{patients}: none of the {len(cases)} images in it; its first column must be the image id")
    ordered, grouped_by = _group([cases[case_id] for case_id in sorted(cases)], patient_of, salt)
    ordered, leakage = _split(ordered, grouped_by, seed)
    missing = tuple(case_id for case_id in table if case_id not in cases)
    return Catalog(
        cases=tuple(ordered),
        reconciliation=_reconcile(table, ordered, len(files), other_files, duplicates, len(missing)),
        leakage=leakage,
        rejects=tuple(rejects),
        missing=missing,
    )


def _join(header: Header, name: str, digest: str, table: Mapping[str, tuple[str, ...]], labels: Path) -> Case:
    masks = table.get(header.case_id)
    for text in masks or ():
        try:
            rle.area_px([text], header.rows, header.columns)
        except LabelError as error:
            where = f"{labels}, line {line_of(labels, header.case_id, text)}"
            raise LabelError(f"{where}: the mask of {header.case_id} does not fit its image: {error}") from None
    return Case(
        case_id=header.case_id,
        path=name,
        digest=digest,
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

    def hashed(text: str) -> str:
        return hashlib.blake2b(text.encode(), key=salt[:64], digest_size=8).hexdigest()

    if patient_of:
        names = [
            f"patient {patient_of[case.case_id]}" if case.case_id in patient_of else case.case_id for case in cases
        ]
        return [replace(case, group=hashed(name)) for case, name in zip(cases, names, strict=True)], "patient map"
    cases = [case if case.group else replace(case, group=hashed(case.case_id)) for case in cases]
    groups = len({case.group for case in cases})
    return cases, "PatientID" if groups < len(cases) else "nothing"


def _split(cases: list[Case], grouped_by: str, seed: int) -> tuple[list[Case], Leakage]:
    """Cases with fold and split (fold 0 validates), and the leakage of that split."""
    labelled = [case for case in cases if case.masks is not None]
    groups = [case.group for case in labelled]
    folds = assign_folds([case.case_id for case in labelled], groups, [case.area_px for case in labelled], seed=seed)
    fold_of = {case.case_id: fold for case, fold in zip(labelled, folds, strict=True)}
    leakage = measure_leakage(
        groups, [bool(case.masks) for case in labelled], [fold == 0 for fold in folds], grouped_by
    )
    return [
        replace(case, fold=fold_of[case.case_id], split="train" if fold_of[case.case_id] else "val")
        if case.case_id in fold_of
        else case
        for case in cases
    ], leakage


def _reconcile(
    table: Mapping[str, tuple[str, ...]],
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
        table_overlapping=sum(map(rle.overlap, several)),
        files=files,
        other_files=other_files,
        duplicates=duplicates,
        labelled=sum(case.masks is not None for case in cases),
        positive=sum(bool(case.masks) for case in cases),
        unlabelled=sum(case.masks is None for case in cases),
        ids_without_file=missing,
    )


def write_catalog(catalog: Catalog, path: Path) -> None:
    """Write the file in one step: it is there whole, or the former one stays."""
    head = {
        "schema": SCHEMA,
        "reconciliation": asdict(catalog.reconciliation),
        "leakage": asdict(catalog.leakage),
        "rejects": [asdict(reject) for reject in catalog.rejects],
        "missing": list(catalog.missing),
    }
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for record in (head, *(asdict(case) for case in catalog.cases)):
            file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_catalog(cache: Path) -> Catalog:
    """Catalog of a cache; StoreError when there is none, or one of a newer ptxdist."""
    path = cache / FILE_NAME
    if not path.is_file():
        raise StoreError(f"{cache} is not a ptxdist cache (no {FILE_NAME}); make one with `ptxdist preprocess`")
    try:
        with open(path, encoding="utf-8") as file:
            head = json.loads(file.readline())
            if head.get("schema") != SCHEMA:
                raise StoreError(f"{path} has schema {head.get('schema')}, this ptxdist reads {SCHEMA}: update it")
            cases, counts = tuple(_cases(map(json.loads, file))), Reconciliation(**head["reconciliation"])
            if len(cases) != counts.labelled + counts.unlabelled:
                raise ValueError(f"{len(cases)} cases instead of {counts.labelled + counts.unlabelled}")
            return Catalog(
                cases=cases,
                reconciliation=counts,
                leakage=Leakage(**head["leakage"]),
                rejects=tuple(Reject(**reject) for reject in head["rejects"]),
                missing=tuple(head["missing"]),
            )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(f"{path} is damaged ({error}); run `ptxdist preprocess` again") from error


def _cases(records: Iterable[dict[str, Any]]) -> Iterator[Case]:
    for record in records:
        masks = record.pop("masks")
        yield Case(**record, masks=None if masks is None else tuple(masks))
