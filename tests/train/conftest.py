"""Networks for tests of what does not depend on the network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ptxdist.config import Transform


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
