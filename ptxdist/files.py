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
import errno
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from ptxdist import locks
from ptxdist.errors import PtxdistError, RunError, SettingsError, raise_limit, remedy, system_says

_LEFTOVER = re.compile(r"\.ptxdist-[0-9a-f]{8}\.tmp$")
_FORMULA = re.compile("'*[-=+@\t\r\uff0d\uff1d\uff0b\uff20]")
_NUMBER = re.compile("-[0-9]+([.][0-9]+)?(e[-+]?[0-9]+)?", re.ASCII)  # -1 is an empty mask
_DRIVE = re.compile("[A-Za-z]:")  # as Windows has it before a name
_TRIES = 20
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
def replacing_folder(
    path: Path, *, over: bool = True, busy: str | None = None, error: Error = RunError
) -> Iterator[Path]:
    """Write a folder at once: the block fills an empty temporary folder, which then replaces `path`.

    A former folder is removed after the new one is complete; without `over`, only an empty one is replaced. With
    `busy`, one process at a time does so: another one gets a BusyError of this text or, if it is "", waits; what a
    killed one has left is removed. Errors as in `replacing`.
    """
    temporary, former = _temporary(path), _temporary(path)
    try:
        with _failures(path, error), ExitStack() as held:
            if busy is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(_alone(path, busy))
                remove_leftovers(path.parent, deep=False, of=path)
            temporary.mkdir(parents=True)
            yield temporary
            _put_in_place(temporary, path, former, over=over)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


@contextmanager
def _alone(path: Path, busy: str) -> Iterator[None]:
    lock = path.with_name(f".{_shortened(path)}.lock")
    with locks.only(lock, busy, error=None):
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()


def _put_in_place(folder: Path, path: Path, former: Path, *, over: bool) -> None:
    """Rename a folder to `path`; with `over`, what is there goes to `former`, and back when that fails."""
    for _ in range(_TRIES):
        try:
            os.replace(folder, path)
            return
        except OSError as failure:
            if not over or failure.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        shutil.rmtree(former, ignore_errors=True)  # of the try before, when another process was faster
        with suppress(FileNotFoundError):
            os.replace(path, former)
    with suppress(OSError):
        os.replace(former, path)
    raise OSError(errno.EBUSY, "other processes replace it all the time")


def write_whole(
    path: Path, content: bytes | str, *, sync: bool = True, mode: int = 0o666, error: Error = RunError
) -> None:
    """Write a file atomically; text as UTF-8, where undecodable bytes of file names become what they were.

    Parameters and errors as in `replacing`.
    """
    data = _encoded(content) if isinstance(content, str) else content
    with replacing(path, sync=sync, mode=mode, error=error) as temporary:
        temporary.write_bytes(data)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def write_json(
    path: Path, content: Mapping[str, Any] | _Model, *, beside: Iterable[str] = (), sync: bool = True
) -> None:
    """Write a mapping or a pydantic model as JSON, indented by two, atomically.

    Its entry `sha256` has the checksums by which `read_json` recognises damage: by their names, those of the files
    `beside` in the same folder, and that of all other entries, by the name of the file.
    """
    plain = dict(content if isinstance(content, Mapping) else content.model_dump(mode="json"))
    plain["sha256"] = sums = {name: sha256(path.parent / name) for name in beside}
    sums[path.name] = content_sum(plain)
    write_whole(path, json.dumps(plain, indent=2, allow_nan=False) + "\n", sync=sync)


def read_json(path: Path, otherwise: str, *beside: str, error: type[PtxdistError] = RunError) -> dict[str, Any]:
    """What `write_json` wrote; the files `beside`, whose checksums it has, are compared too.

    Files of older versions have no `sha256`: what was not recorded is not compared. Raises `error` when one of these
    files is damaged or cannot be read; it ends with what to do: `otherwise`, unless a permission or a disk is wrong.
    """
    try:
        with open(path, "rb", opener=open_at_once) as file:
            content = parse_json(file.read() or b"")
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        sums = content.get("sha256")
        if sums is None:
            return content
        if not isinstance(sums, dict) or sums.pop(path.name, None) != content_sum(content):
            raise ValueError("it has another checksum than when it was written")
        del content["sha256"]
    except OSError as failure:
        raise error(f"{path} cannot be read: {system_says(failure, otherwise)}") from failure
    except (ValueError, RecursionError) as failure:
        raise error(f"{path} is damaged ({failure}); {otherwise}") from failure
    for name in filter(sums.__contains__, beside):
        refuse_damaged(path.parent / name, sums[name], otherwise, error)
    return content


def fingerprint(*parts: object) -> str:
    """16 hex digits over the canonical JSON of the parts (texts, numbers, lists, None)."""
    return sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode())[:16]


