"""Checkpoints come back as they were, or are refused."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from ptxdist import files
from ptxdist.errors import CheckpointError
from ptxdist.train.checkpoint import (
    TrainingState,
    await_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
    snapshot,
)


def trained(epoch: int) -> tuple[nn.Module, TrainingState]:
    torch.manual_seed(epoch)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    progress = {"history": [{"epoch": number, "loss": 0.1 + number / 3} for number in range(epoch)]}
    state = TrainingState(epoch, 0, model.state_dict(), optimizer.state_dict(), {"weight": model.weight * 2}, progress)
    return model, state


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, state = trained(3)
    save_checkpoint(tmp_path, state, keep=2)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert (loaded.epoch, loaded.progress) == (3, state.progress)
    assert all(torch.equal(loaded.model[key], value) for key, value in model.state_dict().items())
    assert torch.equal(loaded.average["weight"], model.weight * 2)
    optimizer = torch.optim.Adam(nn.Linear(4, 3).parameters())
    optimizer.load_state_dict(dict(loaded.optimizer))
    before, after = state.optimizer["state"], optimizer.state_dict()["state"]
    assert all(torch.equal(after[index][name], before[index][name]) for index in before for name in before[index])
    assert optimizer.param_groups[0]["betas"] == pytest.approx((0.9, 0.999))


def test_only_the_newest_are_kept_and_no_draft_stays(tmp_path: Path) -> None:
    for epoch in range(1, 6):
        save_checkpoint(tmp_path, trained(epoch)[1], keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-0004-step-000000", "epoch-0005-step-000000"]


@pytest.mark.parametrize("part", ["model.safetensors", "optimizer.safetensors", "average.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "altered", "gone"])
def test_a_damaged_checkpoint_is_passed_over_and_told(tmp_path: Path, part: str, damage: str) -> None:
    for epoch in (1, 2):
        save_checkpoint(tmp_path, trained(epoch)[1], keep=2)
    path = tmp_path / "epoch-0002-step-000000" / part
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "altered":  # still JSON, or still tensors
        path.write_bytes(content.replace(b'"epoch": 2', b'"epoch": 3') if part == "state.json" else content[:-1] + b"x")
    else:
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    told: list[str] = []
    loaded = load_checkpoint(tmp_path, told.append)
    assert loaded is not None
    assert loaded.epoch == 1
    assert len(told) == 1
    assert "epoch-0002-step-000000 is damaged" in told[0]


def test_a_checkpoint_that_a_limit_keeps_from_being_read_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for epoch in (1, 2):
        save_checkpoint(tmp_path, trained(epoch)[1], keep=2)

    def fail(path: Path) -> str:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    monkeypatch.setattr(files, "sha256", fail)
    with pytest.raises(CheckpointError, match=r"epoch-0002-step-000000 cannot be read.*raise the limit of open files"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_that_another_node_wrote_may_be_seen_late_or_not_at_all(tmp_path: Path) -> None:
    _, state = trained(2)
    writer = threading.Timer(0.3, save_checkpoint, (tmp_path / "shared", state), {"keep": 2})
    writer.start()
    loaded = await_checkpoint(tmp_path / "shared" / state.name)
    writer.join()
    assert torch.equal(loaded.average["weight"], state.average["weight"])
    with pytest.raises(CheckpointError, match=r"but rank 0 resumes from it.*shared storage"):
        await_checkpoint(tmp_path / "elsewhere" / state.name, patience_s=0)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "nowhere") is None


def test_weights_of_another_model_or_altered_ones_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    sha256 = save_weights(model.state_dict(), tmp_path / "w.safetensors")
    load_weights(nn.Linear(4, 3), tmp_path / "w.safetensors", sha256)
    with pytest.raises(CheckpointError, match=r"weight has shape \(3, 4\), not \(3, 5\)"):
        load_weights(nn.Linear(5, 3), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"has another checksum than when it was written; remove .* and rerun"):
        load_weights(nn.Linear(4, 3), tmp_path / "w.safetensors", "0" * 64)
    with pytest.raises(CheckpointError, match="missing"):
        load_weights(nn.Linear(4, 3), tmp_path / "none.safetensors", sha256)


def test_weights_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    plain, weights = tmp_path / "plain", tmp_path / "weights.safetensors"
    plain.touch()
    save_weights({"weight": torch.zeros(3)}, weights)
    assert weights.stat().st_mode == plain.stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "weights.safetensors"]


def test_a_snapshot_keeps_what_was_and_the_next_one_takes_its_memory() -> None:
    model, state = trained(1)
    before = model.weight.detach().clone()
    first = snapshot(state)
    with torch.no_grad():
        model.weight.add_(1)
        for entry in state.optimizer["state"].values():
            entry["exp_avg"].fill_(7)
    assert torch.equal(first.model["weight"], before)
    assert not (first.optimizer["state"][0]["exp_avg"] == 7).any()
    place = first.model["weight"].data_ptr()
    second = snapshot(state, first)
    assert torch.equal(second.model["weight"], before + 1)
    assert (second.optimizer["state"][0]["exp_avg"] == 7).all()
    assert torch.equal(second.average["weight"], state.average["weight"])
    assert second.model["weight"].data_ptr() == place
    assert second.optimizer["param_groups"] == state.optimizer["param_groups"]
