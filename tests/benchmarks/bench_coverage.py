"""How often the 95 % intervals of the scores hold the right value, by simulation.

    python tests/benchmarks/bench_coverage.py [--samples 2000]

Patients are drawn from a large made-up population: one to thirty images each, alike within a patient in whether they
show a pneumothorax, whether it is found and how well. The right value of a score is that of the whole population.
Samples of 20, 87 and 536 images (on average) are drawn by patient; those from fewer than FEWEST patients have no
interval and are left out. Two more populations have no likeness within patients, and a strong one with a better model.

Differences are those of `compare` and of tuned points, on the same cases. Another model finds other images and is a
little better. Of a tuned point, the threshold of an image's score with the best Kaggle Dice on the other patients is
used for each of five folds; the right value is what these five thresholds give in the population.
"""

from __future__ import annotations

import argparse
from functools import cache

import numpy as np
import numpy.typing as npt

from ptxdist.scores.intervals import difference_intervals, score_intervals
from ptxdist.scores.metrics import auroc, differences, image_dice, scores

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
    right |= {"pooled_iou": scores(counts).pooled_iou, "auroc": auroc(score[some], positive[some])}
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


THRESHOLDS = np.linspace(-2.5, 2.5, 21)
OWN_POINT = 10  # of these thresholds: the model's own, which gives too many masks here

Rows = npt.NDArray[np.int64]


@cache
def second_model(alike: float, better: float) -> Rows:
    """Counts of another model on the population, (n, 3): four of five of its decisions are those of the first one."""
    counts = population(alike, better)[1]
    random = np.random.default_rng(1)
    kept = random.random(len(counts)) < 0.8
    positive = counts[:, 2] > 0
    marked = np.where(kept, counts[:, 1] > 0, random.random(len(counts)) < np.where(positive, 0.65, 0.08))
    fresh = np.where(positive, counts[:, 2], 4000) * random.lognormal(0, 0.6, len(counts))
    area = np.where(counts[:, 1] > 0, counts[:, 1], fresh) * random.lognormal(0, 0.15, len(counts))
    predicted = np.where(marked, np.maximum(50, area), 0).astype(np.int64)
    share = np.divide(counts[:, 0], counts[:, 1], out=random.uniform(0.2, 0.9, len(counts)), where=counts[:, 1] > 0)
    overlap = np.where(positive, np.minimum(share * 1.03, 1) * np.minimum(predicted, counts[:, 2]), 0)
    return np.column_stack((overlap.astype(np.int64), predicted, counts[:, 2]))


@cache
def at_thresholds(alike: float, better: float) -> tuple[Rows, npt.NDArray[np.float64]]:
    """Counts at each of THRESHOLDS (thresholds, n, 3), and in the population the means of what Dice scores sum up."""
    _, counts, score, _ = population(alike, better)
    random = np.random.default_rng(2)
    positive = counts[:, 2] > 0
    area = np.where(positive, counts[:, 2], 4000) * random.lognormal(0, 0.6, len(counts))
    overlap = np.where(positive, np.minimum(area, counts[:, 2]) * random.beta(4, 2, len(counts)), 0)
    full = np.column_stack((overlap, area, counts[:, 2])).astype(np.int64)
    found = np.stack([full * np.where(score >= at, 1, 0)[:, None] for at in THRESHOLDS])
    found[:, :, 2] = counts[:, 2]
    dice = np.stack([image_dice(one) for one in found])
    parts = (dice, dice * positive, 2 * found[:, :, 0], found[:, :, 1] + found[:, :, 2], positive & (dice >= 0))
    return found, np.stack([part.mean(1, dtype=float) for part in parts], axis=1)


def dices(sums: npt.NDArray[np.float64]) -> dict[str, float]:
    """The Dice scores of such means (5,)."""
    kaggle, hits, upper, lower, share = sums.tolist()
    return {"kaggle_dice": kaggle, "positive_dice": hits / share, "pooled_dice": upper / lower}


def tuned(rows: npt.NDArray[np.intp], patient: npt.NDArray[np.intp], alike: float, better: float) -> tuple[Rows, Rows]:
    """Counts of a sample at thresholds tuned on other patients, (n, 3), and the threshold of each case (n,)."""
    at, _ = at_thresholds(alike, better)
    dice = np.stack([image_dice(one[rows]) for one in at])
    fold = np.unique(patient, return_inverse=True)[1] % 5
    best = np.array([dice[:, fold != number].sum(1).argmax() for number in range(5)])
    return at[best[fold], rows], best[fold]


def difference_coverage(
    cases: int, samples: int, *, seed: int, alike: float = 1.0, better: float = 1.6
) -> dict[str, tuple[float, int]]:
    """As `coverage`, for the differences of another model and of a tuned point from the first one."""
    starts, counts, _, _ = population(alike, better)
    other, (at, values) = second_model(alike, better), at_thresholds(alike, better)
    apart, before = differences(counts, other), dices(values[OWN_POINT])
    random, held = np.random.default_rng(seed), dict[str, list[bool]]()
    for _ in range(samples):
        patients = random.choice(PATIENTS, round(cases * PATIENTS / len(counts)), replace=False)
        rows = np.concatenate([np.arange(starts[one], starts[one + 1]) for one in patients])
        patient = np.repeat(np.arange(len(patients)), starts[patients + 1] - starts[patients])
        groups = patient.astype(str).tolist()
        mine, used = tuned(rows, patient, alike, better)
        gain = {name: value - before[name] for name, value in dices(values[used].mean(0)).items()}
        for what, right, pair in (
            ("another model", apart, (counts[rows], other[rows])),
            ("tuned point", gain, (at[OWN_POINT][rows], mine)),
        ):
            for name, (low, high) in difference_intervals(*pair, groups).items():
                if name in right:
                    held.setdefault(f"{what}, {name}", []).append(low <= right[name] <= high)
    return {name: (float(np.mean(found)), len(found)) for name, found in held.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    samples = parser.parse_args().samples
    for name, (alike, better) in POPULATIONS.items():
        print(f"\n| {name} | 20 images | 87 images | 536 images |\n|---|---|---|---|")
        tables = [
            coverage(cases, samples, seed=1, alike=alike, better=better)
            | difference_coverage(cases, samples, seed=2, alike=alike, better=better)
            for cases in (20, 87, 536)
        ]
        for score in tables[-1]:
            cells = [f"{100 * table[score][0]:.1f} %" if score in table else "too few" for table in tables]
            print(f"| {score} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
