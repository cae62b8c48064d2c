"""The demo starts from ImageNet weights where they are installed; its training is timed by `make demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ptxdist.cli import cli
from ptxdist.cli.data import phantom, preprocess
from ptxdist.cli.train import train
from ptxdist.resolve import load_settings
from ptxdist.train import pretrained


@pytest.mark.parametrize(
    ("installed", "encoder", "weights"),
    [(["timm/tf_efficientnet_lite0"], "timm/tf_efficientnet_lite0", "imagenet"), ([], "resnet34", "none")],
)
def test_encoder_of_the_demo(
    installed: list[str], encoder: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[dict[str, Any]] = []
    for command in (phantom, preprocess, train):
        monkeypatch.setattr(command, "callback", lambda **options: called.append(options))
    monkeypatch.setattr(pretrained, "offline_encoders", lambda: installed)
    done = CliRunner().invoke(cli, ["demo", "--out", str(tmp_path / "demo")])
    assert done.exit_code == 0, done.output
    assert ("random weights" in done.stderr) == (not installed)
    model = load_settings("demo", assignments=called[-1]["assignments"]).pipeline.model
    assert (model.encoder, model.encoder_weights) == (encoder, weights)
