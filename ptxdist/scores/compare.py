"""Comparison of evaluations: their scores on the same cases, with 95 % intervals of the differences.

Everything is computed from the cases.csv of each run, at the operating point that it has in use (`headline.points`);
a tuned point is scored on patients that it was not tuned on. Differences are paired: each patient is left out of both
runs at once, so that cases which are hard for every run cancel out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ptxdist.errors import RunError
from ptxdist.finding import FindingType
from ptxdist.records import EvaluationResult, Intervals, Record, Scores
from ptxdist.rundir import CASES, EVALUATION, SETTINGS, read_evaluation, read_settings
from ptxdist.scores.headline import points, short
from ptxdist.scores.intervals import difference_intervals, score_intervals
from ptxdist.scores.metrics import differences, scores
from ptxdist.scores.names import DICES, Score, markdown
from ptxdist.scores.tables import read_cases


class Compared(Record):
    """One run of a comparison: its scores on the common cases, and its differences from the first run.

    `run` is the name of its folder, `cases` how many it evaluated itself; the first run has no differences. Masks are
    those at the `point` in use; `at_threshold` are the scores at the stage's own threshold, if another point is in use.
    """

    run: str
    cases: int
    scores: Scores
    intervals: Intervals
    differences: dict[str, float]
    difference_intervals: Intervals
    point: str = ""
    at_threshold: Scores | None = None


class Comparison(Record):
    """Scores of several runs on the `cases` images that all of them evaluated."""

    cases: int
    runs: tuple[Compared, ...]


class DataComparison(Record):
    """The comparison on one of several data sets; `models` are the names of its runs' models, in their order."""

    data: str
    models: tuple[str, ...]
    comparison: Comparison


def compare(runs: Sequence[Path]) -> Comparison:
    """Scores of each run on the cases that all runs have evaluated, and differences from the first run.

    Both are at the operating points in use. A run may also be the folder of an evaluation of several runs. Raises
    RunError when a run has no evaluation, when the runs have no common case, or when their true masks differ or show
    different findings.
    """
    _refuse_other_findings(runs)
    used = [_in_use(run) for run in runs]
    tables = [{row.case_id: row for row in read_cases(run, kind)} for run, (_, kind) in zip(runs, used, strict=True)]
    common = [case_id for case_id in tables[0] if all(case_id in table for table in tables)]
    if not common:
        raise RunError(f"{', '.join(map(str, runs))} have no case in common; did they hold out the same fold?")
    counts = [np.array([table[case_id].counts for case_id in common], np.int64) for table in tables]
    groups = [tables[0][case_id].group for case_id in common]
    for run, found in zip(runs, counts, strict=True):
        if not np.array_equal(found[:, 2], counts[0][:, 2]):
            raise RunError(f"{run} and {runs[0]} were evaluated against different masks; evaluate both on one cache")
    compared = []
    for run, name, (point, kind), table, found in zip(runs, _names(runs), used, tables, counts, strict=True):
        own = {row.case_id: row.counts for row in read_cases(run)} if kind else {}
        compared.append(
            Compared(
                run=name,
                cases=len(table),
                scores=scores(found),
                intervals=score_intervals(found, groups),
                differences=differences(counts[0], found) if found is not counts[0] else {},
                difference_intervals=(difference_intervals(counts[0], found, groups) if found is not counts[0] else {}),
                point=point,
                at_threshold=scores(np.array([own[case_id] for case_id in common], np.int64)) if own else None,
            )
        )
    return Comparison(cases=len(common), runs=tuple(compared))


def by_data(runs: Sequence[Path]) -> tuple[DataComparison, ...]:
    """The comparisons of runs and evaluations, one for each data set: those with a common case are of one.

    In each, models are named, so that one can be found in all of them. Errors as for `compare`.
    """
    _refuse_other_findings(runs)
    groups: list[tuple[set[str], list[Path]]] = []
    for run in runs:
        ids = {row.case_id for row in read_cases(run)}
        group = next((group for group in groups if group[0] & ids), None)
        if group is None:
            groups.append((ids, [run]))
        else:
            group[0].intersection_update(ids)
            group[1].append(run)
    if len(groups) == 1:
        return (DataComparison(data="", models=(), comparison=compare(runs)),)
    origins = [[_origin(run) for run in members] for _, members in groups]
    places = [members[0][0] for members in origins]
    if len(set(places)) == 1:  # of one data set; `compare` refuses runs without a common case
        return (DataComparison(data="", models=(), comparison=compare(runs)),)
    return tuple(
        DataComparison(data=name, models=tuple(model for _, model in found), comparison=compare(members))
        for name, found, (_, members) in zip(_names(list(map(Path, places))), origins, groups, strict=True)
    )


