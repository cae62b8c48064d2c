"""Training: the whole loop beside its own bare step, beside segmentation_models_pytorch + Lightning, beside the limit.

    python tests/benchmarks/bench_training.py [--size 256] [--size 512] [--batches N] [--rounds R] [--save training]
                                              [--variants] [--images N]

Images/s of training epochs on random images (a fifth positive), and MFU: of the floating-point operations that the
network needs (46.6 GFLOP an image at 256 px, 186.3 at 512, forward and backward; a multiply-add is two) as a share of
the fastest matrix product measured on the device in the same run.

limit           the arithmetic alone at that rate
bare step       our network, loss, Adam and precision on one batch that lies on the device, always the same
loop            `loop.fit`, as `ptxdist train` runs it in one process: mapped store, augmentation, checks, progress;
                images/s of its training part. `loop, data on the device` on a GPU: train.data_on_device = "on"
Lightning       segmentation_models_pytorch's Unet("resnet34"), Lightning's Trainer, DataLoader with two workers on the
                CPU, with 8 on a GPU, over np.memmap, the usual albumentations recipe with Normalize on three channels,
                BCE + Dice, Adam; bf16-mixed on a GPU, else fp32: what a careful user writes. Left out if not installed.

--variants adds bare steps in other formats and memory layouts: plain fp32, channels_last, bf16, both, and on a GPU
torch.compile. CPU: 6 batches of 4 (256 px) or 2 (512 px); GPU: 100 batches of 64 or 16. `epoch_s` is the time that the
images of the challenge's training part (10,842) would take at the median rate.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import numpy as np
import torch
from bench_reading import MappedSamples, make_store, usual_recipe
from measuring import header, in_turn, publish, table
from torch import nn
from torch.utils.data import DataLoader

from ptxdist.cache.catalog import Case
from ptxdist.cache.store import ARRAYS, Store
from ptxdist.config import ModelSettings, StageSettings, TrainSettings
from ptxdist.train.dataset import Batch
from ptxdist.train.device import choose_device, choose_precision
from ptxdist.train.loop import StageData, fit
from ptxdist.train.step import Stepper
from ptxdist.train.unet import build_unet

GFLOP = {256: 46.6, 512: 186.3}  # an image, forward and backward, of the network of the default settings
TRAIN_IMAGES = 10_842
DEVICE = choose_device("auto")
ON_GPU = DEVICE.type == "cuda"
BATCH = {256: 64, 512: 16} if ON_GPU else {256: 4, 512: 2}
PACKAGES = "ptxdist torch albumentations lightning segmentation-models-pytorch"


def wait() -> None:
    """Until the device has done what it was given."""
    if ON_GPU:
        torch.cuda.synchronize()


def peak_flops(dtype: torch.dtype) -> float:
    """Floating-point operations per second of the fastest of some matrix products."""
    best = 0.0
    for side in (8192, 4096) if ON_GPU else (2048, 1024):
        a, b = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
        a @ b
        wait()
        started, count = time.perf_counter(), 20 if ON_GPU else 4
        for _ in range(count):
            a @ b
        wait()
        best = max(best, 2 * side**3 * count / (time.perf_counter() - started))
    return best


def random_batch(size_px: int, batch: int) -> Batch:
    image, mask = (torch.randint(0, 256, (batch, 1, size_px, size_px), dtype=torch.uint8, device=DEVICE) for _ in "im")
    return Batch(image, mask, torch.arange(batch), batch)


def bare_step(
    size_px: int, batches: int, *, precision: str = "auto", channels_last: bool = True, compiled: bool = False
) -> Callable[[], float]:
    """Images/s of the optimiser step alone."""
    dtype, batch = choose_precision(precision, DEVICE), random_batch(size_px, BATCH[size_px])
    torch.manual_seed(0)
    model = build_unet(ModelSettings(encoder_weights="none")).to(DEVICE)
    model = model.to(memory_format=torch.channels_last) if channels_last else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    stage = StageSettings(size_px=size_px, epochs=1, batch_size=BATCH[size_px])
    stepper = Stepper(model, optimizer, stage, TrainSettings(compile=compiled), dtype)
    for _ in range(3 if ON_GPU else 1):
        stepper.step(batch)

    def rate() -> float:
        wait()
        started = time.perf_counter()
        for _ in range(batches):
            stepper.step(batch)
        wait()
        return batches * BATCH[size_px] / (time.perf_counter() - started)

    return rate


def loop(store: Store, batches: int, folder: Path, **settings: Any) -> Callable[[], float]:
    """Images/s of the training part of an epoch of `fit`."""
    batch = BATCH[store.size_px]
    cases = tuple(
        Case(f"1.2.826.{n}", "0", "none", store.size_px, store.size_px, f"g{n}", (), 0, split="train", fold=0)
        for n in range(store.cases)
    )
    data = StageData(store, cases, np.arange(batches * batch), np.arange(batches * batch, batches * batch + 8))
    runs = iter(range(1000))

    def rate() -> float:
        torch.manual_seed(0)
        result = fit(
            build_unet(ModelSettings(encoder_weights="none")), data,
            StageSettings(size_px=store.size_px, epochs=1, batch_size=batch, best_by="loss"),
            TrainSettings(**settings), number=1, seed=0, device=DEVICE, folder=folder / f"fit{next(runs)}",
        )  # fmt: skip
        return float(result.history[-1].images_per_second or 0)

    return rate


def lightning(store: Store, batches: int, folder: Path) -> Callable[[], float]:
    """Images/s of an epoch of Lightning's Trainer, without its first batch."""
    import lightning as L
    import segmentation_models_pytorch as smp

    for name, shards in zip(ARRAYS, (store.images, store.masks), strict=True):
        np.save(folder / f"{name}.npy", np.concatenate(shards))
    batch = BATCH[store.size_px]

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = smp.Unet("resnet34", encoder_weights=None, in_channels=3, classes=1)
            self.bce, self.dice = nn.BCEWithLogitsLoss(), smp.losses.DiceLoss("binary")
            self.times: list[float] = []

        def training_step(self, data: Any, number: int) -> Any:
            image, mask = data
            target = (mask[:, None] >= 128).float()
            logits = self.model(image)
            return self.bce(logits, target) + self.dice(logits, target)

        def on_train_batch_end(self, *arguments: Any) -> None:
            if len(self.times) in (0, batches - 1):
                wait()
            self.times.append(time.perf_counter())

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    def rate() -> float:
        loader = DataLoader(
            MappedSamples(folder, usual_recipe()), batch, shuffle=True, drop_last=True, pin_memory=ON_GPU,
            num_workers=8 if ON_GPU else 2,
        )  # fmt: skip
        module = Module()
        trainer = L.Trainer(
            max_epochs=1, limit_train_batches=batches, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accelerator="gpu" if ON_GPU else "cpu", devices=1,
            precision="bf16-mixed" if ON_GPU else "32-true",
        )  # fmt: skip
        trainer.fit(module, loader)
        return (batches - 1) * batch / (module.times[-1] - module.times[0])

    return rate


