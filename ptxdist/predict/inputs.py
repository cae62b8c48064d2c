"""The files to predict: given as files, folders and zip files, listed with their image ids before prediction.

Owns: the list of inputs, and reading from zip files. Refuses: paths that do not exist or hold no image (CatalogError).
A single file that cannot be used gets a reason instead.

Nothing is unpacked to disk, so no name in a zip file is ever used as a path. A member is inflated in memory, up to the
size that a radiograph may have. Zip files inside zip files are skipped.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from ptxdist.archives import Archive, ArchiveError
from ptxdist.cache.scan import choose_images, digest_of, find_files, no_images
from ptxdist.dicom.guard import guarded
from ptxdist.dicom.kind import START_BYTES, kind_of
from ptxdist.dicom.radiograph import read_bytes, read_header, read_start
from ptxdist.dicom.tags import MAX_INFLATED
from ptxdist.errors import CatalogError, DicomError, raise_limit

_ENCRYPTED = 0x1


@dataclass(frozen=True)
class Input:
    """A file, or with a `member` a file inside the zip file at `path`.

    `number` is the member's place in the zip file, where several may have one name.
    """

    path: str
    member: str = ""
    number: int = 0

    @property
    def shown(self) -> str:
        """Its name in rejects.csv."""
        return f"{self.path}:{self.member}" if self.member else self.path

    @property
    def name(self) -> str:
        """The file's own name."""
        return PurePosixPath(self.member or Path(self.path).name).name

    def start(self) -> bytes:
        """The first bytes, as many as `kind_of` needs; b"" when they cannot be read."""
        if not self.member:
            return read_start(Path(self.path), START_BYTES) or b""
        with suppress(DicomError):
            return _read_member(self.path, self.number, START_BYTES)
        return b""

    def read(self) -> bytes:
        """The content; DicomError when it cannot be read or is too large."""
        return _read_member(self.path, self.number) if self.member else read_bytes(Path(self.path))


@dataclass(frozen=True)
class FoundInput:
    """An input with the hash of its bytes and its image id, or with the reason why it is rejected."""

    source: Input
    digest: str = ""
    case_id: str = ""
    reason: str = ""


def find_inputs(paths: Sequence[Path], skip: Sequence[Path] = ()) -> list[Input]:
    """Inputs in the order of the paths, sorted inside a folder or a zip file; `skip` are folders to skip.

    A file that is named is used whatever its name; in folders and zip files `scan.choose_images` decides, and DICOM
    files without an image, such as reports, are left out. Raises CatalogError when a path does not exist, or holds no
    image.
    """
    found: list[Input] = []
    for path in paths:
        if path.is_dir():
            names, others = find_files(path, skip)
            inputs = [Input(str(path / name)) for name in names]
        elif path.is_file() and zipfile.is_zipfile(path):
            inputs, others = _images_in_zip(path)
        elif path.exists():
            inputs, others = [Input(str(path))], None
        else:
            raise CatalogError(f"nothing at {path}: give DICOM files, folders or zip files")
        if others is not None:
            images = [item for item in inputs if kind_of(item.start()) != "object"]
            inputs, others = images, others + len(inputs) - len(images)
        if not inputs:
            below = [name for *_, files in os.walk(path) for name in files]  # none below a zip file
            held = below if path.is_dir() else _open(str(path)).namelist()
            raise CatalogError(no_images(path, held))
        found += inputs
    return found


def read_headers(inputs: Sequence[Input]) -> list[FoundInput]:
    """Read the headers of some inputs."""
    found = []
    for source in inputs:
        try:
            with guarded():
                content = source.read()
                case_id = read_header(content, b"", source.name).case_id
                found.append(FoundInput(source, digest_of(content), case_id))
        except DicomError as error:
            found.append(FoundInput(source, reason=str(error)))
    return found


def reject_repeated(found: Sequence[FoundInput]) -> tuple[list[FoundInput], list[FoundInput]]:
    """The inputs to predict, each image id once, and those rejected.

    A file with the bytes of an earlier one is left out. One with the id of an earlier file but other bytes is
    rejected: an id has one result.
    """
    first: dict[str, str] = {}
    kept, rejected = [], []
    for item in found:
        if item.reason:
            rejected.append(item)
        elif item.case_id not in first:
            first[item.case_id] = item.digest
            kept.append(item)
        elif first[item.case_id] != item.digest:
            rejected.append(FoundInput(item.source, reason="has the image id of another file with different content"))
    return kept, rejected


@lru_cache(maxsize=4)
def _open(path: str) -> Archive:
    # Kept open, so that its directory is read once. Several threads may read members.
    return Archive(Path(path))


def _images_in_zip(path: Path) -> tuple[list[Input], int]:
    """The image files of a zip file, sorted by name, and the number of others."""
    _open.cache_clear()  # the file may have changed
    members: dict[str, list[int]] = {}
    try:
        for number, item in enumerate(_open(str(path)).infolist()):
            if not item.is_dir() and "__MACOSX" not in item.filename:
                members.setdefault(item.filename, []).append(number)
    except ArchiveError as error:
        raise CatalogError(f"{path}: this zip file {error}") from None
    except Exception as error:  # zipfile raises almost anything for a damaged directory
        raise_limit(error)
        raise CatalogError(f"{path}: this zip file cannot be read ({type(error).__name__})") from error

    def start_of(name: str) -> bytes | None:
        number = members[name][0]
        with suppress(DicomError):
            return _read_member(str(path), number, START_BYTES)
        return None if _open(str(path)).infolist()[number].file_size else b""

    names, _ = choose_images(members, start_of)
    inputs = [Input(str(path), name, number) for name in names for number in members[name]]
    return inputs, sum(map(len, members.values())) - len(inputs)


def _read_member(path: str, number: int, size: int = MAX_INFLATED + 1) -> bytes:
    """The first `size` bytes of a member."""
    try:
        info = _open(path).infolist()[number]
        if info.flag_bits & _ENCRYPTED:
            raise DicomError("is encrypted in its zip file; unpack it first")
        if info.file_size > MAX_INFLATED:
            raise DicomError(f"has {info.file_size:,} bytes unpacked, more than the {MAX_INFLATED:,} accepted")
        with _open(path).unpacked(info) as file:
            content = file.read(size)  # zipfile stops at the declared size and checks the checksum
    except NotImplementedError as error:
        raise DicomError("is compressed in its zip file by a method that is not supported; unpack it first") from error
    except DicomError:
        raise
    except Exception as error:  # zipfile and its decompressors raise almost anything
        raise_limit(error)
        raise DicomError("is damaged in its zip file, or was changed meanwhile") from error
    if not content:
        raise DicomError("is empty (0 bytes)")
    return content
