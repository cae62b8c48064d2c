"""What cannot be trained is refused before anything is made, with the place and what is wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ptxdist.config import Settings
from ptxdist.errors import SettingsError
from ptxdist.resolve import load_settings
from ptxdist.train import losses
from ptxdist.train.choices import refuse_unknown
from ptxdist.train.losses import LOSSES, Loss


def settings(*assignments: str) -> Settings:
    return load_settings("smoke", assignments=assignments)


def refusal(*assignments: str) -> str:
    with pytest.raises(SettingsError) as caught:
        refuse_unknown(settings(*assignments))
    return str(caught.value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model.encoder=resnet33", "pipeline.model.encoder: unknown encoder 'resnet33' (did you mean 'resnet34'?)"),
        ("stages.2.loss=bce", "pipeline.stages.2.loss: unknown loss 'bce' (did you mean 'bce_dice'?)"),
        ("stages.1.augmentation=sim", "stages.1.augmentation: unknown augmentation 'sim' (did you mean 'siim'?)"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_one(assignment: str, message: str) -> None:
    assert message in refusal(assignment)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        ('"Affin"', "albumentations has no transform 'Affin' (did you mean Affine or PiecewiseAffine?)"),
        ('"Lambda"', "albumentations has no transform 'Lambda'"),
        ('"Compose"', "albumentations has no transform 'Compose'"),
        ('"BasicTransform"', "albumentations has no transform 'BasicTransform'"),
        ('"__name__"', "albumentations has no transform '__name__'"),
        ('"Affine", rotat = 3', "Affine has no argument 'rotat' (did you mean 'rotate'?)"),
        ('"Affine", strict = false', "Affine has no argument 'strict'"),
        ('"HorizontalFlip", p = 1.5', "HorizontalFlip: p: Input should be less than or equal to 1, found 1.5"),
        ('"MedianBlur", p = -0.1', "MedianBlur: p: Input should be greater than or equal to 0, found -0.1"),
        ('"CLAHE", clip_limit = -3', "CLAHE: clip_limit: "),
        ('"Affine", rotate = "much"', "Affine: rotate"),
        ('"RandomCrop"', "RandomCrop: height: Field required; RandomCrop: width: Field required"),
        (
            '"RandomCrop", height = 32, width = 32',
            "one of 32 x 32 in uint8; a transform must not",
        ),
        ('"RandomScale"', "RandomScale makes of an image of 64 x 64 pixels"),
        ('"ToRGB"', "one of 64 x 64 x 3 in uint8"),
        ('"Normalize"', "one of 64 x 64 in float32"),
        ('"ToTensorV2"', "one of 1 x 64 x 64 in torch.uint8"),
        ('"FDA"', "FDA cannot be applied to a grey image of 64 pixels and its mask: FDA requires ['fda_metadata']"),
        ('"BBoxSafeRandomCrop"', "BBoxSafeRandomCrop cannot be applied to a grey image of 64 pixels and its mask"),
        ('"ISONoise"', "expects 3-channel images"),
    ],
)
def test_transforms_that_cannot_be_applied_are_refused(transform: str, message: str) -> None:
    found = refusal(f'stages.1.augmentation=[{{transform = "NoOp"}}, {{transform = {transform}}}]')
    assert found.startswith("pipeline.stages.1.augmentation.2: ")
    assert message in found


@pytest.mark.parametrize(
    "transform",
    [
        '"HorizontalFlip"', '"RandomRotate90", p = 1', '"MedianBlur", blur_limit = [3, 5]', '"ShiftScaleRotate"',
        '"Affine", rotate = [-10, 10], scale = {x = [0.9, 1.1], y = [0.9, 1.1]}, p = 0.5',
        '"RandomSizedCrop", min_max_height = [40, 64], size = [64, 64]', '"ElasticTransform", alpha = 30, sigma = 5',
    ],
)  # fmt: skip
def test_transforms_that_keep_size_and_type_are_accepted(transform: str) -> None:
    refuse_unknown(settings(f"stages.1.augmentation=[{{transform = {transform}}}]"))


def test_a_loss_of_whole_batches_and_passes_of_parts_of_them_do_not_go_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loss = Loss("Dice of the batch", losses.bce_per_image, losses.dice_sums, losses.dice_loss)
    monkeypatch.setitem(LOSSES, "whole", loss)
    refuse_unknown(settings("stages.*.loss=whole"))
    assert "pipeline.stages.1.loss: 'whole' is a loss of whole batches" in refusal(
        "stages.*.loss=whole", "train.micro_batch=2"
    )


def test_names_are_checked_without_loading_torch_or_albumentations() -> None:
    code = (
        "import sys; from ptxdist.resolve import load_settings; from ptxdist.train.choices import refuse_unknown;"
        "refuse_unknown(load_settings('smoke')); print({'torch', 'torchvision', 'albumentations'} & sys.modules.keys())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
