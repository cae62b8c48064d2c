"""Metrics of a run while it trains: metrics.jsonl, TensorBoard's event files and, with train.mlflow, an MLflow run.

    RUN/tensorboard/1-256px/events.out.tfevents.…           one point an epoch; open with `tensorboard --logdir RUN`
    RUN/tensorboard/1-256px-average/, RUN/tensorboard/evaluation/
    RUN/mlflow.json                                         id of the MLflow run, which a resumed run continues

Owns: these formats. Refuses: an MLflow server that does not answer when a run starts (SettingsError). Later failures
are reported once, and training continues.

Epochs after the last checkpoint of a killed run are retrained. So the points of a stage are always those of its
history: event files that differ from it are rewritten, and MLflow receives the points that it lacks.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ptxdist import files
from ptxdist.config import Settings, leaves, snapshot
from ptxdist.errors import SettingsError, reason
from ptxdist.events import Event, Message, OnEvent
from ptxdist.records import EpochMetrics, EvaluationResult, StageHistory, StageResult
from ptxdist.rundir import MLFLOW, TENSORBOARD, stage_folder, write_metrics
from ptxdist.scores.names import dice_metrics

if TYPE_CHECKING:  # it loads torch, which a training that is refused does without
    from tensorboardX.record_writer import RecordWriter

Point = tuple[int, dict[str, float]]  # step, values by tag


class _Sink(Protocol):
    """A place that stores points in groups; `sync` makes a group contain exactly these points, in their order."""

    def sync(self, group: str, points: list[Point]) -> None: ...

    def close(self, finished: bool) -> None: ...


class Tracker:
    """Writes the finished epochs of all stages to RUN/metrics.jsonl and to every sink; what fails is a Message."""

    def __init__(self, run: Path, settings: Settings, on_event: OnEvent) -> None:
        self._run, self._on_event = run, on_event
        self._sizes = [stage.size_px for stage in settings.pipeline.stages]
        self._epochs: dict[int, tuple[EpochMetrics, ...]] = {}
        self._failed: set[str] = set()
        self._finished = False
        self._sinks: dict[str, _Sink] = {"TensorBoard": _TensorBoard(run / TENSORBOARD)}
        if settings.train.mlflow:
            self._sinks["MLflow"] = _MLflow(settings.train.mlflow, run, settings)

    def add(self, event: Event) -> None:
        """Write what the event adds: an epoch, all epochs that a stage has, or the evaluation."""
        match event:
            case EpochMetrics():
                self._write_stage(event.stage, (*self._epochs.get(event.stage, ()), event))
            case StageHistory():
                self._write_stage(event.stage, event.epochs)
            case StageResult():
                self._write_stage(event.stage, event.history)
            case EvaluationResult():
                self._sync("evaluation", [(0, dice_metrics(event.scores))])
                self._finished = True

    def _write_stage(self, stage: int, epochs: tuple[EpochMetrics, ...]) -> None:
        self._epochs[stage] = epochs
        with self._survive("metrics.jsonl"):
            write_metrics(self._run, [item for number in sorted(self._epochs) for item in self._epochs[number]])
        name = stage_folder(self._run, stage, self._sizes[stage - 1]).name
        for group, averaged in ((name, False), (f"{name}-average", True)):
            self._sync(group, [_point(item) for item in epochs if item.averaged == averaged])

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *raised: object) -> None:
        for name, sink in self._sinks.items():
            with self._survive(name):
                sink.close(self._finished)

    def _sync(self, group: str, points: list[Point]) -> None:
        for name, sink in self._sinks.items():
            with self._survive(name):
                sink.sync(group, points)

    @contextlib.contextmanager
    def _survive(self, name: str) -> Iterator[None]:
        """Report the first failure of each target; whatever fails here must not end the training."""
        try:
            yield
        except Exception as error:
            if name not in self._failed:
                self._failed.add(name)
                text = f"warning: {name} could not be written ({reason(error)[:200]}); training continues"
                self._on_event(Message(text=text))


def refuse_missing_mlflow(settings: Settings) -> None:
    """Raise SettingsError when train.mlflow is set and MLflow is not installed."""
    if settings.train.mlflow:
        files.require_extra("mlflow", "train.mlflow", "mlflow", otherwise="or leave it out")


def _point(item: EpochMetrics) -> Point:
    values = {"loss/validation": item.val_loss, "learning rate": item.learning_rate, **dice_metrics(item.at_full)}
    if item.train_loss is not None:
        values["loss/training"] = item.train_loss
    if item.images_per_second is not None:
        values["images per second"] = item.images_per_second
    return item.epoch, values


class _TensorBoard:
    """One event file for each group: a header, a mark that makes older points of the group invalid, the points."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, RecordWriter] = {}
        self._written: dict[str, list[Point]] = {}

    def sync(self, group: str, points: list[Point]) -> None:
        written = self._written.get(group)
        if written is None or points[: len(written)] != written:
            written = self._begin(group, empty=not points)
        if len(points) == len(written):
            return
        from tensorboardX.proto.event_pb2 import Event as Entry
        from tensorboardX.proto.summary_pb2 import Summary

        for step, values in points[len(written) :]:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
            self._files[group].write(Entry(wall_time=time.time(), step=step, summary=summary).SerializeToString())
        self._files[group].flush()
        self._written[group] = list(points)

    def _begin(self, group: str, *, empty: bool) -> list[Point]:
        if group in self._files:
            self._files.pop(group).close()
        self._written.pop(group, None)
        folder = self._folder / group
        if empty:
            shutil.rmtree(folder, ignore_errors=True)
            return []
        from tensorboardX.proto.event_pb2 import Event as Entry
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        older = list(folder.glob("events.out.tfevents.*"))
        file = self._files[group] = RecordWriter(str(folder / f"events.out.tfevents.{time.time_ns():020d}"))
        start = SessionLog(status=SessionLog.START)  # a running TensorBoard drops the points of the older file
        for entry in (Entry(file_version="brain.Event:2"), Entry(session_log=start)):
            entry.wall_time = time.time()
            file.write(entry.SerializeToString())
        for path in older:
            path.unlink()
        return []

    def close(self, finished: bool) -> None:
        with contextlib.ExitStack() as files_open:  # closes all, also when the disk is full
            for file in self._files.values():
                files_open.callback(file.close)


