"""How often the 95 % intervals of the scores hold the right value, by simulation.

    python tests/benchmarks/bench_coverage.py [--samples 2000]

Patients are drawn from a large made-up population: one to thirty images each, alike within a patient in whether they
show a pneumothorax, whether it is found and how well. The right value of a score is that of the whole population.
Samples of 20, 87 and 536 images (on average) are drawn by patient; those from fewer than FEWEST patients have no
interval and are left out. Two more populations have no likeness within patients, and a strong one with a better model.
"""

from __future__ import annotations

import argparse
from functools import cache

import numpy as np
import numpy.typing as npt

from ptxdist.scores.intervals import score_intervals
from ptxdist.scores.metrics import auroc, scores

PATIENTS = 100_000
POPULATIONS = {"alike within a patient": (1.0, 1.6), "independent": (0.0, 1.6), "very alike, better": (2.0, 3.0)}

Population = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64], dict[str, float]]


@cache
def population(alike: float, better: float) -> Population:
    """First case of each patient (patients + 1,), counts (n, 3), scores (n,), and the right value of each score."""
    random = np.random.default_rng(0)
    sizes = 1 + np.minimum(random.lognormal(-0.6, 1.1, PATIENTS).astype(int), 29)
    patient = np.repeat(np.arange(PATIENTS), sizes)
    count = len(patient)
    own = alike * random.normal(0, 1, (PATIENTS, 3))[patient]

    def happens(log_odds: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        return np.asarray(random.random(count) < 1 / (1 + np.exp(-log_odds)))

    positive = happens(-1.9 + 1.5 * own[:, 0])
    marked = np.where(positive, happens(0.3 + own[:, 1]), happens(-2.2 + own[:, 1]))
    truth = np.where(positive, 300 + random.lognormal(9.06, 1.08, count), 0).astype(int)
    area = np.where(positive, truth, 4000) * random.lognormal(0, 0.6, count)
    predicted = np.where(marked, np.maximum(50, area), 0).astype(int)
    quality = 1 / (1 + np.exp(-(0.2 + 0.7 * own[:, 2] + random.normal(0, 1, count))))
    overlap = np.where(positive & marked, np.minimum(truth, predicted) * quality, 0).astype(int)
    score = -1.2 + better * positive + 0.5 * own[:, 2] + random.normal(0, 1, count)
    counts = np.column_stack((overlap, predicted, truth)).astype(np.int64)
    some = random.choice(count, 40_000, replace=False)
    right = {name: value for name, value in scores(counts).model_dump().items() if isinstance(value, float)}
    right |= {"pooled_iou": scores(counts).pooled_iou, "auroc": float(auroc(score[some], positive[some])[0])}
    return np.concatenate(([0], np.cumsum(sizes))), counts, score, right


def coverage(
    cases: int, samples: int, *, seed: int, alike: float = 1.0, better: float = 1.6
) -> dict[str, tuple[float, int]]:
    """Share of `samples` whose interval holds the right value, and of how many samples, for each score."""
    starts, counts, score, right = population(alike, better)
    random, held = np.random.default_rng(seed), dict[str, list[bool]]()
    for _ in range(samples):
        patients = random.choice(PATIENTS, round(cases * PATIENTS / len(counts)), replace=False)
        rows = np.concatenate([np.arange(starts[one], starts[one + 1]) for one in patients])
        groups = np.repeat(patients, starts[patients + 1] - starts[patients]).astype(str).tolist()
        for name, (low, high) in score_intervals(counts[rows], groups, image_score=score[rows]).items():
            held.setdefault(name, []).append(low <= right[name] <= high)
    return {name: (float(np.mean(found)), len(found)) for name, found in held.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    samples = parser.parse_args().samples
    for name, (alike, better) in POPULATIONS.items():
        print(f"\n| {name} | 20 images | 87 images | 536 images |\n|---|---|---|---|")
        tables = [coverage(cases, samples, seed=1, alike=alike, better=better) for cases in (20, 87, 536)]
        for score in tables[0]:
            print(f"| {score} | {' | '.join(f'{100 * table[score][0]:.1f} %' for table in tables)} |")


if __name__ == "__main__":
    main()
