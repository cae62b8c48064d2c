"""The encoders of the U-Net and their pre-trained weights.

Owns: ENCODERS, to which the networks of timm come under the names `timm/NAME`. To add an encoder, write a function and
add a line to ENCODERS. Refuses: weights that do not fit the encoder (CheckpointError).

torch, torchvision and timm are imported in functions only, so that a report can name an encoder without loading them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ptxdist.config import ModelSettings, nearest
from ptxdist.errors import CheckpointError, SettingsError, raise_limit, reason
from ptxdist.train import pretrained

if TYPE_CHECKING:
    from torch import Tensor

    from ptxdist.train.features import Features

State = Mapping[str, "Tensor"]
_UNREADABLE = (OSError, EOFError, KeyError, RuntimeError, ValueError, pickle.UnpicklingError)  # of torch.load


@dataclass(frozen=True)
class Encoder:
    """A network that turns an image into features.

    `words` name it in reports. `build` makes it with random weights, on the CPU. `check` raises SettingsError, before
    anything is built, when it cannot be an encoder of images of a size in pixels; None: it always can.
    Files of its weights contain the state dict of `library`'s `architecture`. `imagenet` returns such a state dict with
    ImageNet weights, or raises CheckpointError; None: there are none. They are of `origin`, for reports.
    """

    words: str
    build: Callable[[], Features]
    library: str
    architecture: str
    imagenet: Callable[[], State] | None = None
    origin: str = ""
    check: Callable[[int], None] | None = None


def chosen(model: ModelSettings) -> Encoder:
    """The encoder of a model; SettingsError with the nearest name when there is none.

    Whether timm has the network of `timm/NAME` is not looked up here, but by the entry's `check` and `build`.
    """
    name = model.encoder
    if name.startswith(_TIMM) and name != _TIMM:
        return _of_timm(name.removeprefix(_TIMM))
    if name not in ENCODERS:
        raise SettingsError(
            f"unknown encoder '{name}'{nearest(name, ENCODERS)}; the networks of timm have the names {_TIMM}NAME"
        )
    return ENCODERS[name]


def start_in_words(model: ModelSettings) -> str:
    """What the encoder of a model starts from, for reports."""
    if model.encoder_weights == "none":
        return "random weights"
    if model.encoder_weights != "imagenet":
        return "weights from a file"
    origin = chosen(model).origin
    return f"weights trained on ImageNet, of {origin}" if origin else "weights trained on ImageNet"


def load_weights(network: Features, encoder: Encoder, source: str) -> None:
    """Load pre-trained weights into a network that `encoder` has built.

    `source` is `imagenet` (from this machine, else downloaded once: `pretrained`), `none`, or a file: .safetensors, or
    a state dict that torch.load reads without running code. Raises CheckpointError when the weights cannot be had or
    do not fit.
    """
    if source == "none":
        return
    if source != "imagenet":
        state, place = read_weights(Path(source)), str(Path(source))
    elif encoder.imagenet is not None:
        state, place = encoder.imagenet(), f"{encoder.library}'s {encoder.words} ImageNet weights"
    else:
        raise CheckpointError(
            f"there are no ImageNet weights of {encoder.words}; use `--encoder-weights none`, or give a file: "
            "`--encoder-weights <file>`"
        )
    found = network.own_weights(state)
    if faults := misfits(network.state_dict(), found):
        raise CheckpointError(
            f"{place}: not the weights of {encoder.library}'s {encoder.architecture}; {'; '.join(faults)}"
        )
    network.load_state_dict(found)


def _resnet(depth: int) -> Encoder:
    """An encoder of torchvision."""

    def build() -> Features:
        from torchvision import models

        from ptxdist.train.features import ResNetFeatures

        return ResNetFeatures(models.get_model(name, weights=None))

    name = f"resnet{depth}"
    return Encoder(
        f"ResNet-{depth}",
        build,
        "torchvision",
        name,
        imagenet=lambda: pretrained.of_torchvision(name),
        origin="torchvision (IMAGENET1K_V1)",
    )


def _of_timm(name: str) -> Encoder:
    def build() -> Features:
        from ptxdist.train.timm_networks import TimmFeatures

        return TimmFeatures(name)

    def check(size_px: int) -> None:
        from ptxdist.train.timm_networks import check_timm

        check_timm(name, size_px)

    packaged = name.partition(".")[0] == pretrained.PACKAGED
    return Encoder(
        f"timm's {name}",
        build,
        "timm",
        name,
        imagenet=lambda: pretrained.of_timm(name),
        origin=f"the package {pretrained.PACKAGE}, or of timm if it is not installed" if packaged else "timm",
        check=check,
    )


ENCODERS = {f"resnet{depth}": _resnet(depth) for depth in (34, 18, 50)}
_TIMM = "timm/"


def read_weights(path: Path) -> State:
    """The state dict in a file, .safetensors or of torch, without running code; CheckpointError when there is none."""
    import torch
    from safetensors import SafetensorError

    from ptxdist.train.checkpoint import load_tensors

    if not path.is_file():
        raise CheckpointError(
            f"no encoder weights at {path}: give 'imagenet', 'none' or a .pth, .pt or .safetensors file"
        )
    try:
        if path.suffix == ".safetensors":
            state: object = load_tensors(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (*_UNREADABLE, SafetensorError) as error:
        raise_limit(error)
        raise CheckpointError(
            f"{path}: cannot be read as weights (.pth, .pt or .safetensors): {reason(error)}"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected a state dict, names and tensors only, found {type(state).__name__}")
    return state


def misfits(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """What of `found` does not fit the state dict `expected`: number and first names of keys; [] if all does.

    Files from before PyTorch 0.4.1 lack the counters of batch norms, and may do so.
    """
    required = {key for key in expected if not key.endswith("num_batches_tracked")}
    problems = {
        "missing": sorted(required - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": sorted(key for key in expected.keys() & found if expected[key].shape != found[key].shape),
    }
    return [f"{len(keys)} {name}: {', '.join(keys[:3])}" for name, keys in problems.items() if keys]
