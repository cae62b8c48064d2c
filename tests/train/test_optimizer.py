"""Weight decay and the norm of gradients against torch's own optimisers and functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ptxdist.config import StageSettings, TrainSettings
from ptxdist.errors import SettingsError
from ptxdist.resolve import load_settings
from ptxdist.train.dataset import Batch
from ptxdist.train.losses import chosen
from ptxdist.train.step import Stepper, make_optimizer


def stage(**changes: Any) -> StageSettings:
    return StageSettings(size_px=32, epochs=1, batch_size=4, learning_rate=0.01, **changes)


def test_weights_decay_and_biases_and_batch_norm_do_not(small_net: Callable[[], nn.Module]) -> None:
    """With gradients of 0, a step of AdamW is the decay alone."""
    model, before = small_net(), small_net().state_dict()
    optimizer = make_optimizer(model, stage(weight_decay=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.01 * 0.1 if parameter.ndim == 4 else 1
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)
    assert type(make_optimizer(model, stage())) is torch.optim.Adam


def test_the_norm_of_the_gradient_is_reported(small_net: Callable[[], nn.Module]) -> None:
    generator = torch.Generator().manual_seed(0)
    image, mask = torch.randint(0, 256, (2, 4, 1, 32, 32), generator=generator, dtype=torch.uint8)
    batch = Batch(image, mask, torch.arange(4), 4)
    model, reference = small_net(), small_net()
    loss = chosen(stage()).per_case(reference(image), mask.float() / 255).mean()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in reference.parameters()])
    stepper = Stepper(model, make_optimizer(model, stage()), stage(), TrainSettings(), torch.float32)
    assert stepper.step(batch)[1].item() == pytest.approx(norm.item(), rel=1e-5)
    for (name, found), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stages.1.epoch=positives", 'epoch = "positives" needs positive_share'),
        ("stages.1.negative_weight=0.5", "negative_weight below 1 leaves masks in negative cases, which best_by"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(assignment: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings("paper", assignments=[assignment])


def test_masks_that_say_less_about_negative_cases_need_an_image_head() -> None:
    wanted = ["stages.*.negative_weight=0.5", "stages.*.best_by=loss"]
    with pytest.raises(SettingsError, match=r"stages.1.negative_weight below 1 needs model.image_head = true"):
        load_settings("paper", assignments=wanted)
    assert load_settings("paper", assignments=[*wanted, "model.image_head=true"]).pipeline.model.image_head
