"""The loss against its written formula, at its edges and under autocast."""

import math
from typing import Literal

import numpy as np
import pytest
import torch

from ptxdist.config import StageSettings
from ptxdist.errors import SettingsError
from ptxdist.train.losses import (
    LOSSES,
    Loss,
    bce_dice_per_image,
    bce_per_image,
    chosen,
    dice_loss,
    dice_sums,
    image_bce,
    over_ranks,
)


def batch(seed: int = 0, shape: tuple[int, ...] = (3, 1, 8, 8)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)


def reference(logits: torch.Tensor, target: torch.Tensor) -> list[float]:
    losses = []
    for x, t in zip(logits.double().numpy(), target.double().numpy(), strict=True):
        p = 1 / (1 + np.exp(-x))
        cross_entropy = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
        losses.append(cross_entropy + 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
    return losses


@pytest.mark.parametrize("soft", [True, False])
def test_the_loss_is_the_written_formula_for_soft_and_hard_targets(soft: bool) -> None:
    logits, target = batch()
    target = target if soft else (target > 0.7).float()
    loss = bce_dice_per_image(logits, target)
    assert loss.dtype == torch.float32
    assert loss.tolist() == pytest.approx(reference(logits, target), rel=1e-5)


def test_an_empty_prediction_of_an_empty_mask_costs_almost_nothing() -> None:
    loss = bce_dice_per_image(torch.full((1, 1, 256, 256), -20.0), torch.zeros(1, 1, 256, 256))
    assert 0 <= loss.item() < 1e-3


def test_a_perfect_prediction_costs_almost_nothing_and_its_opposite_much() -> None:
    target = torch.zeros(1, 1, 16, 16)
    target[..., :4] = 1
    logits = 40 * target - 20
    assert bce_dice_per_image(logits, target).item() < 1e-4
    assert bce_dice_per_image(-logits, target).item() > 20


def test_missing_a_mask_costs_its_dice_even_when_it_is_small() -> None:
    target = torch.zeros(1, 1, 256, 256)
    target[..., :4, :4] = 1
    assert bce_dice_per_image(torch.full_like(target, -20.0), target).item() > 0.9


def test_the_loss_of_an_image_does_not_depend_on_its_batch() -> None:
    logits, target = batch()
    alone = torch.cat([bce_dice_per_image(logits[i : i + 1], target[i : i + 1]) for i in range(3)])
    assert bce_dice_per_image(logits, target).tolist() == pytest.approx(alone.tolist(), rel=1e-6)


def test_under_autocast_the_loss_is_still_computed_in_float32() -> None:
    logits, target = batch(shape=(2, 1, 64, 64))
    logits = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = bce_dice_per_image(logits, target)
    assert loss.dtype == torch.float32
    assert loss.tolist() == pytest.approx(reference(logits, target), rel=1e-5)


def test_extreme_logits_give_finite_losses_and_gradients() -> None:
    logits = torch.tensor([-1e4, 1e4, 0.0, 1e4]).view(1, 1, 2, 2).requires_grad_()
    loss = bce_dice_per_image(logits, torch.tensor([1.0, 0.0, 0.5, 1.0]).view(1, 1, 2, 2))
    loss.sum().backward()
    assert math.isfinite(loss.item())
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_following_the_gradient_lowers_the_loss() -> None:
    logits, target = batch()
    logits.requires_grad_()
    before = bce_dice_per_image(logits, target)
    (gradient,) = torch.autograd.grad(before.sum(), logits)
    assert (bce_dice_per_image(logits.detach() - 0.1 * gradient, target) < before).all()


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_batch_gives_no_losses_and_can_be_differentiated(name: str) -> None:
    logits = torch.zeros(0, 1, 32, 32, requires_grad=True)
    loss = LOSSES[name].per_case(logits, torch.zeros(0, 1, 32, 32))
    assert loss.shape == (0,)
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.shape == (0, 1, 32, 32)


def dice_loss_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return dice_loss(dice_sums(logits, target))


def test_dice_of_a_batch_takes_all_pixels_as_one_image() -> None:
    logits, target = torch.randn(3, 1, 8, 8), (torch.rand(3, 1, 8, 8) < 0.3).float()
    whole = dice_loss_of(logits, target)
    flat = bce_dice_per_image(logits.view(1, 1, 24, 8), target.view(1, 1, 24, 8)) - bce_per_image(
        logits.view(1, 1, 24, 8), target.view(1, 1, 24, 8)
    )
    assert whole.item() == pytest.approx(flat.item(), rel=1e-6)
    per_image = (bce_dice_per_image(logits, target) - bce_per_image(logits, target)).mean()
    assert whole.item() != pytest.approx(per_image.item(), rel=1e-3), "the two are not the same"


def test_dice_of_a_batch_without_images_is_that_of_nothing() -> None:
    logits = torch.zeros(0, 1, 8, 8, requires_grad=True)
    loss = dice_loss_of(logits, torch.zeros(0, 1, 8, 8))
    loss.backward()
    assert loss.item() == 0


def variants() -> list[Loss]:
    return [variant for loss in LOSSES.values() for variant in (loss, loss.batch) if variant is not None]


@pytest.mark.parametrize("loss", variants(), ids=lambda loss: loss.words)
def test_a_loss_of_cases_is_the_objective_of_the_same_cases(loss: Loss) -> None:
    """From the parts of the cases, which validation keeps, comes what training differentiates."""
    logits, target = batch(1, (5, 1, 16, 16))
    parts = loss.parts(logits, target)
    assert parts.shape == (5, loss.width)
    assert parts.dtype == torch.float64
    expected = loss.per_case(logits, target).mean()
    if loss.sums and loss.whole:
        expected = expected + loss.whole(over_ranks(loss.sums(logits, target)))
    assert loss.total(parts.numpy()) == pytest.approx(expected.item(), rel=1e-6)
    apart = torch.cat([loss.parts(logits[i : i + 1], target[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(parts, apart, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_target_of_an_image_is_whether_any_of_its_mask_is_left(dtype: torch.dtype) -> None:
    target = torch.zeros(3, 1, 8, 8)
    target[1, 0, 2, 3], target[2] = 1 / 255, 0.4
    logits = torch.tensor([1.5, -0.5, 2.0])
    expected = [math.log(1 + math.exp(1.5)), math.log(1 + math.exp(0.5)), math.log(1 + math.exp(-2.0))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = image_bce(logits.to(dtype), target)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert image_bce(logits[:0], target[:0]).shape == (0,)


@pytest.mark.parametrize("dice", ["image", "batch"])
def test_the_loss_of_an_image_head_is_added_to_each_case_with_its_weight(dice: Literal["image", "batch"]) -> None:
    (mask, target), image = batch(1, (4, 1, 16, 16)), torch.randn(4, generator=torch.Generator().manual_seed(2))
    target[::2] = 0
    loss = chosen(StageSettings(size_px=32, epochs=1, batch_size=1, dice=dice, image_weight=0.3))
    assert loss.of_cases(mask, target).equal(loss.per_case(mask, target))
    added = 0.3 * image_bce(image, target)
    torch.testing.assert_close(loss.of_cases((mask, image), target), loss.per_case(mask, target) + added)
    with_head, without = (loss.total(loss.parts(output, target).numpy()) for output in ((mask, image), mask))
    assert with_head == pytest.approx(without + added.mean().item(), rel=1e-6)


@pytest.mark.parametrize("dice", ["image", "batch"])
def test_negative_cases_count_by_their_weight_but_teach_the_image_head(dice: Literal["image", "batch"]) -> None:
    (mask, target), image = batch(1, (4, 1, 16, 16)), torch.randn(4, generator=torch.Generator().manual_seed(2))
    target[1::2] = 0

    def parts(weight: float, rows: slice = slice(None)) -> torch.Tensor:
        stage = StageSettings(size_px=32, epochs=1, batch_size=1, dice=dice, negative_weight=weight, best_by="loss")
        return chosen(stage).parts((mask[rows], image[rows]), target[rows])

    by_head = 0.2 * image_bce(image, target).double()
    whole, half, none = parts(1.0), parts(0.5), parts(0.0)
    assert whole[::2].equal(none[::2]), "the positive cases count in full"
    assert whole[1::2, 1:].abs().sum() > 0 or dice == "image"
    torch.testing.assert_close(none[1::2, 0], by_head[1::2])
    assert none[1::2, 1:].abs().sum() == 0
    torch.testing.assert_close(half, (whole + none) / 2, rtol=1e-6, atol=0)
    without = parts(0.0, slice(0, 4, 2))
    torch.testing.assert_close(none[:, 1:].sum(0), without[:, 1:].sum(0))


def test_words_are_those_of_reports_and_bundles() -> None:
    def words(dice: Literal["image", "batch"]) -> str:
        return chosen(StageSettings(size_px=32, epochs=1, batch_size=1, dice=dice)).words

    assert words("image") == "BCE and Dice loss (Dice per image)"
    assert words("batch") == "BCE and Dice loss (Dice per batch)"


def test_a_loss_that_does_not_exist_and_one_without_the_dice_that_is_asked_for_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = StageSettings(size_px=32, epochs=1, batch_size=1, loss="bce_dise", dice="batch")
    with pytest.raises(SettingsError, match=r"unknown loss 'bce_dise' \(did you mean 'bce_dice'\?\)"):
        chosen(stage)
    monkeypatch.setitem(LOSSES, "focal", Loss("focal loss", bce_per_image))
    stage = stage.model_copy(update={"loss": "focal"})
    with pytest.raises(SettingsError, match="'focal' has no Dice over the batch"):
        chosen(stage)
    assert chosen(stage.model_copy(update={"dice": "image"})).words == "focal loss"
