"""The tables of an evaluation: cases.csv, predictions.csv and histograms.safetensors.

    cases.csv               a row for each case with COLUMNS, from which every score can be computed again
    predictions.csv         ImageId, EncodedPixels: its mask as run-length text, in the challenge's format
    histograms.safetensors  `histograms`, int32 (case, 2, LEVELS): pixels by probability, see `counts`

Owns: columns, writing and reading of these files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from safetensors.numpy import save_file

from ptxdist import files
from ptxdist.cache.catalog import Catalog
from ptxdist.errors import RunError
from ptxdist.finding import PNEUMOTHORAX
from ptxdist.rundir import CASES, EVALUATION, HISTOGRAMS, PREDICTIONS, RESULT, read_evaluation, read_origin
from ptxdist.scores.counts import Histograms

FIXED_THRESHOLDS = (0.5, 0.55)  # those of the source, scored beside the run's own threshold
COLUMNS = (
    "case_id", "group", "fold", "positive", "masks", "truth_px", "predicted_px", "intersection_px", "kaggle_dice",
    "score", "view", "sex", "age", "brightness", "rows", "columns", "patient_in_training",
    "pair_predicted_px", "pair_intersection_px", "triplet_predicted_px", "triplet_intersection_px",
    *(f"at_{threshold}_{what}_px" for threshold in FIXED_THRESHOLDS for what in ("predicted", "intersection")),
)  # fmt: skip
_PX, _FLOATS = ("intersection_px", "predicted_px", "truth_px"), ("kaggle_dice", "score")  # as in CaseRow
_MOST_PX = 2**32  # of an image
_MASK = re.compile("-1|[0-9]+( [0-9]+)*", re.ASCII)  # as `labels.rle` writes it
Row = TypeVar("Row")
_PREDICTION_COLUMNS = ("ImageId", "EncodedPixels")


@dataclass(frozen=True)
class CaseRow:
    """What is read of a row of cases.csv: identity, counts at an operating point, Dice, score, mean grey level."""

    case_id: str
    group: str
    intersection_px: int
    predicted_px: int
    truth_px: int
    kaggle_dice: float
    score: float
    brightness: float = 0.0

    @property
    def positive(self) -> bool:
        """Whether the image has a true mask."""
        return self.truth_px > 0

    @property
    def counts(self) -> tuple[int, int, int]:
        """Intersection, predicted and truth in pixels, a row of `counts.Counts`."""
        return self.intersection_px, self.predicted_px, self.truth_px


def write_tables(
    folder: Path, cases: Iterable[Mapping[str, object]], predictions: Iterable[tuple[str, str]], histograms: Histograms
) -> None:
    """Write the three files, each atomically: values of COLUMNS, ids with masks as text, and counts in the same order.

    Leftovers of killed processes are removed first. RunError when a file cannot be written.
    """
    files.remove_leftovers(folder, deep=False)
    files.write_table(folder / CASES, COLUMNS, ([row[name] for name in COLUMNS] for row in cases))
    files.write_table(folder / PREDICTIONS, _PREDICTION_COLUMNS, predictions)
    with files.replacing(folder / HISTOGRAMS) as temporary:
        save_file({"histograms": histograms}, temporary)


def read_cases(run: Path, tuned: str = "") -> list[CaseRow]:
    """Rows of the cases.csv of a run, or of the folder of an evaluation, in order.

    With the kind of a `tuned` point, pixels and Dice are those at the points that were tuned on other patients.
    RunError when there is none, when it is damaged, and when it has another number of cases than its evaluation.
    """
    return _read_table(run, CASES, partial(_case_row, tuned=tuned))


def read_predictions(run: Path) -> dict[str, str]:
    """The masks of a run as run-length text, by image id; errors as for `read_cases`."""
    return dict(_read_table(run, PREDICTIONS, _prediction))


def _read_table(run: Path, name: str, parse: Callable[[Mapping[str, str]], Row]) -> list[Row]:
    path = next((path for path in (run / EVALUATION / name, run / name) if path.is_file()), None)
    if path is None:
        raise RunError(f"{run} has no {EVALUATION}/{name}; `ptxdist evaluate {run}` makes it")
    has_result = os.path.lexists(path.parent / RESULT)
    expected = read_evaluation(path.parent, name).scores.cases if has_result else None
    remedy = f"`ptxdist evaluate {run}` rewrites it"
    try:
        rows = [parse(row) for row in files.read_table(path)]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged or of another version; {remedy}") from error
    if expected not in (None, len(rows)):  # cut between two lines; an older version has recorded no checksum
        raise RunError(f"{path} has {len(rows):,} cases and its evaluation {expected:,}; {remedy}")
    return rows


def _case_row(row: Mapping[str, str], tuned: str) -> CaseRow:
    counts, shares = [int(row[name]) for name in _PX], [float(row[name]) for name in _FLOATS]
    if tuned:
        counts[:2] = (int(row[f"{tuned}_{name}"]) for name in _PX[:2])
        total = counts[1] + counts[2]
        shares[0] = 2 * counts[0] / total if total else 1.0
    (overlap, predicted, truth), (dice, score) = counts, shares
    brightness = float(row.get("brightness") or 0)
    is_possible = 0 <= overlap <= min(predicted, truth) and max(predicted, truth) <= _MOST_PX
    if not is_possible or not all(0 <= share <= 1 for share in (*shares, brightness / 255)):
        raise ValueError("a number is out of its range")
    return CaseRow(row["case_id"], row["group"], overlap, predicted, truth, dice, score, brightness)


def _prediction(row: Mapping[str, str]) -> tuple[str, str]:
    if not _MASK.fullmatch(row["EncodedPixels"]):
        raise ValueError(f"the mask of {row['ImageId']} is none")
    return row["ImageId"], row["EncodedPixels"]


def refuse_other_split(run: Path, catalog: Catalog, fold: int) -> None:
    """RunError when the cache was split differently after the run, or its masks show another finding now.

    With another split, training images would be scored. Cases that were added or removed do no harm; one that the run
    held out and that is in training now does. A run without an evaluation, or whose table of cases cannot be read, is
    not checked.
    """
    trained = origin.finding if (origin := read_origin(run)) else PNEUMOTHORAX
    if trained.is_other(catalog.finding):
        raise RunError(
            f"{run} segments {trained.name}, and the masks in its cache show {catalog.finding.name} now; make that "
            "cache again with its own labels"
        )
    path = run / EVALUATION / CASES
    if not path.is_file():
        return
    try:
        held_out = [row.get("case_id") for row in files.read_table(path)]
    except (OSError, ValueError):  # `evaluate` is about to rewrite it
        return
    fold_of: dict[str | None, int] = {case.case_id: case.fold for case in catalog.labelled}
    if moved := sum(fold_of.get(case_id, -1) not in (-1, fold) for case_id in held_out):
        raise RunError(
            f"the cache of {run} was split differently after the run: {moved} of the {len(held_out)} images that it "
            "held out are training images now, so images that it was trained on are held out. Run `ptxdist preprocess` "
            "as before (the same --patients and --folds), or train again"
        )
