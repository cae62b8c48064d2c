"""Writing files so that a crash, a full disk or a second writer never leaves half of one.

Owns: atomic replacement of files and folders, checksums of files, and the sentence about a missing extra.

A file is first written under a temporary name in the same folder, `NAME.ptxdist-1a2b3c4d.tmp`, and then renamed over
the target. Readers see the former file or the new one. The temporary name is random, so two processes that write the
same file at the same time do not disturb each other: both results are whole and the later one stays. A temporary file
is removed when writing fails; only a killed process leaves one. The process that holds the lock of a cache, a run or a
prediction folder removes such leftovers with `remove_leftovers`. Nothing reads them or copies them to an object store,
since they end in `.tmp`.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from ptxdist.errors import PtxdistError, RunError, SettingsError

_LEFTOVER = re.compile(r"\.ptxdist-[0-9a-f]{8}\.tmp$")
_MAX_NAME_BYTES = 230  # of 255; the rest is for what is appended

Error = type[PtxdistError] | None  # class of the error that an OSError becomes; None: the OSError itself is raised


class _Model(Protocol):
    """A pydantic model."""

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


@contextmanager
def replacing(path: Path, *, sync: bool = True, mode: int = 0o666, error: Error = RunError) -> Iterator[Path]:
    """Write a file atomically in several steps: the block fills an empty temporary file, which then replaces `path`.

    The parent folder is created. With `sync`, file and folder are flushed to disk, so that the file survives a power
    failure. `mode` is subject to the umask. An OSError in the block or afterwards becomes `error`; after any exception
    the temporary file is removed and `path` is as before.
    """
    temporary = _temporary(path)
    try:
        with _failures(path, error):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
            permissions = temporary.stat().st_mode
            yield temporary
            if temporary.stat().st_mode != permissions:  # safetensors puts a file there that only its owner can read
                temporary.chmod(permissions)
            if sync:
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if sync:
        _sync_folder(path.parent)


@contextmanager
def replacing_folder(path: Path, *, error: Error = RunError) -> Iterator[Path]:
    """Write a folder at once: the block fills an empty temporary folder, which then replaces `path`.

    A former folder `path` is removed after the new one is complete. Errors as in `replacing`.
    """
    temporary, former = _temporary(path), _temporary(path)
    try:
        with _failures(path, error):
            temporary.mkdir(parents=True)
            yield temporary
            with suppress(FileNotFoundError):
                os.replace(path, former)
            try:
                os.replace(temporary, path)
            except OSError:
                with suppress(OSError):
                    os.replace(former, path)
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def write_whole(
    path: Path, content: bytes | str, *, sync: bool = True, mode: int = 0o666, error: Error = RunError
) -> None:
    """Write a file atomically; text as UTF-8, where undecodable bytes of file names become what they were.

    Parameters and errors as in `replacing`.
    """
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    with replacing(path, sync=sync, mode=mode, error=error) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, content: Mapping[str, Any] | _Model, *, sync: bool = True, error: Error = RunError) -> None:
    """Write a mapping or a pydantic model as JSON, indented by two, atomically."""
    plain = content if isinstance(content, Mapping) else content.model_dump(mode="json")
    write_whole(path, json.dumps(plain, indent=2) + "\n", sync=sync, error=error)


def write_table(
    path: Path,
    header: Iterable[object],
    rows: Iterable[Iterable[object]],
    *,
    lineterminator: str = "\r\n",
    sync: bool = True,
    error: Error = RunError,
) -> None:
    """Write a CSV file atomically; lines end as in RFC 4180 unless `lineterminator` says otherwise."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=lineterminator).writerows([header, *rows])
    write_whole(path, text.getvalue(), sync=sync, error=error)


def copy(source: Path, target: Path, *, sync: bool = True, error: Error = RunError) -> None:
    """Copy the content of a file atomically; the message names the file that could not be read or written."""
    with _failures(source, error, "read"):
        file = open(source, "rb")  # noqa: SIM115  closed below
    with file, replacing(target, sync=sync, error=error) as temporary, open(temporary, "wb") as out:
        shutil.copyfileobj(file, out, 2**20)


def move(source: Path, target: Path) -> None:
    """Rename a finished file or folder within a file system, over a former file; OSError when that fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


def remove_leftovers(folder: Path, *, deep: bool = True) -> None:
    """Remove temporary files and folders that killed processes have left in `folder`, and with `deep` below it.

    To be called only while no other process writes there, that is, while holding the folder's lock.
    """
    for parent, folders, names in os.walk(folder):
        for name in filter(_LEFTOVER.search, (*folders, *names)):
            path = Path(parent, name)
            if name in folders:
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()
        folders[:] = [name for name in folders if deep and not _LEFTOVER.search(name)]


def sha256(source: Path | bytes) -> str:
    """sha256 in hex of a file's content, or of these bytes; OSError when the file cannot be read."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with open(source, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_extra(
    extra: str, what: str, *modules: str, otherwise: str = "", error: type[PtxdistError] = SettingsError
) -> None:
    """Raise `error` when one of these top-level modules, which belong to an extra of ptxdist, is not installed.

    The message starts with `what`, in the singular ("ONNX export"), and ends with the alternative, if there is one.
    """
    if missing := [name for name in modules if not _is_installed(name)]:
        packages = "a package that is" if len(missing) == 1 else "packages that are"
        alternative = f"; {otherwise}" if otherwise else ""
        raise error(
            f"{what} needs {packages} not installed ({', '.join(missing)}): {install_command(extra)}{alternative}"
        )


def install_command(extra: str) -> str:
    """The command that installs an extra of ptxdist, for messages."""
    return f"pip install 'ptxdist[{extra}]'"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # it is imported, and has no spec
        return True


def _temporary(path: Path) -> Path:
    name = os.fsdecode(os.fsencode(path.name)[:_MAX_NAME_BYTES])
    return path.with_name(f"{name}.ptxdist-{secrets.token_hex(4)}.tmp")


@contextmanager
def _failures(path: Path, error: Error, verb: str = "written") -> Iterator[None]:
    try:
        yield
    except OSError as failure:
        if error is None:
            raise
        kept = "; what was saved before is kept" if verb == "written" else ""
        raise error(f"{path} cannot be {verb}: {failure.strerror or failure}{kept}") from failure


def _sync_folder(folder: Path) -> None:
    """Flush the new name to disk, where the file system can do that; the file is in place in any case."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
