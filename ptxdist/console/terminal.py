"""The terminal: lines, bars, JSON, and where the output of libraries goes.

Owns: stdout and stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from ptxdist.errors import ClusterError, PtxdistError, TrainingError, plain

_LOG_EVERY_S = 10.0
_CUT = "…"  # which rich puts where it cuts a text
_WORD = 20  # characters; longer words, such as paths and ids, may be broken


class _Console(Console):
    """Prints every text as it is, without markup, and its control characters escaped."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich's, from which everything that is printed comes; a table whose cells would be cut is stacked."""
        if isinstance(renderable, Table) and (cells := _cells(renderable)):
            drawn = "".join(segment.text for segment in super().render(renderable, options))
            if _is_cut(cells if renderable.show_header else cells[1:], drawn):
                renderable = _stacked(renderable, cells)
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(plain(segment.text), segment.style)


def _cells(table: Table) -> list[list[str]]:
    """The texts of a table, its heads first; [] for one that has other things in it, such as bars."""
    rows = [list(column.cells) for column in table.columns]
    if not all(isinstance(cell, str | Text) for row in rows for cell in row):
        return []
    return [
        [str(column.header) for column in table.columns],
        *([str(cell) for cell in row] for row in zip(*rows, strict=True)),
    ]


def _is_cut(cells: Sequence[Sequence[str]], drawn: str) -> bool:
    """Whether what is drawn lacks an end of a cell, or breaks a word or a number."""
    text = " ".join(cell for row in cells for cell in row)
    words = Counter(word for word in text.split() if len(word) <= _WORD)
    return bool(words - Counter(drawn.split())) or drawn.count(_CUT) > text.count(_CUT)


def _stacked(table: Table, cells: Sequence[Sequence[str]]) -> Text:
    """The rows of a table below each other, each value with its head, in lines that may be wrapped."""
    (first, *heads), *rows = ([cell.replace("\n", " ").rstrip() for cell in row] for row in cells)
    lines = [Text(str(table.title), "bold")] if table.title else []
    for name, *values in rows:
        if not table.show_header:
            lines.append(Text(": ".join((name, *values))))
            continue
        lines.append(Text(" ".join(filter(None, (first, name)))))
        indent = " " * (len(name) - len(name.lstrip()) + 2)
        lines += [Text(f"{indent}{head}: {value}") for head, value in zip(heads, values, strict=True) if value]
    return Text("\n").join(lines)


out = _Console(highlight=False, markup=False, emoji=False)
err = _Console(stderr=True, highlight=False, markup=False, emoji=False)


def redraws(console: Console) -> bool:
    """Whether what was printed can be replaced, as bars are: on a terminal that has more than lines."""
    return console.is_terminal and not console.is_dumb_terminal


def fail(message: str) -> None:
    """Print an error as one line."""
    err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def say(message: str) -> None:
    """Print a line for people, on stderr."""
    err.print(Text(message), soft_wrap=True)


def show_json(content: Any) -> None:
    """Print JSON on stdout, undecorated; paths become text."""
    print(json.dumps(content, indent=2, default=str))


class _Rate(ProgressColumn):
    """Finished items per second."""

    def render(self, task: Task) -> Text:
        """The rate of a task, empty while it is unknown."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed and speed >= 10 else f"{speed:,.1f}/s" if speed else "", style="dim")


def bars() -> Progress:
    """A group of progress bars on stderr, not started."""
    return Progress(
        TextColumn("{task.description}", table_column=Column(overflow="fold")),
        BarColumn(bar_width=max(4, min(32, err.width - 64))),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=err,
    )


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A callable (what, done, total) that draws one bar for each `what`."""
    if redraws(err):
        with bars() as drawn:
            tasks: dict[str, Any] = {}

            def update(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = drawn.add_task(what, total=total)
                drawn.update(tasks[what], completed=done, total=total)

            yield update
    else:
        yield log_progress()


def log_progress() -> Callable[[str, int, int], None]:
    """A callable (what, done, total) that prints a line every ten seconds, and one at the end."""
    started: dict[str, float] = {}
    printed: dict[str, float] = {}
    former: dict[str, int] = {}

    def update(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done < former.get(what, 0):  # restarted, for example by the next fold
            del started[what]
            printed.pop(what, None)
        former[what] = done
        first = started.setdefault(what, now)
        finished = done >= total
        if printed.get(what) == float("inf") or not (finished or now - printed.get(what, first) >= _LOG_EVERY_S):
            return
        printed[what] = float("inf") if finished else now
        rate = done / (now - first) if now - first > 0.5 else 0.0  # the first call starts the clock
        speed = f", {rate:,.1f}/s" if rate else ""
        left = f", {(total - done) / rate:,.0f} s left" if rate and not finished else ""
        say(f"{what}: {done:,} of {total:,}{speed}{left}")

    return update


@contextmanager
def divert(log: Path) -> Iterator[None]:
    """Redirect the process's stdout and stderr, to which libraries write, to a file; this module keeps the terminal."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    saved = [os.dup(1), os.dup(2)]
    terminals = [os.fdopen(os.dup(number), "w", buffering=1, encoding="utf-8") for number in saved]
    real = [sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__]  # False while pytest captures them
    with open(log, "ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    for console, terminal, is_real in zip((out, err), terminals, real, strict=True):
        if is_real:
            console.file = terminal
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, descriptor in zip((1, 2), saved, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        for console, terminal, is_real in zip((out, err), terminals, real, strict=True):
            if is_real:
                console._file = None  # back to sys.stdout and sys.stderr
            terminal.close()


@contextmanager
def ray_log(folder: Path) -> Iterator[None]:
    """Write the output of Ray to a file in `folder`, which errors name; a refusal leaves no folder that was not there.

    For a failure of Ray or of the workers the file stays.
    """
    from ptxdist.rundir import RAY_LOG  # late: it brings the settings

    log = folder / RAY_LOG
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with divert(log):
            yield
    except PtxdistError as error:
        if made and not isinstance(error, TrainingError | ClusterError):
            with suppress(OSError):  # other files are in it
                log.unlink()
                for path in made:
                    path.rmdir()
                raise
        raise type(error)(f"{error} (the output of Ray is in {log})") from error
