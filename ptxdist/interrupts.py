"""Interruption: Ctrl-C, SIGTERM and SIGHUP have the same effect in every command.

The first signal raises `Interrupted` in the main thread, so that `finally` cleans up, and the command ends with a
sentence and exit code 128 + its number. Further signals change nothing. A command that has not ended after GRACE_S
seconds is ended at once; nothing is lost, since whatever is finished is on the disk by then.

The program imports this module first of all, so it imports little.
"""

from __future__ import annotations

import _thread
import fcntl
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

GRACE_S = 15.0
SENTENCE = "interrupted; finished work is kept, and is skipped when you rerun the command"
NOTHING_KEPT = "interrupted; nothing was left half done"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TERMINAL = (signal.SIGINT, signal.SIGHUP)  # what a terminal sends to all processes of a command
_AGAIN_S = 0.01
_IMPORT = "<frozen importlib._bootstrap_external>"
_ignored: set[signal.Signals] = set()
_first: list[int] = []  # the number of the first signal, when one has arrived
_due = False  # whether it still has to be raised
_installed = False
_main = 0  # the thread that `install` was called in
_stderr = 2
_deferring = 0  # blocks in which it must not be raised, one in the other
_sentence = SENTENCE


class Interrupted(KeyboardInterrupt):
    """The command was interrupted by this signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


def install() -> None:
    """Handle the three signals from now on; what is ignored already (nohup, background jobs) stays ignored."""
    global _installed, _main, _stderr
    _ignored.update(item for item in _SIGNALS if signal.getsignal(item) is signal.SIG_IGN)
    _installed, _main = True, _thread.get_ident()
    with suppress(OSError):  # it is closed
        # A command may redirect stderr, as to the log of Ray.
        _stderr = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, 3)
    sys.unraisablehook = _unraisable
    _handle()


def end() -> None:
    """Ignore the three signals from now on: the command has ended, and the end of the interpreter is not disturbed."""
    for item in _SIGNALS:
        signal.signal(item, signal.SIG_IGN)


def keeps_nothing() -> None:
    """From now on this command has nothing that a rerun would skip; the sentence says so."""
    global _sentence
    _sentence = NOTHING_KEPT


def say() -> None:
    """Write the sentence to stderr, once; after SIGHUP there may be nobody to read it."""
    global _sentence
    said, _sentence = _sentence, ""
    with suppress(OSError):
        os.write(_stderr, f"{said}\n".encode() if said else b"")


@contextmanager
def held() -> Iterator[None]:
    """Hold the three signals back during the block, and handle them after it, whoever has taken them over in it.

    Without `install`, as in a notebook, nothing is changed. Only for blocks that start no process.
    """
    if not _installed:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        _handle()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def only_here() -> Iterator[None]:
    """Processes that the block starts never get SIGINT and SIGHUP, which a terminal sends to them too.

    This process ends them. Here, a signal that arrives during the block is handled after it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TERMINAL)  # processes inherit it
    with deferred():  # other threads may get the signal nevertheless
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def deferred() -> Iterator[None]:
    """Let the block end before a signal that arrives in it is handled: starting and ending Ray must not stop halfway.

    Half started, Ray leaves processes behind, or the end of the interpreter crashes. In other threads than the main
    one nothing is changed.
    """
    global _deferring
    if _thread.get_ident() != _main:
        yield
        return
    _deferring += 1
    try:
        yield
    finally:
        _deferring -= 1
        if not _deferring:
            _raise_due()


def installed() -> bool:
    """Whether this process handles the signals by `install`."""
    return _installed


def arrived() -> bool:
    """Whether a signal has arrived."""
    return bool(_first)


def exit_code() -> int:
    """128 + the number of the first signal: Ray may turn `Interrupted` into a KeyboardInterrupt without a number."""
    return 128 + (_first[0] if _first else signal.SIGINT)


def _handle() -> None:
    for item in _SIGNALS:
        if item not in _ignored:
            signal.signal(item, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _due
    if not _first:
        _first.append(number)
        _due = True
        _thread.start_new_thread(_end_later, (number,))
    if _due and _in_import(frame):
        _thread.start_new_thread(_again, ())
    elif not _deferring:
        _raise_due()


def _in_import(frame: FrameType | None) -> bool:
    """Whether a module is being imported: its own `except:` may take what is raised, and native code aborts at it."""
    while frame is not None:
        code = frame.f_code
        if code.co_name in ("create_module", "exec_module") and code.co_filename == _IMPORT:
            return True
        frame = frame.f_back
    return False


def _raise_due() -> None:
    global _due
    if _due:
        _due = False
        raise Interrupted(_first[0])


def _unraisable(lost: sys.UnraisableHookArgs) -> None:
    """What Python calls with an exception in a destructor or a callback, which ends there."""
    global _due
    if _first and isinstance(lost.exc_value, KeyboardInterrupt):
        _due = True
        _thread.start_new_thread(_again, ())
    else:
        sys.__unraisablehook__(lost)


def _again() -> None:
    """Interrupt the main thread once more, when it has left the callback or the import."""
    time.sleep(_AGAIN_S)
    os.kill(os.getpid(), _first[0])


def _end_later(number: int) -> None:
    """End the process after a while; its children end with it, as executors and Ray see to it."""
    time.sleep(GRACE_S)
    say()
    os._exit(128 + number)
