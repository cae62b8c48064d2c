"""The data set on the device gives the loader's bytes, and so the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ptxdist.cache.catalog import read_catalog
from ptxdist.cache.store import open_store
from ptxdist.config import Recipe, StageSettings, TrainSettings, Transform
from ptxdist.errors import TrainingError
from ptxdist.events import Event, Message, Progress
from ptxdist.train.augment import Augmentation
from ptxdist.train.dataset import Share, batches, epoch_order, training_shares
from ptxdist.train.loop import FitResult, StageData, fit
from ptxdist.train.on_device import OnDeviceStore, hold

CPU = torch.device("cpu")
NAMES = [f"case-{number}" for number in range(26)]


@pytest.mark.parametrize("recipe", ["none", "siim", "in full", None])
def test_batches_are_bit_identical_to_the_loaders(
    long_cache: Path, recipe: str | None, full_recipe: tuple[Transform, ...]
) -> None:
    store = open_store(long_cache, 64)
    held = hold(store, CPU, "on")
    assert isinstance(held, OnDeviceStore)
    nobody = np.array([], np.int64)
    for epoch in range(3):
        shares = training_shares(epoch_order(np.arange(26), seed=1, epoch=epoch), 5, 0, 1)
        shares += [Share(nobody, 1, nobody), Share(np.array([3, 3]), 2, np.array([0, 1]))]
        augmentation = Augmentation(full_recipe if recipe == "in full" else recipe, 1) if recipe else None
        both = (
            list(batches(source, shares, augmentation=augmentation, names=NAMES, epoch=epoch, device=CPU))
            for source in (store, held)
        )
        for one, other in zip(*both, strict=True):
            assert torch.equal(one.image, other.image)
            assert torch.equal(one.mask, other.mask)
            assert torch.equal(one.index, other.index)
            assert one.global_size == other.global_size
            assert one.image.shape == other.image.shape == (len(one.index), 1, 64, 64)


def train(
    net: nn.Module, cache: Path, folder: Path, settings: TrainSettings, recipe: Recipe = "siim", **hooks: object
) -> FitResult:
    cases = read_catalog(cache).labelled
    sides = [np.array([i for i, case in enumerate(cases) if case.split == side]) for side in ("train", "val")]
    stage = StageSettings(size_px=32, epochs=2, batch_size=4, swa_epochs=1, best_by="loss", augmentation=recipe)
    return fit(
        net, StageData(open_store(cache, 32), cases, sides[0], sides[1]), stage, settings, number=1, seed=0,
        device=CPU, folder=folder, **hooks,
    )  # fmt: skip


def test_a_stage_trained_on_held_data_ends_with_the_same_bits(
    cache: Path, tmp_path: Path, small_net: Callable[[], nn.Module]
) -> None:
    results = [
        train(small_net(), cache, tmp_path / choice, TrainSettings(data_on_device=choice)) for choice in ("off", "on")
    ]
    assert results[0].sha256 == results[1].sha256


def test_a_recipe_in_full_is_applied_by_the_cpu_which_is_said(
    cache: Path, tmp_path: Path, small_net: Callable[[], nn.Module], full_recipe: tuple[Transform, ...]
) -> None:
    ends, texts, copied = [], [], []

    def listen(event: Event) -> None:
        texts.extend([event.text] if isinstance(event, Message) else [])
        copied.extend([event] if isinstance(event, Progress) and event.step == "load" else [])

    for choice in ("off", "auto", "on"):
        settings = TrainSettings(data_on_device=choice)
        ends.append(train(small_net(), cache, tmp_path / choice, settings, full_recipe, on_event=listen).sha256)
    assert len(set(ends)) == 1
    assert texts == [
        "stage 1: the augmentation does more than flip images and change grey levels, so the CPU prepares the training "
        "batches; the data set on the device is used for validation only"
    ]
    assert copied[-1].done == copied[-1].total == open_store(cache, 32).cases


def test_auto_holds_nothing_on_a_cpu(cache: Path) -> None:
    store = open_store(cache, 32)
    assert hold(store, CPU, "auto") is store
    assert hold(store, CPU, "off") is store


def test_auto_takes_a_quarter_of_a_gpus_free_memory_at_most_and_on_all_of_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no GPU its free memory is invented; what is decided is the same code."""
    store = open_store(cache, 64)
    needed, gpu = 2 * store.cases * 64**2, torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed - 1, 0))
    assert hold(store, gpu, "auto") is store
    with pytest.raises(TrainingError, match=r"the store of 64 pixels takes .* free; use train.data_on_device"):
        hold(store, gpu, "on")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * needed - 1, 0))
    assert hold(store, gpu, "auto") is store
