"""An encoder that is added to the dict serves the U-Net, its weights and the words of reports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ptxdist.config import ModelSettings
from ptxdist.errors import CheckpointError, SettingsError
from ptxdist.train.encoders import ENCODERS, Encoder, chosen
from ptxdist.train.unet import UNet, build_unet


def build(**settings: object) -> UNet:
    torch.manual_seed(0)
    return build_unet(ModelSettings(**{"encoder_weights": "none", "encoder": "small", **settings}))


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_features_have_the_strides_and_channels_that_the_entry_states(name: str) -> None:
    encoder = ENCODERS[name]
    features = encoder.build().eval()(torch.zeros(2, 3, 64, 96))
    found = [tuple(feature.shape) for feature in features]
    strides = (2, 4, 8, 16, 32)
    assert found == [
        (2, channels, 64 // stride, 96 // stride) for channels, stride in zip(encoder.channels, strides, strict=True)
    ]


def test_an_encoder_of_ones_own_is_trained_within_the_unet() -> None:
    network = build(decoder_channels=(8, 8, 4, 4, 4))
    assert chosen(ModelSettings(encoder="small")).words == "five convolutions"
    image = torch.randint(0, 256, (4, 1, 64, 64), dtype=torch.uint8)
    before = {name: value.clone() for name, value in network.named_parameters()}
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(network(image), (image > 127).float())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    unchanged = [name for name, value in network.named_parameters() if value.equal(before[name])]
    assert not unchanged, "every weight is trained"


def test_weights_of_its_own_come_from_a_file_and_others_are_refused(tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in build().encoder.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "tiny.safetensors")
    torch.manual_seed(1)
    loaded = build(encoder_weights=str(tmp_path / "tiny.safetensors")).encoder.state_dict()
    assert all(loaded[name].equal(value) for name, value in state.items())
    safetensors.torch.save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not the weights of these tests's TinyFeatures; 25 missing"):
        build(encoder_weights=str(tmp_path / "other.safetensors"))


def test_imagenet_weights_are_those_of_the_entry_if_it_has_any(
    tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="no ImageNet weights of five convolutions"):
        build(encoder_weights="imagenet")
    state = {name: torch.ones_like(value) for name, value in tiny_encoder.build().state_dict().items()}
    monkeypatch.setitem(ENCODERS, "small", replace(tiny_encoder, imagenet=lambda: state))
    assert all(bool((value == 1).all()) for value in build(encoder_weights="imagenet").encoder.parameters())


def test_an_unknown_encoder_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(SettingsError, match=r"unknown encoder 'resnet43' \(did you mean 'resnet34'\?\)"):
        build(encoder="resnet43")
