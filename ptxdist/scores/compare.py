"""Several evaluations beside each other: their scores on the same cases, and how sure their differences are.

Owns: which cases are compared, and the table. Refuses: evaluations without a case in common (RunError). Called by:
`cli`. Everything comes from the cases.csv of each run; no network is run. Differences are paired: every draw of
patients takes the same cases for both, so what all find hard cancels out.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ptxdist.errors import RunError
from ptxdist.records import Compared, Comparison
from ptxdist.rundir import CASES, EVALUATION
from ptxdist.scores.counts import Counts
from ptxdist.scores.intervals import difference_intervals, score_intervals
from ptxdist.scores.metrics import scores

_NEEDED = ("case_id", "group", "intersection_px", "predicted_px", "truth_px")
_SHOWN = {"kaggle_dice": "Kaggle Dice", "positive_dice": "positives only", "pooled_dice": "pooled"}


def compare(runs: Sequence[Path]) -> Comparison:
    """Scores of each run on the cases that all have evaluated, and differences from the first one.

    A run may also be the folder of an evaluation of several. Raises RunError when a run has no evaluation, or the runs
    have no case in common, or do not agree on what its truth is.
    """
    tables = [_read(run) for run in runs]
    common = [case_id for case_id in tables[0] if all(case_id in table for table in tables)]
    if not common:
        raise RunError(f"{', '.join(map(str, runs))} have evaluated no case in common; were their folds the same?")
    counts = [np.array([table[case_id][1] for case_id in common], np.int64) for table in tables]
    groups = [tables[0][case_id][0] for case_id in common]
    for run, found in zip(runs, counts, strict=True):
        if not np.array_equal(found[:, 2], counts[0][:, 2]):
            raise RunError(f"{run} and {runs[0]} were evaluated against different masks; evaluate both on one cache")
    compared = []
    for name, table, found in zip(_names(runs), tables, counts, strict=True):
        compared.append(
            Compared(
                run=name,
                cases=len(table),
                scores=scores(found),
                intervals=score_intervals(found, groups),
                differences=_differences(counts[0], found) if found is not counts[0] else {},
                difference_intervals=(difference_intervals(counts[0], found, groups) if found is not counts[0] else {}),
            )
        )
    return Comparison(cases=len(common), runs=tuple(compared))


def _names(runs: Sequence[Path]) -> list[str]:
    """As much of the end of each path as tells the runs apart: exp1/fold-0, exp2/fold-0."""
    paths = [run.resolve().parts for run in runs]
    length = next(n for n in range(1, max(map(len, paths)) + 1) if len({p[-n:] for p in paths}) == len(set(paths)))
    return [Path(*path[-length:]).as_posix() for path in paths]


def as_markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown table; differences with their intervals below each score."""
    lines = [
        f"| {comparison.cases:,} images, {comparison.runs[0].scores.positives:,} positive | "
        + " | ".join(_SHOWN.values())
        + " |",
        "|---|" + "---|" * len(_SHOWN),
    ]
    for run in comparison.runs:
        lines.append(f"| {run.run} | " + " | ".join(cell(run, name) for name in _SHOWN) + " |")
    nothing = comparison.runs[0].scores.all_empty_dice
    lines.append(f"| predicting nothing | {nothing:.4f} | 0.0000 | 0.0000 |")
    return "\n".join(lines) + "\n"


def cell(run: Compared, name: str) -> str:
    """One score of a run as text: the value and its interval, and the difference from the first run and its."""
    value = getattr(run.scores, name)
    text = "" if value is None else f"{value:.4f}{_span(run.intervals.get(name))}"
    if name in run.differences:
        text += f"; {run.differences[name]:+.4f}{_span(run.difference_intervals.get(name), '+')}"
    return text


def _span(interval: tuple[float, float] | None, sign: str = "") -> str:
    return "" if interval is None else f" ({interval[0]:{sign}.4f} to {interval[1]:{sign}.4f})"


def _differences(first: Counts, other: Counts) -> dict[str, float]:
    before, after = scores(first), scores(other)
    pairs = {name: (getattr(before, name), getattr(after, name)) for name in _SHOWN}
    return {name: new - old for name, (old, new) in pairs.items() if old is not None and new is not None}


def _read(run: Path) -> dict[str, tuple[str, tuple[int, int, int]]]:
    """Group and counts of each case, by its id, in the order of the file."""
    path = next((p for p in (run / EVALUATION / CASES, run / CASES) if p.is_file()), None)
    if path is None:
        raise RunError(f"{run} has no evaluation (no {EVALUATION}/{CASES}); `ptxdist evaluate {run}` makes one")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [[row[name] for name in _NEEDED] for row in csv.DictReader(file)]
        return {case_id: (group, (int(a), int(b), int(c))) for case_id, group, a, b, c in rows}
    except (KeyError, ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged or of another version; `ptxdist evaluate` makes it anew") from error