def run(size_px: int, batches: int, images: int, rounds: int, variants: bool) -> dict[str, Any]:
    """Images/s of each way, and what follows from them."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = make_store(folder, size_px, images)
        ways: dict[str, Callable[[], float]] = {"bare step": bare_step(size_px, batches)}
        if variants:
            ways |= {
                "bare step, plain fp32": bare_step(size_px, batches, precision="fp32", channels_last=False),
                "bare step, fp32 channels_last": bare_step(size_px, batches, precision="fp32"),
                "bare step, bf16": bare_step(size_px, batches, precision="bf16", channels_last=False),
                "bare step, bf16 channels_last": bare_step(size_px, batches, precision="bf16"),
            }
            if ON_GPU:
                ways["bare step, compiled"] = bare_step(size_px, batches, compiled=True)
        else:
            ways["loop"] = loop(store, batches, folder / "loop", data_on_device="off")
            if ON_GPU:
                ways["loop, data on the device"] = loop(store, batches, folder / "held", data_on_device="on")
            try:
                ways["Lightning"] = lightning(store, batches, folder)
            except ModuleNotFoundError as error:
                print(f"Lightning is left out: {error.name} is not installed", file=sys.stderr)
        rows = in_turn(ways, rounds)
    peak = statistics.median(peak_flops(choose_precision("auto", DEVICE)) for _ in range(3))
    limit = peak / (GFLOP[size_px] * 1e9)
    derived = {
        way: {"MFU": row["median"] / limit, "epoch_s": TRAIN_IMAGES / row["median"],
              "of bare step": row["median"] / rows["bare step"]["median"]}
        for way, row in rows.items()
    }  # fmt: skip
    return {"rows": {"limit": dict.fromkeys(("min", "median", "max"), limit), **rows}, "derived": derived, "peak": peak}


def text_of(size_px: int, result: dict[str, Any]) -> str:
    lines = [
        table(f"images/s, {size_px} px, batches of {BATCH[size_px]}", result["rows"], 2 if not ON_GPU else 0),
        "",
        f"Matrix products: {result['peak'] / 1e9:,.0f} GFLOP/s.",
        *(
            f"{way}: {row['of bare step']:.3f} of the bare step, MFU {row['MFU']:.2f}, epoch {row['epoch_s']:,.0f} s."
            for way, row in result["derived"].items()
        ),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, action="append", choices=sorted(GFLOP))
    parser.add_argument("--batches", type=int, default=100 if ON_GPU else 6, help="optimiser steps of a round")
    parser.add_argument("--images", type=int, default=8192 if ON_GPU else 128, help="in the store, a multiple of 128")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--save", help="name of the files in tests/benchmarks/results")
    arguments = parser.parse_args()
    report = header(
        "Training, images/s", PACKAGES.split(), device=torch.cuda.get_device_name() if ON_GPU else "cpu",
        threads=torch.get_num_threads(), batches=arguments.batches, rounds=arguments.rounds,
        precision=str(choose_precision("auto", DEVICE)),
    )  # fmt: skip
    report["result"] = {
        size: run(size, arguments.batches, arguments.images, arguments.rounds, arguments.variants)
        for size in arguments.size or GFLOP
    }
    publish(report, "\n\n".join(text_of(size, result) for size, result in report["result"].items()), arguments.save)
