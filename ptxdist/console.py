"""Everything a person sees in the terminal: progress, tables, the error line.

Owns: rich. Refuses: nothing. Called by: `cli`. Results go to stdout, everything else to stderr, so that `--json` can be
piped. Where stderr is not a terminal, progress becomes a line now and then, so that a log file stays readable.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ptxdist.rundir import EpochMetrics, EvaluationResult, Scores, StageResult

if TYPE_CHECKING:
    from ptxdist.data.catalog import Catalog

_LOG_EVERY_S = 10.0
_EPOCHS_SHOWN = 12

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def fail(message: str) -> None:
    """Print the one line of a refusal."""
    err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def say(message: str) -> None:
    """Print a line for people, on stderr."""
    err.print(Text(message), soft_wrap=True)


def show_json(content: Any) -> None:
    """Print JSON on stdout, undecorated; paths become text."""
    print(json.dumps(content, indent=2, default=str))


class _Rate(ProgressColumn):
    """Finished things per second."""

    def render(self, task: Task) -> Text:
        """The rate of a task, empty while it is unknown."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed and speed >= 10 else f"{speed:,.1f}/s" if speed else "", style="dim")


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=err,
    )


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A callable (what, done, total) that draws one bar for each `what`."""
    if err.is_terminal:
        with _bars() as bars:
            tasks: dict[str, Any] = {}

            def update(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=total)
                bars.update(tasks[what], completed=done, total=total)

            yield update
    else:
        yield _log_progress()


def _log_progress() -> Callable[[str, int, int], None]:
    started: dict[str, float] = {}
    spoken: dict[str, float] = {}

    def update(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        first = started.setdefault(what, now)
        finished = done >= total
        if spoken.get(what) == float("inf") or not (finished or now - spoken.get(what, first) >= _LOG_EVERY_S):
            return
        spoken[what] = float("inf") if finished else now
        rate = done / (now - first) if now - first > 0.5 else 0.0  # the first call starts the clock
        speed = f", {rate:,.1f}/s" if rate else ""
        left = f", {(total - done) / rate:,.0f} s left" if rate and not finished else ""
        say(f"{what}: {done:,} of {total:,}{speed}{left}")

    return update


class TrainingDisplay:
    """A live table of epochs over a progress bar; in a log file, a line an epoch.

    `show` takes the coordinator's events: texts, epochs, finished stages, and (stage, step, epoch, done, total).
    """

    def __init__(self, sizes_px: Sequence[int], epochs: Sequence[int]) -> None:
        self._sizes, self._epochs = sizes_px, epochs
        self._rows: list[EpochMetrics] = []
        self._bars = _bars()
        self._task = self._bars.add_task("Ray starts", total=None)
        self._key: tuple[Any, ...] = ()
        self._log = _log_progress()
        self._live = Live(
            get_renderable=self._render, console=err, transient=True, redirect_stdout=False, redirect_stderr=False
        )

    def __enter__(self) -> TrainingDisplay:
        if err.is_terminal:
            self._live.start()
        else:
            say("Ray starts")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if err.is_terminal:
            self._live.stop()

    def show(self, event: Any) -> None:
        """Show one event of the coordinator."""
        if isinstance(event, str):
            say(event)
        elif isinstance(event, EpochMetrics):
            self._rows.append(event)
            if not err.is_terminal:
                say(epoch_line(event, self._epochs[event.stage - 1]))
        elif isinstance(event, StageResult):
            self._finish_stage(event)
        else:
            self._show_step(*event)

    def _finish_stage(self, stage: StageResult) -> None:
        if err.is_terminal:
            err.print(epoch_table(stage.history, f"stage {stage.stage}, {stage.size_px} px"))
        best = f"best epoch {stage.best.epoch}{' (averaged weights)' if stage.best.averaged else ''}"
        source = f"taken from run {stage.reused_from}" if stage.reused_from else f"{stage.seconds:,.0f} s"
        say(f"stage {stage.stage} of {len(self._sizes)} is finished: {best}, {source}")
        self._rows = [row for row in self._rows if row.stage != stage.stage]
        if stage.best.at_full.equals_all_empty:
            say(
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

    def _render(self) -> Group:
        rows = self._rows[-_EPOCHS_SHOWN:]
        return Group(*([epoch_table(rows, f"stage {rows[-1].stage}")] if rows else []), self._bars)


def epoch_line(item: EpochMetrics, epochs: int) -> str:
    """One epoch as a line of text."""
    scores = item.at_full
    loss = "" if item.train_loss is None else f"train loss {item.train_loss:.4f}, "
    rate = "" if item.images_per_second is None else f", {item.images_per_second:,.1f} images/s"
    name = "averaged weights" if item.averaged else f"epoch {item.epoch}/{epochs}"
    return (
        f"stage {item.stage} {name}: {loss}val loss {item.val_loss:.4f}, Dice {scores.kaggle_dice:.4f} Kaggle "
        f"(predicting nothing {scores.all_empty_dice:.4f}), {_number(scores.positive_dice)} positives only, "
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
            _number(item.train_loss),
            _number(item.val_loss),
            f"{item.at_full.kaggle_dice:.4f}{' (nothing)' if item.at_full.equals_all_empty else ''}",
            _number(item.at_full.positive_dice),
            _number(item.at_full.pooled_dice),
            f"{item.images_per_second:,.1f}" if item.images_per_second else "",
        )
    return table


def show_result(stages: Sequence[StageResult], evaluation: EvaluationResult | None) -> None:
    """Print the table of a run: per stage epochs, loss and the three Dice scores, then the evaluation."""
    table = Table(title="validation, at the original resolution", title_justify="left")
    for name in ("", "epochs", "best", "loss", "Dice:\nKaggle", "positives\nonly", "pooled"):
        table.add_column(name, justify="right" if name else "left", no_wrap=bool(name))
    for stage in stages:
        best = f"{stage.best.epoch}{' avg' if stage.best.averaged else ''}"
        name = f"stage {stage.stage}, {stage.size_px} px" + (" (reused)" if stage.reused_from else "")
        table.add_row(name, str(stage.epochs), best, f"{stage.best.val_loss:.4f}", *_dice(stage.best.at_full))
    if evaluation is not None:
        table.add_section()
        scores = evaluation.scores
        flip = ", flip averaging" if evaluation.flip_averaging else ""
        table.add_row(f"evaluation\n(threshold {evaluation.threshold}{flip})", "", "", "", *_dice(scores), style="bold")
        baseline = f"{scores.all_empty_dice:.4f}"
        table.add_row("predicting nothing", "", "", "", baseline, "0.0000", "0.0000", style="dim")
    out.print(table)
    if evaluation is not None:
        scores = evaluation.scores
        out.print(
            f"{scores.cases:,} held-out images, {scores.positives:,} positive; per image: sensitivity "
            f"{_number(scores.sensitivity)}, specificity {_number(scores.specificity)}"
        )


def show_pairs(title: str, pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values as a two-column table."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in pairs:
        table.add_row(name, value)
    out.print(table)


def show_catalog(catalog: Catalog) -> None:
    """Print how table and files fit together, the split, and what it leaks."""
    counts, leakage, sides = catalog.reconciliation, catalog.leakage, catalog.sides()
    show_pairs(
        "reconciliation of table and files",
        [
            ("table: rows", f"{counts.table_rows:,}"),
            ("table: images", f"{counts.table_images:,}"),
            ("  positive", f"{counts.table_positive:,}"),
            ("  with several masks", f"{counts.table_several_masks:,}"),
            ("  with overlapping masks, united", f"{counts.table_overlapping:,}"),
            ("  without a file", f"{counts.ids_without_file:,}"),
            ("files: DICOM", f"{counts.files:,}"),
            ("  rejected", f"{len(catalog.rejects):,}"),
            ("  copies of another one", f"{counts.duplicates:,}"),
            ("files: others, left alone", f"{counts.other_files:,}"),
            ("images: labelled", f"{counts.labelled:,}"),
            ("  positive", f"{counts.positive:,}"),
            ("images: without a row, unlabelled", f"{counts.unlabelled:,}"),
            *(
                (f"split: {side}", f"{sides[side]['cases']:,} ({sides[side]['positive']:,} positive)")
                for side in ("train", "val")
            ),
            (f"groups by {leakage.grouped_by}", f"{leakage.groups:,} ({leakage.positive_groups:,} with a positive)"),
            ("  val images whose group is in train", f"{leakage.shared_cases:,}"),
            (
                "  the same in a random split",
                f"{leakage.random_shared:.0%} ({leakage.random_shared_positive:.0%} of positive)",
            ),
        ],
    )
    if leakage.grouped_by == "nothing":
        say(
            "warning: PatientID groups nothing (a different one for every image), so a patient may be on both sides of "
            "the split; give --patients map.csv if it is known who is who"
        )


def _dice(scores: Scores) -> tuple[str, str, str]:
    return _number(scores.kaggle_dice), _number(scores.positive_dice), _number(scores.pooled_dice)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


@contextmanager
def divert(log: Path) -> Iterator[None]:
    """Send what libraries write to the process's stdout and stderr to a file; this module keeps the terminal."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    saved = [os.dup(1), os.dup(2)]
    terminals = [os.fdopen(os.dup(number), "w", buffering=1, encoding="utf-8") for number in saved]
    real = [sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__]  # not while a test captures them
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
