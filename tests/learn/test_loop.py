"""Training learns, resumes to the bit, and does not depend on the number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ptxdist.config import ModelSettings, StageSettings, TrainSettings
from ptxdist.data.catalog import read_catalog
from ptxdist.data.store import open_store
from ptxdist.errors import TrainingError
from ptxdist.learn.checkpoint import load_weights
from ptxdist.learn.loop import FitResult, StageData, fit
from ptxdist.learn.unet import build_unet
from ptxdist.rundir import EpochMetrics

CPU = torch.device("cpu")
MODEL = ModelSettings(encoder_weights="none")


def data(cache: Path, size_px: int = 32) -> StageData:
    cases = read_catalog(cache).labelled
    sides = [[i for i, case in enumerate(cases) if case.split == side] for side in ("train", "val")]
    return StageData(open_store(cache, size_px), cases, np.array(sides[0]), np.array(sides[1]))


def train(cache: Path, folder: Path, stage: StageSettings, seed: int = 3, **hooks: object) -> FitResult:
    torch.manual_seed(seed)
    model = build_unet(MODEL)
    return fit(
        model,
        data(cache, stage.size_px),
        stage,
        TrainSettings(),
        number=1,
        seed=seed,
        device=CPU,
        folder=folder,
        **hooks,
    )


def state(path: Path) -> dict[str, torch.Tensor]:
    model = build_unet(MODEL)
    load_weights(model, path)
    return model.state_dict()


def test_four_images_are_learnt_by_heart(cache: Path, tmp_path: Path) -> None:
    small = data(cache)
    seen = StageData(small.store, small.cases, np.repeat(small.train[:4], 12), small.train[:4])
    stage = StageSettings(size_px=32, epochs=4, batch_size=4, augmentation="none", best_by="positive_dice")
    torch.manual_seed(0)
    result = fit(build_unet(MODEL), seen, stage, TrainSettings(), number=1, seed=0, device=CPU, folder=tmp_path)
    assert result.history[0].train_loss > 1.0
    assert result.best.at_stage.positive_dice > 0.8
    assert result.best.at_full.positive_dice > 0.7


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(cache: Path, tmp_path: Path) -> None:
    stage = StageSettings(size_px=32, epochs=4, batch_size=4, swa_epochs=2, best_by="loss")
    whole = train(cache, tmp_path / "whole", stage)

    class StoppedError(Exception):
        pass

    def stop_in_epoch_three(step: str, epoch: int, done: int, total: int) -> None:
        if step == "train" and epoch == 3:
            raise StoppedError

    heard: list[str] = []
    with pytest.raises(StoppedError):
        train(cache, tmp_path / "broken", stage, on_step=stop_in_epoch_three)
    resumed = train(cache, tmp_path / "broken", stage, seed=3, on_message=heard.append)
    assert heard == ["stage 1 goes on after epoch 2 of 4"]
    assert len(whole.history) == len(resumed.history) == 5

    def numbers(item: EpochMetrics) -> dict[str, object]:
        return item.model_dump(exclude={"train_seconds", "val_seconds", "images_per_second"})

    assert [numbers(item) for item in whole.history] == [numbers(item) for item in resumed.history]
    assert whole.best.epoch == resumed.best.epoch
    assert whole.sha256 == resumed.sha256
    for name in ("model", "optimizer", "average"):
        first, second = (tmp_path / run / "epoch-0004" / f"{name}.safetensors" for run in ("whole", "broken"))
        assert first.read_bytes() == second.read_bytes(), name


def test_the_best_weights_are_those_of_the_best_epoch(cache: Path, tmp_path: Path) -> None:
    stage = StageSettings(size_px=32, epochs=3, batch_size=4, best_by="loss")
    result = train(cache, tmp_path, stage)
    assert result.best.val_loss == min(item.val_loss for item in result.history)
    assert result.weights.name == f"best-{result.best.epoch:04d}.safetensors"
    last = state(tmp_path / "epoch-0003" / "model.safetensors")
    same = all(torch.equal(value, last[key]) for key, value in state(result.weights).items())
    assert same == (result.best.epoch == 3)


def test_a_loss_that_is_not_finite_stops_with_epoch_and_cases(cache: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_unet(MODEL)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    stage = StageSettings(size_px=32, epochs=1, batch_size=4)
    with pytest.raises(TrainingError, match=r"stage 1, epoch 1 is nan on the cases case-"):
        fit(model, data(cache), stage, TrainSettings(), number=1, seed=0, device=CPU, folder=tmp_path)


def on_rank(rank: int, ranks: int, cache: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'meet'}", rank=rank, world_size=ranks)
    # Six training cases in batches of five: the last global batch has one case, so some ranks get none of it.
    stage = StageSettings(size_px=64, epochs=2, batch_size=5, learning_rate=1e-4, best_by="loss")
    result = train(cache, folder / "fit", stage)
    if rank == 0:
        (folder / "history.json").write_text(json.dumps([item.model_dump(mode="json") for item in result.history]))
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_equal_one_process(cache: Path, tmp_path: Path, ranks: int) -> None:
    torch.multiprocessing.spawn(on_rank, (ranks, cache, tmp_path), nprocs=ranks)
    stage = StageSettings(size_px=64, epochs=2, batch_size=5, learning_rate=1e-4, best_by="loss")
    alone = train(cache, tmp_path / "alone", stage)
    together = [EpochMetrics.model_validate(item) for item in json.loads((tmp_path / "history.json").read_text())]
    for one, many in zip(alone.history, together, strict=True):
        assert many.train_loss == pytest.approx(one.train_loss, rel=2e-3)
        assert many.val_loss == pytest.approx(one.val_loss, rel=2e-3)
        assert many.at_full.cases == one.at_full.cases == 4
    torch.manual_seed(3)
    start = build_unet(MODEL).state_dict()
    ends = [state(folder / "epoch-0002" / "model.safetensors") for folder in (tmp_path / "alone", tmp_path / "fit")]
    weights = [key for key in start if key.endswith("weight")]
    moved = sum(float((ends[0][key] - start[key]).square().sum()) for key in weights) ** 0.5
    apart = sum(float((ends[0][key] - ends[1][key]).square().sum()) for key in weights) ** 0.5
    # Adam turns rounding in all but vanishing gradients into whole steps, so the weights agree less than the losses.
    assert apart < 0.5 * moved
