"""Networks for tests of what does not depend on the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from ptxdist.config import Transform
from ptxdist.train.encoders import ENCODERS, Encoder


class SmallNet(nn.Module):
    """A network that trains in milliseconds; what is compared does not depend on how large it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.layers(image.float() / 255)
        return logits


@pytest.fixture(scope="session")
def small_net() -> Callable[[], nn.Module]:
    """Function that makes a SmallNet, always with the same weights."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return SmallNet()

    return make


class TinyFeatures(nn.Module):
    """An encoder whose U-Net trains in milliseconds; a checkpoint of one with ResNet-34 is 300 MB."""

    CHANNELS = (4, 4, 8, 8, 16)

    def __init__(self) -> None:
        super().__init__()
        pairs = zip((3, *self.CHANNELS), self.CHANNELS, strict=False)
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


@pytest.fixture(scope="session", autouse=True)
def tiny_encoder() -> Iterator[Encoder]:
    """`model.encoder = "tiny"` is known in these tests."""
    tiny = Encoder("five convolutions", TinyFeatures.CHANNELS, TinyFeatures, "these tests", "TinyFeatures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODERS, "tiny", tiny)
        yield tiny


@pytest.fixture(scope="session")
def full_recipe() -> tuple[Transform, ...]:
    """A recipe that is applied in full, whose transforms draw from both random generators."""
    return (
        Transform(transform="HorizontalFlip", p=0.5),
        Transform(transform="Affine", rotate=[-20, 20], translate_percent=[-0.1, 0.1], p=0.7),
        Transform(transform="ElasticTransform", alpha=20, sigma=4, p=0.5),
        Transform(transform="RandomGamma", p=0.5),
        Transform(transform="GaussNoise", p=0.5),
    )
