"""A loss, an encoder, a recipe and a chart are each added with a function and a line in a dict or list.

Then training uses them, and model card, bundle, exported metadata and report tell the truth about them.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ptxdist
from ptxdist.cache.preprocess import PreprocessResult
from ptxdist.errors import SettingsError
from ptxdist.predict.bundle import write_bundle
from ptxdist.report import charts
from ptxdist.report.page import Chart, Section
from ptxdist.report.report import write_report
from ptxdist.report.sections import RunData, sections
from ptxdist.resolve import load_settings
from ptxdist.run.pipeline import train
from ptxdist.rundir import read_metrics
from ptxdist.train.augment import RECIPES, Named, load_albumentations
from ptxdist.train.encoders import ENCODERS, Encoder
from ptxdist.train.features import Features
from ptxdist.train.losses import LOSSES, Loss


def focal_per_case(logits: Tensor, target: Tensor) -> Tensor:
    """Focal loss (Lin et al. 2017) with gamma 2, float32 (B,)."""
    logits, target = logits.float().flatten(1), target.float().flatten(1)
    cross_entropy = nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return ((1 - torch.exp(-cross_entropy)) ** 2 * cross_entropy).mean(1)


class FiveConvolutions(Features):
    """Features at strides 2 to 32, of four channels each."""

    channels = (4, 4, 4, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3, stride=2, padding=1) for i in range(5))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for layer in self.layers:
            x = layer(x).relu()
            features.append(x)
        return features


def turned() -> list[Any]:
    """Rotation and blur: a transform of positions, and one that looks at a pixel's surroundings."""
    A = load_albumentations()  # noqa: N806
    return [A.Affine(rotate=(-20, 20), p=1.0), A.GaussianBlur(blur_limit=(3, 3), p=0.5)]


def gap_chart(run: RunData) -> Chart:
    """Validation loss minus training loss, by epoch."""
    epochs = [epoch for stage in run.result.stages for epoch in stage.history]
    gaps = [epoch.val_loss - (epoch.train_loss or 0) for epoch in epochs]
    x, y = charts.linear_axis("epoch", 0, len(gaps)), charts.linear_axis("gap", min(gaps) - 1, max(gaps) + 1)
    return Chart("Generalisation gap", charts.plot(x, y, [], words="gap by epoch"))


@pytest.fixture
def extended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The four dicts and lists, each with one more line."""
    monkeypatch.setitem(LOSSES, "focal", Loss("focal loss of Lin et al.", focal_per_case))
    tiny = Encoder("five convolutions", FiveConvolutions, "ours", "five")
    monkeypatch.setitem(ENCODERS, "tiny", tiny)
    monkeypatch.setitem(RECIPES, "turned", Named("rotation and blur", turned))


def test_what_is_added_in_one_place_is_trained_and_described_everywhere(
    extended: None, small_cache: tuple[Path, PreprocessResult], tmp_path: Path
) -> None:
    settings = load_settings(
        "smoke",
        assignments=[
            "model.encoder=tiny", "model.decoder_channels=[4, 4, 4, 4, 4]", "model.image_head=true",
            "stages.*.loss=focal", "stages.*.augmentation=turned", "train.device=cpu", "train.precision=fp32",
        ],
        options={"data.cache": str(small_cache[0])},
    )  # fmt: skip
    run = tmp_path / "run"
    result = train(settings, run)

    best = result.stages[0].best
    assert 0 < best.val_loss < 0.8, "validated with the loss that was trained: BCE plus Dice is above 1 at first"
    assert sum(v.numel() for k, v in read_weights(run / result.stages[0].weights).items() if "encoder" in k) == 704

    page = write_report(
        run, sections=lambda data: (*sections(data), Section("gap", "Gap", (gap_chart(data),)))
    ).read_text()
    for words in (
        "five convolutions",
        "focal loss of Lin et al. + 0.2 x BCE of the image head",
        "rotation and blur",
        "Generalisation gap",
    ):
        assert words in page, words
    assert "ResNet-34" not in page
    assert "Dice loss" not in page
    assert len(read_metrics(run)) == 2

    write_bundle(run, tmp_path / "model.ptxdist")
    with zipfile.ZipFile(tmp_path / "model.ptxdist") as archive:
        readme, card = archive.read("README.md").decode(), json.loads(archive.read("card.json"))
    assert "five convolutions" in readme
    assert "with an image head" in readme
    assert "ResNet-34" not in readme
    assert card["pipeline"]["model"]["encoder"] == "tiny"
    assert {stage["loss"] for stage in card["pipeline"]["stages"]} == {"focal"}
    predictor = ptxdist.Predictor.load(tmp_path / "model.ptxdist", device="cpu")
    assert sum(value.numel() for value in predictor.models[0].encoder.parameters()) == 704


def read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("stages.1.loss=bce_dise", "pipeline.stages.1.loss: unknown loss 'bce_dise' (did you mean 'bce_dice'?)"),
        ("model.encoder=resnet43", "pipeline.model.encoder: unknown encoder 'resnet43' (did you mean 'resnet34'?)"),
        ("stages.2.augmentation=siem", "pipeline.stages.2.augmentation: "),
    ],
)
def test_a_name_that_is_in_no_dict_is_refused_before_anything_is_made(
    small_cache: tuple[Path, PreprocessResult], tmp_path: Path, assignment: str, words: str
) -> None:
    settings = load_settings("smoke", assignments=[assignment], options={"data.cache": str(small_cache[0])})
    with pytest.raises(SettingsError) as caught:
        train(settings, tmp_path / "run")
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []
