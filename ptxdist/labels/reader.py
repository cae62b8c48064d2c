"""Labels of any format -> masks by image id. Owns: which format it is, found out from the content.

    table       `tables`: run-length texts, whose encoding `dialect` detects
    images      `pictures`: PNG, TIFF, GIF, BMP, named by their images
    NIfTI       `nifti`, named by their images
    JSON        `annotations`: COCO, LabelMe
    DICOM SEG   `segments`

A folder is searched with all below it. Of several formats in it, JSON comes first, then DICOM SEG, since the rest may
be the images. A name or a path in a file is never opened.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ptxdist.dicom.kind import START_BYTES
from ptxdist.dicom.radiograph import read_start
from ptxdist.errors import LabelError, SettingsError, system_says
from ptxdist.executor import Executor, in_chunks, serial
from ptxdist.files import require_extra
from ptxdist.finding import known_name
from ptxdist.labels import nifti, pictures, rle
from ptxdist.labels.annotations import kind_of_json, load_json, read_annotations
from ptxdist.labels.evidence import Size
from ptxdist.labels.found import CLASSES, FoundMask, bare_id, short
from ptxdist.labels.names import Names, parse_match, usual_names
from ptxdist.labels.segments import is_segmentation, read_segmentation
from ptxdist.labels.tables import read_labels

TABLE, IMAGES, NIFTI, JSON, SEG = "table", "mask images", "NIfTI masks", "JSON annotations", "DICOM SEG objects"
_READERS: Mapping[str, Callable[[Path, Path], list[FoundMask]]] = {
    IMAGES: pictures.read_picture,
    NIFTI: nifti.read_nifti,
    JSON: read_annotations,
    SEG: read_segmentation,
}
_FILES_A_TASK = 64
_NOISE = 1 / 16  # of the range of values, in images from JPEG
_SIDES = re.compile("left|right")

OnFile = Callable[[int, int], None]


@dataclass(frozen=True)
class Labels:
    """Masks by image id, in the order of the files: run-length texts, () for a negative image.

    `sizes` are the (rows, columns) of the masks, each of which fits only an image of that size; None for a table, whose
    texts are in an encoding yet to be detected. `kind` says in words what the labels were taken for. `skip` are files
    and folders that are no images. The names of this many `folders` above an image are a part of its id.
    """

    masks: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, Size] | None
    kind: str
    skip: Collection[Path] = ()
    folders: int = 0


def read_any(
    path: Path,
    *,
    match: str | None = None,
    dialect: str | None = None,
    option: str = "--dialect",
    finding: str = "",
    executor: Executor = serial,
    on_file: OnFile = lambda done, total: None,
) -> Labels:
    """Read a label table, a file or a folder with masks of any known format.

    `match` says how the name of a mask file gives the image's, see `names.Names`; `dialect` was given with `option`. Of
    several classes that JSON and DICOM SEG name, the one named `finding` is read; an image that JSON marks with others
    only is negative. `on_file` is called with (files done, files) for a folder. Raises LabelError for labels that
    cannot be read, contradict each other, or are of several classes; SettingsError for a `dialect` of anything but a
    table, a `match` of what names its images itself, and a missing extra.
    """
    names = parse_match(match) if match else None
    files = _files_below(path) if path.is_dir() else {_kind_of_file(path): [path]}
    kind = next(iter(files)) if not path.is_dir() else _choose(path, files, names)
    if names and kind not in (IMAGES, NIFTI):
        raise SettingsError(f"{path} holds {_article(kind)}, which names its images; leave out --match {match}")
    if kind == TABLE:
        return Labels(read_labels(path), None, kind, (path,))
    if dialect:
        raise SettingsError(f"{path} holds {kind}, which have no dialect; leave out {option} {dialect}")
    if kind == NIFTI:
        require_extra("nifti", "reading NIfTI files", "nibabel")
    if kind in (IMAGES, NIFTI):
        names = names or usual_names(files[kind])
        ids = _ids(path, files[kind], names)
    else:
        empty = files.get("", ()) if kind == SEG else ()  # an empty file says nothing of its kind
        ids = dict.fromkeys([*files[kind], *(each for each in empty if each.stat().st_size == 0)], "")
    masks = in_chunks(executor, _read_files, list(ids), _FILES_A_TASK, path, kind, on_done=on_file)
    read, left_out = _of_finding(path, kind, masks, finding)
    labels = _join(path, kind, ids, read)
    if left_out:
        labels = replace(labels, kind=f"{labels.kind}, without other classes")
    if names:
        shown = f"{labels.kind} named {names.mask}"
        return replace(labels, kind=shown, skip=_others(files, ids, names), folders=names.folders)
    return replace(labels, skip=(path,)) if kind in (IMAGES, NIFTI) else labels


def _kind_of_file(path: Path) -> str:
    start = read_start(path, START_BYTES)
    if start is None:
        try:
            path.open("rb").close()
        except FileNotFoundError:
            raise LabelError(f"{path}: there is no such file or folder") from None
        except OSError as error:
            raise LabelError(f"{path} cannot be read: {system_says(error)}") from None
        raise LabelError(f"{path} cannot be read")
    if is_segmentation(start):
        return SEG
    if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        return JSON
    return _by_suffix(path.name) or TABLE


def _by_suffix(name: str) -> str:
    lower = name.lower()
    known = {IMAGES: pictures.SUFFIXES, NIFTI: nifti.SUFFIXES, JSON: (".json",)}
    return next((kind for kind, suffixes in known.items() if lower.endswith(suffixes)), "")


def _files_below(folder: Path) -> dict[str, list[Path]]:
    """Files by kind ("" for others), in the order of their paths; nothing hidden counts."""

    def unreadable(error: OSError) -> None:  # by default, os.walk skips folders that it cannot read
        raise LabelError(f"{folder}: a folder in it cannot be read: {error.strerror}") from error

    files = defaultdict[str, list[Path]](list)
    for where, below, names in os.walk(folder, onerror=unreadable):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in names:
            path = Path(where, name)
            if not name.startswith("."):
                kind = _by_suffix(name) or (SEG if is_segmentation(read_start(path, START_BYTES) or b"") else "")
                files[kind].append(path)
    return {kind: sorted(paths) for kind, paths in files.items()}


def _choose(folder: Path, files: Mapping[str, Sequence[Path]], names: Names | None) -> str:
    """Which of the kinds in a folder are the labels."""
    pictured = [kind for kind in (IMAGES, NIFTI) if kind in files]
    if names:
        fitting = [kind for kind in pictured if any(names.id_of(path) for path in files[kind])]
        if not fitting:
            shown = ", ".join(path.name for kind in pictured for path in files[kind][:3]) or "none"
            raise LabelError(f"{folder}: no mask image is named {names.mask}; the first names: {shown}")
        pictured = fitting
    elif any(kind_of_json(load_json(folder, path)) for path in files.get(JSON, ())):
        return JSON
    elif SEG in files:
        return SEG
    elif len(pictured) == 2 and usual_names(files[IMAGES]):
        return IMAGES
    if len(pictured) > 1:
        counts = " and ".join(f"{len(files[kind])} {kind}" for kind in pictured)
        raise LabelError(f"{folder} has {counts}; give a folder with one kind, or --match with a suffix")
    if not pictured:
        count = Counter(path.suffix.lower() or "none" for paths in files.values() for path in paths)
        others = ", ".join(f"{number} with the suffix {suffix}" for suffix, number in count.most_common(3))
        raise LabelError(
            f"{folder} has no mask images (<image id>.png), NIfTI masks, annotations in JSON or DICOM SEG objects in "
            f"it or below it; {f'its files: {others}; give the file of a table' if others else 'it is empty'}"
        )
    return pictured[0]


def _article(kind: str) -> str:
    return f"a {kind}" if kind == TABLE else kind


def _others(files: Mapping[str, Sequence[Path]], ids: Mapping[Path, str], names: Names) -> Collection[Path]:
    """The masks, and files that are neither masks nor images, where both lie in one folder."""
    return [path for paths in files.values() for path in paths if path in ids or not names.is_image(path)]


def _ids(folder: Path, paths: Sequence[Path], names: Names | None) -> dict[Path, str]:
    """Ids of the images of those files that are masks.

    LabelError when an image has two, unless these are a left and a right one in folders named so.
    """
    try:
        found = {path: names.id_of(path) if names else bare_id(path.name) for path in paths}
    except LabelError as error:
        raise LabelError(f"{folder}: a file {error}") from None
    ids = {path: case_id for path, case_id in found.items() if case_id is not None}
    same = defaultdict[str, list[Path]](list)
    for path, case_id in ids.items():
        same[case_id].append(path)
    for case_id, paths in same.items():
        above = [path.parent.name.lower() for path in paths]
        sides = len(paths) == 2 and above[0] != above[1] and len({_SIDES.sub("", name) for name in above}) == 1
        if len(paths) > 1 and not sides:
            raise LabelError(
                f"{folder}: {len(paths)} mask images in it are named {case_id}; an image can have only one. If their "
                f"folders tell them apart, give --match '{f'*/{names.mask}=*/{names.image}' if names else '*/*'}'"
            )
    return ids


def _read_files(paths: Sequence[Path], folder: Path, kind: str) -> list[list[FoundMask]]:
    return [_READERS[kind](folder, path) for path in paths]


def _of_finding(
    folder: Path, kind: str, read: Sequence[Sequence[FoundMask]], finding: str
) -> tuple[Sequence[Sequence[FoundMask]], bool]:
    """The masks of the finding where classes are named, and whether others were left out.

    LabelError when the only class is another known finding; any other name may mean this one.
    """
    classes = {str(mask.inside) for found in read for mask in found} - {""}
    if kind not in (JSON, SEG) or not finding:
        return read, False
    if len(classes) == 1 and (other := known_name(classes.copy().pop())) not in ("", finding):
        raise LabelError(f"{folder}: the masks are of the class {short(other)}; give --finding {short(other)}")
    if len(classes) < 2 or finding not in classes:
        return read, False
    chosen = [[mask for mask in found if kind == JSON or mask.inside in ("", finding)] for found in read]
    return [
        [mask if mask.inside == finding else replace(mask, text=rle.EMPTY, inside="") for mask in found]
        for found in chosen
    ], True


def _join(
    folder: Path,
    kind: str,
    ids: Mapping[Path, str],
    read: Sequence[Sequence[FoundMask]],
) -> Labels:
    """All masks by image id; LabelError when they contradict each other."""
    masks: dict[str, tuple[str, ...]] = {}
    sizes: dict[str, Size] = {}
    owners: dict[str, Path] = {}
    insides: dict[str | float, Path] = {}
    for path, found in zip(ids, read, strict=True):
        for mask in found:
            case_id = mask.case_id or ids[path]
            if owners.get(case_id, path) != path and (mask.case_id or sizes[case_id] != mask.size):
                raise LabelError(
                    f"{folder}: {case_id} has two masks, in {owners[case_id].name} and in {path.name}"
                    + ("; keep one of them" if mask.case_id else ", of different sizes")
                )
            owners[case_id], sizes[case_id] = path, mask.size
            masks[case_id] = (*masks.get(case_id, ()), *((mask.text,) if mask.text != rle.EMPTY else ()))
            if mask.inside:
                insides.setdefault(mask.inside, path)
    if not masks:
        raise LabelError(f"{folder}: the {kind} name no image")
    _refuse_classes(folder, insides)
    if kind == JSON:
        kind = f"{next(mask.tool for found in read for mask in found)} annotations"
    if kind not in (IMAGES, NIFTI) and insides:
        kind += f" of {short(next(iter(insides)))}"
    return Labels(masks, sizes, kind)


def _refuse_classes(folder: Path, insides: Mapping[str | float, Path]) -> None:
    """LabelError when what is inside the masks differs: those may be other classes."""
    shares = {value: path for value, path in insides.items() if isinstance(value, float)}
    texts = [(short(value), path) for value, path in insides.items() if isinstance(value, str)]
    if shares and max(shares) - min(shares) > _NOISE:
        low, high = (f"{shares[end].name} has {end:.0%}" for end in (min(shares), max(shares)))
        raise LabelError(
            f"{folder}: the mask images have different values inside ({low} of the highest value, {high}); {CLASSES}"
        )
    if len(texts) + bool(shares) > 1:
        listed = [f"{path.name} has {value}" for value, path in texts[:5]]
        listed += [f"{next(iter(shares.values())).name} has black and white"] if shares else []
        raise LabelError(
            f"{folder}: the masks are of several classes ({', '.join(listed)}); keep the one to be found, or name it "
            "with --finding where the file names classes"
        )
