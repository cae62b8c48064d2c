"""What to predict: files, folders and zip files -> contents with a name, their image ids known beforehand.

Owns: the list of inputs, and reading out of zip files. Refuses: paths that are not there or hold no image
(CatalogError); single files become a reason. Called by: `predict.folder`, in any process.

Nothing is unpacked to disk, so no name in a zip file leads anywhere. A member is inflated in memory, up to the bytes
that a radiograph may have; zip files inside zip files are left alone.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from ptxdist.cache.scan import DICOM_SUFFIXES, digest_of, find_files
from ptxdist.dicom.radiograph import CASE_ID, read_bytes, read_header
from ptxdist.dicom.tags import MAX_INFLATED
from ptxdist.errors import CatalogError, DicomError

_ENCRYPTED = 0x1


@dataclass(frozen=True)
class Input:
    """A file, or with a `member` a file inside the zip file at `path`; `shown` is for rejects.csv alone."""

    path: str
    member: str
    shown: str

    @property
    def name(self) -> str:
        """The file's own name."""
        return PurePosixPath(self.member or Path(self.path).name).name

    def read(self) -> bytes:
        """Its content; DicomError when it cannot be read or is too large."""
        return _read_member(self.path, self.member) if self.member else read_bytes(Path(self.path))


@dataclass(frozen=True)
class FoundInput:
    """An input with the hash of its bytes and its image id, or with the reason for its refusal."""

    source: Input
    digest: str = ""
    case_id: str = ""
    reason: str = ""


def find_inputs(paths: Sequence[Path], skip: Sequence[Path] = ()) -> list[Input]:
    """Inputs in the order of the paths, sorted inside a folder or a zip file; `skip` are folders to pass over.

    A file that is named is taken whatever its suffix; what counts in folders and zip files, `scan.find_files` says.
    Raises CatalogError when a path is not there, or holds no image.
    """
    found: list[Input] = []
    for path in paths:
        if path.is_dir():
            names, others = find_files(path, skip)
            inputs = [Input(str(path / name), "", str(path / name)) for name in names]
        elif path.is_file() and zipfile.is_zipfile(path):
            members = list(_members(path))
            inputs, others = [Input(str(path), name, f"{path}:{name}") for name in members], 0
        elif path.exists():
            inputs, others = [Input(str(path), "", str(path))], 0
        else:
            raise CatalogError(f"nothing at {path}: give DICOM files, folders or zip files")
        if not inputs:
            raise CatalogError(f"{path}: no DICOM files (*.dcm) and no PNG images in it ({others} other files)")
        found += inputs
    return found


def look_at(start: int, inputs: Sequence[Input]) -> tuple[int, list[FoundInput]]:
    """One task: image ids by reading headers; `start` comes back with them."""
    found = []
    for source in inputs:
        try:
            content = source.read()
            case_id = read_header(content, b"", source.name).case_id
            if not CASE_ID.fullmatch(case_id):
                raise DicomError("is a PNG whose name cannot be an image id (letters, digits, '.', '_', '-', up to 64)")
            found.append(FoundInput(source, digest_of(content), case_id))
        except DicomError as error:
            found.append(FoundInput(source, reason=str(error)))
    return start, found


def refuse_repeated(found: Sequence[FoundInput]) -> tuple[list[FoundInput], list[FoundInput]]:
    """The inputs to predict, each image id once, and those refused.

    The same bytes again are passed over in silence. Other bytes under a known id are refused: one id has one result.
    """
    first: dict[str, str] = {}
    kept, refused = [], []
    for item in found:
        if item.reason:
            refused.append(item)
        elif item.case_id not in first:
            first[item.case_id] = item.digest
            kept.append(item)
        elif first[item.case_id] != item.digest:
            refused.append(FoundInput(item.source, reason="has the image id of another file, whose bytes are not its"))
    return kept, refused


@lru_cache(maxsize=4)
def _open(path: str) -> zipfile.ZipFile:
    # Kept open: its directory is read once, and several threads may read members.
    return zipfile.ZipFile(path)


def _members(path: Path) -> Iterator[str]:
    _open.cache_clear()  # it may be another file by now
    try:
        names = sorted({item.filename for item in _open(str(path)).infolist() if not item.is_dir()})
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise CatalogError(f"{path}: this zip file cannot be read: {error}") from error
    shown = [name for name in names if not PurePosixPath(name).name.startswith(".") and "__MACOSX" not in name]
    suffixes = {name: os.path.splitext(name)[1].lower() for name in shown}
    dicom = [name for name in shown if suffixes[name] in DICOM_SUFFIXES or suffixes[name][1:].isdigit()]
    yield from dicom or [name for name in shown if suffixes[name] == ".png"]


def _read_member(path: str, member: str) -> bytes:
    try:
        info = _open(path).getinfo(member)
        if info.flag_bits & _ENCRYPTED:
            raise DicomError("is encrypted inside its zip file; unpack it first")
        if info.file_size > MAX_INFLATED:
            raise DicomError(f"claims {info.file_size:,} bytes unpacked, more than the {MAX_INFLATED:,} accepted")
        with _open(path).open(info) as file:
            content = file.read(MAX_INFLATED + 1)  # zipfile stops at the claimed size and compares the checksum
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
        raise DicomError(f"is damaged inside its zip file ({type(error).__name__})") from error
    if not content:
        raise DicomError("is empty (0 bytes)")
    return content
