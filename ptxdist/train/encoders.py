"""The encoders of the U-Net and their pre-trained weights.

Owns: ENCODERS. To add an encoder, write a function and add a line to ENCODERS. Refuses: weights that do not fit the
encoder (CheckpointError).

torch and torchvision are imported in functions only, so that a report can name an encoder without loading them.
"""

from __future__ import annotations

import http.client
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ptxdist.config import ModelSettings, nearest
from ptxdist.errors import CheckpointError, SettingsError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torchvision.models import WeightsEnum

State = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Encoder:
    """A network that turns an image into features.

    `words` name it in reports. `build` makes it with random weights, on the CPU; called with an image (B, 3, H, W)
    normalised as ImageNet's, it returns five features, at strides 2, 4, 8, 16 and 32, which have `channels`.
    Files of its weights contain the state dict of `library`'s `architecture`, of which keys that start with one of
    `ignored` are left out. `imagenet` returns such a state dict with ImageNet weights, or raises CheckpointError; None:
    there are none.
    """

    words: str
    channels: tuple[int, int, int, int, int]
    build: Callable[[], nn.Module]
    library: str
    architecture: str
    ignored: tuple[str, ...] = ()
    imagenet: Callable[[], State] | None = None


def chosen(model: ModelSettings) -> Encoder:
    """The encoder of a model; SettingsError with the nearest name when there is none."""
    if model.encoder not in ENCODERS:
        raise SettingsError(f"unknown encoder '{model.encoder}'{nearest(model.encoder, ENCODERS)}")
    return ENCODERS[model.encoder]


def load_weights(network: nn.Module, encoder: Encoder, source: str) -> None:
    """Load pre-trained weights into a network that `encoder` has built.

    `source` is `imagenet` (for ResNet-34 torchvision's IMAGENET1K_V1, downloaded once into torch's cache), `none`, or a
    file: .safetensors, or a state dict that torch.load reads without running code. Raises CheckpointError when the
    weights cannot be had or do not fit.
    """
    if source == "none":
        return
    if source != "imagenet":
        _load(network, encoder, _read_weights(Path(source)), str(Path(source)))
    elif encoder.imagenet is not None:
        _load(network, encoder, encoder.imagenet(), f"{encoder.library}'s {encoder.words} ImageNet weights")
    else:
        raise CheckpointError(
            f"there are no ImageNet weights of {encoder.words}; use `--encoder-weights none`, or give a file: "
            "`--encoder-weights <file>`"
        )


def _resnet34() -> nn.Module:
    from torchvision.models import resnet34

    from ptxdist.train.resnet import ResNetFeatures

    return ResNetFeatures(resnet34(weights=None))


def _resnet34_imagenet() -> State:
    from torchvision.models import ResNet34_Weights

    return _downloaded(ResNet34_Weights.IMAGENET1K_V1)


ENCODERS = {
    "resnet34": Encoder(
        "ResNet-34", (64, 64, 128, 256, 512), _resnet34, "torchvision", "resnet34", ("fc.",), _resnet34_imagenet
    ),
}


def _downloaded(weights: WeightsEnum) -> State:
    """Weights of torchvision."""
    try:
        state: State = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise CheckpointError(
            f"the ImageNet weights of the encoder could not be downloaded from {weights.url}: {error}; go on with "
            "`--encoder-weights none`, or download them elsewhere and give the file: `--encoder-weights <file>`"
        ) from error
    return state


def _read_weights(path: Path) -> State:
    import safetensors.torch
    import torch

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
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected a state dict, names and tensors only, found {type(state).__name__}")
    return state


def _unusable(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CheckpointError(f"{path}: cannot be read as weights (.pth, .pt or .safetensors): {reason}")


def _load(network: nn.Module, encoder: Encoder, state: State, source: str) -> None:
    expected = network.state_dict()
    found = {key: value for key, value in state.items() if not key.startswith(encoder.ignored)}
    # Files from before PyTorch 0.4.1 lack these counters; load_state_dict fills them in.
    required = {key for key in expected if not key.endswith("num_batches_tracked")}
    problems = {
        "missing": sorted(required - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": sorted(key for key in expected.keys() & found if expected[key].shape != found[key].shape),
    }
    faults = [f"{len(keys)} {name}: {', '.join(keys[:3])}" for name, keys in problems.items() if keys]
    if faults:
        raise CheckpointError(
            f"{source}: not the weights of {encoder.library}'s {encoder.architecture}; {'; '.join(faults)}"
        )
    network.load_state_dict(found)