class _MLflow:
    """One MLflow run for a run folder, in an experiment with the name of the pipeline."""

    def __init__(self, uri: str, run: Path, settings: Settings) -> None:
        # MLflow's defaults wait for minutes for a server that is gone, and send telemetry.
        for name, value in (("HTTP_REQUEST_TIMEOUT", "10"), ("HTTP_REQUEST_MAX_RETRIES", "1")):
            os.environ.setdefault(f"MLFLOW_{name}", value)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._steps, record = Metric, dict[str, set[int]](), run / MLFLOW
        try:
            self._client = MlflowClient(tracking_uri=uri)
            known = files.read_json(record, f"remove {record}") if record.is_file() else {}
            if known.get("uri") == uri:
                self._id = known["run_id"]
                self._client.update_run(self._id, status="RUNNING")
                return
            name = settings.pipeline.name
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            self._id = self._client.create_run(experiment, run_name=run.name).info.run_id
            params = [Param(key, str(value)) for key, value in leaves(snapshot(settings.pipeline))]
            for start in range(0, len(params), 100):  # the limit of one request
                self._client.log_batch(self._id, params=params[start : start + 100])
        except Exception as error:  # of any class: MLflow does not wrap those of its stores and connections
            raise SettingsError(f"MLflow at {uri} (train.mlflow) cannot be used: {reason(error)[:300]}") from error
        files.write_json(record, {"uri": uri, "run_id": self._id})

    def sync(self, group: str, points: list[Point]) -> None:
        if not points:
            return
        if group not in self._steps:
            tag = f"{group}/{next(iter(points[0][1]))}"
            self._steps[group] = {metric.step for metric in self._client.get_metric_history(self._id, tag)}
        new = [point for point in points if point[0] not in self._steps[group]]
        now = round(time.time() * 1000)
        metrics = [self._metric(f"{group}/{tag}", value, now, step) for step, of in new for tag, value in of.items()]
        for start in range(0, len(metrics), 1000):  # the limit of one request
            self._client.log_batch(self._id, metrics=metrics[start : start + 1000])
        self._steps[group] |= {step for step, _ in new}

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "FAILED")
