"""What the usual recipe learns from the same cases, scored as ptxdist's runs are, for `ptxdist compare`.

    python tests/benchmarks/bench_learning.py CACHE OUT [--encoder resnet34 | timm/NAME] [--imagenet] [--size 256]
                                              [--epochs N] [--batch 16] [--rate 1e-3] [--fold N]

The usual recipe is what a careful user of segmentation_models_pytorch writes: its Unet, its DiceLoss plus BCE,
albumentations (flip, shift/scale/rotate, brightness and contrast, ImageNet normalisation), Adam with a cosine schedule,
a DataLoader, bf16 where the CPU has it, and the weights of the epoch with the lowest validation loss. With `--imagenet`
the encoder starts from the ImageNet weights that ptxdist uses for it.

Each fold of CACHE, or of --fold, is held out in turn. The held-out cases of all folds are scored with ptxdist's own
scoring (flip averaging, original resolution, cross-fitted operating points, intervals by patient) and written to OUT as
`ptxdist evaluate --out` does, so `ptxdist compare OUR-OUT-OF-FOLD OUT` gives paired differences. A finished fold
(OUT/fold-N.npz) is not trained again. OUT/usual.json has the CPU minutes of each fold: of this process and its
workers, without validation.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import time
from dataclasses import fields
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ptxdist import files
from ptxdist.cache.catalog import read_catalog
from ptxdist.cache.split import split_indices
from ptxdist.cache.store import Store, open_store
from ptxdist.config import ModelSettings
from ptxdist.rundir import RESULT
from ptxdist.scores.analysis import Evaluated, conclude
from ptxdist.scores.counts import CaseCounts
from ptxdist.scores.tables import FIXED_THRESHOLDS, write_tables
from ptxdist.train.device import autocast, choose_precision
from ptxdist.train.scoring import score_cases
from ptxdist.train.unet import build_unet

CPU = torch.device("cpu")
MEAN, STD = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
THRESHOLD = 0.5


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Augmented three-channel images and masks of some cases."""

    def __init__(self, store: Store, indices: np.ndarray) -> None:
        self.store, self.indices = store, indices
        self.transform = A.Compose(
            [
                A.HorizontalFlip(p=0.5),
                A.Affine(scale=(0.8, 1.2), translate_percent=(-0.1, 0.1), rotate=(-20, 20), p=0.7),
                A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.5),
                A.Normalize(),
                A.ToTensorV2(),
            ]
        )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        image, mask = self.store.sample(int(self.indices[number]))
        result = self.transform(image=np.repeat(image[..., None], 3, axis=2), mask=np.array(mask))
        return result["image"], (result["mask"] >= 128)[None].float()


