"""An encoder that is added to the dict serves the U-Net, its weights and the words of reports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny_encoder import TINY

from ptxdist.config import ModelSettings, PipelineSettings, Settings, StageSettings
from ptxdist.errors import CheckpointError, SettingsError
from ptxdist.train.choices import refuse_unknown
from ptxdist.train.encoders import ENCODERS, chosen
from ptxdist.train.features import STRIDES, Features
from ptxdist.train.unet import UNet, build_unet

IMAGENET = (Features.mean, Features.std)


def build(**settings: object) -> UNet:
    torch.manual_seed(0)
    return build_unet(ModelSettings(**{"encoder_weights": "none", "encoder": "small", **settings}))


@pytest.mark.parametrize(
    ("name", "channels", "normalisation"),
    [
        ("small", (4, 4, 8, 8, 16), IMAGENET),
        ("resnet18", (64, 64, 128, 256, 512), IMAGENET),
        ("resnet34", (64, 64, 128, 256, 512), IMAGENET),
        ("resnet50", (64, 256, 512, 1024, 2048), IMAGENET),
        ("timm/mobilenetv3_small_050", (16, 8, 16, 24, 288), IMAGENET),
        ("timm/resnet10t.c3_in1k", (64, 64, 128, 256, 512), IMAGENET),
        ("timm/tf_efficientnet_lite0", (16, 24, 40, 112, 320), ((0.5,) * 3, (0.5,) * 3)),
        ("timm/vgg11", (128, 256, 512, 512, 512), IMAGENET),  # it has features at stride 1 too
    ],
)
def test_features_have_the_strides_and_channels_that_the_network_states(
    name: str, channels: tuple[int, ...], normalisation: tuple[tuple[float, ...], tuple[float, ...]]
) -> None:
    with torch.device("meta"):
        encoder = chosen(ModelSettings(encoder=name)).build().eval()
        features = encoder(torch.zeros(2, 3, 64, 96))
    assert encoder.channels == channels
    assert (encoder.mean, encoder.std) == normalisation
    found = [tuple(feature.shape) for feature in features]
    assert found == [(2, width, 64 // stride, 96 // stride) for width, stride in zip(channels, STRIDES, strict=True)]


@pytest.mark.parametrize("name", ["timm/mobilenetv3_small_050", "timm/tf_efficientnet_lite0", "resnet18"])
def test_the_unet_has_one_logit_a_pixel_with_any_encoder(name: str) -> None:
    network = build(encoder=name, decoder_channels=(8, 8, 4, 4, 4)).eval()
    assert network(torch.zeros(2, 1, 64, 32, dtype=torch.uint8)).shape == (2, 1, 64, 32)


def test_images_are_normalised_as_the_encoder_needs() -> None:
    network = build(encoder="timm/tf_efficientnet_lite0", decoder_channels=(4, 4, 4, 4, 4))
    levels = network.input(torch.tensor([0, 255]).view(1, 1, 1, 2))
    torch.testing.assert_close(levels, torch.tensor([-1.0, 1.0]).expand(1, 3, 1, 2), rtol=0, atol=1e-6)


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
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(CheckpointError, match="no ImageNet weights of five convolutions"):
        build(encoder_weights="imagenet")
    state = {name: torch.ones_like(value) for name, value in TINY.build().state_dict().items()}
    monkeypatch.setitem(ENCODERS, "small", replace(TINY, imagenet=lambda: state))
    assert all(bool((value == 1).all()) for value in build(encoder_weights="imagenet").encoder.parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet43", r"unknown encoder 'resnet43' \(did you mean 'resnet34'\?\); .* of timm have the names timm/NAME"),
        ("timm/", r"unknown encoder 'timm/'"),
        ("timm/efficientnet_lite", r"timm has no network 'efficientnet_lite' \(did you mean efficientnet_lite\d or "),
        ("timm/hf-hub:a/b", r"timm has no network 'hf-hub:a/b'"),
        ("timm/resnet10t.best", r"timm's 'resnet10t.best' cannot be an encoder: Invalid pretrained tag"),
        (
            "timm/convnext_atto",
            r".* at strides 4, 8, 16 and 32 only; an encoder of the U-Net also needs 2: use another",
        ),
        ("timm/resmlp_12_224", r"timm's 'resmlp_12_224' "),
    ],
)
def test_an_encoder_that_does_not_exist_or_lacks_a_stride_is_refused_before_it_is_built(
    name: str, message: str
) -> None:
    settings = Settings(
        pipeline=PipelineSettings(
            name="a", model=ModelSettings(encoder=name), stages=(StageSettings(size_px=64, epochs=1, batch_size=2),)
        )
    )
    with pytest.raises(SettingsError, match=f"^pipeline.model.encoder: {message}"):
        refuse_unknown(settings)
