"""An exported network against its checkpoint: ms an image on the CPU, in batches of one and of four.

    python tests/benchmarks/bench_export.py [--sizes 256,512] [--rounds 5] [--save NAME]

Random weights and images, flip averaging in all of them. `checkpoint` is PyTorch in channels_last as `predict` runs
it: in bf16 on a CPU that multiplies it, where the run's precision is `auto`, else in fp32. `ONNX Runtime` and `pt2` run
what `ptxdist export` writes, in fp32. All take as many threads as PyTorch (OMP_NUM_THREADS). Wall time, and CPU time
of all threads, which other work disturbs less. Ways take turns; the first round is dropped.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping

import numpy as np
import torch
from bench_predict import make_predictor
from measuring import header, publish, spread, table

from ptxdist.predict.export import ONNX, PT2, encode, load
from ptxdist.predict.parity import Run
from ptxdist.predict.predictor import Predictor
from ptxdist.train.device import choose_precision

BATCHES = (1, 4)


def main() -> None:
    """Measure and print a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="256,512")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", help="name of the files in tests/benchmarks/results, after the date")
    options = parser.parse_args()
    report = header(
        "An exported network against its checkpoint", ("torch", "onnx", "onnxruntime"),
        flip_averaging=True, rounds=options.rounds, threads=torch.get_num_threads(), load=round(os.getloadavg()[0]),
    )  # fmt: skip
    texts = []
    for size in map(int, options.sizes.split(",")):
        predictor = make_predictor(size, precision="fp32")
        ways = {"checkpoint, fp32": checkpoint(predictor)}
        if choose_precision("auto", predictor.device) == torch.bfloat16:
            ways["checkpoint, bf16"] = checkpoint(make_predictor(size, precision="bf16"))
        for name, suffix in (("ONNX Runtime", ONNX), ("pt2", PT2)):
            ways[name] = load(encode(predictor.models[0], predictor.cards[0], suffix), suffix)
        images = np.random.default_rng(0).integers(0, 256, (max(BATCHES), 1, size, size), dtype=np.uint8)
        calls = {f"{batch} at once: {name}": (run, images[:batch]) for batch in BATCHES for name, run in ways.items()}
        for clock, rows in measure(calls, options.rounds).items():
            report[f"{clock}_ms_an_image_{size}"] = rows
            texts.append(table(f"{size} px, {clock} ms an image", rows, digits=1))
    publish(report, "\n\n".join(texts), options.save)


def checkpoint(predictor: Predictor) -> Run:
    """The network of a predictor, as a function like an exported one."""

    @torch.inference_mode()
    def run(image: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(part.numpy() for part in predictor.probabilities(list(image[:, 0]), image.shape[-1], fewest=1))

    return run


def measure(calls: Mapping[str, tuple[Run, np.ndarray]], rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Spread of the ms an image of each call, by clock; a first round is dropped."""
    clocks = {"wall": time.perf_counter, "CPU": time.process_time}
    found: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in calls} for clock in clocks}
    for number in range(rounds + 1):
        for name, (run, image) in calls.items():
            started = {clock: read() for clock, read in clocks.items()}
            run(image)
            for clock, read in clocks.items():
                if number:
                    found[clock][name].append(1000 * (read() - started[clock]) / len(image))
    return {clock: {name: spread(values) for name, values in rows.items()} for clock, rows in found.items()}


if __name__ == "__main__":
    main()
