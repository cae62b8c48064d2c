"""Evaluation at the original resolution: cases/s and the network's part of it; then all that is concluded from counts.

    python tests/benchmarks/bench_evaluation.py [--size 256] [--images 24] [--cases 12047] [--rounds 3] [--save NAME]

score           `score_cases` as `ptxdist evaluate` runs it: network with flip averaging, up-sampling to 1024 x 1024,
                histograms, counts at three thresholds, masks as run-length text; images/s
network         the same forward passes alone, on one batch that is already there
conclude        scores, intervals, operating points, calibration and subgroups of so many cases from their histograms;
                seconds, and the peak memory of the process
of it, tune     the search of the triplet and its cross-fitted estimate alone
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench_reading import make_store
from measuring import header, in_turn, publish, table

from ptxdist.config import ModelSettings
from ptxdist.data import rle
from ptxdist.data.catalog import Case
from ptxdist.learn.analysis import Evaluated, conclude
from ptxdist.learn.operating import tune
from ptxdist.learn.scoring import LEVELS, CaseCounts, score_cases
from ptxdist.learn.unet import build_unet

CPU, SIDE_PX, BLOCK = torch.device("cpu"), 1024, 8
THRESHOLDS = (0.55, 0.5)


def make_cases(count: int) -> list[Case]:
    """Cases of 1024 x 1024 px, every fifth with a mask of a common size; two images a patient."""
    mask = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
    mask[200:500, 700:730] = 255
    text = rle.encode(mask)
    return [
        Case(
            f"case-{number:05}", "", "none", SIDE_PX, SIDE_PX, f"patient-{number // 2}",
            (text,) if number % 5 == 0 else (), 9_000 if number % 5 == 0 else 0,
            view=("AP", "PA")[number % 3 == 0], sex=("F", "M")[number % 2], age=20 + number % 60, fold=0, split="val",
        )
        for number in range(count)
    ]  # fmt: skip


def make_counts(cases: list[Case]) -> CaseCounts:
    """Counts of a network that finds most of what is there and some that is not."""
    random, count = np.random.default_rng(0), len(cases)
    histograms = np.zeros((count, 2, LEVELS), np.int32)
    truth = np.array([case.area_px for case in cases])
    share = random.dirichlet(np.r_[np.full(LEVELS // 2, 0.02), np.full(LEVELS // 2, 0.05)], count)
    histograms[:, 1] = (truth[:, None] * share).astype(np.int32)
    histograms[:, 1, -1] += (truth - histograms[:, 1].sum(1)).astype(np.int32)
    histograms[:, 0] = histograms[:, 1] + random.poisson(random.exponential(8, (count, 1)), (count, LEVELS))
    histograms[:, 0, 0] += SIDE_PX**2 - histograms[:, 0].sum(1)
    reached = histograms[:, :, LEVELS // 2 :].sum(2)
    own = np.stack((reached[:, 1], reached[:, 0], truth), axis=1).astype(np.int64)
    return CaseCounts(
        loss=np.zeros(count), score=random.beta(1 + (truth > 0), 2, count), at_stage=own,
        at_full=np.stack([own] * len(THRESHOLDS)), histograms=histograms, brightness=random.normal(120, 20, count),
    )  # fmt: skip


def main() -> None:
    """Measure and print; with --save keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--cases", type=int, default=12_047)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = build_unet(ModelSettings(encoder_weights="none")).to(memory_format=torch.channels_last).eval()
    few, many = make_cases(options.images), make_cases(options.cases)
    counts = make_counts(many)
    groups = [case.group for case in many]
    batch = torch.randint(0, 256, (BLOCK, 1, options.size, options.size), dtype=torch.uint8)

    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder), options.size, options.images)

        def score() -> float:
            started = time.perf_counter()
            score_cases(
                model, store, few, np.arange(options.images), thresholds=(0.55, 0.5), device=CPU, flip_averaging=True,
                histograms=True, on_mask=lambda index, mask: rle.encode(mask),
            )  # fmt: skip
            return options.images / (time.perf_counter() - started)

        @torch.no_grad()
        def network() -> float:
            started = time.perf_counter()
            for _ in range(0, options.images, BLOCK):
                model(batch)
                model(batch.flip(-1))
            return options.images / (time.perf_counter() - started)

        rates = in_turn({"score": score, "network": network}, options.rounds)

    def seconds_of_all() -> float:
        started = time.perf_counter()
        evaluated = Evaluated(many, counts, groups, [False] * len(many), "catalog")
        conclude(evaluated, THRESHOLDS, min_area_px=0, flip_averaging=True, runs=1)
        return time.perf_counter() - started

    def seconds_of_search() -> float:
        started = time.perf_counter()
        tune(counts.histograms, counts.at_full[0, :, 2], [case.case_id for case in many], groups, "triplet")
        return time.perf_counter() - started

    seconds = in_turn({"conclude": seconds_of_all, "of it, tune": seconds_of_search}, options.rounds)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report = {
        **header("Evaluation", ["ptxdist", "torch", "numpy"], **vars(options)),
        "images_per_second": rates,
        "seconds": seconds,
        "peak_mib": peak_mib,
    }
    part = rates["score"]["median"] / rates["network"]["median"]
    text = (
        f"{table(f'images/s at {options.size} px', rates, 2)}\n\nThe network is {part:.0%} of the time of scoring.\n\n"
        f"{table(f'seconds for {options.cases:,} cases', seconds, 2)}\n\n"
        f"Peak memory of the process: {peak_mib:,.0f} MiB."
    )
    publish(report, text, options.save)


if __name__ == "__main__":
    main()
