"""Results in the terminal: a sentence, and a table of few rows that is not broken at 80 columns."""

from __future__ import annotations

import re

import pytest
from rich.table import Table

from ptxdist import console
from ptxdist.console.results import show_comparison, show_result
from ptxdist.records import EvaluationResult, Intervals, OperatingPoint, Scores, TunedPoint
from ptxdist.scores.compare import Compared, Comparison

SCORES = Scores(
    cases=9, positives=3, kaggle_dice=0.75, positive_dice=None, pooled_dice=0.5, sensitivity=0.5, specificity=0.9,
    all_empty_dice=0.6667,
)  # fmt: skip
INTERVALS: Intervals = {"kaggle_dice": (0.5, 0.8), "sensitivity": (0.25, 0.75), "auroc": (0.7, 0.9)}


@pytest.mark.parametrize("columns", [30, 40, 60])
def test_nothing_is_cut_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    """A table that does not fit is stacked: each value with its head, in lines that may be wrapped."""
    monkeypatch.setattr(console.out, "_width", 300)  # of COLUMNS when it was made, which pytest-xdist sets to 80
    rows = [(f"has another checksum {n}", f"{1.5 * n:.4f}", "1.2.276.0.7230010.3.1.4.8323329") for n in range(12)]

    def show() -> str:
        table = Table(title="a title", title_justify="left")
        for name in ("", "Dice:\nKaggle", "a longer head", "95 % interval"):
            table.add_column(name, no_wrap=bool(name))
        for row in rows:
            table.add_row(*row, "0.7912 to 0.8434")
        console.out.print(table)
        console.show_pairs("wide", [("images", "1,234 (12.5 %)"), ("file", "64.zarr/image/c/0/0/0")])
        return capsys.readouterr().out

    words = set(re.findall(r"[\w.%,/()]{2,}", show()))
    monkeypatch.setattr(console.out, "_width", columns)
    narrow = show()
    assert "…" not in narrow
    assert max(map(len, narrow.splitlines())) <= columns
    assert not {word for word in words - set(re.findall(r"[\w.%,/()]{2,}", narrow)) if len(word) < columns - 9}


def test_an_evaluation_is_a_sentence_and_five_rows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 80 columns no line is broken, with the counts of the full data too."""
    monkeypatch.setenv("COLUMNS", "80")
    large = SCORES.model_copy(update={"cases": 12_047, "positives": 2_669, "positive_dice": 0.4})
    point = OperatingPoint(top=0.825, min_area_px=8192, bottom=0.475, image=0.125)
    tuned = TunedPoint(
        kind="triplet", point=point, scores=large, estimate=large.model_copy(update={"kaggle_dice": 0.8}), folds=5,
        intervals={"kaggle_dice": (0.79, 0.81), "sensitivity": (0.48, 0.52)}, points=(), thresholds=(), areas_px=(),
        surface=(),
    )  # fmt: skip
    evaluation = EvaluationResult(
        threshold=0.25, min_area_px=0, flip_averaging=True, scores=large, auroc=0.8, intervals=INTERVALS,
        at_other_thresholds={"0.5": large, "0.55": large}, tuned=(tuned,), seconds=1.0,
    )  # fmt: skip
    show_result(evaluation)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == [
        "Finds 1,334 of 2,669 with a pneumothorax; false alarms in 938 of 9,378 without.",
        "Kaggle Dice 0.800; predicting nothing scores 0.667.",
        "To find more: ptxdist evaluate RUN --sensitivity 0.95, then predict with --at.",
    ]
    assert [line.split() for line in lines[3:9]] == [
        ["in", "use", "95", "%", "interval", "at", "0.25", "at", "0.5", "at", "0.55", "nothing"],
        ["Kaggle", "Dice", "0.800", "0.790", "to", "0.810", "0.750", "0.750", "0.750", "0.667"],
        ["Dice", "of", "positives", "0.40", "too", "few", "0.40", "0.40", "0.40", "0.00"],
        ["positives", "found", "1,334", "of", "2,669", "1,281", "to", "1,388", "1,334", "1,334", "1,334", "0"],
        ["false", "alarms", "938", "of", "9,378", "too", "few", "938", "938", "938", "0"],
        ["AUROC", "0.80", "0.70", "to", "0.90", "0.5"],
    ]
    assert "in use: tuned thresholds 0.825 and 0.475, ≥ 8,192 pixels, score ≥ 0.125" in lines
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sensitivity": 0.0, "specificity": 1.0}, "Finds nothing: not a pixel is predicted in any of the 9 images."),
        ({"kaggle_dice": 0.5}, "Kaggle Dice 0.50; predicting nothing scores 0.67, which is no worse."),
        ({"positives": 0, "sensitivity": None}, "No image is positive; false alarms in 1 of 9 images."),
        ({"cases": 3, "specificity": None}, "Finds 2 of 3 with a pneumothorax; false alarms in 0 of 0 without."),
    ],
)
def test_the_sentence_says_when_a_model_is_of_no_use(
    changed: dict[str, float], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = SCORES.model_copy(update=changed)
    show_result(
        EvaluationResult(
            threshold=0.5, min_area_px=0, flip_averaging=True, scores=scores, at_other_thresholds={}, seconds=1.0
        ),
    )
    assert said in capsys.readouterr().out.splitlines()[:2]


def test_runs_are_shown_beside_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    first = Compared(run="one", cases=9, scores=SCORES, intervals=INTERVALS, differences={}, difference_intervals={})
    second = Compared(
        run="two", cases=9, scores=SCORES, intervals={}, differences={"pooled_dice": -0.125},
        difference_intervals={"pooled_dice": (-0.25, 0.0)}, point="tuned threshold 0.45", at_threshold=SCORES,
    )  # fmt: skip
    show_comparison(Comparison(cases=9, runs=(first, second)))
    shown = capsys.readouterr().out
    assert shown.startswith("Best Kaggle Dice: 0.75, one; predicting nothing scores 0.67.\n")
    assert "-0.1250" in shown
    assert "-0.250 to +0.000" in shown
    assert "9 images that all runs have evaluated, 3 positive" in shown
    assert shown.count("at the stage's threshold") == 1
    assert "  two: tuned threshold 0.45, scored on images that it was not tuned on\n" in shown
