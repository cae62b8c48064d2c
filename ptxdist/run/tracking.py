"""What a run leaves for those who watch it: metrics.jsonl, TensorBoard's event files, MLflow if it is asked for.

    RUN/tensorboard/1-256px/events.out.tfevents.…           one point an epoch; open with `tensorboard --logdir RUN`
    RUN/tensorboard/1-256px-average/, RUN/tensorboard/evaluation/
    RUN/mlflow.json                                         which MLflow run it is, so that a resumed run goes on there

Owns: these formats. Refuses: an MLflow server that does not answer when a run starts (SettingsError); later failures
are said once and end nothing. Called by: `pipeline`, in its own process or on rank 0, with what it hears.

What a killed run had written after its last checkpoint is trained again. So the points of a stage are always those of
its history: event files are written anew when they differ from it, and MLflow gets the points that it lacks.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from ptxdist import files
from ptxdist.config import Settings, snapshot
from ptxdist.errors import SettingsError
from ptxdist.records import EpochMetrics, EvaluationResult, StageHistory, StageResult
from ptxdist.rundir import MLFLOW, TENSORBOARD, stage_folder, write_metrics
from ptxdist.scores.names import dice_metrics

Point = tuple[int, dict[str, float]]  # step, values by tag


class _Sink(Protocol):
    """Somewhere points are kept in groups; `sync` makes a group hold these points, in their order."""

    def sync(self, group: str, points: list[Point]) -> None: ...

    def close(self, finished: bool) -> None: ...


class Tracker:
    """Keeps the finished epochs of all stages, in RUN/metrics.jsonl and in every sink."""

    def __init__(self, run: Path, settings: Settings, on_message: Callable[[str], None]) -> None:
        self._run, self._on_message = run, on_message
        self._sizes = [stage.size_px for stage in settings.pipeline.stages]
        self._epochs: dict[int, tuple[EpochMetrics, ...]] = {}
        self._failed: set[str] = set()
        self._finished = False
        self._sinks: dict[str, _Sink] = {"TensorBoard": _TensorBoard(run / TENSORBOARD)}
        if settings.train.mlflow:
            self._sinks["MLflow"] = _MLflow(settings.train.mlflow, run, settings)

    def show(self, event: object) -> None:
        """Take up an event of the coordinator: an epoch, all that a stage has of them, or the evaluation."""
        if isinstance(event, EvaluationResult):
            self._sync("evaluation", [(0, dice_metrics(event.scores))])
            self._finished = True
            return
        if isinstance(event, EpochMetrics):
            self._epochs[event.stage] = (*self._epochs.get(event.stage, ()), event)
        elif isinstance(event, StageHistory):
            self._epochs[event.stage] = event.epochs
        elif isinstance(event, StageResult):
            self._epochs[event.stage] = event.history
        else:
            return
        with self._going_on("metrics.jsonl"):
            write_metrics(self._run, [item for stage in sorted(self._epochs) for item in self._epochs[stage]])
        name = stage_folder(self._run, event.stage, self._sizes[event.stage - 1]).name
        for group, averaged in ((name, False), (f"{name}-average", True)):
            points = [_point(item) for item in self._epochs[event.stage] if item.averaged == averaged]
            self._sync(group, points)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *raised: object) -> None:
        for name, sink in self._sinks.items():
            with self._going_on(name):
                sink.close(self._finished)

    def _sync(self, group: str, points: list[Point]) -> None:
        for name, sink in self._sinks.items():
            with self._going_on(name):
                sink.sync(group, points)

    @contextlib.contextmanager
    def _going_on(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # what is shown must not end what is trained
            if name not in self._failed:
                self._failed.add(name)
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                self._on_message(f"warning: {name} could not be written ({reason[:200]}); training goes on")


def refuse_missing_mlflow(settings: Settings) -> None:
    """SettingsError when MLflow is asked for and not installed."""
    if settings.train.mlflow and importlib.util.find_spec("mlflow") is None:
        raise SettingsError(
            "train.mlflow needs a package that is not installed: pip install 'ptxdist[mlflow]', or leave it out"
        )


def _point(item: EpochMetrics) -> Point:
    values = {"loss/validation": item.val_loss, "learning rate": item.learning_rate, **dice_metrics(item.at_full)}
    if item.train_loss is not None:
        values["loss/training"] = item.train_loss
    if item.images_per_second is not None:
        values["images per second"] = item.images_per_second
    return item.epoch, values


class _TensorBoard:
    """One event file for each group: a header, a mark that older points of the group no longer count, the points."""

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
        for step, values in points[len(written) :]:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
            self._files[group].write(Event(wall_time=time.time(), step=step, summary=summary).SerializeToString())
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
        folder.mkdir(parents=True, exist_ok=True)
        older = list(folder.glob("events.out.tfevents.*"))
        file = self._files[group] = RecordWriter(str(folder / f"events.out.tfevents.{time.time_ns():020d}"))
        start = SessionLog(status=SessionLog.START)  # a running TensorBoard drops what it has of the older file
        for event in (Event(file_version="brain.Event:2"), Event(session_log=start)):
            event.wall_time = time.time()
            file.write(event.SerializeToString())
        for path in older:
            path.unlink()
        return []

    def close(self, finished: bool) -> None:
        for file in self._files.values():
            file.close()


class _MLflow:
    """One MLflow run for a run folder, in the experiment of the pipeline's name."""

    def __init__(self, uri: str, run: Path, settings: Settings) -> None:
        # Its defaults wait for minutes on a server that is gone, and tell the makers of MLflow about its use.
        for name, value in (("HTTP_REQUEST_TIMEOUT", "10"), ("HTTP_REQUEST_MAX_RETRIES", "1")):
            os.environ.setdefault(f"MLFLOW_{name}", value)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._steps, record = Metric, dict[str, set[int]](), run / MLFLOW
        try:
            self._client = MlflowClient(tracking_uri=uri)
            known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
            if known.get("uri") == uri:
                self._id = known["run_id"]
                self._client.update_run(self._id, status="RUNNING")
                return
            name = settings.pipeline.name
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            self._id = self._client.create_run(experiment, run_name=run.name).info.run_id
            params = [Param(key, str(value)) for key, value in _leaves(snapshot(settings.pipeline))]
            for start in range(0, len(params), 100):  # as many as one request may have
                self._client.log_batch(self._id, params=params[start : start + 100])
        except Exception as error:  # MLflow lets through what its stores and connections raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise SettingsError(f"MLflow at {uri} (train.mlflow) cannot be used: {reason[:300]}") from error
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
        for start in range(0, len(metrics), 1000):  # as many as one request may have
            self._client.log_batch(self._id, metrics=metrics[start : start + 1000])
        self._steps[group] |= {step for step, _ in new}

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "FAILED")


def _leaves(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names, with stages from 1 as in `--set`, and values."""
    if isinstance(content, list) and content and isinstance(content[0], dict):
        content = {str(number): item for number, item in enumerate(content, start=1)}
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, content
