"""Evaluation at the original resolution: cases/s and the network's part of it; then all that is concluded from counts.

    python tests/benchmarks/bench_evaluation.py [--size 256] [--images 24] [--cases 12047] [--rounds 3] [--save NAME]

score           `score_cases` as `ptxdist evaluate` runs it: network with flip averaging, up-sampling to 1024 x 1024,
                histograms, counts at two thresholds, masks as run-length text; images per second
network         the same forward passes alone, on one batch that is already there
the rest        `score_cases` with a network that costs nothing: what is to do once there are predictions
conclude        scores, intervals, operating points, calibration and subgroups of so many cases from their histograms
of it, tune     the search of the triplet and its cross-fitted estimate alone
report          `write_report` of a run that has evaluated so many cases

All times are CPU seconds of all threads, so that other work on the machine does not count: on a quiet machine one
thread (OMP_NUM_THREADS=1) takes as long by the clock, more threads less. Memory: what `the rest` holds after 256 images
and after 512 (counts and masks are kept, maps must not be), and the peak of the whole process.
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
from torch import Tensor, nn

from ptxdist.cache.catalog import FILE_NAME, Case, Catalog, Reconciliation, write_catalog
from ptxdist.cache.manifest import Manifest, StoreRecord, write_manifest
from ptxdist.cache.split import Leakage
from ptxdist.config import DataSettings, ModelSettings, PipelineSettings, Settings, StageSettings, snapshot
from ptxdist.files import write_json
from ptxdist.labels import rle
from ptxdist.records import EpochMetrics, PipelineResult, StageResult
from ptxdist.report.report import write_report
from ptxdist.rundir import EVALUATION, RESULT, SETTINGS
from ptxdist.scores.analysis import Evaluated, conclude
from ptxdist.scores.counts import LEVELS, CaseCounts
from ptxdist.scores.operating import tune
from ptxdist.scores.tables import write_tables
from ptxdist.train.scoring import score_cases
from ptxdist.train.unet import build_unet

CPU, SIDE_PX, BLOCK = torch.device("cpu"), 1024, 8
MEMORY_AT = (256, 512)  # images
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


class Blur(nn.Module):
    """Probabilities for the price of a mean, few above a half: what is left of `score_cases` without the network."""

    def forward(self, image: Tensor) -> Tensor:
        """Logits B1HW of images B1HW."""
        return nn.functional.avg_pool2d(image.float() / 16 - 10, 9, 1, 4)


def make_run(folder: Path, evaluated: Evaluated) -> Path:
    """A run of one stage that has evaluated these cases, on a cache of noise of 64 px."""
    cases, cache, run = evaluated.cases, folder / "cache", folder / "run"
    rows = make_store(cache, 64, -(-len(cases) // 128) * 128).cases
    write_manifest(cache, Manifest({64: StoreRecord(True, rows)}))
    positive = sum(bool(case.masks) for case in cases)
    counts = Reconciliation(len(cases), len(cases), positive, 0, 0, len(cases), 0, 0, len(cases), positive, 0, 0)
    leakage = Leakage("patient map", len(cases) // 2, positive, len(cases), positive, 0, 0, 0.0, 0.0)
    write_catalog(Catalog(tuple(cases), counts, leakage, (), ()), cache / FILE_NAME)
    result, table_rows = conclude(evaluated, THRESHOLDS, min_area_px=0, flip_averaging=True, runs=1)
    epoch = EpochMetrics(
        stage=1, epoch=1, learning_rate=1e-3, train_loss=1.0, val_loss=1.0, at_stage=result.scores,
        at_full=result.scores, train_seconds=1.0, val_seconds=1.0, images_per_second=1.0,
    )  # fmt: skip
    stage = StageResult(
        stage=1, size_px=64, fingerprint="", epochs=1, workers=1, seconds=1.0, best=epoch, history=(epoch,),
        weights="w", weights_sha256="",
    )  # fmt: skip
    pipeline = PipelineSettings(name="bench", stages=(StageSettings(size_px=64, epochs=1, batch_size=8),))
    write_json(run / SETTINGS, snapshot(Settings(data=DataSettings(cache=str(cache)), pipeline=pipeline)))
    write_json(run / RESULT, PipelineResult(pipeline="bench", stages=(stage,), evaluation=result, seconds=1.0))
    masks = [(case.case_id, (case.masks or ("-1",))[0]) for case in cases]
    write_tables(run / EVALUATION, table_rows, masks, evaluated.counts.histograms)
    return run


def anonymous_mib() -> float:
    """Memory of this process that is no mapped file."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


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
    stored, many = make_cases(max(options.images, *MEMORY_AT)), make_cases(options.cases)
    counts = make_counts(many)
    groups = [case.group for case in many]
    batch = torch.randint(0, 256, (BLOCK, 1, options.size, options.size), dtype=torch.uint8)

    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder), options.size, len(stored))

        def score(model: nn.Module = model, count: int = options.images) -> float:
            masks, started = {}, time.process_time()
            score_cases(
                model, store, stored, np.arange(count), thresholds=THRESHOLDS, device=CPU, flip_averaging=True,
                histograms=True, on_mask=lambda index, mask: masks.__setitem__(index, rle.encode(mask)),
            )  # fmt: skip
            return count / (time.process_time() - started)

        @torch.no_grad()
        def network() -> float:
            started = time.process_time()
            for _ in range(0, options.images, BLOCK):
                model(batch)
                model(batch.flip(-1))
            return options.images / (time.process_time() - started)

        ways = {"score": score, "network": network, "the rest": lambda: score(Blur())}
        rates = in_turn(ways, options.rounds)
        memory = []
        for count in MEMORY_AT:
            score(Blur(), count)
            memory.append(anonymous_mib())

    evaluated = Evaluated(many, counts, groups, [False] * len(many), "catalog")

    def seconds_of_all() -> float:
        started = time.process_time()
        conclude(evaluated, THRESHOLDS, min_area_px=0, flip_averaging=True, runs=1)
        return time.process_time() - started

    def seconds_of_search(image_scores: np.ndarray | None = None) -> float:
        ids, truth = [case.case_id for case in many], counts.at_full[0, :, 2]
        started = time.process_time()
        tune(counts.histograms, truth, ids, groups, "triplet", image_scores)
        return time.process_time() - started

    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder), evaluated)

        def seconds_of_report() -> float:
            started = time.process_time()
            write_report(run)
            return time.process_time() - started

        steps = {
            "conclude": seconds_of_all,
            "of it, tune": seconds_of_search,
            "tune with an image head": lambda: seconds_of_search(counts.score),
            "report": seconds_of_report,
        }
        seconds = in_turn(steps, options.rounds)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report = {
        **header("Evaluation", ["ptxdist", "torch", "numpy"], **vars(options)),
        "images_per_second": rates,
        "seconds": seconds,
        "anonymous_mib": memory,
        "peak_mib": peak_mib,
    }
    part = rates["score"]["median"] / rates["network"]["median"]
    minutes = options.cases / rates["the rest"]["median"] / 60
    text = (
        f"{table(f'images per CPU second at {options.size} px', rates, 2)}\n\n"
        f"The network is {part:.0%} of the time of scoring; the rest takes {minutes:.1f} CPU minutes for "
        f"{options.cases:,} cases.\n\n"
        f"{table(f'CPU seconds for {options.cases:,} cases', seconds, 2)}\n\n"
        f"Memory that is no mapped file: {memory[0]:,.0f} MiB after {MEMORY_AT[0]} images, {memory[1]:,.0f} MiB "
        f"after {MEMORY_AT[1]}. Peak of the process with {options.cases:,} cases: {peak_mib:,.0f} MiB."
    )
    publish(report, text, options.save)


if __name__ == "__main__":
    main()
