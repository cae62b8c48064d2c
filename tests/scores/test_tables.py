"""The tables of an evaluation: what is written is read, and damage is reported with what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ptxdist.cache.catalog import read_catalog
from ptxdist.errors import RunError
from ptxdist.rundir import CASES, EVALUATION, HISTOGRAMS, PREDICTIONS
from ptxdist.scores.counts import LEVELS
from ptxdist.scores.tables import COLUMNS, CaseRow, read_cases, read_predictions, refuse_other_split, write_tables

ROWS = [
    CaseRow("a", "p1", 10, 20, 30, 0.4, 0.9),
    CaseRow("b, with a comma", "p2", 0, 0, 0, 1.0, 0.125),
]
HISTOGRAM = np.arange(2 * 2 * LEVELS, dtype=np.int32).reshape(2, 2, LEVELS)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = [dict.fromkeys(COLUMNS, "") | vars(row) for row in ROWS]
    write_tables(tmp_path / EVALUATION, rows, [("a", "1 5"), ("b, with a comma", "-1")], HISTOGRAM)
    return tmp_path


def test_what_is_written_is_read_from_the_run_and_from_the_folder_of_the_evaluation(run: Path) -> None:
    assert read_cases(run) == read_cases(run / EVALUATION) == ROWS
    assert [row.positive for row in ROWS] == [True, False]
    assert read_predictions(run) == {"a": "1 5", "b, with a comma": "-1"}
    assert np.array_equal(load_file(run / EVALUATION / HISTOGRAMS)["histograms"], HISTOGRAM)


def test_leftovers_of_a_killed_process_are_removed(run: Path) -> None:
    leftover = run / EVALUATION / f"{CASES}.ptxdist-0123abcd.tmp"
    leftover.touch()
    write_tables(run / EVALUATION, [], [], HISTOGRAM)
    assert {path.name for path in (run / EVALUATION).iterdir()} == {CASES, PREDICTIONS, HISTOGRAMS}
    assert read_cases(run) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("truth_px", "truth"),
        lambda text: text.replace("0.9", "high"),
        lambda text: text[:-30],
        lambda text: text + "\xff",
        lambda text: text.replace("30", str(2**63)),  # more than an integer of NumPy
        lambda text: text.replace("10,", "25,"),  # more in both masks than in one
    ],
)
def test_a_damaged_table_is_rejected_and_does_not_keep_evaluate_from_rewriting_it(  # type: ignore[no-untyped-def]
    run: Path, cache: Path, damage
) -> None:
    path = run / EVALUATION / CASES
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="latin-1")
    with pytest.raises(RunError, match=r"cases\.csv is damaged .* `ptxdist evaluate .*` rewrites it"):
        read_cases(run)
    refuse_other_split(run, read_catalog(cache), 0)


def test_a_missing_table_is_reported_with_the_command_that_makes_it(tmp_path: Path) -> None:
    for read in (read_cases, read_predictions):
        with pytest.raises(RunError, match="ptxdist evaluate"):
            read(tmp_path)
