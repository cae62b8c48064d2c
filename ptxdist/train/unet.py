"""The U-Net, from one-channel images to one-channel logits; its encoder is one of `encoders`.

Three channels and the encoder's normalisation are made in the network, on the device; everything before moves one uint8
channel. The names of the weights, which checkpoints keep:

    input.weight, input.bias                                      only with input_mapping = 'learned'
    encoder.conv1.weight, encoder.bn1.*, encoder.layer1.0.* …     a ResNet: as torchvision's, without fc
    encoder.network.…                                             a network of timm: as timm's with features_only
    decoder.<block>.conv1.weight, .bn1.*, .conv2.weight, .bn2.*   blocks 0..4, coarse to fine
    head.weight, head.bias
    image_head.weight (1, C), image_head.bias (1,)                only with image_head; C channels of the encoder's last

With `image_head` the network also predicts whether the image is positive: the mean of the encoder's coarsest features
over the image, then a linear layer to one logit. It then returns two tensors (`Output`).

Decoder and ResNet-34 follow Abedalla et al. 2020 (2ST-UNet); sizes, initialisation and number of parameters are those
of `Unet("resnet34")` in segmentation_models_pytorch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ptxdist.config import ModelSettings
from ptxdist.train.encoders import Encoder, chosen, load_weights
from ptxdist.train.features import Features

STRIDE = 32  # pixels of the image per pixel of the coarsest features
Output = Tensor | tuple[Tensor, Tensor]  # mask logits (B, 1, H, W); with an image head also image logits (B,)


class _Input(nn.Module):
    """Grey levels 0..255, (B, 1, H, W) -> three channels normalised for the encoder, float32.

    A 1x1 convolution from one channel is a factor and an offset per channel. With `learned` these are parameters, which
    start at 1 and 0 and so at the output of the repeated channel; factor, offset and normalisation are one operation.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, encoder: Features, learned: bool) -> None:
        super().__init__()
        mean, std = torch.tensor(encoder.mean).view(3, 1, 1), torch.tensor(encoder.std).view(3, 1, 1)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        self.weight = nn.Parameter(torch.ones(3, 1, 1)) if learned else None
        self.bias = nn.Parameter(torch.zeros(3, 1, 1)) if learned else None

    def forward(self, image: Tensor) -> Tensor:
        scale, shift = self.scale, self.shift
        if self.weight is not None and self.bias is not None:
            scale, shift = scale * self.weight, shift + 255 * scale * self.bias
        return torch.addcmul(shift, image.float(), scale)


class _Block(nn.Module):
    """Twice the size, joined with the encoder's features of that size, two convolutions."""

    def __init__(self, channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels + skip_channels, out_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        for convolution in (self.conv1, self.conv2):
            nn.init.kaiming_uniform_(convolution.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        if skip is not None:
            x = torch.cat((x, skip), dim=1)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)), inplace=True)


class ImageHead(nn.Linear):
    """Whether an image is positive, from its features: their mean over the image, then a linear layer to one logit."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 1)
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B,) of features (B, C, h, w), in the type of the weights; B = 0 gives (0,)."""
        # Not F.linear, which autocast computes in bfloat16: a probability of 8 bits puts many images at one score.
        pooled = features.to(self.weight.dtype).mean((2, 3))
        return (pooled * self.weight).sum(1) + self.bias


class UNet(nn.Module):
    """The network of all stages; 24,436,369 parameters with the default settings."""

    def __init__(
        self,
        encoder: Encoder,
        decoder_channels: tuple[int, int, int, int, int],
        learned_input: bool,
        image_head: bool = False,
    ) -> None:
        super().__init__()
        features = encoder.build()
        self.input = _Input(features, learned_input)
        self.encoder = features
        coarsest, *finer = features.channels[::-1]
        channels, skips = (coarsest, *decoder_channels[:-1]), (*finer, 0)
        self.decoder = nn.ModuleList(map(_Block, channels, skips, decoder_channels))
        self.head = nn.Conv2d(decoder_channels[-1], 1, 3, padding=1)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
        self.image_head = ImageHead(coarsest) if image_head else None

    def forward(self, image: Tensor) -> Output:
        """Logits (B, 1, H, W) of an image (B, 1, H, W), uint8 or floating 0..255; B = 0 gives (0, 1, H, W).

        With an image head a pair: these, and the logits (B,) that the images are positive, float32 under autocast too.
        Raises ValueError unless there is one channel and H and W are multiples of 32.
        """
        if image.shape[1] != 1 or image.shape[2] % STRIDE or image.shape[3] % STRIDE:
            raise ValueError(f"expected (B, 1, H, W) with H and W multiples of {STRIDE}, found {tuple(image.shape)}")
        coarsest, *skips = self.encoder(self.input(image))[::-1]
        x = coarsest
        for block, skip in zip(self.decoder, [*skips, None], strict=True):
            x = block(x, skip)
        logits: Tensor = self.head(x)
        return logits if self.image_head is None else (logits, self.image_head(coarsest))


def build_unet(model: ModelSettings) -> UNet:
    """The network of the settings, on the CPU in float32, initialised from torch's global random generator.

    Raises CheckpointError when the weights that `encoder_weights` names cannot be had or do not fit.
    """
    encoder = chosen(model)
    network = UNet(encoder, model.decoder_channels, model.input_mapping == "learned", model.image_head)
    load_weights(network.encoder, encoder, model.encoder_weights)
    return network


def build_unloaded(model: ModelSettings) -> UNet:
    """The network of the settings as `build_unet` makes it, for weights that are loaded next.

    Its parameters have no values yet: drawing random ones takes longer than loading.
    """
    with _NothingDrawn():
        return build_unet(model.model_copy(update={"encoder_weights": "none"}))


class _NothingDrawn(TorchFunctionMode):
    """Inside, tensors that should be filled with random values keep what is in their memory."""

    _draw = (Tensor.uniform_, Tensor.normal_, nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._draw:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
