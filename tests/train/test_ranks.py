"""Two, three and four ranks against one process: real gloo processes, started once, that do all of it in turn."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_encoder import TINY

from ptxdist.cache.catalog import read_catalog
from ptxdist.cache.store import open_store
from ptxdist.config import ModelSettings, StageSettings, TrainSettings
from ptxdist.errors import TrainingError
from ptxdist.records import EpochMetrics
from ptxdist.train import batchnorm
from ptxdist.train.augment import Augmentation
from ptxdist.train.checkpoint import load_weights
from ptxdist.train.dataset import batches, epoch_order, training_shares
from ptxdist.train.encoders import ENCODERS
from ptxdist.train.loop import StageData, fit
from ptxdist.train.losses import chosen
from ptxdist.train.scoring import score_cases
from ptxdist.train.swa import reestimate_batch_norm
from ptxdist.train.unet import build_unet

CPU = torch.device("cpu")
SEED = 3
TRAINED = ModelSettings(encoder="small", encoder_weights="none", decoder_channels=(32, 16, 16, 8, 8))
HEADED = TRAINED.model_copy(update={"image_head": True})
EXACT = TrainSettings(precision="fp32", keep_checkpoints=1)  # `auto` is bf16 on some CPUs

# Six training cases in batches of five: the last global batch has one case, so some ranks get none of it. With one case
# in a pass, three ranks make the passes of one process with three: the second one has an idle rank.
# All in float64: Adam turns rounding in vanishing gradients into whole steps, and hides so what is wrong.
RUNS: dict[str, tuple[int, ModelSettings, dict[str, Any], TrainSettings, TrainSettings]] = {
    "two, Dice of the batch": (2, HEADED, {"dice": "batch"}, EXACT, EXACT),
    "three, accumulating": (3, HEADED, {}, *(EXACT.model_copy(update={"micro_batch": cases}) for cases in (1, 3))),
    "four": (4, TRAINED, {}, EXACT, EXACT),
    "three, every setting of the optimiser": (
        3,
        HEADED,
        {
            "dice": "batch", "weight_decay": 0.05, "warmup_steps": 3,
            "epoch": "positives", "positive_share": (0.6, 0.4), "negative_weight": 0.25, "mix": 0.5,
        },
        EXACT,
        EXACT,
    ),
}  # fmt: skip


def stage_of(**changes: Any) -> StageSettings:
    return StageSettings(size_px=64, epochs=2, batch_size=5, learning_rate=1e-4, best_by="loss", **changes)


def train(
    cache: Path,
    folder: Path,
    stage: StageSettings,
    settings: TrainSettings,
    *,
    model_settings: ModelSettings = HEADED,
    dtype: torch.dtype = torch.float32,
) -> torch.nn.Module:
    torch.manual_seed(SEED)
    model = build_unet(model_settings).to(dtype)
    cases = read_catalog(cache).labelled
    sides = [np.array([i for i, case in enumerate(cases) if case.split == side]) for side in ("train", "val")]
    data = StageData(open_store(cache, stage.size_px), cases, *sides)
    result = fit(model, data, stage, settings, number=1, seed=SEED, device=CPU, folder=folder)
    if not dist.is_initialized() or dist.get_rank() == 0:
        lines = [item.model_dump(mode="json") for item in result.history]
        (folder / "history.json").write_text(json.dumps(lines))
    return model


def digests(model: torch.nn.Module) -> dict[str, str]:
    """A checksum of each tensor: the tensors themselves would be gigabytes."""
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in model.state_dict().items()}


def validate(cache: Path) -> dict[str, torch.Tensor]:
    """Counts of all 26 cases, in four blocks, by a network of random weights that finds something."""
    torch.manual_seed(1)
    model = build_unet(HEADED)
    cases = read_catalog(cache).labelled
    counts = score_cases(
        model, open_store(cache, 32), cases, np.arange(len(cases)), thresholds=[0.4, 0.5], device=CPU,
        flip_averaging=True, loss=chosen(stage_of(dice="batch")),
    )  # fmt: skip
    return {name: torch.from_numpy(getattr(counts, name)) for name in ("loss", "score", "at_stage", "at_full")}


def statistics(cache: Path, ranks: int, rank: int, *, synchronised: bool = True) -> dict[str, torch.Tensor]:
    """What is re-estimated over this rank's part of an epoch, whose last global batch has one case."""
    torch.manual_seed(2)
    model = build_unet(TRAINED)
    if synchronised:
        model = batchnorm.convert(model)
    order = np.arange(6)
    shares = training_shares(order, 5, rank, ranks)
    reestimate_batch_norm(model, batches(open_store(cache, 64), shares), torch.float32)
    return {name: value for name, value in model.named_buffers() if name.endswith(("_mean", "_var"))}