class GreyImages(nn.Module):
    """The network behind ptxdist's interface: uint8 (B, 1, H, W) in, logits (B, 1, H, W) out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        scaled = (image.float() / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
        logits: Tensor = self.network(scaled)
        return logits


def make_network(encoder: str, imagenet: bool) -> nn.Module:
    network = smp.Unet(encoder.replace("timm/", "tu-"), encoder_weights=None, in_channels=3, classes=1)
    if imagenet:
        own = build_unet(ModelSettings(encoder=encoder, encoder_weights="imagenet")).encoder
        is_timm = encoder.startswith("timm/")
        there = network.encoder.model if is_timm else network.encoder
        there.load_state_dict((own.network if is_timm else own).state_dict())
    return network


def train(store: Store, taught: np.ndarray, held_out: np.ndarray, asked: argparse.Namespace) -> tuple[nn.Module, float]:
    """The network of the epoch with the lowest validation loss, and the CPU minutes of the training."""
    torch.manual_seed(0)
    network = make_network(asked.encoder, asked.imagenet).to(memory_format=torch.channels_last)
    model, precision = GreyImages(network), choose_precision("auto", CPU)
    bce, dice = nn.BCEWithLogitsLoss(), smp.losses.DiceLoss("binary")
    optimizer = torch.optim.Adam(network.parameters(), lr=asked.rate)
    loader = DataLoader(Samples(store, taught), asked.batch, shuffle=True, drop_last=True, num_workers=1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, asked.epochs * len(loader))
    best, weights, minutes = float("inf"), copy.deepcopy(model.state_dict()), 0.0
    for epoch in range(asked.epochs):
        started, total = cpu_minutes(), 0.0
        network.train()
        for image, mask in loader:
            optimizer.zero_grad()
            with autocast(CPU, precision):
                logits = network(image.to(memory_format=torch.channels_last)).float()
            loss = bce(logits, mask) + dice(logits, mask)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        minutes += cpu_minutes() - started
        network.eval()
        losses = []
        with torch.no_grad(), autocast(CPU, precision):
            for start in range(0, len(held_out), asked.batch):
                pairs = [store.sample(int(index)) for index in held_out[start : start + asked.batch]]
                image = torch.from_numpy(np.stack([pair[0] for pair in pairs]))[:, None]
                mask = (torch.from_numpy(np.stack([pair[1] for pair in pairs]))[:, None] >= 128).float()
                logits = model(image).float()
                losses.append(float(bce(logits, mask) + dice(logits, mask)))
        print(f"epoch {epoch + 1}: loss {total / len(loader):.4f}, validation {np.mean(losses):.4f}, "
              f"{minutes:.1f} CPU minutes", flush=True)  # fmt: skip
        if np.mean(losses) < best:
            best, weights = float(np.mean(losses)), copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    return model, minutes


def cpu_minutes() -> float:
    """User and system time of this process and of its finished children, in minutes."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(item.ru_utime + item.ru_stime for item in used) / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--encoder", default="resnet34")
    parser.add_argument("--imagenet", action="store_true")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--fold", type=int, action="append", help="only this fold, again for another; default: all")
    asked = parser.parse_args()
    cv2.setNumThreads(0)
    asked.out.mkdir(parents=True, exist_ok=True)
    catalog = read_catalog(asked.cache)
    store = open_store(asked.cache, asked.size)
    thresholds = list(dict.fromkeys((THRESHOLD, *FIXED_THRESHOLDS)))
    found, order, minutes = [], [], []
    for fold in asked.fold or range(catalog.folds):
        taught, held_out = split_indices(catalog.labelled, fold)
        kept = asked.out / f"fold-{fold}.npz"
        if not kept.is_file():
            started = time.perf_counter()
            model, used = train(store, taught, held_out, asked)
            counts = score_cases(
                model, store, catalog.labelled, held_out, thresholds=thresholds, device=CPU,
                precision=choose_precision("auto", CPU), flip_averaging=True, histograms=True,
            )  # fmt: skip
            parts = {field.name: getattr(counts, field.name) for field in fields(CaseCounts)}
            np.savez(kept, cpu_minutes=used, wall_minutes=(time.perf_counter() - started) / 60, **parts)
        with np.load(kept) as saved:
            found.append(CaseCounts(**{field.name: saved[field.name] for field in fields(CaseCounts)}))
            minutes.append(float(saved["cpu_minutes"]))
        order.extend(held_out.tolist())
    joined = {
        field.name: np.concatenate([getattr(part, field.name) for part in found], axis=int(field.name == "at_full"))
        for field in fields(CaseCounts)
    }
    cases = [catalog.labelled[index] for index in order]
    evaluated = Evaluated(cases, CaseCounts(**joined), [case.group for case in cases], [None] * len(cases), "nothing")
    result, rows = conclude(evaluated, thresholds, min_area_px=0, flip_averaging=True, runs=len(found))
    write_tables(asked.out, rows, [(case.case_id, "") for case in cases], CaseCounts(**joined).histograms)
    files.write_json(asked.out / RESULT, result)
    settings = {name: str(value) for name, value in vars(asked).items() if name not in ("cache", "out")}
    (asked.out / "usual.json").write_text(json.dumps({"settings": settings, "cpu_minutes": minutes}, indent=2))
    best = max(result.tuned, key=lambda tuned: tuned.estimate.kaggle_dice)
    print(f"AUROC {result.auroc:.4f}, positives-only {result.scores.positive_dice}, Kaggle cross-fitted "
          f"{best.estimate.kaggle_dice:.4f}, predicting nothing {result.scores.all_empty_dice:.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
