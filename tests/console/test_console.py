"""What the training display says: in a log file lines, on a terminal a table."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ptxdist import console
from ptxdist.console.relay import RELAY
from ptxdist.records import EpochMetrics, Scores, StageHistory


def epoch(number: int) -> EpochMetrics:
    scores = Scores(
        cases=9, positives=3, kaggle_dice=0.7, positive_dice=0.2, pooled_dice=0.3, sensitivity=0.5, specificity=0.9,
        all_empty_dice=0.6667,
    )  # fmt: skip
    return EpochMetrics(
        stage=1, epoch=number, learning_rate=1e-3, train_loss=1.25, val_loss=1.5, at_stage=scores, at_full=scores,
        train_seconds=500, val_seconds=100, images_per_second=20.5,
    )  # fmt: skip


def test_a_line_of_the_log_file_has_all_numbers_and_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with console.TrainingDisplay([256, 512], [5, 2]) as display:
        display.show(StageHistory(stage=1, epochs=(epoch(1),)))
        display.show(epoch(2))
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("stage 1 epoch 2/5: train loss 1.2500, val loss 1.5000, Dice 0.7000 Kaggle")
    assert line.endswith("lr 1.00e-03, 20.5 images/s, about 30 min left in the stage, about 1 h 50 min in all")


def test_the_live_table_shows_epochs_from_before_an_interruption_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120, highlight=False)
    for module in (console.terminal, console.training):
        monkeypatch.setattr(module, "err", terminal)
    with console.TrainingDisplay([64], [4]) as display:
        display.show(StageHistory(stage=1, epochs=(epoch(1), epoch(2))))
        display.show(epoch(3))
        display.show((1, "train", 4, 3, 9))
        with terminal.capture() as capture:
            terminal.print(display._render())
    shown = capture.get()
    assert "stage 1: about 10 min left" in shown
    assert [name for name in ("lr", "train loss", "val loss", "Kaggle Dice", "images/s") if name not in shown] == []
    assert shown.count("1.00e-03") == 3
    assert "stage 1 (64 px), epoch 4 of 4: train" in shown


def test_an_epoch_that_predicts_nothing_says_so_in_the_table_and_in_the_log() -> None:
    item = epoch(1)
    empty = item.at_full.model_copy(update={"sensitivity": 0.0, "specificity": 1.0, "kaggle_dice": 0.6667})
    item = item.model_copy(update={"at_full": empty})
    assert "Dice 0.6667 Kaggle (as predicting nothing), 0.2000 positives only" in console.epoch_line(item, 5)
    assert "Dice 0.7000 Kaggle (predicting nothing 0.6667)" in console.epoch_line(epoch(1), 5)
    terminal = Console(file=io.StringIO(), width=120)
    terminal.print(console.epoch_table([item, epoch(2)], "stage 1"))
    assert terminal.file.getvalue().count("(nothing)") == 1  # type: ignore[attr-defined]


def test_a_job_s_log_is_the_live_table_on_a_terminal_and_plain_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(RELAY, "1")
    with console.TrainingDisplay([64, 96], [4, 1], "Ray starts") as display:
        display.show("a worker was lost")
        display.show(StageHistory(stage=1, epochs=(epoch(1),)))
        display.show(epoch(2))
        for done in (1, 9):
            display.show((1, "train", 3, done, 9))
    log = capsys.readouterr().err + "report: runs/one\n"

    def show(joblog: console.JobLog) -> None:
        for start in range(0, len(log), 7):  # as it comes, cut anywhere
            joblog.show(log[start : start + 7])

    with console.JobLog() as joblog:
        show(joblog)
    plain = capsys.readouterr().out.splitlines()
    assert plain[:2] == ["Ray starts", "a worker was lost"]
    assert plain[2].startswith("stage 1 epoch 2/4: train loss 1.2500")
    assert plain[3:] == ["stage 1 (64 px), epoch 3 of 4: train: 9 of 9", "report: runs/one"]

    terminal = Console(file=io.StringIO(), force_terminal=True, width=120, highlight=False)
    for module in (console.terminal, console.training, console.joblog):
        monkeypatch.setattr(module, "err", terminal)
    tables: list[str] = []
    with console.JobLog() as joblog:
        end = joblog._end

        def look_and_end() -> None:
            if joblog._display:
                with terminal.capture() as capture:
                    terminal.print(joblog._display._render())
                tables.append(capture.get())
            end()

        monkeypatch.setattr(joblog, "_end", look_and_end)
        show(joblog)
    (shown,) = tables
    assert shown.count("1.00e-03") == 2, "two epochs"
    assert "stage 1 (64 px), epoch 3 of 4: train" in shown
    assert "a worker was lost" in terminal.file.getvalue()  # type: ignore[attr-defined]
    assert capsys.readouterr().out == "report: runs/one\n"
