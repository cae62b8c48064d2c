"""Image files, label table and patient map -> Catalog, in three steps: read, join, split.

Files without a row in the table are unlabelled, never negative. When a cache is renewed, cases keep their row and their
fold; a new case takes the row of a removed one or goes to the end.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ptxdist.cache.catalog import REMOVED, Case, Catalog, Reconciliation, Reject, leakage_of
from ptxdist.cache.scan import DICOM_SUFFIXES, ScannedFile, scan
from ptxdist.cache.split import FOLDS, Leakage, assign_folds
from ptxdist.dicom.radiograph import Header, hash_text
from ptxdist.errors import CatalogError, LabelError
from ptxdist.executor import Executor, OnCount, serial
from ptxdist.finding import DEFAULT, Limits, load_finding
from ptxdist.labels import rle
from ptxdist.labels.dialect import Dialect, check_mask_files, detect_dialect, parse_dialect, to_siim
from ptxdist.labels.found import stem_of
from ptxdist.labels.names import name_of
from ptxdist.labels.patients import read_patients
from ptxdist.labels.reader import Labels, read_any
from ptxdist.labels.tables import line_of

_SUFFIXES = (*DICOM_SUFFIXES, ".png", ".jpg")
_LOOKED_AT = 100  # masks, for a hint
_MAX_REMOVED_SHARE = 0.25  # with more rows of removed cases, the cases are sorted again


@dataclass(frozen=True)
class _Inputs:
    """What was read: labels, patients and usable files, all by image id.

    `renamed` are ids of labels that are the names of files, by image id. `rejects` are the other files, `duplicates`
    counts copies of usable ones. `files` counts all candidates, and `other_files` what is no candidate.
    """

    labels: Labels
    renamed: Mapping[str, str]
    patient_of: Mapping[str, str]
    usable: Mapping[str, tuple[Header, ScannedFile]]
    rejects: tuple[Reject, ...]
    duplicates: int
    files: int
    other_files: int


@dataclass(frozen=True)
class _Labelled:
    """Cases in the order of their ids, without group and fold, and how their masks were read."""

    cases: list[Case]
    reconciliation: Reconciliation
    dialect: str
    proven: bool
    evidence: tuple[str, ...]


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
    match: str | None = None,
    finding: str = DEFAULT,
    unlisted_negative: bool = False,
    skip: Collection[Path] = (),
    executor: Executor = serial,
    on_file: OnCount = lambda done, total: None,
) -> tuple[Catalog, dict[str, str]]:
    """Build the catalog of the files below `images`; also returns the path of each case's file below that folder.

    Without a `former` catalog the result depends on the content of the files only, not on their order; with one, cases
    keep their rows and folds. `labels` is what `read_any` takes, with `match` for the names of mask files. The mask
    encoding of a table is detected unless `dialect` names it. `finding` is a name or a file for `load_finding`. With
    `unlisted_negative`, files without a label are negative. `skip` are folders to leave out. `on_file` is called with
    (files done, files). Raises CatalogError when no usable file is found or a side of the split is empty, LabelError as
    `read_any`, `read_patients`, `detect_dialect` and `check_mask_files`, and for a mask that does not fit its image.
    """
    shown, limits = load_finding(finding)
    encoding = parse_dialect(dialect) if dialect else None
    found = read_any(labels, match=match, dialect=dialect, finding=shown.name, executor=executor)
    inputs = _read(images, labels, found, patients, salt, skip, executor, on_file)
    labelled = _join(inputs, labels, encoding, limits, unlisted_negative)
    cases, leakage = _split(labelled.cases, inputs.patient_of, former, folds, seed, salt)
    _refuse_empty_side(leakage, sum(case.masks is not None for case in labelled.cases))
    catalog = Catalog(
        cases=cases,
        reconciliation=labelled.reconciliation,
        leakage=leakage,
        rejects=inputs.rejects,
        missing=tuple(case_id for case_id in inputs.labels.masks if case_id not in inputs.usable),
        dialect=labelled.dialect,
        dialect_proven=labelled.proven,
        evidence=labelled.evidence,
        seed=seed,
        folds=folds,
        finding=shown,
        synthetic=all(header.synthetic for header, _ in inputs.usable.values()),
    )
    return catalog, {case_id: file.path for case_id, (_, file) in inputs.usable.items()}


def _read(
    images: Path,
    labels: Path,
    found: Labels,
    patients: Path | None,
    salt: bytes,
    skip: Collection[Path],
    executor: Executor,
    on_file: OnCount,
) -> _Inputs:
    """Read patients and headers; CatalogError or LabelError when they do not belong together."""
    patient_of = read_patients(patients) if patients else {}
    scanned, others = scan(images, salt=salt, skip=(*skip, *found.skip), executor=executor, on_file=on_file)
    usable: dict[str, tuple[Header, ScannedFile]] = {}
    rejects: list[Reject] = []
    duplicates = 0
    for file in scanned:
        if file.header is None:
            rejects.append(Reject(file.path, file.reason))
            continue
        header = file.header
        if found.folders and header.case_id == Path(file.path).stem:  # a PNG
            header = replace(header, case_id=name_of(file.path, found.folders))
        case_id = header.case_id
        _, first = usable.setdefault(case_id, (header, file))
        if first is not file and first.digest == file.digest:
            duplicates += 1
        elif first is not file:  # reasons are kept in the cache, so this one names no path
            rejects.append(Reject(file.path, f"has another content than the file used for its id {case_id}"))
    if not usable:
        raise CatalogError(f"{images}: none of {len(scanned)} files is usable; the first one {rejects[0].reason}")
    found, renamed = _by_image_id(found, usable)
    if not usable.keys() & found.masks.keys():
        stems = {Path(case_id).stem if Path(case_id).suffix.lower() in _SUFFIXES else "" for case_id in found.masks}
        hint = _match_in_words(usable, found.masks) if labels.is_dir() else "do both belong to the same data set?"
        hint = "write ids without .dcm or .png" if stems & usable.keys() else hint
        ours, theirs = (", ".join(sorted(ids)[:3]) for ids in (usable, found.masks))
        raise CatalogError(
            f"none of the {len(usable)} images in {images} has a label in {labels} (ids of images: {ours}; of labels: "
            f"{theirs}): {hint}"
        )
    if patients and not usable.keys() & patient_of.keys():
        raise LabelError(f"{patients}: none of the {len(usable)} images in it; its image ids are others")
    return _Inputs(found, renamed, patient_of, usable, tuple(rejects), duplicates, len(scanned), others)


def _match_in_words(images: Collection[str], masks: Collection[str]) -> str:
    """What to do when no id of a mask is one of an image: a pattern, where an image's is the start of a mask's."""
    for mask in sorted(masks)[:_LOOKED_AT]:
        rest = {mask[len(name) :] for name in images if name and mask.startswith(name)}
        rest = {text for text in rest if not text[0].isalnum()}
        if rest:
            return f"--match '*{min(rest, key=len)}' says how the masks are named"
    return "do both belong to the same data set?"


def _by_image_id(labels: Labels, usable: Mapping[str, tuple[Header, ScannedFile]]) -> tuple[Labels, Mapping[str, str]]:
    """The labels by image id where they name files, as tools do that know no DICOM; also their former ids.

    A name that several files have, or whose image is named by its id too, stays as it is.
    """
    named: dict[str, list[str]] = {}
    for case_id, (_, file) in usable.items():
        if case_id not in labels.masks:
            named.setdefault(stem_of(Path(file.path).name), []).append(case_id)
    unknown = [name for name in labels.masks if name not in usable and len(named.get(name, ())) == 1]
    new = {name: named[name][0] for name in unknown}
    masks = {new.get(name, name): texts for name, texts in labels.masks.items()}
    sizes = labels.sizes and {new.get(name, name): size for name, size in labels.sizes.items()}
    return replace(labels, masks=masks, sizes=sizes), {case_id: name for name, case_id in new.items()}


def _join(
    inputs: _Inputs, labels: Path, encoding: Dialect | None, limits: Limits, unlisted_negative: bool
) -> _Labelled:
    """Join the files with their masks; LabelError for a mask that does not fit its image."""
    masks = inputs.labels.masks
    sizes = {case_id: (header.rows, header.columns) for case_id, (header, _) in inputs.usable.items()}
    if inputs.labels.sizes is not None:
        _refuse_other_sizes(labels, inputs.labels.sizes, sizes)
        found = check_mask_files(masks, sizes, labels, inputs.labels.kind, limits)
        encoding, name, proven = found.dialect, inputs.labels.kind, found.proven
        both = len(masks.keys() & sizes.keys())
        evidence: tuple[str, ...] = (f"{both:,} {name} have the size of their radiographs", *found.evidence)
    else:
        detection = detect_dialect(
            masks,
            sizes,
            encoding,
            lambda case_id, text: f"{labels}, line {line_of(labels, inputs.renamed.get(case_id, case_id), text)}",
            limits=limits,
        )
        encoding, evidence = detection.dialect, detection.evidence
        name, proven = encoding.name, detection.proven
    if unlisted_negative and (count := len(inputs.usable.keys() - masks.keys())):
        masks = {**dict.fromkeys(inputs.usable, ()), **masks}
        evidence = (*evidence, f"{count:,} images without a label are negative, as --unlisted negative says")
    cases = [_case(*inputs.usable[case_id], masks.get(case_id), encoding) for case_id in sorted(inputs.usable)]
    several = [texts for texts in masks.values() if len(texts) > 1]
    reconciliation = Reconciliation(
        table_rows=sum(max(1, len(texts)) for texts in inputs.labels.masks.values()),
        table_images=len(inputs.labels.masks),
        table_positive=sum(bool(texts) for texts in inputs.labels.masks.values()),
        table_several_masks=len(several),
        table_overlapping=sum(rle.overlap(texts, encoding.starts) for texts in several),
        files=inputs.files,
        other_files=inputs.other_files,
        duplicates=inputs.duplicates,
        labelled=sum(case.masks is not None for case in cases),
        positive=sum(bool(case.masks) for case in cases),
        unlabelled=sum(case.masks is None for case in cases),
        ids_without_file=len(masks.keys() - inputs.usable.keys()),
        without_patient=_without_patient(cases, inputs.patient_of),
    )
    return _Labelled(cases, reconciliation, name, proven, evidence)


def _without_patient(cases: Sequence[Case], patient_of: Mapping[str, str]) -> int:
    """Number of labelled images that are not in the map, or, without one, have no PatientID though others do."""
    labelled = [case for case in cases if case.masks is not None]
    known = sum(case.case_id in patient_of if patient_of else bool(case.group) for case in labelled)
    return len(labelled) - known if known else 0


def _refuse_empty_side(leakage: Leakage, labelled: int) -> None:
    """CatalogError when the labelled images cannot be split."""
    if 0 < leakage.val_cases < labelled:
        return
    side = "validation" if leakage.val_cases == 0 else "training"
    if leakage.groups > 1:  # folds of a former split, whose other cases are gone
        raise CatalogError(
            f"no image would be left for {side}; give another number of --folds, which splits all cases again"
        )
    source = f" by {leakage.grouped_by}" if leakage.grouped_by != "nothing" else ""
    raise CatalogError(
        f"{'the only image' if labelled == 1 else f'all {labelled} images'} with a label would be on one side of the "
        f"split, as of one patient{source}, and none would be left for {side}; give the "
        "patients with --patients MAP.csv (columns ImageId and PatientID), or images of at least two"
    )


def _refuse_other_sizes(
    labels: Path, mask_sizes: Mapping[str, tuple[int, int]], sizes: Mapping[str, tuple[int, int]]
) -> None:
    for case_id, size in mask_sizes.items():
        if case_id in sizes and sizes[case_id] != size:
            mask, image = (f"{columns}x{rows}" for rows, columns in (size, sizes[case_id]))
            raise LabelError(
                f"{labels}: the mask of {case_id} has {mask} pixels, its image {image}; they must be of one size"
            )


def _case(header: Header, file: ScannedFile, texts: tuple[str, ...] | None, encoding: Dialect) -> Case:
    masks = None if texts is None else tuple(to_siim(text, encoding, header.rows, header.columns) for text in texts)
    return Case(
        case_id=header.case_id,
        digest=file.digest,
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


def _split(
    cases: list[Case], patient_of: Mapping[str, str], former: Catalog | None, folds: int, seed: int, salt: bytes
) -> tuple[tuple[Case, ...], Leakage]:
    """Group and split the cases and put them in the order of their rows; also returns what the split leaks."""
    groups, grouped_by = _group(cases, patient_of, salt)
    has_map, known = bool(patient_of), {}
    # A map that comes or goes makes another split; one more image of a known PatientID only joins two cases.
    if former and (former.seed, former.folds, former.leakage.grouped_by == "patient map") == (seed, folds, has_map):
        known = {case.case_id: case.fold for case in former.cases if case.fold >= 0}
    labelled = [(case, group) for case, group in zip(cases, groups, strict=True) if case.masks is not None]
    ids, areas = [case.case_id for case, _ in labelled], [case.area_px for case, _ in labelled]
    found = assign_folds(ids, [group for _, group in labelled], areas, folds=folds, seed=seed, known=known)
    fold_of = dict(zip(ids, found, strict=True))
    grouped = [
        replace(case, group=group)
        if (fold := fold_of.get(case.case_id)) is None
        else replace(case, group=group, fold=fold, split="train" if fold else "val")
        for case, group in zip(cases, groups, strict=True)
    ]
    sides = _arrange([case for case in grouped if case.masks is not None], former)
    ordered = (*sides, *(case for case in grouped if case.masks is None))
    if former and former.cases == ordered and former.leakage.grouped_by == grouped_by:
        return ordered, former.leakage
    return ordered, leakage_of(ordered, grouped_by)


def _group(cases: list[Case], patient_of: Mapping[str, str], salt: bytes) -> tuple[list[str], str]:
    """Final group of each case, by the map, else by PatientID, else each its own; and what groups them.

    A PatientID that all cases share is a placeholder, as anonymisation leaves it, and groups nothing.
    """
    if patient_of:
        names = (
            f"patient {patient_of[case.case_id]}" if case.case_id in patient_of else case.case_id for case in cases
        )
        return [hash_text(name, salt) for name in names], "patient map"
    placeholder = len({case.group for case in cases}) == 1
    groups = [case.group if case.group and not placeholder else hash_text(case.case_id, salt) for case in cases]
    return groups, "PatientID" if len(set(groups)) < len(cases) else "nothing"


def _arrange(cases: Sequence[Case], former: Catalog | None) -> list[Case]:
    """Labelled cases in the order of their rows; new ones take the rows of removed ones or go to the end."""
    left = {case.case_id: case for case in cases}
    rows = [left.pop(case.case_id, REMOVED) for case in former.labelled] if former else []
    new = iter(left.values())
    rows = [next(new, REMOVED) if case is REMOVED else case for case in rows]
    rows += new
    while rows and rows[-1] is REMOVED:
        rows.pop()
    return list(cases) if rows.count(REMOVED) > _MAX_REMOVED_SHARE * len(rows) else rows
