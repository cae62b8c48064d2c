"""Networks of timm as encoders."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ptxdist.errors import SettingsError, reason
from ptxdist.train.features import STRIDES, Features


class TimmFeatures(Features):
    """A network of timm with random weights, without the layers after the last features.

    Raises SettingsError when timm has no such network or it lacks one of `STRIDES`.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if not timm.is_model(name):
            raise SettingsError(f"timm has no network '{name}'{_nearest(name)}")
        network = _create(name)
        strides = list(network.feature_info.reduction())
        if missing := [stride for stride in STRIDES if stride not in strides]:
            raise SettingsError(
                f"timm's '{name}' has features at strides {_in_words(strides)} only; an encoder of the U-Net also "
                f"needs {_in_words(missing)}: use another one"
            )
        if strides != list(STRIDES):
            network = _create(name, out_indices=[strides.index(stride) for stride in STRIDES])
        self.name, self.network = name, network
        self.channels = tuple(network.feature_info.channels())
        self.mean, self.std = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
        self._depthwise = any(isinstance(layer, nn.Conv2d) and layer.groups > 1 for layer in network.modules())

    def own_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of timm's whole network under the names of its features, as `rename` finds them."""
        return rename(self.name, self, state)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features at strides 2, 4, 8, 16 and 32 of an image (B, 3, H, W).

        On a CPU a network with depthwise convolutions is computed in float32, also under autocast: it is faster.
        """
        full = self._depthwise and torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", enabled=False) if full else nullcontext():
            features: list[Tensor] = self.network(x)
        return features


def check_timm(name: str, size_px: int) -> None:
    """Raise SettingsError when a network of timm cannot be an encoder of images of this size; calculates nothing."""
    with torch.device("meta"):
        network = TimmFeatures(name).eval()
        try:
            found = [tuple(feature.shape) for feature in network(torch.zeros(2, 3, size_px, size_px))]
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise SettingsError(
                f"timm's '{name}' takes no images of {size_px} x {size_px} pixels: {reason(error)}; use another one"
            ) from error
    expected = [
        (2, channels, size_px // stride, size_px // stride)
        for channels, stride in zip(network.channels, STRIDES, strict=True)
    ]
    if found != expected:
        raise SettingsError(f"the features of timm's '{name}' have the shapes {found}, not {expected}: use another one")


def rename(name: str, network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of timm's whole network under the names of its features, without the layers that these lack.

    Keys that the whole network does not have keep their names.
    """
    with torch.device("meta"):
        whole = {_plain(key) for key in timm.create_model(name, pretrained=False).state_dict()}
    own = {_plain(key): key for key in network.state_dict()}
    return {
        own.get(_plain(key), key): value
        for key, value in state.items()
        if _plain(key) in own or _plain(key) not in whole
    }


def _plain(key: str) -> str:
    """timm's features have `stages_0.weight` for `stages.0.weight`, or `model.` in front."""
    return key.removeprefix("network.").removeprefix("model.").replace(".", "_")


def _create(name: str, **arguments: Any) -> Any:
    try:
        return timm.create_model(name, pretrained=False, features_only=True, **arguments)
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise SettingsError(f"timm's '{name}' cannot be an encoder: {reason(error)}; use another one") from error


def _nearest(name: str) -> str:
    found = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(found)}?)" if found else ": `timm.list_models()` names them"


def _in_words(strides: Sequence[int]) -> str:
    return " and ".join(", ".join(map(str, strides)).rsplit(", ", 1))
