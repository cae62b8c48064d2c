"""Compiled passes: the usual batch size is compiled, others are not, and what is learnt is the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ptxdist.cache.catalog import read_catalog
from ptxdist.cache.store import open_store
from ptxdist.config import StageSettings, TrainSettings
from ptxdist.train.loop import StageData, fit
from ptxdist.train.unet import ImageHead

CPU = torch.device("cpu")


class Headed(nn.Module):
    """A small network that returns two tensors, as a U-Net with an image head."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.features, self.head, self.image_head = network.layers[:3], network.layers[3], ImageHead(8)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(image.float() / 255)
        return self.head(features), self.image_head(features)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_stage_learns_the_same(
    long_cache: Path, tmp_path: Path, small_net: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """22 cases in batches of 4: five compiled ones, and a last one of 2 that is not."""
    cases = read_catalog(long_cache).labelled
    train, val = (np.array([i for i, case in enumerate(cases) if case.split == side]) for side in ("train", "val"))
    data, sizes, compile_ = StageData(open_store(long_cache, 32), cases, train, val), [], torch.compile

    def compile_and_count(model: nn.Module, **options: object) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        compiled = compile_(model, **options)

        def forward(image: Tensor) -> tuple[Tensor, Tensor]:
            sizes.append(len(image))
            return compiled(image)

        return forward

    monkeypatch.setattr(torch, "compile", compile_and_count)
    stage = StageSettings(size_px=32, epochs=2, batch_size=4, learning_rate=1e-4, best_by="loss")
    ends = [
        fit(
            Headed(small_net()), data, stage, TrainSettings(compile=choice), number=1, seed=0, device=CPU,
            folder=tmp_path / str(choice),
        ).history
        for choice in (False, True)
    ]  # fmt: skip
    assert sizes == [4] * 10
    for plain, compiled in zip(*ends, strict=True):
        assert compiled.train_loss == pytest.approx(plain.train_loss, rel=1e-5)
        assert compiled.val_loss == pytest.approx(plain.val_loss, rel=1e-3)