def _refuse_other_findings(runs: Sequence[Path]) -> None:
    shown = [_finding(run) for run in runs]
    for run, finding in zip(runs, shown, strict=True):
        if finding.is_other(shown[0]):
            raise RunError(
                f"{run} is about {finding.name} and {runs[0]} about {shown[0].name}; compare runs of one finding"
            )


def _finding(run: Path) -> FindingType:
    """What the true masks of an evaluation show."""
    return _evaluation(run).finding


def _in_use(run: Path) -> tuple[str, str]:
    """The point in use in words, and its kind if it is a tuned one."""
    evaluation = _evaluation(run)
    if evaluation.point is not None:
        return f"the model's own {short(evaluation.point)}", ""
    used = points(evaluation)[0]
    return used.name, used.tuned


def _evaluation(run: Path) -> EvaluationResult:
    """The result of a run's evaluation, or of an evaluation's folder."""
    is_run = (run / SETTINGS).is_file() or (run / EVALUATION / CASES).is_file()
    return read_evaluation(run / EVALUATION if is_run else run)


def _origin(run: Path) -> tuple[str, str]:
    """The place of the data on which a run or evaluation was scored, and the name of its model."""
    if (run / SETTINGS).is_file():
        settings = read_settings(run)
        return settings.data.cache, settings.pipeline.name
    elsewhere = read_evaluation(run).elsewhere if (run / CASES).is_file() else None
    return (elsewhere.data, " + ".join(elsewhere.models)) if elsewhere else (str(run), run.name)


def matrix_markdown(parts: Sequence[DataComparison]) -> str:
    """Models by data sets as a Markdown table; a cell has Kaggle and positives-only Dice, with intervals."""
    firsts = [part.comparison.runs[0].scores for part in parts]
    models = list(dict.fromkeys(model for part in parts for model in part.models))
    heads = [
        f"{part.data}: {first.cases:,} images, {first.positives:,} positive"
        for part, first in zip(parts, firsts, strict=True)
    ]
    rows = []
    for model in models:
        named = [zip(part.models, part.comparison.runs, strict=True) for part in parts]
        runs = [next((run for name, run in part if name == model), None) for part in named]
        rows.append([model, *("; ".join(_plain(run, score) for score in DICES[:2]) if run else "" for run in runs)])
    rows.append(["predicting nothing", *(f"{first.all_empty_dice:.4f}; 0.0000" for first in firsts)])
    return markdown(["Kaggle Dice; positives-only Dice, at the point in use", *heads], rows)


def _plain(run: Compared, score: Score) -> str:
    value = score.of(run.scores)
    return "not defined" if value is None else f"{value:.4f}{_span(run.intervals.get(score.field))}"


def _names(runs: Sequence[Path]) -> list[str]:
    """The shortest end of each path that distinguishes the runs: exp1/fold-0, exp2/fold-0."""
    paths = [run.resolve().parts for run in runs]
    length = next(n for n in range(1, max(map(len, paths)) + 1) if len({p[-n:] for p in paths}) == len(set(paths)))
    return [Path(*path[-length:]).as_posix() for path in paths]


def as_markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown table; each cell has the score, the difference from the first run, and intervals."""
    first = comparison.runs[0].scores
    head = [f"{comparison.cases:,} images, {first.positives:,} positive", "point in use", *(one.name for one in DICES)]
    rows = [[run.run, run.point, *(_cell(run, score) for score in DICES)] for run in comparison.runs]
    nothing = ["predicting nothing", "", *(f"{score.baseline_of(first):.4f}" for score in DICES)]
    return markdown(head, [*rows, nothing])


def _cell(run: Compared, score: Score) -> str:
    value, name = score.of(run.scores), score.field
    text = "" if value is None else f"{value:.4f}{_span(run.intervals.get(name))}"
    if name in run.differences:
        text += f"; {run.differences[name]:+.4f}{_span(run.difference_intervals.get(name), '+')}"
    return text


def _span(interval: tuple[float, float] | None, sign: str = "") -> str:
    return "" if interval is None else f" ({interval[0]:{sign}.4f} to {interval[1]:{sign}.4f})"
