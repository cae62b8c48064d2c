"""Training learns, resumes to the bit, and does not depend on the number of ranks."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from ptxdist.cache.catalog import read_catalog
from ptxdist.cache.store import open_store
from ptxdist.config import ModelSettings, StageSettings, TrainSettings, Transform
from ptxdist.errors import CheckpointError, TrainingError
from ptxdist.events import Event, Message, Progress
from ptxdist.records import EpochMetrics
from ptxdist.train import saving
from ptxdist.train.checkpoint import checkpoints, load_weights
from ptxdist.train.loop import FitResult, StageData, fit
from ptxdist.train.losses import LOSSES, Loss
from ptxdist.train.scoring import predict_probability
from ptxdist.train.unet import build_unet

CPU = torch.device("cpu")
MODEL = ModelSettings(encoder="small", encoder_weights="none", decoder_channels=(16, 8, 8, 4, 4))
HEADED = MODEL.model_copy(update={"image_head": True})
PLAIN: dict[str, object] = {"swa_epochs": 2, "positive_share": (0.7, 0.3)}
ALL: dict[str, object] = {
    "weight_decay": 0.05, "warmup_steps": 30, "swa_epochs": 2, "epoch": "positives",
    "positive_share": (0.54, 0.45), "negative_weight": 0.25, "mix": 0.5,
}  # fmt: skip
RESNET = ModelSettings(encoder="resnet18", encoder_weights="none", decoder_channels=(64, 32, 32, 16, 16))


def data(cache: Path, size_px: int = 32) -> StageData:
    cases = read_catalog(cache).labelled
    sides = [[i for i, case in enumerate(cases) if case.split == side] for side in ("train", "val")]
    return StageData(open_store(cache, size_px), cases, np.array(sides[0]), np.array(sides[1]))


def train(
    cache: Path,
    folder: Path,
    stage: StageSettings,
    settings: TrainSettings | None = None,
    seed: int = 3,
    make_model: Callable[[], nn.Module] = lambda: build_unet(MODEL),
    **hooks: object,
) -> FitResult:
    torch.manual_seed(seed)
    return fit(
        make_model(),
        data(cache, stage.size_px),
        stage,
        settings or TrainSettings(),
        number=1,
        seed=seed,
        device=CPU,
        folder=folder,
        **hooks,
    )


def messages(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Message)]


def state(path: Path) -> dict[str, torch.Tensor]:
    model = build_unet(MODEL)
    load_weights(model, path)
    return model.state_dict()


def test_four_images_are_learnt_by_heart(cache: Path, tmp_path: Path) -> None:
    small = data(cache)
    seen = StageData(small.store, small.cases, np.repeat(small.train[:4], 24), small.train[:4])
    stage = StageSettings(size_px=32, epochs=2, batch_size=4, augmentation="none", best_by="positive_dice")
    torch.manual_seed(0)
    result = fit(build_unet(RESNET), seen, stage, TrainSettings(), number=1, seed=0, device=CPU, folder=tmp_path)
    assert result.history[0].train_loss > result.history[1].train_loss
    assert result.best.at_stage.positive_dice > 0.8
    assert result.best.at_full.positive_dice > 0.7


@pytest.mark.parametrize(
    ("changes", "settings", "preempted", "where"),
    [
        (PLAIN, {}, False, "epoch 2 of 4"),
        (PLAIN, {"checkpoint_every_images": 15}, False, "epoch 2 of 4 and 10 steps of the next"),
        (PLAIN, {"checkpoint_every_s": 1e-9}, False, "epoch 2 of 4 and 10 steps of the next"),
        (PLAIN, {}, True, "epoch 2 of 4 and 10 steps of the next"),
        (ALL, {"checkpoint_every_images": 15}, False, "epoch 2 of 4 and 10 steps of the next"),
    ],
    ids=["between epochs", "by images", "by time", "after a preemption notice", "with every setting of the optimiser"],
)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(
    cache: Path,
    long_cache: Path,
    full_recipe: tuple[Transform, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    settings: dict[str, float],
    preempted: bool,
    where: str,
) -> None:
    inside = bool(settings) or preempted
    model = MODEL if preempted else HEADED
    recipe = full_recipe if "checkpoint_every_images" in settings or not inside else "siim"
    cache, settings = long_cache if inside else cache, TrainSettings(**{"checkpoint_every_s": 0.0, **settings})
    monkeypatch.setattr(saving, "_PREEMPTED_S", 0.0)
    stage = StageSettings(
        size_px=32, epochs=4, batch_size=2 if inside else 4, best_by="loss",
        augmentation=recipe, **changes,
    )  # fmt: skip
    whole = train(cache, tmp_path / "whole", stage, make_model=lambda: build_unet(model))

    class StoppedError(Exception):
        pass

    def stop_in_epoch_three(event: Event) -> None:
        if isinstance(event, Progress) and (event.step, event.epoch) == ("train", 3) and event.done > event.total - 2:
            raise StoppedError

    broken, events = tmp_path / "broken", list[Event]()
    with pytest.raises(StoppedError):
        train(
            cache, broken, stage, settings, make_model=lambda: build_unet(model), on_event=stop_in_epoch_three,
            preempted=lambda: preempted,
        )  # fmt: skip
    resumed = train(cache, broken, stage, settings, make_model=lambda: build_unet(model), on_event=events.append)
    assert messages(events) == [f"stage 1 resumes after {where}"]
    steps = {event.step for event in events if isinstance(event, Progress)}
    assert ("average" in steps) == bool(stage.swa_epochs), "what takes long is told"
    assert len(whole.history) == len(resumed.history) == (5 if stage.swa_epochs else 4)

    def numbers(item: EpochMetrics) -> dict[str, object]:
        return item.model_dump(exclude={"train_seconds", "val_seconds", "images_per_second"})

    assert [numbers(item) for item in whole.history] == [numbers(item) for item in resumed.history]
    assert whole.best.epoch == resumed.best.epoch
    assert whole.sha256 == resumed.sha256
    for name in ("model", "optimizer", "average"):
        first, second = (
            tmp_path / run / "epoch-0004-step-000000" / f"{name}.safetensors" for run in ("whole", "broken")
        )
        assert first.read_bytes() == second.read_bytes(), name


def test_an_image_head_alone_learns_which_images_are_positive(
    long_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = Loss("no loss of masks", lambda logits, target: 0 * logits.float().flatten(1).sum(1))
    monkeypatch.setitem(LOSSES, "nothing", nothing)
    stage = StageSettings(
        size_px=32, epochs=12, batch_size=4, learning_rate=0.01, loss="nothing", image_weight=1.0, best_by="loss"
    )
    torch.manual_seed(3)
    model, sides = build_unet(HEADED), data(long_cache)
    result = fit(model, sides, stage, TrainSettings(), number=1, seed=3, device=CPU, folder=tmp_path)
    assert result.history[0].val_loss == pytest.approx(math.log(2), abs=0.2)
    assert result.best.val_loss < 0.3
    images, masks = (np.stack([sides.store.sample(i)[part] for i in sides.val]) for part in (0, 1))
    found = predict_probability(model.eval(), torch.from_numpy(images)[:, None], flip_averaging=True).image
    assert ((found.detach().numpy() > 0.5) == masks.any((1, 2))).all()


def test_the_best_weights_are_those_of_the_best_epoch(cache: Path, tmp_path: Path) -> None:
    stage = StageSettings(size_px=32, epochs=3, batch_size=4, best_by="loss")
    result = train(cache, tmp_path, stage)
    assert result.best.val_loss == min(item.val_loss for item in result.history)
    assert result.weights.name == f"best-{result.best.epoch:04d}.safetensors"
    last = state(tmp_path / "epoch-0003-step-000000" / "model.safetensors")
    same = all(torch.equal(value, last[key]) for key, value in state(result.weights).items())
    assert same == (result.best.epoch == 3)


def test_a_loss_that_is_not_finite_stops_with_step_and_cases(cache: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_unet(MODEL)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    stage = StageSettings(size_px=32, epochs=1, batch_size=4)
    with pytest.raises(
        TrainingError, match=r"stage 1, epoch 1: loss of nan in step 1 on the cases case-.*no checkpoint"
    ):
        fit(model, data(cache), stage, TrainSettings(), number=1, seed=0, device=CPU, folder=tmp_path)


def test_a_gradient_that_is_not_finite_stops_and_names_the_last_good_checkpoint(cache: Path, tmp_path: Path) -> None:
    stage = StageSettings(size_px=32, epochs=2, batch_size=4)
    torch.manual_seed(0)
    model = build_unet(MODEL)
    epochs: list[int] = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf") if epochs else gradient

    next(model.parameters()).register_hook(spoil)
    with pytest.raises(
        TrainingError, match=r"gradient of norm (inf|nan) in step 1 on the cases .*epoch-0001-step-000000"
    ):
        fit(
            model, data(cache), stage, TrainSettings(), number=1, seed=0, device=CPU, folder=tmp_path,
            on_event=lambda event: epochs.append(event.epoch) if isinstance(event, EpochMetrics) else None,
        )  # fmt: skip


@pytest.mark.parametrize("dice", ["image", "batch"])
def test_it_trains_with_either_dice_and_a_share_of_positive_cases(
    cache: Path, tmp_path: Path, dice: Literal["image", "batch"]
) -> None:
    stage = StageSettings(size_px=32, epochs=8, batch_size=3, learning_rate=0.01, positive_share=(0.8, 0.4), dice=dice)
    result = train(cache, tmp_path, stage)
    assert result.history[-1].train_loss < 0.9 * result.history[0].train_loss


def test_accumulated_passes_make_the_step_of_the_whole_batch(cache: Path, tmp_path: Path) -> None:
    """With batch statistics left out of it, since those are of each pass."""
    stage = StageSettings(size_px=32, epochs=1, batch_size=4, learning_rate=1e-4)
    ends = []
    for micro_batch in (None, 3, 1):
        torch.manual_seed(3)
        model = build_unet(MODEL)
        for layer in model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.train = lambda mode=True, layer=layer: layer  # type: ignore[method-assign]
                layer.training = False
        folder = tmp_path / str(micro_batch)
        result = fit(
            model, data(cache), stage, TrainSettings(micro_batch=micro_batch), number=1, seed=3, device=CPU,
            folder=folder,
        )  # fmt: skip
        ends.append(result.history[0])
    for end in ends[1:]:
        assert end.train_loss == pytest.approx(ends[0].train_loss, rel=1e-4)
        assert end.val_loss == pytest.approx(ends[0].val_loss, rel=1e-3)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, which only root can make; `test_smoke` limits the size of files instead."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_loses_nothing_that_was_saved(
    cache: Path, small_net: Callable[[], nn.Module], tmp_path: Path, small_disk: Path
) -> None:
    """The second checkpoint meets a full disk; with room again the run ends as if nothing had been."""
    stage = StageSettings(size_px=32, epochs=3, batch_size=4, best_by="loss")
    whole = train(cache, tmp_path / "whole", stage, make_model=small_net)
    run, ballast = small_disk / "run", small_disk / "ballast"

    def fill_up(event: Event) -> None:
        if not isinstance(event, EpochMetrics):
            return
        deadline = time.monotonic() + 30
        while not list(run.glob("epoch-0001-step-000000")) and time.monotonic() < deadline:
            time.sleep(0.01)  # the first checkpoint is being written
        with suppress(OSError), open(ballast, "ab", buffering=0) as file:
            while file.write(bytes(512)):
                pass

    with pytest.raises(CheckpointError, match=r"No space left on device.*what was saved before is kept"):
        train(cache, run, stage, make_model=small_net, on_event=fill_up)
    assert [path.name for path in checkpoints(run)] == ["epoch-0001-step-000000"]
    assert not list(run.glob("*.tmp"))
    ballast.unlink()
    events: list[Event] = []
    assert train(cache, run, stage, make_model=small_net, on_event=events.append).sha256 == whole.sha256
    assert messages(events) == ["stage 1 resumes after epoch 1 of 3"]