def stopped(cache: Path, folder: Path) -> str:
    """The error of a training whose network keeps all masks empty."""
    model = build_unet(TRAINED)
    torch.nn.init.constant_(model.head.bias, -1000.0)
    cases = read_catalog(cache).labelled
    sides = [np.array([i for i, case in enumerate(cases) if case.split == side]) for side in ("train", "val")]
    data, stage = StageData(open_store(cache, 64), cases, *sides), StageSettings(size_px=64, epochs=8, batch_size=5)
    settings = EXACT.model_copy(update={"stop_on_collapse": True})
    with pytest.raises(TrainingError) as caught:
        fit(model, data, stage, settings, number=1, seed=SEED, device=CPU, folder=folder)
    return str(caught.value)


def on_rank(rank: int, cache: Path, long_cache: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    ENCODERS["small"] = TINY  # in this process too
    for ranks in (1, 2, 3, 4):
        runs = {name: run for name, run in RUNS.items() if run[0] == ranks}
        if rank < ranks:
            dist.init_process_group("gloo", f"file://{folder / f'meet-{ranks}'}", rank=rank, world_size=ranks)
            torch.save(validate(long_cache), folder / f"counts-{ranks}-{rank}.pt")
            torch.save(statistics(cache, ranks, rank), folder / f"statistics-{ranks}-{rank}.pt")
            torch.save(statistics(cache, ranks, rank, synchronised=False), folder / f"apart-{ranks}-{rank}.pt")
            if ranks == 2:
                (folder / f"stopped-{rank}.txt").write_text(stopped(cache, folder / "stopped"))
            for name, (_, model_settings, changes, settings, _) in runs.items():
                model = train(
                    cache, folder / name, stage_of(**changes), settings, model_settings=model_settings,
                    dtype=torch.float64,
                )  # fmt: skip
                (folder / f"{name}-{rank}.json").write_text(json.dumps(digests(model)))
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(cache: Path, long_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the four processes left."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(on_rank, (cache, long_cache, folder), nprocs=4, start_method="forkserver")
    return folder


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_validation_numbers_are_identical_for_any_number_of_ranks(together: Path, ranks: int) -> None:
    alone = torch.load(together / "counts-1-0.pt")
    assert int(alone["at_full"][0, :, 1].sum()) > 0
    for rank in range(ranks):
        counts = torch.load(together / f"counts-{ranks}-{rank}.pt")
        for name, expected in alone.items():
            assert counts[name].equal(expected), f"{name} on rank {rank}"


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_statistics_are_reestimated_over_all_ranks(cache: Path, together: Path, ranks: int) -> None:
    own = [statistics(cache, ranks, rank, synchronised=False) for rank in range(ranks)]
    expected = {
        "statistics": torch.load(together / "statistics-1-0.pt"),
        "apart": {name: torch.stack([part[name] for part in own]).mean(0) for name in own[0]},
    }
    for kind, values in expected.items():
        found = [torch.load(together / f"{kind}-{ranks}-{rank}.pt") for rank in range(ranks)]
        for name, value in values.items():
            assert all(part[name].equal(found[0][name]) for part in found), f"{name} differs between ranks"
            torch.testing.assert_close(found[0][name], value, rtol=1e-3, atol=1e-4)


def test_a_collapse_stops_all_ranks_in_the_same_epoch(together: Path) -> None:
    for rank in range(2):
        text = (together / f"stopped-{rank}.txt").read_text()
        assert "stage 1 has collapsed to empty masks. In epoch 5 of 8, 0 % of the images get a mask" in text


@pytest.mark.parametrize("name", RUNS)
def test_ranks_together_train_as_one_process(cache: Path, together: Path, tmp_path: Path, name: str) -> None:
    ranks, model, changes, _, alone = RUNS[name]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(cache, tmp_path, stage_of(**changes), alone, model_settings=model, dtype=torch.float64)
    torch.set_num_threads(threads)
    one_by_one, many = (
        [EpochMetrics.model_validate(item) for item in json.loads((folder / "history.json").read_text())]
        for folder in (tmp_path, together / name)
    )
    for one, other in zip(one_by_one, many, strict=True):
        if one.train_loss is not None:
            assert other.train_loss == pytest.approx(one.train_loss, rel=1e-4)
        assert other.val_loss == pytest.approx(one.val_loss, rel=1e-4)
        assert other.at_full.cases == one.at_full.cases == 4
    torch.manual_seed(SEED)
    start = build_unet(model).state_dict()
    ends = [weights(folder / "epoch-0002-step-000000", model) for folder in (tmp_path, together / name)]
    kernels = [key for key in start if key.endswith("weight")]
    moved = sum(float((ends[0][key] - start[key]).square().sum()) for key in kernels) ** 0.5
    apart = sum(float((ends[0][key] - ends[1][key]).square().sum()) for key in kernels) ** 0.5
    assert apart < 0.02 * moved
    states = [json.loads((together / f"{name}-{rank}.json").read_text()) for rank in range(ranks)]
    for key, value in states[0].items():
        assert all(state[key] == value for state in states), f"{key} differs between ranks"


def weights(checkpoint: Path, settings: ModelSettings = HEADED) -> dict[str, torch.Tensor]:
    model = build_unet(settings)
    load_weights(model, checkpoint / "model.safetensors")
    return model.state_dict()


@pytest.mark.parametrize("update", [False, True], ids=["the authors' variant", "re-estimated"])
def test_the_average_is_equal_and_its_statistics_are_as_set(cache: Path, tmp_path: Path, update: bool) -> None:
    """Epochs 2 and 3 are averaged; the statistics are those of epoch 3, or of the averaged weights over its batches."""
    stage = StageSettings(
        size_px=32, epochs=3, batch_size=4, schedule="constant", swa_epochs=2, swa_update_batch_norm=update
    )
    model = train(cache, tmp_path, stage, EXACT.model_copy(update={"keep_checkpoints": 3}))
    second, third = (weights(tmp_path / f"epoch-{number:04d}-step-000000") for number in (2, 3))
    parameters = dict(model.named_parameters())
    for name, value in parameters.items():
        mean = (second[name].double() + third[name].double()) / 2
        torch.testing.assert_close(value.double(), mean, rtol=3e-7, atol=1e-8)
        assert not name.endswith("weight") or not value.equal(third[name]), name
    expected = {name: third[name] for name, _ in model.named_buffers() if name in third}
    if update:
        expected = reestimated(cache, stage, model)
    off = [
        float((value - expected[name]).abs().max() / expected[name].abs().max())
        for name, value in model.named_buffers()
        if not name.endswith("num_batches_tracked") and not name.startswith("input.")
    ]
    assert len(off) > 25
    # At 32 px the deepest layers normalise four values each, which enlarges rounding.
    assert np.median(off) <= (1e-5 if update else 0)
    assert max(off) <= (2e-2 if update else 0)
    moved = [name for name, value in model.named_buffers() if name in third and not value.equal(third[name])]
    assert bool(moved) == update


def reestimated(cache: Path, stage: StageSettings, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The plain mean of each batch's own mean and (unbiased) variance at each layer, over the last epoch's batches."""
    cases = read_catalog(cache).labelled
    train_side = np.array([i for i, case in enumerate(cases) if case.split == "train"])
    shares = training_shares(epoch_order(train_side, seed=SEED, epoch=stage.epochs), stage.batch_size, 0, 1)
    other = build_unet(HEADED)
    other.load_state_dict(model.state_dict())
    other.train()
    seen: dict[str, list[torch.Tensor]] = {}
    for name, layer in other.named_modules():
        if isinstance(layer, torch.nn.BatchNorm2d):

            def remember(layer: torch.nn.Module, inputs: tuple[torch.Tensor], name: str = name) -> None:
                variance, mean = torch.var_mean(inputs[0].double(), (0, 2, 3))
                seen.setdefault(f"{name}.running_mean", []).append(mean)
                seen.setdefault(f"{name}.running_var", []).append(variance)

            layer.register_forward_pre_hook(remember)
    names = [case.case_id for case in cases]
    store, augmentation = open_store(cache, stage.size_px), Augmentation(stage.augmentation, SEED)
    with torch.no_grad():
        for batch in batches(store, shares, augmentation=augmentation, names=names, epoch=stage.epochs):
            other(batch.image)
    return {name: torch.stack(values).mean(0).float() for name, values in seen.items()}
