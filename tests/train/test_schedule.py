"""Learning rates equal torch's own schedulers, epoch for epoch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptxdist.config import StageSettings
from ptxdist.train.schedule import learning_rate, positive_share, warm_up


def stage(schedule: str, epochs: int = 12) -> StageSettings:
    return StageSettings(size_px=32, epochs=epochs, batch_size=1, schedule=schedule, plateau_patience=2)


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)


@given(losses=st.lists(st.floats(0.1, 2.0), max_size=40))
def test_plateau_equals_reduce_lr_on_plateau(losses: list[float]) -> None:
    reference = optimizer()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(reference, factor=0.2, patience=2, eps=0.0)
    for number, loss in enumerate(losses):
        assert learning_rate(stage("plateau"), losses[:number]) == pytest.approx(reference.param_groups[0]["lr"])
        scheduler.step(loss)
    assert learning_rate(stage("plateau"), losses) == pytest.approx(reference.param_groups[0]["lr"])


def test_cosine_equals_cosine_annealing() -> None:
    reference = optimizer()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=12)
    for epoch in range(12):
        assert learning_rate(stage("cosine"), [1.0] * epoch) == pytest.approx(reference.param_groups[0]["lr"])
        reference.step()
        scheduler.step()


def test_a_stage_starts_at_its_own_learning_rate_and_constant_stays_there() -> None:
    assert {learning_rate(stage(name), []) for name in ("plateau", "cosine", "constant")} == {1e-3}
    assert learning_rate(stage("constant"), [9.0] * 50) == 1e-3


def test_the_rate_rises_in_a_line_over_the_first_steps() -> None:
    slow = stage("constant").model_copy(update={"warmup_steps": 4})
    assert [warm_up(slow, steps) for steps in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert warm_up(stage("constant"), 0) == 1


def test_share_of_positives_goes_in_a_line_from_first_to_last_epoch() -> None:
    stage = StageSettings(size_px=64, epochs=4, batch_size=2, positive_share=(0.8, 0.2))
    assert [positive_share(stage, epoch) for epoch in (1, 2, 3, 4)] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    one = StageSettings(size_px=64, epochs=1, batch_size=2, positive_share=(0.8, 0.2))
    assert positive_share(one, 1) == 0.8
    assert positive_share(StageSettings(size_px=64, epochs=4, batch_size=2), 1) is None
