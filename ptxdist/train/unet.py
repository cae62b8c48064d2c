"""U-Net on a ResNet-34, from one-channel images to one-channel logits.

Owns: the network, and how pre-trained encoder weights get in. Refuses: weights that do not fit it. Called by: `loop`,
`evaluate`, `export`. Three channels and the ImageNet normalisation are made here, on the device; everything before
moves one uint8 channel. The names of the weights, which checkpoints keep:

    input.weight, input.bias                                      only with input_mapping = 'learned'
    encoder.conv1.weight, encoder.bn1.*, encoder.layer1.0.* …     as torchvision's resnet34, without fc
    decoder.<block>.conv1.weight, .bn1.*, .conv2.weight, .bn2.*   blocks 0..4, coarse to fine
    head.weight, head.bias

Encoder and decoder follow Abedalla et al. 2020 (2ST-UNet); sizes, initialisation and number of parameters are those
of `Unet("resnet34")` in segmentation_models_pytorch.
"""

from __future__ import annotations

import http.client
import pickle
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet34_Weights, resnet34

from ptxdist.config import ModelSettings
from ptxdist.errors import CheckpointError

STRIDE = 32  # px of the image per px of the coarsest features
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_ENCODER_CHANNELS = (512, 256, 128, 64, 64)  # coarse to fine: layer4, layer3, layer2, layer1, conv1


class _Input(nn.Module):
    """Grey levels 0..255, (B, 1, H, W) -> three channels normalised as ImageNet's, float32.

    A 1x1 convolution from one channel is a factor and an offset per channel. With `learned` these are parameters, which
    start at 1 and 0 and so at the output of the repeated channel; factor, offset and normalisation are one operation.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, learned: bool) -> None:
        super().__init__()
        mean, std = torch.tensor(_IMAGENET_MEAN).view(3, 1, 1), torch.tensor(_IMAGENET_STD).view(3, 1, 1)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        self.weight = nn.Parameter(torch.ones(3, 1, 1)) if learned else None
        self.bias = nn.Parameter(torch.zeros(3, 1, 1)) if learned else None

    def forward(self, image: Tensor) -> Tensor:
        scale, shift = self.scale, self.shift
        if self.weight is not None and self.bias is not None:
            scale, shift = scale * self.weight, shift + 255 * scale * self.bias
        return torch.addcmul(shift, image.float(), scale)


class _Encoder(nn.Module):
    """ResNet-34 without average pooling and fully connected layer; features from stride 32 to stride 2."""

    def __init__(self) -> None:
        super().__init__()
        network = resnet34(weights=None)
        self.conv1, self.bn1, self.relu, self.maxpool = network.conv1, network.bn1, network.relu, network.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            network.layer1,
            network.layer2,
            network.layer3,
            network.layer4,
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        features = [self.relu(self.bn1(self.conv1(x)))]
        x = self.maxpool(features[0])
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features[::-1]


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


class UNet(nn.Module):
    """The network of all stages; 24,436,369 parameters with the default settings."""

    def __init__(self, decoder_channels: tuple[int, int, int, int, int], learned_input: bool) -> None:
        super().__init__()
        self.input = _Input(learned_input)
        self.encoder = _Encoder()
        channels = (_ENCODER_CHANNELS[0], *decoder_channels[:-1])
        skips = (*_ENCODER_CHANNELS[1:], 0)
        self.decoder = nn.ModuleList(map(_Block, channels, skips, decoder_channels))
        self.head = nn.Conv2d(decoder_channels[-1], 1, 3, padding=1)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, 1, H, W) of an image (B, 1, H, W), uint8 or floating 0..255; B = 0 gives (0, 1, H, W).

        Raises ValueError unless there is one channel and H and W are multiples of 32.
        """
        if image.shape[1] != 1 or image.shape[2] % STRIDE or image.shape[3] % STRIDE:
            raise ValueError(f"expected (B, 1, H, W) with H and W multiples of {STRIDE}, found {tuple(image.shape)}")
        x, *skips = self.encoder(self.input(image))
        for block, skip in zip(self.decoder, [*skips, None], strict=True):
            x = block(x, skip)
        logits: Tensor = self.head(x)
        return logits


def build_unet(model: ModelSettings) -> UNet:
    """The network of the settings, on the CPU in float32, initialised from torch's global random generator.

    `encoder_weights` is `imagenet` (torchvision's IMAGENET1K_V1, downloaded once into torch's cache), `none`, or a file
    with the weights of a ResNet-34 under torchvision's names: .safetensors, or a state dict that torch.load reads
    without running code. Its fc.* are ignored. Raises CheckpointError when weights cannot be had or do not fit.
    """
    network = UNet(model.decoder_channels, learned_input=model.input_mapping == "learned")
    if model.encoder_weights == "imagenet":
        _load_encoder(network.encoder, _imagenet_weights(), "torchvision's ResNet-34 ImageNet weights")
    elif model.encoder_weights != "none":
        path = Path(model.encoder_weights)
        _load_encoder(network.encoder, _read_weights(path), str(path))
    return network


def _imagenet_weights() -> Mapping[str, Tensor]:
    weights = ResNet34_Weights.IMAGENET1K_V1
    try:
        state: Mapping[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise CheckpointError(
            f"the ImageNet weights of the encoder could not be downloaded from {weights.url}: {error}; go on with "
            "`--encoder-weights none`, or download them elsewhere and give the file: `--encoder-weights <file>`"
        ) from error
    return state


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(
            f"no encoder weights at {path}: give 'imagenet', 'none' or a .pth, .pt or .safetensors file"
        )
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, KeyError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise _unusable(path, error) from error
    except safetensors.SafetensorError as error:
        raise _unusable(path, error) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected a state dict, names and tensors only, found {type(state).__name__}")
    return state


def _unusable(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CheckpointError(f"{path}: cannot be read as weights (.pth, .pt or .safetensors): {reason}")


def _load_encoder(encoder: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    expected = encoder.state_dict()
    found = {key: value for key, value in state.items() if not key.startswith("fc.")}
    # Files from before PyTorch 0.4.1 lack these counters; load_state_dict fills them in.
    required = {key for key in expected if not key.endswith("num_batches_tracked")}
    problems = {
        "missing": sorted(required - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": sorted(key for key in expected.keys() & found if expected[key].shape != found[key].shape),
    }
    faults = [f"{len(keys)} {name}: {', '.join(keys[:3])}" for name, keys in problems.items() if keys]
    if faults:
        raise CheckpointError(f"{source}: not the weights of torchvision's resnet34; {'; '.join(faults)}")
    encoder.load_state_dict(found)
