"""ResNets of torchvision as encoders."""

from __future__ import annotations

from torch import Tensor
from torchvision.models import ResNet

from ptxdist.train.features import Features


class ResNetFeatures(Features):
    """A ResNet without average pooling and fully connected layer; its weights keep torchvision's names."""

    def __init__(self, network: ResNet) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu, self.maxpool = network.conv1, network.bn1, network.relu, network.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            network.layer1,
            network.layer2,
            network.layer3,
            network.layer4,
        )
        wide = network.fc.in_features
        self.channels = (64, wide // 8, wide // 4, wide // 2, wide)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features at strides 2, 4, 8, 16 and 32 of an image (B, 3, H, W)."""
        features = [self.relu(self.bn1(self.conv1(x)))]
        x = self.maxpool(features[0])
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features
