"""Training as it goes on: a live table of epochs, or a line an epoch.

Owns: what is shown of a run that is not finished. Refuses: nothing. Called by: `cli`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table

from ptxdist.console.eta import TimeLeft, in_words
from ptxdist.console.relay import MARK, encode, relays
from ptxdist.console.tables import number
from ptxdist.console.terminal import bars, err, log_progress, say
from ptxdist.records import EpochMetrics, StageHistory, StageResult

_EPOCHS_SHOWN = 12


class TrainingDisplay:
    """A live table of epochs over a progress bar; in a log file, a line an epoch, in a job's log with its event.

    `show` takes the coordinator's events: texts, epochs, finished stages, and (stage, step, epoch, done, total).
    """

    def __init__(self, sizes_px: Sequence[int], epochs: Sequence[int], start: str = "Ray starts") -> None:
        self._sizes, self._epochs = sizes_px, epochs
        self._relays, self._event = relays(), ""
        self._rows: list[EpochMetrics] = []
        self._left = TimeLeft(sizes_px, epochs)
        self._start = start
        self._bars = bars()
        self._task = self._bars.add_task(start, total=None)
        self._key: tuple[Any, ...] = ()
        self._log = log_progress(self._say)
        self._live = Live(
            get_renderable=self._render, console=err, transient=True, redirect_stdout=False, redirect_stderr=False
        )

    def __enter__(self) -> TrainingDisplay:
        if err.is_terminal:
            self._live.start()
        else:
            self._event = encode({"sizes_px": list(self._sizes), "epochs": list(self._epochs), "start": self._start})
            self._say(self._start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if err.is_terminal:
            self._live.stop()
        elif self._relays:
            self._event = encode(None)
            self._say("")

    def show(self, event: Any) -> None:
        """Show one event of the coordinator."""
        self._event = encode(event)
        if isinstance(event, str):
            self._say(event)
        elif isinstance(event, EpochMetrics):
            self._rows.append(event)
            self._left.add(event)
            if not err.is_terminal:
                self._say(epoch_line(event, self._epochs[event.stage - 1]) + self._time_left(event.stage, ", "))
        elif isinstance(event, StageHistory):
            self._rows = [row for row in self._rows if row.stage != event.stage] + list(event.epochs)
            self._left.start(event.stage, event.epochs)
            if self._relays:
                self._say("")
        elif isinstance(event, StageResult):
            self._finish_stage(event)
        else:
            self._show_step(*event)

    def _say(self, text: str) -> None:
        """A line; in a job that is followed, with the event that it stands for, once."""
        say(f"{text}{MARK}{self._event}" if self._relays and not err.is_terminal else text)
        self._event = ""

    def _finish_stage(self, stage: StageResult) -> None:
        if err.is_terminal:
            err.print(epoch_table(stage.history, f"stage {stage.stage}, {stage.size_px} px"))
        best = f"best epoch {stage.best.epoch}{' (averaged weights)' if stage.best.averaged else ''}"
        source = f"taken from run {stage.reused_from}" if stage.reused_from else f"{stage.seconds:,.0f} s"
        self._say(f"stage {stage.stage} of {len(self._sizes)} is finished: {best}, {source}")
        self._rows = [row for row in self._rows if row.stage != stage.stage]
        if stage.best.at_full.equals_all_empty:
            self._say(
                f"warning: stage {stage.stage} predicts nothing at all; its Kaggle Dice "
                f"{stage.best.at_full.kaggle_dice:.4f} is the share of images without a pneumothorax"
            )

    def _show_step(self, stage: int, step: str, epoch: int, done: int, total: int) -> None:
        if step == "evaluate":
            what = "evaluation at the original resolution"
        else:
            size, epochs = self._sizes[stage - 1], self._epochs[stage - 1]
            what = f"stage {stage} ({size} px), epoch {epoch} of {epochs}: {step}"
        if not err.is_terminal:
            self._log(what, done, total)
        elif (what,) != self._key:
            self._key = (what,)
            self._bars.reset(self._task, description=what, total=total, completed=done)
        else:
            self._bars.update(self._task, completed=done, total=total)

    def _time_left(self, stage: int, before: str) -> str:
        """In words, for a line or a title; empty while nothing is measured."""
        left = self._left.seconds(stage)
        if left is None or not left[1]:
            return ""
        if len(self._sizes) == 1:
            return f"{before}about {in_words(left[1])} left"
        in_stage = f"about {in_words(left[0])} left in the stage, " if left[0] else ""
        return f"{before}{in_stage}about {in_words(left[1])} in all"

    def _render(self) -> Group:
        rows = self._rows[-_EPOCHS_SHOWN:]
        if not rows:
            return Group(self._bars)
        stage = rows[-1].stage
        return Group(epoch_table(rows, f"stage {stage}{self._time_left(stage, ': ')}"), self._bars)


def epoch_line(item: EpochMetrics, epochs: int) -> str:
    """One epoch as a line of text."""
    scores = item.at_full
    loss = "" if item.train_loss is None else f"train loss {item.train_loss:.4f}, "
    rate = "" if item.images_per_second is None else f", {item.images_per_second:,.1f} images/s"
    name = "averaged weights" if item.averaged else f"epoch {item.epoch}/{epochs}"
    nothing = "as predicting nothing" if scores.equals_all_empty else f"predicting nothing {scores.all_empty_dice:.4f}"
    return (
        f"stage {item.stage} {name}: {loss}val loss {item.val_loss:.4f}, Dice {scores.kaggle_dice:.4f} Kaggle "
        f"({nothing}), {number(scores.positive_dice)} positives only, "
        f"{scores.pooled_dice:.4f} pooled, lr {item.learning_rate:.2e}{rate}"
    )


def epoch_table(rows: Sequence[EpochMetrics], title: str) -> Table:
    """Epochs as a table."""
    table = Table(title=title, title_justify="left", box=None, header_style="dim")
    for name in ("epoch", "lr", "train loss", "val loss", "Kaggle Dice", "positives", "pooled", "images/s"):
        table.add_column(name, justify="right")
    for item in rows:
        table.add_row(
            f"{item.epoch}{' avg' if item.averaged else ''}",
            f"{item.learning_rate:.2e}",
            number(item.train_loss),
            number(item.val_loss),
            f"{item.at_full.kaggle_dice:.4f}{' (nothing)' if item.at_full.equals_all_empty else ''}",
            number(item.at_full.positive_dice),
            number(item.at_full.pooled_dice),
            f"{item.images_per_second:,.1f}" if item.images_per_second else "",
        )
    return table
