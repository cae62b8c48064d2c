"""Interruption: Ctrl-C, SIGTERM and SIGHUP have the same effect in every command.

The first signal raises `Interrupted` in the main thread, so that `finally` cleans up, and the command ends with a
sentence and exit code 128 + its number. Further signals change nothing. A command that has not ended after GRACE_S
seconds is ended at once; nothing is lost, since whatever is finished is on the disk by then.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

GRACE_S = 15.0
SENTENCE = "interrupted; finished work is kept, and is skipped when you rerun the command"
NOTHING_KEPT = "interrupted; nothing was left half done"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ignored: set[signal.Signals] = set()
_first: list[int] = []  # the number of the first signal, when one has arrived
_installed = False
_deferring = False
_said = SENTENCE


class Interrupted(KeyboardInterrupt):
    """The command was interrupted by this signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


def install() -> None:
    """Handle the three signals from now on; what is ignored already (nohup, background jobs) stays ignored."""
    global _installed
    _ignored.update(item for item in _SIGNALS if signal.getsignal(item) is signal.SIG_IGN)
    _installed = True
    _handle()


def keeps_nothing() -> None:
    """From now on this command has nothing that a rerun would skip; the sentence says so."""
    global _said
    _said = NOTHING_KEPT


def say() -> None:
    """Write the sentence to stderr; after SIGHUP there may be nobody to read it."""
    with suppress(OSError):
        os.write(2, f"{_said}\n".encode())


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
def deferred() -> Iterator[None]:
    """Let the block end before a signal that arrives in it is handled: starting and ending Ray must not stop halfway.

    Half started, Ray leaves processes behind, or the end of the interpreter crashes.
    """
    global _deferring
    _deferring, before = True, len(_first)
    try:
        yield
    finally:
        _deferring = False
        if len(_first) > before:
            raise Interrupted(_first[0])


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
    if _first:
        return
    _first.append(number)
    limit = threading.Timer(GRACE_S, _end, (number,))
    limit.daemon = True
    limit.start()
    if not _deferring:
        raise Interrupted(number)


def _end(number: int) -> None:
    """End the process; its children end with it, as executors and Ray see to it."""
    say()
    os._exit(128 + number)
