"""A folder of image files -> their headers, read in parallel.

Owns: which names are image files. Refuses: folders without a candidate, or that cannot be read (CatalogError).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptxdist.dicom.radiograph import Header, read_bytes, read_header
from ptxdist.errors import CatalogError, DicomError
from ptxdist.executor import Executor, serial

DICOM_SUFFIXES = ("", ".dcm", ".dicom", ".ima")
_FILES_A_TASK = 64


@dataclass(frozen=True)
class ScannedFile:
    """One candidate: its path below the folder, a hash of its bytes, and its header.

    `header` is None for a file that cannot be used; `reason` says why. The path is written to rejects.csv only, since
    folders may be named after patients.
    """

    path: str
    digest: str
    header: Header | None
    reason: str = ""


def scan(
    root: Path,
    *,
    salt: bytes = b"",
    skip: Collection[Path] = (),
    executor: Executor = serial,
    on_file: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[ScannedFile], int]:
    """Every candidate below `root` in the order of the paths, and the number of other files.

    `skip` are folders to leave out. `on_file` is called with (files done, files). Headers are read on every run: this
    takes a fraction of the time of hashing and shows when a file's decoder has changed. Raises CatalogError when there
    is no candidate.
    """
    names, others = find_files(root, skip)
    if not names:
        raise CatalogError(
            f"{root}: no DICOM files (*.dcm) and no PNG images in it or below it ({others} other files); links "
            "to folders are not followed"
        )
    starts = range(0, len(names), _FILES_A_TASK)
    tasks = [(root, start, names[start : start + _FILES_A_TASK], salt) for start in starts]
    found: dict[int, list[ScannedFile]] = {}
    done = 0
    for start, files in executor(_scan_files, tasks, light=True):
        found[start] = files
        done += len(files)
        on_file(done, len(names))
    return [file for start in starts for file in found[start]], others


def _scan_files(root: Path, start: int, names: Sequence[str], salt: bytes) -> tuple[int, list[ScannedFile]]:
    """A task; `start` is returned with the results, which arrive in any order."""
    files = []
    for name in names:
        digest, header, reason = "", None, ""
        try:
            content = read_bytes(root / name)
            digest = digest_of(content)
            header = read_header(content, salt, name)
        except DicomError as error:
            reason = str(error)
        files.append(ScannedFile(name, digest, header, reason))
    return start, files


def digest_of(content: bytes) -> str:
    """Hash of a file's content: the first half of its sha256, in hex."""
    return hashlib.sha256(content).hexdigest()[:32]


def find_files(root: Path, skip: Collection[Path] = ()) -> tuple[list[str], int]:
    """Paths of the candidates below a folder (see `choose_images`), sorted, and the number of other files.

    Links to folders are not followed, since they may form a cycle; each counts as one of the other files.
    """
    if not root.is_dir():
        raise CatalogError(f"{root}: no such folder; give the folder that holds the DICOM files")
    found: list[str] = []
    others = 0

    def unreadable(error: OSError) -> None:  # os.walk ignores these errors by default
        raise CatalogError(f"{error.filename}: this folder cannot be read: {error.strerror}") from error

    top = os.path.realpath(root)
    skipped = {os.path.realpath(path) for path in skip}
    for folder, below, names in os.walk(top, onerror=unreadable):
        if skipped:
            below[:] = [name for name in below if os.path.join(folder, name) not in skipped]
        others += sum(os.path.islink(os.path.join(folder, name)) for name in below)
        below_top = folder[len(top) :].lstrip(os.sep)
        found += [os.path.join(below_top, name) for name in names]
    images, left = choose_images(found)
    return images, others + left


def choose_images(paths: Collection[str]) -> tuple[list[str], int]:
    """Those of the paths that name image files, sorted, and the number of others.

    An image file ends in .dcm, .dicom or .ima, or has no suffix (the last number of a UID is none). Only where there
    is no such file, PNG files count. Hidden files do not count.
    """
    dicom, png = [], []
    for path in paths:
        name = os.path.basename(path)
        suffix = os.path.splitext(name)[1].lower()
        if name.startswith("."):
            continue
        if suffix in DICOM_SUFFIXES or suffix[1:].isdigit():
            dicom.append(path)
        elif suffix == ".png":
            png.append(path)
    images = sorted(dicom or png)
    return images, len(paths) - len(images)
