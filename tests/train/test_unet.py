"""The network, its names and its weights; nothing here needs the internet."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torchvision.models import ResNet34_Weights, resnet34

from ptxdist.config import ModelSettings
from ptxdist.errors import CheckpointError
from ptxdist.train.unet import UNet, build_unet, build_unloaded

PARAMETERS = 24_436_369  # Unet("resnet34", in_channels=3, classes=1) of segmentation_models_pytorch
State = dict[str, Tensor]


def build(weights: object = "none", **settings: object) -> UNet:
    torch.manual_seed(0)
    return build_unet(ModelSettings(encoder_weights=str(weights), **settings))


def grey(batch: int = 2, size_px: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, 1, size_px, size_px), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These images are too small to share between threads, which wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def network() -> UNet:
    return build().eval()


@pytest.fixture(scope="module")
def resnet() -> torch.nn.Module:
    """A ResNet-34 with random weights and random statistics."""
    torch.manual_seed(7)
    model = resnet34(weights=None)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.uniform_(-1, 1)
            layer.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def state(resnet: torch.nn.Module) -> State:
    return dict(resnet.state_dict())


def test_the_number_of_parameters_is_that_of_the_usual_unet(network: UNet) -> None:
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS
    assert sum(parameter.numel() for parameter in build(input_mapping="learned").parameters()) == PARAMETERS + 6


@pytest.mark.parametrize("encoder", ["resnet34", "timm/efficientnet_b0"])
def test_a_network_made_for_weights_draws_no_random_numbers_and_is_the_same_with_them(encoder: str) -> None:
    settings = ModelSettings(encoder=encoder, encoder_weights="imagenet", image_head=True)
    drawn = build("none", encoder=encoder, image_head=True).eval()
    before = torch.get_rng_state()
    made = build_unloaded(settings).eval()
    assert torch.equal(torch.get_rng_state(), before)
    made.load_state_dict(drawn.state_dict())
    for one, other in zip(made(grey()), drawn(grey()), strict=True):
        assert torch.equal(one, other)


def test_weight_names_are_those_that_checkpoints_keep(network: UNet) -> None:
    batch_norm = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
    decoder = rf"decoder\.[0-4]\.(conv[12]\.weight|bn[12]\.{batch_norm})"
    encoder = {f"encoder.{key}" for key in resnet34(weights=None).state_dict() if not key.startswith("fc.")}
    names = set(network.state_dict())
    assert {name for name in names if name.startswith("encoder.")} == encoder
    assert all(re.fullmatch(decoder, name) or name in ("head.weight", "head.bias") for name in names - encoder)
    assert set(build(input_mapping="learned").state_dict()) - names == {"input.weight", "input.bias"}
    assert set(build(encoder="small", image_head=True).state_dict()) - set(build(encoder="small").state_dict()) == {
        "image_head.weight",
        "image_head.bias",
    }


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_an_image_head_adds_one_logit_and_changes_no_other(batch: int) -> None:
    plain, headed = (build(encoder="small", image_head=choice).eval() for choice in (False, True))
    mask, image = headed(grey(batch))
    assert mask.equal(plain(grey(batch)))
    features = headed.encoder(headed.input(grey(batch)))[-1]
    expected = torch.nn.functional.linear(features.mean((2, 3)), headed.image_head.weight, headed.image_head.bias)
    assert image.shape == (batch,)
    torch.testing.assert_close(image, expected[:, 0])


def test_under_autocast_the_logits_of_images_are_still_computed_in_float32() -> None:
    network = build(encoder="small", image_head=True).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mask, image = network(grey())
    assert (mask.dtype, image.dtype) == (torch.bfloat16, torch.float32)
    assert not image.equal(image.bfloat16().float())


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96)])
def test_logits_have_the_size_of_the_image(network: UNet, height: int, width: int) -> None:
    logits = network(torch.zeros(2, 1, height, width, dtype=torch.uint8))
    assert logits.shape == (2, 1, height, width)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_goes_through_forward_and_backward(training: bool) -> None:
    network = build(image_head=True).train(training)
    logits, image = network(grey(0))
    assert logits.shape == (0, 1, 32, 32)
    (logits.sum() + image.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in network.parameters())
    assert all(buffer.isfinite().all() for buffer in network.buffers())


@pytest.mark.parametrize("shape", [(1, 1, 33, 32), (1, 1, 32, 63), (1, 3, 32, 32)])
def test_images_that_do_not_fit_are_refused(network: UNet, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        network(torch.zeros(shape))


def test_grey_levels_as_bytes_or_as_floats_give_the_same_logits(network: UNet) -> None:
    assert network(grey()).equal(network(grey().float()))


def test_the_image_is_repeated_and_normalised_as_torchvision_does(network: UNet) -> None:
    normalise = ResNet34_Weights.IMAGENET1K_V1.transforms()
    three = grey().expand(-1, 3, -1, -1).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (normalise.mean, normalise.std))
    torch.testing.assert_close(network.input(grey()), (three - mean) / std, rtol=0, atol=1e-6)


def test_a_learned_mapping_starts_as_the_repeated_channel_and_learns(network: UNet) -> None:
    learned = build(input_mapping="learned").eval()
    learned.load_state_dict(network.state_dict(), strict=False)
    assert learned(grey()).equal(network(grey()))
    learned(grey()).square().mean().backward()
    for parameter in (learned.input.weight, learned.input.bias):
        assert parameter.grad.abs().min() > 0
    with torch.no_grad():
        learned.input.weight.copy_(torch.tensor([2.0, 1.0, 0.5]).view(3, 1, 1))
        learned.input.bias.fill_(0.25)
    mean, std = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1), torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    expected = (learned.input.weight * grey() / 255 + 0.25 - mean) / std
    torch.testing.assert_close(learned.input(grey()), expected, rtol=0, atol=2e-6)


def test_every_parameter_gets_a_gradient() -> None:
    network = build(input_mapping="learned", image_head=True)
    mask, image = network(grey())
    (mask.square().mean() + image.square().mean()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_channels_last_gives_the_same_logits(network: UNet) -> None:
    other = build().eval()
    other.load_state_dict(network.state_dict())
    other.to(memory_format=torch.channels_last)
    torch.testing.assert_close(other(grey()), network(grey()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_encoder_weights_from_a_file_give_the_features_of_that_network(
    resnet: torch.nn.Module, state: State, tmp_path: Path, suffix: str
) -> None:
    file = tmp_path / f"resnet34{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, file)
    else:
        torch.save(state, file)
    encoder = build(file).encoder.eval()
    x = torch.randn(1, 3, 64, 64)
    expected, stages = [resnet.relu(resnet.bn1(resnet.conv1(x)))], (1, 2, 3, 4)
    for number in stages:
        last = resnet.maxpool(expected[0]) if number == 1 else expected[-1]
        expected.append(getattr(resnet, f"layer{number}")(last))
    features = encoder(x)
    assert [feature.shape[1] for feature in features] == [64, 64, 128, 256, 512]
    assert all(a.equal(b) for a, b in zip(features, expected, strict=True))


def test_weights_without_fc_and_without_batch_counters_are_accepted(state: State, tmp_path: Path) -> None:
    old = {k: v for k, v in state.items() if not k.startswith("fc.") and not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    assert build(tmp_path / "old.pth").encoder.conv1.weight.equal(state["conv1.weight"])


def test_imagenet_weights_come_through_torchvision_and_its_cache(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(state, folder / ResNet34_Weights.IMAGENET1K_V1.url.rpartition("/")[2])
    assert build("imagenet").encoder.conv1.weight.equal(state["conv1.weight"])


def test_a_failed_download_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # the discard port, where nobody listens
    with pytest.raises(CheckpointError, match=r"--encoder-weights none.*--encoder-weights <file>"):
        build("imagenet")


def without(state: State, key: str) -> State:
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "layer3.1.bn2.weight"), r"1 missing: layer3\.1\.bn2\.weight"),
        (lambda s: s | {"layer5.weight": torch.zeros(1)}, r"1 unexpected: layer5\.weight"),
        (lambda s: s | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, r"1 of another shape: conv1\.weight"),
        (lambda s: {f"module.{key}": value for key, value in s.items()}, r"missing: bn1\.bias.*unexpected: module\."),
    ],
)
def test_weights_of_another_network_are_refused_with_file_and_keys(
    state: State, tmp_path: Path, change, message: str
) -> None:
    file = tmp_path / "other.pth"
    torch.save(change(state), file)
    with pytest.raises(CheckpointError, match=rf"other\.pth.*{message}"):
        build(file)


class Code:
    """Runs when unpickled without weights_only."""

    def __reduce__(self) -> tuple:
        return (print, ("code was run",))


def test_files_that_are_no_weights_are_refused(state: State, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(CheckpointError, match=r"no encoder weights at .*absent\.pth"):
        build(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="no encoder weights at imagnet: give 'imagenet'"):
        build("imagnet")
    contents = {"a.pth": b"", "b.pth": b"not weights", "c.safetensors": b"", "d.safetensors": b"x" * 99}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name}: cannot be read as weights"):
            build(tmp_path / name)
    torch.save(state, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:100_000])
    torch.save({"conv1.weight": Code()}, tmp_path / "code.pth")
    for name in ("cut.pth", "code.pth"):
        with pytest.raises(CheckpointError, match=rf"{name}: cannot be read as weights"):
            build(tmp_path / name)
    assert "code was run" not in capsys.readouterr().out
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "checkpoint.pth")
    with pytest.raises(CheckpointError, match="expected a state dict"):
        build(tmp_path / "checkpoint.pth")


def test_it_is_the_unet_of_segmentation_models_pytorch(network: UNet) -> None:
    """As many parameters, and with the weights carried over the same logits and gradients."""
    smp = pytest.importorskip("segmentation_models_pytorch", reason="the dev extra is not installed")
    torch.manual_seed(5)
    settings = {"encoder_name": "resnet34", "encoder_weights": None, "decoder_channels": (256, 128, 64, 32, 16)}
    other = smp.Unet(**settings, in_channels=3, classes=1)
    with torch.no_grad():
        for layer in other.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                for values in (layer.weight, layer.running_var):
                    values.uniform_(0.5, 2)
                for values in (layer.bias, layer.running_mean):
                    values.uniform_(-1, 1)
    assert sum(p.numel() for p in other.parameters()) == PARAMETERS
    # Both register their layers in the order of the forward pass, decoder blocks from coarse to fine.
    own = build()
    names = dict(zip(own.state_dict(), other.state_dict(), strict=True))
    own.load_state_dict({name: other.state_dict()[theirs] for name, theirs in names.items()})
    for training in (False, True):
        logits, expected = (
            model.train(training)(image) for model, image in ((own, grey(2, 96)), (other, own.input(grey(2, 96))))
        )
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        gradients = [
            torch.autograd.grad(output.sigmoid().mean(), tuple(model.parameters()))
            for model, output in ((own, logits), (other, expected))
        ]
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert all(own.state_dict()[name].equal(other.state_dict()[theirs]) for name, theirs in names.items())