def parse_json(text: bytes | str) -> Any:
    """The content of JSON in UTF-8; ValueError when it is malformed, nested too deeply, or has a number like NaN."""
    try:
        return _DECODER.decode(text if isinstance(text, str) else text.decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no number")
    return number


_DECODER = json.JSONDecoder(parse_constant=_finite, parse_float=_finite)


def content_sum(content: Mapping[str, Any]) -> str:
    """sha256 of the content of a JSON file, whatever its order and its blanks."""
    return sha256(json.dumps(content, sort_keys=True).encode())


def damage_of(path: Path, sha256_: object) -> str:
    """What is wrong with a file that must have this sha256, as the rest of a sentence; "" for nothing."""
    try:
        return "" if sha256(path) == sha256_ else "has another checksum than when it was written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        raise_limit(error)
        return f"cannot be read ({error.strerror})"


def refuse_damaged(path: Path, sha256_: object, otherwise: str, error: type[PtxdistError]) -> None:
    """Raise `error`, ending with what to do as in `read_json`, unless a file has this sha256."""
    if found := damage_of(path, sha256_):
        raise error(f"{path} {found}; {remedy(found, otherwise)}")


def write_table(
    path: Path,
    header: Iterable[object],
    rows: Iterable[Iterable[object]],
    *,
    lineterminator: str = "\r\n",
    sync: bool = True,
    error: Error = RunError,
) -> None:
    """Write a CSV file atomically; lines end as in RFC 4180 unless `lineterminator` says otherwise.

    An apostrophe is put before text that a spreadsheet would run as a formula; `read_table` removes it.
    """
    write_whole(path, table_text(header, rows, lineterminator), sync=sync, error=error)


def table_text(header: Iterable[object], rows: Iterable[Iterable[object]], lineterminator: str = "\r\n") -> bytes:
    """The content of a CSV file as `write_table` writes it."""
    text = io.StringIO(newline="")
    harmless = ([_harmless(cell) for cell in row] for row in rows)
    csv.writer(text, lineterminator=lineterminator).writerows([header, *harmless])
    return _encoded(text.getvalue())


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a file of `write_table` by column; ValueError when it is damaged, OSError when it cannot be read."""
    csv.field_size_limit(2**31 - 1)  # a mask may have more than Python's 131,072 characters
    try:
        with open(path, newline="", encoding="utf-8", opener=open_at_once) as file:
            rows = list(csv.DictReader(file, strict=True))
    except csv.Error as error:
        raise ValueError(str(error)) from error
    if any(None in row or None in row.values() for row in rows):
        raise ValueError("a row has too few or too many columns")
    return [{name: _as_it_was(cell) for name, cell in row.items()} for row in rows]


def _harmless(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and is_formula(cell) else cell


def _as_it_was(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and is_formula(cell) else cell


def is_formula(cell: str) -> bool:
    """Whether a spreadsheet would run the text of a cell, or take it for one that has been made harmless."""
    return bool(_FORMULA.match(cell)) and not _NUMBER.fullmatch(cell)


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


def below(folder: Path, name: str, *, error: type[PtxdistError] = RunError) -> Path:
    """The path in `folder` of a name from a file, an archive or a listing, which anybody may have written.

    Such a name is relative and printable, with "/" between its parts. Raises `error` for any other: an absolute or
    Windows-style one, one with "..", and one that leads out of the folder through a link to another folder.
    """
    if not is_relative(name):
        raise error(f"{name!r} is not the name of a file in {folder}: such names are relative, without '..'")
    if not (path := folder / name).parent.resolve().is_relative_to(folder.resolve()):
        raise error(f"{name!r} leads out of {folder} through a link; remove that link")
    return path


def is_relative(name: object) -> bool:
    """Whether a name has the form that `below` accepts."""
    is_plain = isinstance(name, str) and name.isprintable() and "\\" not in name and not _DRIVE.match(name)
    return is_plain and not {"", ".", ".."} & {*str(name).split("/")}


def remove_leftovers(folder: Path, *, deep: bool = True, of: Path | None = None) -> None:
    """Remove temporary files and folders that killed processes have left in `folder`, and with `deep` below it.

    With `of`, only those of this file or folder. To be called only while no other process writes there, that is, while
    holding the folder's lock.
    """
    for parent, folders, names in os.walk(folder):
        for name in filter(_LEFTOVER.search, (*folders, *names)):
            if of is not None and _LEFTOVER.sub("", name) != _shortened(of):
                continue
            path = Path(parent, name)
            if name in folders:
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()
        folders[:] = [name for name in folders if deep and not _LEFTOVER.search(name)]


def open_at_once(path: str, flags: int) -> int:
    """An opener of `open` for what anybody may have put there: nobody waits for the writer of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def sha256(source: Path | bytes) -> str:
    """sha256 in hex of a file's content, or of these bytes; OSError when the file cannot be read."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with open(source, "rb", opener=open_at_once) as file:
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
    return path.with_name(f"{_shortened(path)}.ptxdist-{secrets.token_hex(4)}.tmp")


def _shortened(path: Path) -> str:
    return os.fsdecode(os.fsencode(path.name)[:_MAX_NAME_BYTES])


@contextmanager
def _failures(path: Path, error: Error, verb: str = "written") -> Iterator[None]:
    try:
        yield
    except OSError as failure:
        if error is None:
            raise
        kept = "; what was saved before is kept" if verb == "written" else ""
        raise error(f"{path} cannot be {verb}: {system_says(failure)}{kept}") from failure


def _sync_folder(folder: Path) -> None:
    """Flush the new name to disk, where the file system can do that; the file is in place in any case."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
