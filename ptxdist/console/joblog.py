"""The log of a job as it comes: its training as a live table on a terminal, everything else as it is.

Owns: how a job's log is shown. Refuses: nothing; a line that cannot be understood is shown as text. Called by: `cli`.
"""

from __future__ import annotations

from types import TracebackType

from ptxdist.console.relay import MARK, decode
from ptxdist.console.terminal import err, out, say
from ptxdist.console.training import TrainingDisplay


class JobLog:
    """Shows texts of a log, cut anywhere, by whole lines."""

    def __init__(self) -> None:
        self._rest = ""
        self._display: TrainingDisplay | None = None

    def __enter__(self) -> JobLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rest:
            self._line(self._rest)
        self._end()

    def show(self, text: str) -> None:
        """Show what has come."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line)

    def _line(self, line: str) -> None:
        words, mark, event = line.partition(MARK)
        if mark and err.is_terminal:
            if event:
                self._event(event)
        elif words or not mark:
            if self._display and out.is_terminal:
                say(words)  # above the table
            else:
                print(words, flush=True)

    def _event(self, text: str) -> None:
        event = decode(text)
        if isinstance(event, dict):
            self._end()
            self._display = TrainingDisplay(**event).__enter__()
        elif event is None:
            self._end()
        elif self._display:
            self._display.show(event)

    def _end(self) -> None:
        if self._display:
            self._display.__exit__(None, None, None)
            self._display = None
