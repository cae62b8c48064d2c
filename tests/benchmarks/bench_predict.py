"""Prediction of files against the bare network: latency of one image, images/s of a folder.

    python tests/benchmarks/bench_predict.py [--size 512] [--files 16] [--rounds 3] [--save NAME]

Random weights, phantoms of 1024 px, flip averaging (two passes an image) in all of them. `network` is the limit: the
same tensors through the same network and nothing else. `predictor` reads, decodes, and brings the map back to the
original size; `command` also writes mask, overlay and finding. Interleaved; the first round is dropped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from ptxdist.cache.render import TRANSFORM
from ptxdist.phantoms.dataset import write_phantoms
from ptxdist.predict.bundle import ModelCard
from ptxdist.predict.folder import predict_files
from ptxdist.predict.predictor import BATCH, Predictor
from ptxdist.records import EvaluationResult, OperatingPoint
from ptxdist.resolve import load_settings
from ptxdist.train.unet import build_unet


def make_predictor(size_px: int, precision: str = "auto") -> Predictor:
    """A predictor with random weights, of which only the fields that predicting reads are filled in."""
    pipeline = load_settings("smoke").pipeline
    point = OperatingPoint(top=0.5, min_area_px=0, bottom=0.5)
    card = ModelCard.model_construct(
        name="bench", size_px=size_px, preprocessing=TRANSFORM, precision=precision, flip_averaging=True,
        operating_point=point, operating_point_from="", pipeline=pipeline, fingerprint="", weights_sha256="0" * 64,
        evaluation=EvaluationResult.model_construct(),
    )  # fmt: skip
    return Predictor([card], [build_unet(pipeline.model)], torch.device("cpu"))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--files", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", help="name of a file in tests/benchmarks/results, without its ending")
    options = parser.parse_args()
    predictor = make_predictor(options.size)
    squares = torch.randint(0, 256, (options.files, 1, options.size, options.size), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as temporary:
        folder, out = Path(temporary), Path(temporary) / "out"
        write_phantoms(folder / "ph", cases=options.files, seed=0)
        files = sorted((folder / "ph" / "dicom-images").rglob("*.dcm"))

        def network(batch: int, count: int) -> None:
            for start in range(0, count, batch):
                predictor.probabilities(list(squares[start : start + batch, 0].numpy()), options.size, fewest=1)

        def command() -> None:
            shutil.rmtree(out, ignore_errors=True)
            predict_files([folder / "ph" / "dicom-images"], out, predictor, [])

        ways: dict[str, tuple[int, Callable[[], object]]] = {
            "one image: network": (1, lambda: network(1, 1)),
            "one image: predictor": (1, lambda: predictor.predict(files[0])),
            "folder: network": (len(files), lambda: network(BATCH, len(files))),
            "folder: predictor": (len(files), lambda: list(predictor.predict_many(files))),
            "folder: command": (len(files), command),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for round_number in range(options.rounds + 1):
            for name, (count, call) in ways.items():
                with torch.inference_mode():
                    started = time.perf_counter()
                    call()
                if round_number:
                    seconds[name].append((time.perf_counter() - started) / count)
    rows = {name: [round(1000 * f(times), 1) for f in (min, statistics.median, max)] for name, times in seconds.items()}
    for name, numbers in rows.items():
        print(f"{name:24} ms an image: min {numbers[0]:8} median {numbers[1]:8} max {numbers[2]:8}")
    if options.save:
        about = {
            "date": date.today().isoformat(), "cores": os.cpu_count(), "machine": platform.machine(),
            "torch": version("torch"), "size_px": options.size, "files": options.files, "ms_an_image": rows,
        }  # fmt: skip
        path = Path(__file__).parent / "results" / f"{options.save}.json"
        path.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
