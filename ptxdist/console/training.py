"""A training in progress: a live table of epochs on a terminal, a line for each epoch in a log file.

Before it starts, what it will do; after its first steps, how long it will take.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Group
from rich.live import Live
from rich.table import Table

from ptxdist.config import StageSettings
from ptxdist.console.eta import TimeLeft, in_words
from ptxdist.console.tables import number
from ptxdist.console.terminal import bars, err, log_progress, redraws, say
from ptxdist.events import Event, Message, Progress, RunStart
from ptxdist.records import EpochMetrics, EvaluationResult, StageHistory, StageResult
from ptxdist.scores.watchdog import Verdict, judge, why_not

_EPOCHS_SHOWN, _WIDE = 12, 80
_OUTSIDE = {  # steps of a stage that are outside of its epochs
    "copy": "copying the cache", "draw": "drawing phantoms", "load": "copying the images to the device",
    "average": "batch norm of the averaged weights",
}  # fmt: skip


class TrainingDisplay:
    """Shows the events of a training of these stages, and the progress of the checks before it."""

    def __init__(self, stages: Sequence[StageSettings]) -> None:
        self._stages = stages
        self._rows: list[EpochMetrics] = []
        self._left = TimeLeft([stage.size_px for stage in stages], [stage.epochs for stage in stages])
        self._bars = bars()
        self._task = self._bars.add_task("", total=None, visible=False)
        self._what = ""  # of the bar
        self._folds_left, self._is_estimated = 1, False
        self._run: RunStart | None = None
        self._log = log_progress()
        self._live = Live(
            get_renderable=self._render, console=err, transient=True, redirect_stdout=False, redirect_stderr=False
        )

    def __enter__(self) -> TrainingDisplay:
        if redraws(err):
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if redraws(err):
            self._live.stop()

    def show(self, event: Event) -> None:
        """Show one event."""
        match event:
            case Message():
                say(event.text)
            case RunStart():
                self._announce(event)
            case Progress():
                self.progress(self._describe(event), event.done, event.total)
                if self._left.step(event) and not self._is_estimated:
                    self._estimate(event)
            case StageHistory():
                if self._run:
                    self._announce_stage(self._run, event)
                self._rows = [row for row in self._rows if row.stage != event.stage] + list(event.epochs)
                self._left.start(event.stage, event.epochs)
            case EpochMetrics():
                self._rows.append(event)
                self._left.add(event)
                self._is_estimated = True  # from here on, each line or the title of the table says it
                if not redraws(err):
                    left, stage = self._time_left(event.stage, ", "), self._stages[event.stage - 1]
                    say(epoch_line(event, stage.epochs, judge(self._rows_of(event.stage), stage)[-1]) + left)
            case StageResult():
                self._finish_stage(event)
            case EvaluationResult():
                pass  # `show_result` prints it

    def progress(self, what: str, done: int, total: int) -> None:
        """Show how far one piece of work is."""
        if not redraws(err):
            self._log(what, done, total)
        elif what != self._what:
            self._what = what
            self._bars.reset(self._task, description=what, total=total, completed=done, visible=True)
        else:
            self._bars.update(self._task, completed=done, total=total)

    def _announce(self, run: RunStart) -> None:
        self._left.expect(run.images, run.held_out)
        self._folds_left, self._is_estimated = run.folds_left, False
        workers = f"{run.workers} worker{'s' if run.workers > 1 else ''}, {run.cores} CPU cores on this machine"
        if run.workers > run.cores:
            workers += ", where more workers than cores do not train faster"
        say(
            f"{run.run} trains on {run.train:,} images, {run.positive:,} with {run.shown}; {run.held_out:,} are held "
            f"out (fold {run.fold}); {workers}"
        )
        self._run = run

    def _announce_stage(self, run: RunStart, begun: StageHistory) -> None:
        stage, images = self._stages[begun.stage - 1], run.images[begun.stage - 1]
        what = "" if images == run.train else f" of {images:,} {'phantoms' if stage.phantoms else 'images'}"
        epochs = f"{stage.epochs} epoch{'s' if stage.epochs > 1 else ''}{what} in batches of {stage.batch_size}"
        finished = min(len(begun.epochs), stage.epochs)  # averaged weights are an entry too
        done = f"; {finished} finished" if finished else ""
        say(f"stage {begun.stage} of {len(self._stages)}: {stage.size_px} px, {epochs}{done}")

    def _estimate(self, step: Progress) -> None:
        left = self._left.seconds(step.stage)
        assert left is not None
        self._is_estimated = True
        in_stage = f", {in_words(left[0])} of it for stage {step.stage}" if left[1] > left[0] else ""
        folds = f"; about {in_words(left[1] * self._folds_left)} for all folds" if self._folds_left > 1 else ""
        say(f"training will take about {in_words(left[1])}{in_stage}{folds}; an estimate from its first steps")

    def _describe(self, step: Progress) -> str:
        if step.step == "evaluate":
            return "evaluation at the original resolution"
        stage = self._stages[step.stage - 1]
        if step.step in _OUTSIDE:
            return f"stage {step.stage} ({stage.size_px} px): {_OUTSIDE[step.step]}"
        return f"stage {step.stage} ({stage.size_px} px), epoch {step.epoch} of {stage.epochs}: {step.step}"

    def _finish_stage(self, stage: StageResult) -> None:
        if redraws(err):
            verdicts = judge(stage.history, self._stages[stage.stage - 1])
            err.print(epoch_table(stage.history, f"stage {stage.stage}, {stage.size_px} px", verdicts))
        best = f"best epoch {stage.best.epoch}{' (averaged weights)' if stage.best.averaged else ''}"
        source = f"reused from run {stage.reused_from}" if stage.reused_from else f"{stage.seconds:,.0f} s"
        say(f"stage {stage.stage} of {len(self._stages)} is finished: {best}, {source}")
        self._rows = [row for row in self._rows if row.stage != stage.stage]
        settings = self._stages[stage.stage - 1]
        if stage.best.at_full.equals_all_empty and not settings.phantoms:
            say(
                f"warning: stage {stage.stage} predicts nothing at all; its Kaggle Dice "
                f"{stage.best.at_full.kaggle_dice:.4f} is the share of negative images"
            )
        elif reason := why_not(stage.best.at_full, settings):
            say(f"the masks of stage {stage.stage} do not raise the Kaggle Dice: {reason}")

    def _rows_of(self, stage: int) -> list[EpochMetrics]:
        return [row for row in self._rows if row.stage == stage]

    def _time_left(self, stage: int, before: str) -> str:
        """The ETA in words, for a line or a title; "" before one epoch is finished."""
        left = self._left.seconds(stage)
        if left is None or not left[1]:
            return ""
        if len(self._stages) == 1:
            return f"{before}about {in_words(left[1])} left"
        in_stage = f"about {in_words(left[0])} left in the stage, " if left[0] else ""
        return f"{before}{in_stage}about {in_words(left[1])} in all"

    def _render(self) -> Group:
        if not self._rows:
            return Group(self._bars)
        stage = self._rows[-1].stage
        rows = self._rows_of(stage)
        shown = _EPOCHS_SHOWN if err.width >= _WIDE else 1  # one is stacked there
        verdicts = judge(rows, self._stages[stage - 1])[-shown:]
        title = f"stage {stage}{self._time_left(stage, ': ')}"
        return Group(epoch_table(rows[-shown:], title, verdicts), self._bars)


def epoch_line(item: EpochMetrics, epochs: int, verdict: Verdict) -> str:
    """One epoch, of so many, as a line of text."""
    scores = item.at_full
    loss = "" if item.train_loss is None else f"train loss {item.train_loss:.4f}, "
    rate = "" if item.images_per_second is None else f", {item.images_per_second:,.1f} images/s"
    name = "averaged weights" if item.averaged else f"epoch {item.epoch}/{epochs}"
    nothing = "as predicting nothing" if scores.equals_all_empty else f"predicting nothing {scores.all_empty_dice:.4f}"
    collapsed = " (collapsed)" if verdict == "collapsed" else ""
    return (
        f"stage {item.stage} {name}{collapsed}: {loss}val loss {item.val_loss:.4f}, Dice {scores.kaggle_dice:.4f} "
        f"Kaggle ({nothing}), {number(scores.positive_dice)} positives only, "
        f"{scores.pooled_dice:.4f} pooled, lr {item.learning_rate:.2e}{rate}"
    )


def epoch_table(rows: Sequence[EpochMetrics], title: str, verdicts: Sequence[Verdict]) -> Table:
    """Epochs as a table, with the verdict on each."""
    table = Table(title=title, title_justify="left", box=None, header_style="dim")
    for name in ("epoch", "lr", "train loss", "val loss", "Kaggle Dice", "positives", "pooled", "images/s"):
        table.add_column(name, justify="right")
    for item, verdict in zip(rows, verdicts, strict=True):
        mark = " (nothing)" if item.at_full.equals_all_empty else ""
        mark = " (collapsed)" if verdict == "collapsed" else mark
        table.add_row(
            f"{item.epoch}{' avg' if item.averaged else ''}",
            f"{item.learning_rate:.2e}",
            number(item.train_loss),
            number(item.val_loss),
            f"{item.at_full.kaggle_dice:.4f}{mark}",
            number(item.at_full.positive_dice),
            number(item.at_full.pooled_dice),
            f"{item.images_per_second:,.1f}" if item.images_per_second else "",
        )
    return table
