"""One training of a run at a time, no folder for what is refused, and the checks before a run starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from ptxdist import files
from ptxdist.errors import BusyError, ClusterError, RunError, SettingsError
from ptxdist.events import Event, Message
from ptxdist.interrupts import Interrupted
from ptxdist.resolve import load_settings
from ptxdist.run import plan
from ptxdist.run.folds import train_folds
from ptxdist.run.pipeline import only_training, run_pipeline, train
from ptxdist.rundir import (
    CHECKPOINTS,
    EVALUATION,
    ORIGIN,
    RESULT,
    SETTINGS,
    read_result,
    read_settings,
    stage_folder,
    start_run,
)


def test_a_second_training_is_refused_until_the_first_one_has_ended_however_it_does(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    code = (
        "import sys, time; from pathlib import Path; from ptxdist.run.pipeline import only_training\n"
        "with only_training(Path(sys.argv[1])):\n"
        "    print('mine', flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"
        with (
            pytest.raises(BusyError, match=r"another `ptxdist train` works on .*one; wait for it or stop it"),
            only_training(run),
        ):
            pass
        other.kill()
    with only_training(run):
        pass


def test_what_is_refused_leaves_no_folder_and_a_run_keeps_its_own(tmp_path: Path) -> None:
    new, run = tmp_path / "runs" / "new", tmp_path / "run"
    with pytest.raises(RunError, match="refused"), only_training(new):
        raise RunError("refused")
    assert list(tmp_path.iterdir()) == []
    with only_training(run):
        (run / SETTINGS).write_text("{}")
    assert (run / SETTINGS).is_file()


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunError, match="cannot be made: Not a directory; give another folder"),
        only_training(tmp_path / "file" / "run"),
    ):
        pass


def test_a_run_killed_while_it_wrote_its_first_file_is_started(tmp_path: Path) -> None:
    settings = load_settings("smoke")
    (tmp_path / "stages").mkdir()
    with pytest.raises(RunError, match="holds other files"):
        start_run(tmp_path, settings)
    (tmp_path / "stages").rmdir()
    leftover = tmp_path / f"{SETTINGS}.ptxdist-0123abcd.tmp"
    leftover.touch()
    start_run(tmp_path, settings)
    assert read_settings(tmp_path) == settings
    assert not leftover.exists()


def test_settings_bind_a_run_from_its_first_checkpoint_on(tmp_path: Path) -> None:
    one, other = load_settings("smoke"), load_settings("smoke", options={"pipeline.seed": 5})
    start_run(tmp_path, one)
    (tmp_path / ORIGIN).touch()
    start_run(tmp_path, other)
    assert read_settings(tmp_path) == other
    assert not (tmp_path / ORIGIN).exists(), "it is of the former settings"
    (stage_folder(tmp_path, 1, 64) / CHECKPOINTS / "epoch-0001-step-000000").mkdir(parents=True)
    with pytest.raises(RunError, match=r"was started with other settings \(seed"):
        start_run(tmp_path, one)
    assert read_settings(tmp_path) == other


def test_a_stage_of_a_run_beside_it_is_taken_over_with_a_word_or_not_at_all(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "first", copy_function=os.link)
    settings = read_settings(finished_run)
    heard: list[Event] = []

    class Stopped:
        def nodes(self) -> list[dict[str, float]]:
            return []

        def train(self, task: object) -> Any:
            raise RuntimeError("it trains")

        evaluate = train

    def engine(*given: object) -> Any:
        return nullcontext(Stopped())

    anew = settings.model_copy(update={"train": settings.train.model_copy(update={"reuse": False})})
    for wanted, said in ((anew, False), (settings, True)):
        with pytest.raises(RuntimeError, match="it trains"):
            run_pipeline(plan.plan_run(wanted, tmp_path / "second"), engine, on_event=heard.append)
        texts = [event.text for event in heard if isinstance(event, Message)]
        assert any("stage 1 is taken from" in text and "--no-reuse" in text for text in texts) is said


def test_a_damaged_stage_is_refused_before_an_engine_starts(finished_run: Path, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", read_settings(finished_run)
    shutil.copytree(finished_run, run, copy_function=os.link)
    path = stage_folder(run, 2, settings.pipeline.stages[1].size_px) / RESULT
    path.unlink()
    path.write_bytes(b"{")

    def engine(*given: object) -> Any:
        raise AssertionError("an engine starts")

    with pytest.raises(RunError, match=r"result\.json is damaged"):
        run_pipeline(plan.plan_run(settings, run), engine)


def test_an_interruption_between_two_stages_keeps_the_first_one(finished_run: Path, tmp_path: Path) -> None:
    run, asked = tmp_path / "run", list[int]()
    shutil.copytree(finished_run, run, copy_function=os.link)
    settings = read_settings(run)
    first, second = (stage_folder(run, n, stage.size_px) for n, stage in enumerate(settings.pipeline.stages, start=1))
    shutil.rmtree(second)
    (run / RESULT).unlink()
    kept = {path: files.sha256(path) for path in first.rglob("*") if path.is_file()}

    class Interrupts:
        def nodes(self) -> list[dict[str, float]]:
            return []

        def train(self, task: Any) -> Any:
            asked.append(task.number)
            raise Interrupted(15)

    def engine(*given: object) -> Any:
        return nullcontext(Interrupts())

    for _ in range(2):
        with pytest.raises(Interrupted), only_training(run):
            run_pipeline(plan.plan_run(settings, run), engine)
    assert asked == [2, 2]
    assert kept == {path: files.sha256(path) for path in first.rglob("*") if path.is_file()}


def test_a_finished_run_starts_no_engine_unless_its_evaluation_is_missing(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run, copy_function=os.link)
    settings = read_settings(run)
    heard: list[object] = []

    def engine(*given: object) -> Any:
        raise RuntimeError("it starts")

    result = run_pipeline(plan.plan_run(settings, run), engine, on_event=heard.append)
    assert result == read_result(finished_run)
    assert heard == [*result.stages, result.evaluation]
    (run / EVALUATION / RESULT).unlink()
    with pytest.raises(RuntimeError, match="it starts"):
        run_pipeline(plan.plan_run(settings, run), engine)


def test_a_disk_that_is_nearly_full_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan._refuse_full_disk(tmp_path)
    monkeypatch.setattr(plan, "_LEAST_FREE", 2**70)
    with pytest.raises(ClusterError, match=r"GiB free; free some space"):
        plan._refuse_full_disk(tmp_path)


def test_what_torchrun_and_object_stores_cannot_do_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="torchrun --nproc-per-node 2"):
        train(load_settings("smoke", options={"train.workers": 2}), tmp_path / "run")
    with pytest.raises(SettingsError, match="writes to a folder, not to s3://bucket/run"):
        train_folds(load_settings("smoke"), "s3://bucket/run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="one process or with Ray"):
        train(load_settings("smoke", options={"train.workers": 2}), "s3://bucket/run")
    with pytest.raises(SettingsError, match="under torchrun is not possible"):
        train_folds(load_settings("smoke"), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
