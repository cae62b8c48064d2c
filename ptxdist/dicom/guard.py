"""One file never ends the work on many: whatever goes wrong with it becomes its reason. A limit of the machine does.

Owns: the sentence about an exception that nobody expected. It has kind and place, and never the message, which may
contain values of the file.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ptxdist.errors import DicomError, PtxdistError, raise_limit

_PACKAGE = str(Path(__file__).resolve().parents[1])


class PassingError(DicomError):
    """A file that may be readable another time: with more memory, a newer ptxdist, or when nobody writes to it."""


@contextmanager
def guarded() -> Iterator[None]:
    """Any exception of the block becomes a PassingError; ptxdist's own errors, and those that end a process, pass.

    A limit of the process or machine is no fault of the file and becomes its OSError, whatever was made of it.
    """
    try:
        yield
    except Exception as error:
        raise_limit(error)
        if isinstance(error.__cause__, MemoryError):  # of a decoder
            raise PassingError(f"needs more memory than there is ({place_of(error.__cause__)})") from error
        if isinstance(error, PtxdistError):
            raise
        if isinstance(error, MemoryError):
            raise PassingError(f"needs more memory than there is ({place_of(error)})") from error
        raise PassingError(
            f"cannot be used because of a defect in ptxdist ({place_of(error)}); please report it"
        ) from error


def bare(error: DicomError) -> DicomError:
    """The same error without its traceback and cause, which hold the content of the file as long as it is kept."""
    return type(error)(str(error))


def place_of(error: BaseException) -> str:
    """Kind of an exception, and file and line of ptxdist where it was raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if frame.filename.startswith(_PACKAGE)]
    where = (own or frames)[-1:]
    return type(error).__name__ + "".join(f" in {Path(frame.filename).name}, line {frame.lineno}" for frame in where)
