"""The tables of an evaluation: cases.csv, predictions.csv and histograms.safetensors.

    cases.csv               a row for each case with COLUMNS, from which every score can be computed again
    predictions.csv         ImageId, EncodedPixels: its mask as run-length text, in the challenge's format
    histograms.safetensors  `histograms`, int32 (case, 2, LEVELS): pixels by probability, see `counts`

Owns: columns, writing and reading of these files. Refuses: damaged tables, and a cache that was split differently
after the run was evaluated, or shows another finding (RunError).
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import save_file

from ptxdist import files
from ptxdist.cache.catalog import Catalog
from ptxdist.errors import RunError
from ptxdist.finding import PNEUMOTHORAX
from ptxdist.rundir import CASES, EVALUATION, HISTOGRAMS, PREDICTIONS, read_origin
from ptxdist.scores.counts import Histograms

FIXED_THRESHOLDS = (0.5, 0.55)  # those of the source, scored beside the run's own threshold
COLUMNS = (
    "case_id", "group", "fold", "positive", "masks", "truth_px", "predicted_px", "intersection_px", "kaggle_dice",
    "score", "view", "sex", "age", "brightness", "rows", "columns", "patient_in_training",
    "pair_predicted_px", "pair_intersection_px", "triplet_predicted_px", "triplet_intersection_px",
    *(f"at_{threshold}_{what}_px" for threshold in FIXED_THRESHOLDS for what in ("predicted", "intersection")),
)  # fmt: skip
_PX, _FLOATS = ("intersection_px", "predicted_px", "truth_px"), ("kaggle_dice", "score")  # as in CaseRow
_PREDICTION_COLUMNS = ("ImageId", "EncodedPixels")


@dataclass(frozen=True)
class CaseRow:
    """What is read of a row of cases.csv: identity, counts at the run's own threshold, Dice, score."""

    case_id: str
    group: str
    intersection_px: int
    predicted_px: int
    truth_px: int
    kaggle_dice: float
    score: float

    @property
    def positive(self) -> bool:
        """Whether the image has a true mask."""
        return self.truth_px > 0

    @property
    def counts(self) -> tuple[int, int, int]:
        """Intersection, predicted and truth in pixels, a row of `counts.Counts`."""
        return self.intersection_px, self.predicted_px, self.truth_px


def write_tables(
    folder: Path,
    cases: Iterable[Mapping[str, object]],
    predictions: Iterable[tuple[str, str]],
    histograms: Histograms,
) -> None:
    """Write the three files, each atomically: values of COLUMNS, ids with masks as text, and counts in the same order.

    Leftovers of killed processes are removed first. RunError when a file cannot be written.
    """
    files.remove_leftovers(folder, deep=False)
    files.write_table(folder / CASES, COLUMNS, ([row[name] for name in COLUMNS] for row in cases))
    files.write_table(folder / PREDICTIONS, _PREDICTION_COLUMNS, predictions)
    with files.replacing(folder / HISTOGRAMS) as temporary:
        save_file({"histograms": histograms}, temporary)


def read_cases(run: Path) -> list[CaseRow]:
    """Rows of the cases.csv of a run, or of the folder of an evaluation, in order.

    RunError when there is none, or it is damaged.
    """
    path = next((path for path in (run / EVALUATION / CASES, run / CASES) if path.is_file()), None)
    if path is None:
        raise RunError(f"{run} has no evaluation (no {EVALUATION}/{CASES}); `ptxdist evaluate {run}` makes one")
    try:
        return [
            CaseRow(
                row["case_id"], row["group"], *(int(row[name]) for name in _PX), *(float(row[name]) for name in _FLOATS)
            )
            for row in _read(path)
        ]
    except (KeyError, ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged or of another version; `ptxdist evaluate` rewrites it") from error


def read_predictions(run: Path) -> dict[str, str]:
    """The masks of a run as run-length text, by image id; RunError when the table is missing or damaged."""
    path = next((path for path in (run / EVALUATION / PREDICTIONS, run / PREDICTIONS) if path.is_file()), None)
    if path is None:
        raise RunError(f"{run / EVALUATION / PREDICTIONS} is missing; `ptxdist evaluate {run}` writes it")
    try:
        return {row["ImageId"]: row["EncodedPixels"] for row in _read(path)}
    except (KeyError, ValueError) as error:
        raise RunError(f"{path} is damaged or of another version; `ptxdist evaluate {run}` rewrites it") from error


def refuse_other_split(run: Path, catalog: Catalog, fold: int) -> None:
    """RunError when the cache was split differently after the run, or its masks show another finding now.

    With another split, training images would be scored.

    Cases that were added or removed do no harm; one that the run held out and that is in training now does. A run
    without an evaluation, or whose table of cases cannot be read, is not checked.
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
        held_out = [row.get("case_id") for row in _read(path)]
    except ValueError:  # `evaluate` is about to rewrite it
        return
    fold_of: dict[str | None, int] = {case.case_id: case.fold for case in catalog.labelled}
    if moved := sum(fold_of.get(case_id, -1) not in (-1, fold) for case_id in held_out):
        raise RunError(
            f"the cache of {run} was split differently after the run: {moved} of the {len(held_out)} images that it "
            "held out are training images now, so images that it was trained on are held out. Run `ptxdist preprocess` "
            "as before (the same --patients and --folds), or train again"
        )


def _read(path: Path) -> list[dict[str, str]]:
    """Rows by column; ValueError when the file is no CSV in UTF-8."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except csv.Error as error:
        raise ValueError(str(error)) from error
