"""Paired differences that `ptxdist compare` does not show: of AUROC, and of the Kaggle Dice at cross-fitted points.

    python tests/benchmarks/paired_scores.py EVALUATION OTHER

Both are folders with the cases.csv of the same cases. Intervals are of a bootstrap over patients (95 %, 4,000 draws).
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score

Values = npt.NDArray[np.float64]
DRAWS = 4_000


def read(folder: str) -> dict[str, dict[str, str]]:
    with open(Path(folder) / "cases.csv", newline="") as file:
        return {row["case_id"]: row for row in csv.DictReader(file)}


def kaggle_dice(row: dict[str, str], point: str) -> float:
    truth, predicted, both = (
        float(row[key]) for key in ("truth_px", f"{point}_predicted_px", f"{point}_intersection_px")
    )
    return 1.0 if truth == predicted == 0 else 2 * both / (truth + predicted)


def main() -> None:
    one, other = map(read, sys.argv[1:3])
    if one.keys() != other.keys():
        sys.exit("these are not the same cases")
    ids = sorted(one)
    truth = np.array([float(one[case]["truth_px"]) > 0 for case in ids])
    patient = np.unique([one[case]["group"] for case in ids], return_inverse=True)[1]
    draw, patients = np.random.default_rng(0), int(patient.max()) + 1

    def show(name: str, score: Callable[[dict[str, dict[str, str]], Values], float]) -> None:
        weights = (np.bincount(draw.integers(0, patients, patients), minlength=patients)[patient] for _ in range(DRAWS))
        found = [score(one, weight) - score(other, weight) for weight in weights]
        ones = np.ones(len(ids))
        low, high = np.quantile(found, (0.025, 0.975))
        before, after = score(other, ones), score(one, ones)
        print(f"{name}: {after:.3f}, other {before:.3f}: {after - before:+.3f} ({low:+.3f} to {high:+.3f})")

    def auroc(rows: dict[str, dict[str, str]], weight: Values) -> float:
        scores = [float(rows[case]["score"]) for case in ids]
        return float(roc_auc_score(truth, scores, sample_weight=weight))

    show("AUROC", auroc)
    for point in ("pair", "triplet"):
        dice = {id(rows): np.array([kaggle_dice(rows[case], point) for case in ids]) for rows in (one, other)}
        show(f"Kaggle Dice, {point}", lambda rows, weight, dice=dice: float(np.average(dice[id(rows)], weights=weight)))


if __name__ == "__main__":
    main()
