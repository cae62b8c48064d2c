"""A stage on phantoms before the cases: what it trains on, what it keeps, what is said of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ptxdist.config import Settings
from ptxdist.errors import SettingsError
from ptxdist.events import Event, Message, Progress
from ptxdist.resolve import load_settings
from ptxdist.run import plan
from ptxdist.run.pipeline import train

STAGE = 'size_px = 32\nbatch_size = 4\naugmentation = "none"\n'
PIPELINE = f"""
[model]
encoder = "resnet18"
encoder_weights = "none"
decoder_channels = [8, 8, 8, 4, 4]
[[stages]]
epochs = 2
phantoms = 10
{STAGE}
[[stages]]
epochs = 1
{STAGE}
"""


def settings_of(cache: Path, folder: Path, *assignments: str) -> Settings:
    (folder / "first.toml").write_text(PIPELINE)
    return load_settings(str(folder / "first.toml"), assignments=assignments, options={"data.cache": str(cache)})


def test_a_stage_on_phantoms_is_drawn_trained_and_named_and_keeps_its_last_epoch(cache: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    result = train(settings_of(cache, tmp_path), tmp_path / "run", on_event=events.append)
    drawn = [event for event in events if isinstance(event, Progress) and event.step == "draw"]
    assert (drawn[-1].stage, drawn[-1].done, drawn[-1].total) == (1, 10, 10)
    trained = {
        stage: {
            event.total
            for event in events
            if isinstance(event, Progress) and (event.stage, event.step) == (stage, "train")
        }
        for stage in (1, 2)
    }
    assert trained == {1: {10}, 2: {6}}
    first, second = result.stages
    assert first.best.epoch == 2
    assert first.history[0].at_full.cases == second.history[0].at_full.cases == 4  # held-out cases of the cache
    assert not [event for event in events if isinstance(event, Message) and "collapsed" in event.text]
    card = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "on 10 phantoms with the masks of the training cases" in card
    assert "the last one: epoch 2" in card


def test_the_phantoms_are_part_of_what_a_stage_is_and_training_is_repeatable(cache: Path, tmp_path: Path) -> None:
    one, again = (train(settings_of(cache, tmp_path), tmp_path / name / "run") for name in ("one", "again"))
    assert [stage.weights_sha256 for stage in one.stages] == [stage.weights_sha256 for stage in again.stages]
    other = plan.plan_run(settings_of(cache, tmp_path, "stages.1.phantoms=11"), tmp_path / "other")
    first = plan.plan_run(settings_of(cache, tmp_path), tmp_path / "first")
    none = plan.plan_run(settings_of(cache, tmp_path, "stages.1.phantoms=0"), tmp_path / "none")
    assert len({item.fingerprints[1] for item in (other, first, none)}) == 3
    assert first.fingerprints == tuple(stage.fingerprint for stage in one.stages)


def test_without_a_positive_training_case_phantoms_are_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "split_indices", lambda cases, fold: (np.array([1, 3]), np.array([0, 2])))
    with pytest.raises(SettingsError, match=r"no training case of .* is positive; set stages.1.phantoms = 0"):
        plan.plan_run(settings_of(cache, tmp_path), tmp_path / "run")
