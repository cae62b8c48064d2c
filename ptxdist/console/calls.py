"""What functions called from Python print: as the commands do, or nothing.

Of torchrun's processes only the first one prints.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from ptxdist.console.terminal import progress

if TYPE_CHECKING:
    from ptxdist.config import StageSettings
    from ptxdist.events import Event, OnEvent
    from ptxdist.executor import OnProgress


def shown(quiet: bool) -> AbstractContextManager[OnProgress]:
    """A callable (what, done, total) that prints, unless `quiet`."""
    return nullcontext(_ignore) if _is_silent(quiet) else progress()


@contextmanager
def training_shown(
    stages: Sequence[StageSettings], quiet: bool, on_event: OnEvent
) -> Iterator[tuple[OnEvent, OnProgress]]:
    """What prints the events of a training, unless `quiet`, and calls `on_event`; what prints the checks before it."""
    if _is_silent(quiet):
        yield on_event, _ignore
        return
    from ptxdist.console.training import TrainingDisplay

    with TrainingDisplay(stages) as display:

        def show(event: Event) -> None:
            display.show(event)
            on_event(event)

        yield show, display.progress


def _ignore(what: str, done: int, total: int) -> None:
    """Print nothing."""


def _is_silent(quiet: bool) -> bool:
    return quiet or os.environ.get("RANK", "0") != "0"
