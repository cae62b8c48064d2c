"""Events and tasks come out of JSON as they went in, and progress is thinned out."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from ptxdist.events import Event, Message, Progress, RunStart, decode_event, encode_event
from ptxdist.records import EpochMetrics, EvaluationResult, Scores, StageHistory, StageResult
from ptxdist.resolve import load_settings
from ptxdist.run.engine import StageTask
from ptxdist.run.stage import Throttled

SCORES = Scores(
    cases=3, positives=0, kaggle_dice=1 / 3, positive_dice=None, pooled_dice=0.1, sensitivity=None, specificity=1,
    all_empty_dice=0.7,
)  # fmt: skip
EPOCH = EpochMetrics(
    stage=1, epoch=2, learning_rate=1e-3, train_loss=None, val_loss=0.1 + 0.2, at_stage=SCORES, at_full=SCORES,
    train_seconds=1, val_seconds=2, images_per_second=None,
)  # fmt: skip
STAGE = StageResult(
    stage=1, size_px=64, fingerprint="f", epochs=2, workers=1, seconds=3, best=EPOCH, history=(EPOCH,), weights="w",
    weights_sha256="s",
)  # fmt: skip
EVENTS: list[Event] = [
    Message(text="a text"),
    RunStart(run="r", train=9, positive=3, shown="a lung", held_out=1, images=(9, 6), fold=0, workers=1, cores=2),
    Progress(stage=1, step="train", epoch=2, done=3, total=4),
    StageHistory(stage=1, epochs=(EPOCH,)),
    EPOCH,
    STAGE,
    EvaluationResult(
        threshold=0.5, min_area_px=0, flip_averaging=True, scores=SCORES, at_other_thresholds={"0.4": SCORES},
        intervals={"kaggle_dice": (0.1, 0.2)}, seconds=1,
    ),
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_comes_out_of_json_as_it_went_in(event: Event) -> None:
    assert decode_event(json.loads(json.dumps(encode_event(event)))) == event


def test_all_kinds_of_events_are_tested() -> None:
    assert {type(event) for event in EVENTS} == set(get_args(Event))


def test_a_task_comes_out_of_json_as_it_went_in() -> None:
    settings = load_settings("paper", options={"data.cache": "s3://bucket/cache"})
    task = StageTask(settings=settings, token="t", run="/runs/x", number=2, fingerprint="f", parent=STAGE, result=STAGE)
    assert StageTask.model_validate_json(task.model_dump_json()) == task
    assert task.stage.size_px == 512


def test_only_progress_is_thinned_out_and_its_end_is_kept() -> None:
    passed: list[Event] = []
    throttled = Throttled(passed.append)
    for done in range(1, 1001):
        throttled(Progress(stage=1, step="train", epoch=1, done=done, total=1000))
        if done == 500:
            throttled(EPOCH)
    assert EPOCH in passed
    assert passed[-1] == Progress(stage=1, step="train", epoch=1, done=1000, total=1000)
    assert len(passed) < 20
