"""What every encoder of the U-Net is to the rest of it."""

from __future__ import annotations

from torch import nn

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
