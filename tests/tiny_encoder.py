"""An encoder for tests of what does not depend on the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ptxdist.train.encoders import Encoder

if TYPE_CHECKING:
    from torch import Tensor

    from ptxdist.train.features import Features


def _build() -> Features:
    """An encoder whose U-Net trains in milliseconds; a checkpoint of one with ResNet-34 is 300 MB."""
    from torch import nn  # here, so that a command that is refused loads no torch

    from ptxdist.train.features import Features

    class TinyFeatures(Features):
        channels = (4, 4, 8, 8, 16)

        def __init__(self) -> None:
            super().__init__()
            pairs = zip((3, *self.channels), self.channels, strict=False)
            self.stages = nn.ModuleList(
                nn.Sequential(nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
                for before, after in pairs
            )

        def forward(self, x: Tensor) -> list[Tensor]:
            features = []
            for stage in self.stages:
                x = stage(x)
                features.append(x)
            return features

    return TinyFeatures()


TINY = Encoder("five convolutions", _build, "these tests", "TinyFeatures")
