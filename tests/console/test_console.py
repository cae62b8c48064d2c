"""What the training display says: in a log file lines, on a terminal a table."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ptxdist import console
from ptxdist.config import StageSettings
from ptxdist.console.training import TrainingDisplay, epoch_line, epoch_table
from ptxdist.events import Message, Progress, RunStart
from ptxdist.records import EpochMetrics, Scores, StageHistory, StageResult


def epoch(number: int) -> EpochMetrics:
    scores = Scores(
        cases=9, positives=3, kaggle_dice=0.7, positive_dice=0.2, pooled_dice=0.3, sensitivity=0.5, specificity=0.9,
        all_empty_dice=0.6667,
    )  # fmt: skip
    return EpochMetrics(
        stage=1, epoch=number, learning_rate=1e-3, train_loss=1.25, val_loss=1.5, at_stage=scores, at_full=scores,
        train_seconds=500, val_seconds=100, images_per_second=20.5,
    )  # fmt: skip


def stages(*sizes_and_epochs: tuple[int, int]) -> list[StageSettings]:
    return [StageSettings(size_px=size, epochs=epochs, batch_size=4) for size, epochs in sizes_and_epochs]


def test_a_line_of_the_log_file_has_all_numbers_and_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingDisplay(stages((256, 5), (512, 2))) as display:
        display.show(StageHistory(stage=1, epochs=(epoch(1),)))
        display.show(epoch(2))
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("stage 1 epoch 2/5: train loss 1.2500, val loss 1.5000, Dice 0.7000 Kaggle")
    assert line.endswith("lr 1.00e-03, 20.5 images/s, about 30 min left in the stage, about 1 h 50 min in all")


def test_a_run_says_what_it_will_do_and_after_its_first_steps_how_long_it_will_take(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    display = TrainingDisplay(stages((256, 60), (512, 29)))
    monkeypatch.setattr(display._left, "_clock", lambda: now)
    run = {"run": "runs/x", "train": 600, "positive": 150, "shown": "a pneumothorax", "held_out": 300}
    start = RunStart.model_validate({**run, "images": (600, 900), "fold": 1, "folds_left": 2, "workers": 4, "cores": 2})
    with display:
        for _ in range(2):  # the next fold, after which nothing is left
            display.show(start)
            display.show(StageHistory(stage=1, epochs=()))
            for done in range(10, 80, 10):
                now += 2
                display.show(Progress(stage=1, step="train", epoch=1, done=done, total=600))
            start = start.model_copy(update={"folds_left": 1})
        display.show(StageHistory(stage=2, epochs=()))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "runs/x trains on 600 images, 150 with a pneumothorax; 300 are held out (fold 1); 4 workers, 2 CPU cores on "
        "this machine, where more workers than cores do not train faster",
        "stage 1 of 2: 256 px, 60 epochs in batches of 4",
    ]
    assert lines[-1] == "stage 2 of 2: 512 px, 29 epochs of 900 images in batches of 4", "said when it starts"
    estimates = [line for line in lines if line.startswith("training will take")]
    assert estimates == [
        "training will take about 8 h 47 min, 2 h 20 min of it for stage 1; about 17 h 33 min for all folds; an "
        "estimate from its first steps",
        "training will take about 8 h 47 min, 2 h 20 min of it for stage 1; an estimate from its first steps",
    ]


def test_the_live_table_shows_epochs_from_before_an_interruption_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120, highlight=False)
    for module in (console.terminal, console.training):
        monkeypatch.setattr(module, "err", terminal)
    with TrainingDisplay(stages((64, 4))) as display:
        display.show(StageHistory(stage=1, epochs=(epoch(1), epoch(2))))
        display.show(epoch(3))
        display.show(Progress(stage=1, step="train", epoch=4, done=3, total=9))
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
    assert "Dice 0.6667 Kaggle (as predicting nothing), 0.2000 positives only" in epoch_line(item, 5, "empty")
    assert "Dice 0.7000 Kaggle (predicting nothing 0.6667)" in epoch_line(epoch(1), 5, "pays")
    terminal = Console(file=io.StringIO(), width=120)
    terminal.print(epoch_table([item, epoch(2)], "stage 1", ["empty", "pays"]))
    assert terminal.file.getvalue().count("(nothing)") == 1  # type: ignore[attr-defined]


def test_a_collapsed_epoch_is_marked_in_the_table_and_in_the_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here the third and fourth of four epochs are empty, after two with masks."""
    gone = {"sensitivity": 0.0, "specificity": 1.0, "positive_dice": 0.0, "kaggle_dice": 0.6667}
    empty = epoch(1).at_full.model_copy(update=gone)
    epochs = [epoch(1), epoch(2), *(epoch(n).model_copy(update={"at_full": empty}) for n in (3, 4))]
    with TrainingDisplay(stages((64, 4))) as display:
        for item in epochs:
            display.show(item)
    starts = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert starts == [f"stage 1 epoch {n}/4" for n in (1, 2, 3)] + ["stage 1 epoch 4/4 (collapsed)"]
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120, highlight=False)
    for module in (console.terminal, console.training):
        monkeypatch.setattr(module, "err", terminal)
    with TrainingDisplay(stages((64, 4))) as display:
        display.show(StageHistory(stage=1, epochs=tuple(epochs)))
        with terminal.capture() as capture:
            terminal.print(display._render())
    shown = capture.get()
    assert shown.count("(nothing)") == 1
    assert shown.count("(collapsed)") == 1


def test_masks_that_do_not_pay_are_said_once_at_the_end_of_the_stage(capsys: pytest.CaptureFixture[str]) -> None:
    poor = epoch(1).at_full.model_copy(update={"specificity": 0.5, "kaggle_dice": 0.4})
    best = epoch(1).model_copy(update={"at_full": poor})
    with TrainingDisplay(stages((64, 1))) as display:
        display.show(best)
        display.show(
            StageResult(
                stage=1, size_px=64, fingerprint="", epochs=1, workers=1, seconds=1, best=best, history=(best,),
                weights="w", weights_sha256="",
            )
        )  # fmt: skip
    assert capsys.readouterr().err.splitlines()[-1] == (
        "the masks of stage 1 do not raise the Kaggle Dice: 50 % of the positive and 50 % of the negative images get a "
        "mask, a ratio of 1.0. With a Dice of 0.40 on the positive ones, masks raise the Kaggle Dice above a ratio of "
        "5.0."
    )


def test_each_fold_starts_with_its_own_lines_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingDisplay(stages((64, 2), (96, 1))) as display:
        for fold in range(2):
            display.show(Message(text=f"fold {fold}"))
            for done in (1, 9):
                display.progress("check of 64 px", done, 9)
            display.show(StageHistory(stage=1, epochs=()))
            display.show(epoch(1))
            display.show(StageHistory(stage=2, epochs=()))
            display.show(epoch(1).model_copy(update={"stage": 2}))
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines[:2]] == ["fold 0", "check of 64 px: 9 of 9"]
    assert lines[4:] == [line.replace("fold 0", "fold 1") for line in lines[:4]]
