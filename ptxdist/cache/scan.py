"""A folder of image files -> their headers, read in parallel; which files count, by their names and first bytes."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptxdist.dicom.guard import guarded
from ptxdist.dicom.kind import START_BYTES, kind_of
from ptxdist.dicom.radiograph import Header, read_bytes, read_header, read_start
from ptxdist.errors import CatalogError, DicomError, system_says
from ptxdist.executor import Executor, OnCount, in_chunks, serial

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_UID = re.compile(r"\d+(\.\d+){3,}")
_HIDDEN = re.compile(r"(?:^|/)\.(?!\.?/)")
_FILES_A_TASK = 64


@dataclass(frozen=True)
class ScannedFile:
    """One candidate: its path below the folder, a hash of its bytes, and its header.

    `header` is None for a file that cannot be used; `reason` says why. `is_image` is False for a DICOM file that is
    none, such as a report. The path is written to rejects.csv only, since folders may be named after patients.
    """

    path: str
    digest: str
    header: Header | None
    reason: str = ""
    is_image: bool = True


def scan(
    root: Path,
    *,
    salt: bytes = b"",
    skip: Collection[Path] = (),
    executor: Executor = serial,
    on_file: OnCount = lambda done, total: None,
) -> tuple[list[ScannedFile], int]:
    """Every candidate below `root` in the order of the paths, and the number of other files.

    `skip` are folders and files to leave out. `on_file` is called with (files done, files). Headers are read on every
    run: this takes a fraction of the time of hashing and shows when a file's decoder has changed. Raises CatalogError
    when there is no candidate.
    """
    names, others = find_files(root, skip)
    found = in_chunks(executor, _scan_files, names, _FILES_A_TASK, root, salt, light=True, on_done=on_file)
    images = [file for file in found if file.is_image]
    others += len(names) - len(images)
    if not images:
        raise CatalogError(
            f"{no_images(root, (name for *_, names in os.walk(root) for name in names))}; links to folders are not "
            "followed"
        )
    return images, others


def no_images(place: Path, names: Iterable[str]) -> str:
    """A sentence about a folder or zip file with other files only: of which kinds, and what to do with JPEG images."""
    kinds = Counter(os.path.splitext(name)[1].lower() or "without a suffix" for name in names)
    shown = ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common(3))
    found = f" ({sum(kinds.values()):,} other files: {shown})" if shown else "; it is empty"
    jpeg = any(kind in (".jpg", ".jpeg") for kind, _ in kinds.most_common(3))
    advice = (
        ". JPEG images are not read: convert them to PNG (ImageMagick: `mogrify -format png *.jpg`)" if jpeg else ""
    )
    return f"{place}: no DICOM files (*.dcm) and no PNG images in it or below it{found}{advice}"


def _scan_files(names: Sequence[str], root: Path, salt: bytes) -> list[ScannedFile]:
    files = []
    for name in names:
        digest, header, reason, content = "", None, "", b""
        try:
            with guarded():
                content = read_bytes(root / name)
                digest = digest_of(content)
                header = read_header(content, salt, name)
        except DicomError as error:
            reason = str(error)
        files.append(ScannedFile(name, digest, header, reason, not reason or kind_of(content) != "object"))
    return files


def digest_of(content: bytes) -> str:
    """Hash of a file's content: the first half of its sha256, in hex."""
    return hashlib.sha256(content).hexdigest()[:32]


def find_files(root: Path, skip: Collection[Path] = ()) -> tuple[list[str], int]:
    """Paths of the candidates below a folder (see `choose_images`), sorted, and the number of other files.

    Links to folders are not followed, since they may form a cycle; each counts as one of the other files.
    """
    if not root.is_dir():
        raise CatalogError(f"{root}: no such folder; give the folder that holds the DICOM files")
    top = os.path.realpath(root)
    skipped = {os.path.realpath(path) for path in skip}
    skipped |= {os.path.join(os.path.realpath(path.parent), path.name) for path in skip if path.is_file()}  # links too
    found: list[str] = []
    folders, others = [""], 0
    while folders:
        below = folders.pop()
        try:
            with os.scandir(os.path.join(top, below)) as entries:
                for entry in entries:
                    path = f"{below}/{entry.name}" if below else entry.name
                    if skipped and entry.path in skipped:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(path)
                    elif entry.is_symlink() and os.path.isdir(entry.path):
                        others += 1
                    else:
                        found.append(path)
        except OSError as error:
            raise CatalogError(f"{root / below}: this folder cannot be read: {system_says(error)}") from error
    images, left = choose_images(found, lambda path: read_start(Path(top, path), START_BYTES))
    return images, others + left


def choose_images(paths: Collection[str], start_of: Callable[[str], bytes | None]) -> tuple[list[str], int]:
    """Those of the paths that are image files, sorted, and the number of others.

    A name that ends in .dcm, .dicom or .ima, or is a UID, is a DICOM file; of other names but PNG, those whose content
    is a DICOM image. Only where no content is, PNG files count. Nothing hidden counts, such as deleted files in
    `.Trash-1000` or copies in `.ipynb_checkpoints`. `start_of` gives the first bytes of a file, or None when it cannot
    be read; such a file without a suffix counts, to be reported.
    """

    def kind(path: str) -> str | None:
        start = start_of(path)
        return None if start is None else kind_of(start)

    dicom, png = [], []
    for path in paths:
        name = os.path.basename(path)
        suffix = os.path.splitext(name)[1].lower()
        if _HIDDEN.search(path):
            continue
        if suffix in DICOM_SUFFIXES or _UID.fullmatch(name):
            dicom.append(path)
        elif suffix == ".png":
            png.append(path)
        elif (found := kind(path)) == "image" or (found is None and not suffix):
            dicom.append(path)
        elif found == "png" and not suffix:
            png.append(path)
    if png and not any(kind(path) == "image" for path in dicom):
        dicom += png
    images = sorted(dicom)
    return images, len(paths) - len(images)
