"""Locks between processes.

Owns: every call of flock, and what happens where it does not work.

A lock is an flock on a file that contains nothing. The kernel releases it when the process ends, however it ends, so
there are no stale locks. The file may stay. Whoever holds the lock with `only` may also delete the file: a process
that waited for a deleted file notices it and locks the new one.

The file is opened for reading and writing, because NFS refuses locks on other descriptors, and it is never a folder.
The lock is released by closing the descriptor and not by unlocking it: a forked worker shares the descriptor, and its
end must not release the lock of its parent.

Some file systems have no locks (Lustre without `-o flock`, NFS without a lock daemon, some FUSE file systems). There,
every command continues without a lock; a warning is logged once for each folder, and the block receives False.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path

from ptxdist.errors import BusyError, PtxdistError, RunError, system_says

LOCK = ".lock"  # the lock file in a cache and in a folder of predictions; in a run it is `rundir.LOCK`

_CONFLICT = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}

_log = logging.getLogger(__name__)


def only(path: Path, busy: str = "", *, error: type[PtxdistError] | None = RunError) -> AbstractContextManager[bool]:
    """Hold the lock file `path` alone while the block runs.

    If another process has it, raises BusyError with the text `busy`; with no text, waits. The folder must exist.
    Yields True, or False where the file system has no locks. Any other failure raises `error` with the reason, or the
    OSError itself when `error` is None.
    """
    return _holding(path, fcntl.LOCK_EX, busy, error)


def shared(path: Path, busy: str = "", *, error: type[PtxdistError] | None = RunError) -> AbstractContextManager[bool]:
    """Hold the lock file `path` together with other readers while the block runs; as `only` otherwise.

    Reading must be possible where nothing can be written: if the lock file cannot be opened for writing, it is opened
    for reading; if that fails too, the block runs without a lock and receives False.
    """
    return _holding(path, fcntl.LOCK_SH, busy, error)


@contextmanager
def _holding(path: Path, operation: int, busy: str, error: type[PtxdistError] | None) -> Iterator[bool]:
    try:
        lock = _acquire(path, operation, busy)
    except OSError as failure:
        if error is None:
            raise
        raise error(f"{path} cannot be locked: {system_says(failure)}") from failure
    try:
        yield lock is not None
    finally:
        if lock is not None:
            os.close(lock)


def _acquire(path: Path, operation: int, busy: str) -> int | None:
    """Descriptor of the locked file; None where there can be no lock."""
    while True:
        lock = _open(path, is_shared=operation == fcntl.LOCK_SH)
        if lock is None:
            return None
        is_held = False
        try:
            fcntl.flock(lock, operation | (fcntl.LOCK_NB if busy else 0))
            is_held = _is_current(lock, path)  # else the former holder has deleted the file
            if is_held:
                return lock
        except OSError as failure:
            if failure.errno in _NO_LOCKS:
                _warn(path.parent)
                return None
            if busy and failure.errno in _CONFLICT:
                raise BusyError(busy) from None
            raise
        finally:
            if not is_held:
                os.close(lock)


def _open(path: Path, *, is_shared: bool) -> int | None:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as failure:
        if not is_shared or failure.errno not in _READ_ONLY:
            raise
    try:
        return os.open(path, os.O_RDONLY)
    except OSError:
        return None


def _is_current(lock: int, path: Path) -> bool:
    """Whether the descriptor still is the file of this name."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(path))
    except FileNotFoundError:
        return False


@cache
def _warn(folder: Path) -> None:
    _log.warning("%s is on a file system without locks; do not write there with two commands at the same time", folder)
