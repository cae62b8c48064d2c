"""An exported network against its checkpoint: ms an image on the CPU, in batches of one and of four.

    python tests/benchmarks/bench_export.py [--sizes 256,512] [--rounds 5] [--save NAME]

Random weights and images, flip averaging (two passes an image) in all of them, fp32. `checkpoint` is what `predict`
runs: PyTorch in channels_last. `ONNX Runtime` and `pt2` run what `ptxdist export` writes. All take as many threads as
they do by themselves. Ways take turns; the first round is dropped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from bench_predict import make_predictor
from measuring import header, in_turn, publish, table

from ptxdist.learn.export import ONNX, PT2, Run, encode, largest_difference, load
from ptxdist.learn.predictor import Predictor

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
        precision="fp32", flip_averaging=True, rounds=options.rounds, threads=torch.get_num_threads(),
    )  # fmt: skip
    texts = []
    for size in map(int, options.sizes.split(",")):
        predictor = make_predictor(size, precision="fp32")
        exported = {
            name: load(encode(predictor.models[0], predictor.cards[0], suffix), suffix)
            for name, suffix in (("ONNX Runtime", ONNX), ("pt2", PT2))
        }
        images = np.random.default_rng(0).integers(0, 256, (max(BATCHES), 1, size, size), dtype=np.uint8)
        ways: dict[str, Callable[[], float]] = {}
        for batch in BATCHES:
            image = images[:batch]
            ways[f"batch of {batch}: checkpoint"] = timed(checkpoint(predictor), image)
            for name, run in exported.items():
                ways[f"batch of {batch}: {name}"] = timed(run, image)
        rows = in_turn(ways, options.rounds)
        differences = {name: largest_difference(predictor, run, list(images[:, 0])) for name, run in exported.items()}
        report[f"ms_an_image_{size}"], report[f"difference_{size}"] = rows, differences
        words = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
        texts.append(f"{table(f'ms an image, {size} px', rows, digits=1)}\n\nLargest difference: {words}.")
    publish(report, "\n\n".join(texts), options.save)


def checkpoint(predictor: Predictor) -> Run:
    """The network of a predictor, as a function like an exported one."""

    @torch.inference_mode()
    def run(image: np.ndarray) -> np.ndarray:
        return predictor.probabilities(list(image[:, 0]), image.shape[-1], fewest=1).numpy()

    return run


def timed(run: Run, image: np.ndarray) -> Callable[[], float]:
    """A call that says how many ms an image it has taken."""

    def call() -> float:
        started = time.perf_counter()
        run(image)
        return 1000 * (time.perf_counter() - started) / len(image)

    return call


if __name__ == "__main__":
    main()
