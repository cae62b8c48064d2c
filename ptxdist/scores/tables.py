"""The tables of an evaluation: how they are written, and what cases.csv says of the split.

Refuses: a cache that has been split otherwise since the run (RunError).
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path

from ptxdist.cache.catalog import Catalog
from ptxdist.errors import RunError
from ptxdist.rundir import CASES, EVALUATION


def refuse_other_split(run: Path, catalog: Catalog, fold: int) -> None:
    """RunError when the cache has been split anew since the run: it would be scored on what it was trained on.

    Cases that came or went since do no harm; one that the run held out and that trains now does. A run without an
    evaluation yet is not judged.
    """
    path = run / EVALUATION / CASES
    if not path.is_file():
        return
    with open(path, newline="", encoding="utf-8") as file:
        held_out = [row["case_id"] for row in csv.DictReader(file)]
    fold_of = {case.case_id: case.fold for case in catalog.labelled}
    if moved := sum(fold_of.get(case_id, -1) not in (-1, fold) for case_id in held_out):
        raise RunError(
            f"the cache of {run} has been split anew since: {moved} of the {len(held_out)} images that it held out are "
            "training images now, so others that it was trained on are held out. Run `ptxdist preprocess` as it was "
            "before (the same --patients and --folds), or train again"
        )


def write_csv(path: Path, header: Iterable[object], rows: Iterable[Iterable[object]]) -> None:
    """Write a CSV file in one step; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    os.replace(temporary, path)
