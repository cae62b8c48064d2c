"""Event files and MLflow runs hold each epoch once, whatever was killed; read back from what was really written."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event as Entry
from tensorboardX.proto.event_pb2 import SessionLog

from ptxdist.config import Settings
from ptxdist.errors import SettingsError
from ptxdist.events import Event, Message
from ptxdist.records import EpochMetrics, EvaluationResult, Scores, StageHistory
from ptxdist.resolve import load_settings
from ptxdist.run.tracking import Tracker, refuse_missing_mlflow
from ptxdist.rundir import read_metrics

Points = dict[str, list[tuple[int, float]]]


def metrics(epoch: int, loss: float, *, stage: int = 1, averaged: bool = False) -> EpochMetrics:
    scores = Scores(
        cases=4, positives=2, kaggle_dice=0.75, positive_dice=0.5, pooled_dice=0.625, sensitivity=1, specificity=1,
        all_empty_dice=0.5,
    )  # fmt: skip
    return EpochMetrics(
        stage=stage, epoch=epoch, averaged=averaged, learning_rate=1e-3, train_loss=None if averaged else 2 * loss,
        val_loss=loss, at_stage=scores, at_full=scores, train_seconds=2, val_seconds=1, images_per_second=None,
    )  # fmt: skip


def history(*losses: float) -> StageHistory:
    return StageHistory(stage=1, epochs=tuple(metrics(number, loss) for number, loss in enumerate(losses, start=1)))


def events(folder: Path) -> list[Entry]:
    """The records of the only event file in a folder: length, its checksum, bytes, their checksum."""
    (path,) = folder.iterdir()
    content, found, place = path.read_bytes(), [], 0
    while place < len(content):
        (length,) = struct.unpack("<Q", content[place : place + 8])
        found.append(Entry.FromString(content[place + 12 : place + 12 + length]))
        place += 12 + length + 4
    return found


def points(folder: Path) -> Points:
    found: Points = {}
    for event in events(folder):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def settings(*assignments: str) -> Settings:
    return load_settings("smoke", assignments=assignments)


def silent(event: Event) -> None:
    raise AssertionError(event)


def kill(tracker: Tracker) -> None:
    """As when its process is killed: files are closed, and nothing else happens."""
    for file in tracker._sinks["TensorBoard"]._files.values():  # type: ignore[attr-defined]
        file.close()


def test_each_epoch_is_one_point_although_the_run_was_killed(tmp_path: Path) -> None:
    """The third epoch is reported, and lost with the process, since its checkpoint was not written; it is retrained."""
    folder = tmp_path / "tensorboard" / "1-64px"
    killed = Tracker(tmp_path, settings(), silent)
    killed.add(history())
    for number, loss in enumerate((4.0, 3.0, 2.5), start=1):
        killed.add(metrics(number, loss))
        assert points(folder)["loss/validation"][-1] == (number, loss), "an epoch can be seen at once"
    kill(killed)
    with Tracker(tmp_path, settings(), silent) as tracker:
        tracker.add(history(4.0, 3.0))
        tracker.add(metrics(3, 2.0))
        tracker.add(metrics(3, 1.0, averaged=True))
    assert points(folder)["loss/validation"] == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert points(folder)["loss/training"] == [(1, 8.0), (2, 6.0), (3, 4.0)]
    assert points(folder)["dice/positives only"] == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert points(tmp_path / "tensorboard" / "1-64px-average")["loss/validation"] == [(3, 1.0)]
    header, start = events(folder)[:2]
    assert header.file_version == "brain.Event:2"
    assert start.session_log.status == SessionLog.START, "a TensorBoard that is open drops what it knew"
    assert [(item.epoch, item.averaged) for item in read_metrics(tmp_path)] == [(1, 0), (2, 0), (3, 0), (3, 1)]


def test_lost_workers_restart_the_stage_within_one_process(tmp_path: Path) -> None:
    with Tracker(tmp_path, settings(), silent) as tracker:
        tracker.add(history())
        tracker.add(metrics(1, 4.0))
        tracker.add(metrics(2, 3.5))
        tracker.add(history(4.0))
        tracker.add(metrics(2, 3.0))
        tracker.add(metrics(1, 9.0, stage=2))
    assert points(tmp_path / "tensorboard" / "1-64px")["loss/validation"] == [(1, 4.0), (2, 3.0)]
    assert points(tmp_path / "tensorboard" / "2-96px")["loss/validation"] == [(1, 9.0)]


def test_what_cannot_be_written_is_reported_once_and_training_continues(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    reported: list[Event] = []
    with Tracker(tmp_path, settings(), reported.append) as tracker:
        tracker.add(history())
        tracker.add(metrics(1, 4.0))
        tracker.add(metrics(2, 3.0))
    (message,) = reported
    assert isinstance(message, Message)
    assert message.text.startswith("warning: TensorBoard could not be written")
    assert len(read_metrics(tmp_path)) == 2


@pytest.fixture
def mlflow_store(tmp_path: Path) -> str:
    pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
    return (tmp_path / "mlruns").as_uri()


def evaluation() -> EvaluationResult:
    return EvaluationResult(
        threshold=0.5, min_area_px=0, flip_averaging=True, scores=metrics(1, 1.0).at_full, auroc=None,
        at_other_thresholds={}, tuned=(), calibration=(), subgroups=(), shared_patients=None, seconds=1,
    )  # fmt: skip


def test_mlflow_has_one_run_with_each_point_once_and_the_settings(
    tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run, chosen = tmp_path / "run", settings(f"train.mlflow={mlflow_store}")
    run.mkdir()
    killed = Tracker(run, chosen, silent)
    killed.add(history())
    killed.add(metrics(1, 4.0))
    killed.add(metrics(2, 3.0))
    kill(killed)
    with Tracker(run, chosen, silent) as tracker:
        tracker.add(history(4.0))
        tracker.add(metrics(2, 3.0))
        tracker.add(evaluation())
    from mlflow import MlflowClient

    client: Any = MlflowClient(tracking_uri=mlflow_store)
    experiment = client.get_experiment_by_name("smoke")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == json.loads((run / "mlflow.json").read_text())["run_id"]
    assert found.info.status == "FINISHED"
    assert found.data.params["stages.2.size_px"] == "96"
    logged = client.get_metric_history(found.info.run_id, "1-64px/loss/validation")
    assert [(item.step, item.value) for item in logged] == [(1, 4.0), (2, 3.0)]
    assert found.data.metrics["evaluation/dice/kaggle"] == 0.75


def test_an_mlflow_that_does_not_answer_is_refused_before_anything_is_trained(
    tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(SettingsError, match=r"MLflow at http://127\.0\.0\.1:9 \(train\.mlflow\) cannot be used"):
        Tracker(tmp_path, settings("train.mlflow=http://127.0.0.1:9"), silent)  # the discard port: nobody listens


def test_without_the_package_the_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_missing_mlflow(settings())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install 'ptxdist\[mlflow\]'"):
        refuse_missing_mlflow(settings("train.mlflow=http://127.0.0.1:9"))
