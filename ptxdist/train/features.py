"""What every encoder of the U-Net is to the rest of it, and the ResNets of torchvision as encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from torchvision.models import ResNet

STRIDES = (2, 4, 8, 16, 32)
Channels = tuple[int, int, int, int, int]


class Features(nn.Module):
    """The encoder of a U-Net: called with an image (B, 3, H, W), it returns features at `STRIDES`, with `channels`.

    The image is normalised to `mean` and `std` of a range of 0 to 1; these are ImageNet's unless a subclass or an
    object has others.
    """

    channels: Channels
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def own_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the whole network under the names of its features, without the layers that these lack."""
        return dict(state)


class ResNetFeatures(Features):
    """A ResNet without average pooling and fully connected layer; its weights keep torchvision's names."""

    def __init__(self, network: ResNet) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu, self.maxpool = network.conv1, network.bn1, network.relu, network.maxpool
        self.layer1, self.layer2 = network.layer1, network.layer2
        self.layer3, self.layer4 = network.layer3, network.layer4
        wide = network.fc.in_features
        self.channels = (64, wide // 8, wide // 4, wide // 2, wide)

    def own_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict without the fully connected layer."""
        return {key: value for key, value in state.items() if not key.startswith("fc.")}

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features at strides 2, 4, 8, 16 and 32 of an image (B, 3, H, W)."""
        features = [self.relu(self.bn1(self.conv1(x)))]
        x = self.maxpool(features[0])
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features
