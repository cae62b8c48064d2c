"""A training that collapses says so within two epochs, or stops there; one that learns is not accused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ptxdist.cache.catalog import read_catalog
from ptxdist.cache.store import open_store
from ptxdist.config import StageSettings, TrainSettings
from ptxdist.errors import TrainingError
from ptxdist.events import Event, Message
from ptxdist.records import EpochMetrics
from ptxdist.train import collapse
from ptxdist.train.checkpoint import checkpoints
from ptxdist.train.loop import FitResult, StageData, fit

STAGE = StageSettings(size_px=32, epochs=8, batch_size=2, learning_rate=0.03, schedule="constant", augmentation="none")


class Pushed:
    """Receives the events of a training, and after `last` epochs pushes all masks of its network to empty ones."""

    def __init__(self, net: nn.Module, last: int) -> None:
        self.net, self.last, self.told = net, last, list[tuple[int, str]]()
        self.epoch = 0
        self.push()

    def push(self) -> None:
        if self.epoch == self.last:
            with torch.no_grad():
                self.net.layers[-1].bias -= 1000.0

    def __call__(self, event: Event) -> None:
        if isinstance(event, EpochMetrics):
            self.epoch = event.epoch
            self.push()
        if isinstance(event, Message):
            self.told.append((self.epoch, event.text))


def train(
    net: nn.Module, cache: Path, folder: Path, stage: StageSettings, *, stop: bool = False, **hooks: object
) -> FitResult:
    cases = read_catalog(cache).labelled
    sides = [np.array([i for i, case in enumerate(cases) if case.split == side]) for side in ("train", "val")]
    data = StageData(open_store(cache, stage.size_px), cases, sides[0], sides[1])
    settings = TrainSettings(stop_on_collapse=stop)
    return fit(net, data, stage, settings, number=1, seed=0, device=torch.device("cpu"), folder=folder, **hooks)


def test_a_collapse_is_named_in_its_second_epoch_and_once(
    long_cache: Path, tmp_path: Path, small_net: Callable[[], nn.Module]
) -> None:
    net = small_net()
    listener = Pushed(net, last=4)
    result = train(net, long_cache, tmp_path, STAGE, on_event=listener)
    assert [item.at_full.equals_all_empty for item in result.history[2:]] == [False] * 2 + [True] * 4
    ((epoch, text),) = listener.told
    assert epoch == 6
    assert text.startswith("warning: stage 1 has collapsed to empty masks. In epoch 6 of 8, 0 % of the images get a ")
    assert "the positives-only Dice is 0.00, after 0." in text
    assert "Start a new run with --set stages.1.dice=batch" in text


def test_masks_that_are_empty_from_the_start_are_named_after_half_of_the_epochs(
    long_cache: Path, tmp_path: Path, small_net: Callable[[], nn.Module]
) -> None:
    net = small_net()
    listener = Pushed(net, last=0)
    train(net, long_cache, tmp_path, STAGE.model_copy(update={"epochs": 4}), on_event=listener)
    ((epoch, text),) = listener.told
    assert epoch == 3
    assert "In epoch 3 of 4, 0 % of the images get a mask, and no masks were learnt before." in text


def test_a_stage_stops_at_its_collapse_if_wanted_and_keeps_what_it_has(
    long_cache: Path, tmp_path: Path, small_net: Callable[[], nn.Module]
) -> None:
    net = small_net()
    with pytest.raises(TrainingError, match=r"^stage 1 has collapsed to empty masks\. .*the best weights are ") as told:
        train(net, long_cache, tmp_path, STAGE, stop=True, on_event=Pushed(net, last=4))
    weights = next(tmp_path.glob("best-*.safetensors"))
    assert f"the best weights are {weights}. Start" in str(told.value)
    assert int(weights.stem[5:]) <= 4
    assert checkpoints(tmp_path)[-1].name == "epoch-0006-step-000000"
    with pytest.raises(TrainingError, match="stage 1 has collapsed to empty masks"):
        train(small_net(), long_cache, tmp_path, STAGE, stop=True)
    assert len(train(small_net(), long_cache, tmp_path, STAGE).history) == STAGE.epochs


@pytest.mark.parametrize("dice", ["image", "batch"])
@pytest.mark.parametrize("seed", range(3))
def test_a_training_that_learns_is_not_accused(
    long_cache: Path, tmp_path: Path, small_net: Callable[[], nn.Module], dice: str, seed: int
) -> None:
    """From random weights, and from weights with which all masks are empty at first."""
    net = small_net()
    torch.manual_seed(seed)
    for layer in net.layers:
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()
    with torch.no_grad():
        net.layers[-1].bias -= 3.0 * (seed % 2)
    listener = Pushed(net, last=-1)
    result = train(net, long_cache, tmp_path, STAGE.model_copy(update={"dice": dice}), on_event=listener)
    assert listener.told == []
    assert result.history[-1].at_full.positive_dice > 0.5


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({"dice": "image", "positive_share": (0.8, 0.3)}, "--set stages.2.dice=batch: "),
        ({"dice": "batch", "positive_share": (0.8, 0.3)}, "--set 'stages.2.positive_share=[0.5,0.5]', "),
        ({"dice": "batch"}, "--set 'stages.2.positive_share=[0.5,0.5]', "),
        ({"dice": "batch", "positive_share": (0.5, 0.5)}, "from pre-trained weights"),
    ],
)
def test_the_cure_fits_the_settings_of_the_stage(
    long_cache: Path, tmp_path: Path, small_net: Callable[[], nn.Module], settings: dict[str, object], cure: str
) -> None:
    net, stage = small_net(), STAGE.model_copy(update={"epochs": 3, **settings})
    result = train(net, long_cache, tmp_path, stage, on_event=Pushed(net, last=0))
    found = collapse.find(result.history, stage, 2)
    assert found is not None
    assert found.cure.startswith(f"Start a new run {'with ' if '--' in cure else ''}{cure}")
    assert not found.over
    assert collapse.find(result.history[:2], stage, 2) is None
