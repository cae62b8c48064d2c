"""The errors of ptxdist, with the exit code of each.

    PtxdistError            1   base class; never raised itself
    ├── SettingsError       3   an unknown setting, a wrong value, more workers than the global batch
    ├── LabelError          4   a label table or a patient map that is invalid
    ├── DicomError          5   one file that cannot be used as a radiograph (a row in rejects.csv)
    ├── CatalogError        6   no input found, or too much of it unusable
    ├── StoreError          7   a cache that is missing, incomplete, damaged or lacks a size
    ├── RunError            8   a run folder that does not fit the command or its settings
    ├── CheckpointError     9   a checkpoint or a weights file that cannot be used
    ├── TrainingError      10   training stopped: a worker failed, the loss is not finite, a collapse
    ├── ClusterError       11   a Ray cluster that cannot be reached or used, a job that was rejected
    ├── BusyError          12   another ptxdist process works on the same folder
    ├── StorageError       13   an object store that cannot be reached, rejects a request, or keeps failing
    ├── AddressError       14   an address or a port that cannot be listened on
    └── ExportError        15   an exported network that computes other values than its checkpoint

Owns: the error classes and their exit codes, and how texts from outside are shown in messages. The command line prints
the message of a PtxdistError and ends with its exit code. A message says what was found, what was expected, where, and
what to do. A disk or a permission that another command runs into is one line too, with exit code 1. Any other exception
is a defect of ptxdist and keeps its traceback (exit code 1). Exit code 2 is click's, for a command line that does not
parse; 130 is an interruption from the keyboard.
"""

from __future__ import annotations

import errno
import os
import re

_MOST = 500  # characters of what was found
# Characters that move the cursor, change colours or titles, or reverse the direction of what follows.
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """A text whose control characters, which names of files and cases may contain, are escaped: \\x1b."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def short(text: str, most: int = _MOST) -> str:
    """A text from outside for a message: of a long one the start, the end and the length."""
    return text if len(text) <= most else f"{text[: most - 100]} … {text[-50:]} ({len(text):,} characters)"


def reason(error: BaseException) -> str:
    """What an error of another library says, in one line: the first of its text, else its class."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


_SPACE = "free some space there"
_PERMISSION = "give this user the permission, or use another place"
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: f"{_SPACE}, or ask for a larger quota",
    errno.EROFS: "use another place, or mount that file system for writing",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "close other programs: this machine has too many open files",
    errno.ENOMEM: "close other programs, or use a machine with more memory",
    errno.ESTALE: "mount that network storage again, and rerun the command",
    errno.EIO: "check that disk or network storage, which fails, and rerun the command",
}


def remedy(failure: object, otherwise: str = "") -> str:
    """What to do about a failure of a disk, a permission or a limit; `otherwise` for any other one.

    `failure` is an OSError, or a text from another process that repeats one.
    """
    text = str(failure)
    return next((advice for number, advice in _REMEDIES.items() if os.strerror(number) in text), otherwise)


def system_says(failure: OSError, otherwise: str = "") -> str:
    """The end of a sentence about a file: what the system says, and what to do, as `remedy` knows it."""
    advice = remedy(failure, otherwise)
    return f"{failure.strerror or reason(failure)}{'; ' if advice else ''}{advice}"


LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def raise_limit(error: BaseException) -> None:
    """Raise the OSError of a limit of this process or machine that has led to an error; nothing for any other one.

    It says nothing of a file: no more files can be opened, or there is no memory. No file may be rejected, be called
    damaged or be skipped for it. It names no path, which may be a patient's.
    """
    found: BaseException | None = error
    while found is not None:
        for number in LIMITS:  # a library that cannot be loaded says so in words, and so does torch
            is_words = isinstance(found, ImportError | RuntimeError) and os.strerror(number) in str(found)
            if is_words or (isinstance(found, OSError) and found.errno == number):
                raise OSError(number, os.strerror(number)) from error
        found = found.__cause__ or found.__context__


# What gloo and NCCL say when another rank does not answer, and when it is gone.
_TIMED_OUT = re.compile(r"Timed out waiting \d+ms|Watchdog caught collective operation timeout|timed out after \d+ms")
_BROKEN = re.compile(r"gloo/transport\S* .*?(?:\[([\w.:%]+)\]:\d+|$)|ncclRemoteError", re.MULTILINE)


def lost_rank(error: BaseException, who: str) -> str:
    """How the loss of another rank was noticed, if `error` is a collective's; else ""."""
    text = str(error)
    if _TIMED_OUT.search(text):
        return "a collective did not end within train.collective_timeout_s: another worker is stuck or cut off"
    if broken := _BROKEN.search(text):
        peer = f"the one on {broken[1]}" if broken[1] else "another one"
        return f"{who} lost its connection to {peer}, which died or was cut off"
    return ""


class PtxdistError(Exception):
    """Base class of all errors; `exit_code` is that of the command line. A message that repeats input is bounded."""

    exit_code = 1

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= 2 * _MOST else f"{text[:_MOST]} … {text[-_MOST:]}"


class SettingsError(PtxdistError):
    """A setting is unknown, has a wrong value, or contradicts another one."""

    exit_code = 3


class LabelError(PtxdistError):
    """A label table, run-length text or patient map is malformed or contradicts itself."""

    exit_code = 4


class DicomError(PtxdistError):
    """One file cannot be used as a radiograph; the message is the reason shown in rejects.csv."""

    exit_code = 5


class CatalogError(PtxdistError):
    """The input as a whole cannot be used: it has no DICOM files, or too many rejects."""

    exit_code = 6


class StoreError(PtxdistError):
    """A cache or one of its stores is missing, incomplete, damaged or of another size."""

    exit_code = 7


class RunError(PtxdistError):
    """A run folder is missing, unfinished or was made with other settings."""

    exit_code = 8


class CheckpointError(PtxdistError):
    """A checkpoint or weights file is missing, damaged or does not fit the model."""

    exit_code = 9


class TrainingError(PtxdistError):
    """Training stopped before its end."""

    exit_code = 10


class ClusterError(PtxdistError):
    """A Ray cluster cannot be reached or used, or a job was rejected or failed."""

    exit_code = 11


class BusyError(PtxdistError):
    """Another ptxdist process is writing to the same folder."""

    exit_code = 12


class StorageError(PtxdistError):
    """An object store cannot be reached, rejects a request, or does not recover in time."""

    exit_code = 13


class AddressError(PtxdistError):
    """A server cannot listen on the given address or port."""

    exit_code = 14


class ExportError(PtxdistError):
    """An exported network computes other values than its checkpoint; nothing was written."""

    exit_code = 15
