"""The result of a run in the terminal: every score with its interval and its value without a model."""

from __future__ import annotations

import pytest

from ptxdist import console
from ptxdist.records import EvaluationResult, Intervals, Reliability, Scores
from ptxdist.scores.compare import Compared, Comparison

SCORES = Scores(
    cases=9, positives=3, kaggle_dice=0.75, positive_dice=None, pooled_dice=0.5, sensitivity=0.5, specificity=0.9,
    all_empty_dice=0.6667,
)  # fmt: skip
INTERVALS: Intervals = {"kaggle_dice": (0.5, 0.8), "sensitivity": (0.25, 0.75), "auroc": (0.7, 0.9)}


def test_an_evaluation_is_shown_with_intervals_and_baselines(capsys: pytest.CaptureFixture[str]) -> None:
    calibration = Reliability(things="px", counts=(6, 4), predicted=(0.1, 0.9), observed=(0.0, 1.0), error=0.1)
    console.show_result(
        (),
        EvaluationResult(
            threshold=0.5, min_area_px=0, flip_averaging=True, scores=SCORES, auroc=0.8, intervals=INTERVALS,
            at_other_thresholds={"0.55": SCORES}, calibration=(calibration,), seconds=1.0,
        ),
    )  # fmt: skip
    shown = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line.split() for line in shown.splitlines() if line.startswith("│")}
    assert [word for word in rows["predicting nothing"] if word[0] == "0"] == ["0.6667", "0.0000", "0.0000"]
    assert [word for word in rows["95 % interval"] if word[0] == "0"] == ["0.50-0.80"]
    assert [word for word in rows["(threshold 0.55)"] if word[:2] == "0." and len(word) == 6] == ["0.7500", "0.5000"]
    text = " ".join(shown.split())
    assert "sensitivity 0.5000 [0.25-0.75] (predicting nothing 0)" in text
    assert "specificity 0.9000 [too few] (predicting nothing 1)" in text
    assert "AUROC 0.8000 [0.70-0.90] (chance 0.5)" in text
    assert "pooled IoU 0.3333 [too few] (predicting nothing 0)" in text
    assert "calibration error of pixels 0.1000 (probability 0 for all: 0.4000; their positive share 0.4000" in text


def test_runs_are_shown_beside_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    first = Compared(run="one", cases=9, scores=SCORES, intervals=INTERVALS, differences={}, difference_intervals={})
    second = Compared(
        run="two", cases=9, scores=SCORES, intervals={}, differences={"pooled_dice": -0.125},
        difference_intervals={"pooled_dice": (-0.25, 0.0)},
    )  # fmt: skip
    console.show_comparison(Comparison(cases=9, runs=(first, second)))
    shown = capsys.readouterr().out
    assert "-0.1250" in shown
    assert "-0.250 to +0.000" in shown
    assert "9 images that all runs have evaluated, 3 positive" in shown
