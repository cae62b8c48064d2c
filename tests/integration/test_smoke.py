"""The whole way through the commands on real Ray workers: phantoms, cache, stages, numbers, report; and resuming."""

from __future__ import annotations

import csv
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from faults import Training, cluster, kill_node, living_nodes, train_workers
from ray.cluster_utils import Cluster

from ptxdist.labels import rle
from ptxdist.resolve import load_settings
from ptxdist.run.pipeline import only_training, run_pipeline
from ptxdist.run.plan import plan_run
from ptxdist.rundir import read_metrics, read_result, read_settings, read_stage_result, stage_folder
from ptxdist.scores.metrics import scores
from ptxdist.train.scoring import count

pytestmark = pytest.mark.slow

Trained = tuple[Path, subprocess.CompletedProcess[str]]

INSIDE = "epoch-0000-step-000010"  # the checkpoint inside the first epoch of a stage


def ptxdist(*arguments: str | Path, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ptxdist", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=400)
    assert done.returncode == code, f"{arguments}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


def train_words(work: Path, run: Path, workers: int = 2) -> list[str | Path | int]:
    """The smoke pipeline in thirteen steps an epoch, with a checkpoint after the tenth."""
    settings = ["stages.*.batch_size=2", "train.checkpoint_every_images=20"]
    words = ["train", "--pipeline", "smoke", "--workers", workers, "--data", work / "cache", "--run", run]
    return [*words, *(word for setting in settings for word in ("--set", setting))]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache of 40 phantoms at 64 and 96 px."""
    work = tmp_path_factory.mktemp("smoke")
    ptxdist("phantom", work / "ph", "--cases", 40, "--positive-share", 0.5)
    ptxdist(
        "preprocess", "--dicom", work / "ph/dicom-images", "--labels", work / "ph/train-rle.csv",
        "--patients", work / "ph/patients.csv", "--out", work / "cache", "--size", 64, "--size", 96,
    )  # fmt: skip
    return work


@pytest.fixture(scope="module")
def trained(work: Path) -> Trained:
    """The smoke pipeline, trained on two Ray workers, and what the command printed."""
    run = work / "runs" / "smoke"
    return run, ptxdist(*train_words(work, run), "--json")


def test_a_run_leaves_settings_metrics_results_and_a_report(
    trained: Trained,
) -> None:
    run, done = trained
    printed = json.loads(done.stdout)
    result = read_result(run)
    assert {**result.model_dump(mode="json"), "report": str(run / "report" / "index.html")} == printed
    assert [(stage.stage, stage.size_px, stage.epochs, stage.workers) for stage in result.stages] == [
        (1, 64, 1, 2),
        (2, 96, 1, 2),
    ]
    assert [(item.stage, item.epoch) for item in read_metrics(run)] == [(1, 1), (2, 1)]
    assert read_settings(run).train.workers == 2
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert environment["memory_gib"] > 0
    assert environment["nodes"][0]["CPU"] >= 2
    assert len(list((run / "tensorboard" / "2-96px").iterdir())) == 1
    assert not list(run.rglob("checkpoints")), "resumable checkpoints go when a stage is finished"
    assert (run / "report" / "index.html").read_text().count('<figure class="case"') >= 1
    assert list((run / "report" / "overlays").glob("*.png"))


def test_ray_keeps_out_of_the_terminal(trained: Trained) -> None:
    run, done = trained
    known = re.compile(r"^(check of \d+ px|Ray starts|stage \d|evaluation|warning: stage|\s*$)")
    assert [line for line in done.stderr.splitlines() if not known.match(line)] == []
    assert (run / "ray.log").is_file()


def test_the_printed_scores_can_be_computed_from_the_tables_of_the_run(work: Path, trained: Trained) -> None:
    import torch

    run, _ = trained
    with open(work / "ph" / "train-rle.csv", newline="") as file:
        rows = [(row["ImageId"], row[" EncodedPixels"].strip()) for row in csv.DictReader(file)]
    with open(run / "evaluation" / "predictions.csv", newline="") as file:
        predictions = {row["ImageId"]: row["EncodedPixels"] for row in csv.DictReader(file)}
    masks = [
        (rle.decode(text, 1024, 1024), rle.decode([mask for known, mask in rows if known == case_id], 1024, 1024))
        for case_id, text in predictions.items()
    ]
    predicted, truth = (torch.from_numpy(np.stack(side)).bool() for side in zip(*masks, strict=True))
    assert scores(count(predicted, truth).numpy()) == read_result(run).evaluation.scores


def test_torchrun_trains_the_same_weights_without_ray(work: Path, trained: Trained) -> None:
    run = work / "without" / "smoke"  # a folder of its own, so that no stage of another run is used again
    words = [*train_words(work, run), "--without-ray"]
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [torchrun, "--nproc-per-node", "2", "--standalone", "-m", "--", "ptxdist", *words]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("evaluation") == 1, "one rank speaks"
    assert not (run / "ray.log").exists()
    for with_ray, without in zip(read_result(trained[0]).stages, read_result(run).stages, strict=True):
        assert without.workers == 2
        assert without.weights_sha256 == with_ray.weights_sha256


def test_workers_that_torchrun_did_not_start_are_refused(work: Path) -> None:
    done = ptxdist("train", "--without-ray", "--workers", 3, "--pipeline", "smoke", "--data", work / "cache", code=3)
    assert "torchrun --nproc-per-node 3" in done.stderr


def test_the_same_command_again_trains_nothing(work: Path, trained: Trained) -> None:
    run, _ = trained
    before = {path: path.stat().st_mtime_ns for path in run.glob("stages/*/*") if path.is_file()}
    done = ptxdist(*train_words(work, run))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "epoch 1 of 1: train" not in done.stderr
    assert "positives" in done.stdout


def test_a_second_training_of_the_same_run_is_refused(work: Path, trained: Trained) -> None:
    run, _ = trained
    with only_training(run):
        assert f"another `ptxdist train` works on {run}" in ptxdist(*train_words(work, run), code=12).stderr


def test_other_settings_on_the_same_run_are_refused(work: Path, trained: Trained) -> None:
    run, _ = trained
    done = ptxdist(*train_words(work, run), "--set", "stages.2.epochs=2", code=8)
    assert "stages.2.epochs: 1 -> 2" in done.stderr


def test_a_run_beside_it_uses_the_finished_stage_again_and_trains_only_the_other(work: Path, trained: Trained) -> None:
    first, _ = trained
    run = work / "runs" / "other"
    ptxdist(*train_words(work, run, workers=1), "--without-ray", "--set", "stages.2.learning_rate=0.0005")
    stages = read_result(run).stages
    assert [stage.reused_from for stage in stages] == ["smoke", None]
    assert stages[0].weights_sha256 == read_result(first).stages[0].weights_sha256
    assert stages[1].workers == 1


def test_evaluate_report_and_inspect_work_on_the_finished_run(work: Path, trained: Trained) -> None:
    run, _ = trained
    before = read_result(run).evaluation.scores
    assert json.loads(ptxdist("evaluate", run, "--json").stdout)["scores"]["cases"] == before.cases
    assert read_result(run).evaluation.scores == before
    assert Path(json.loads(ptxdist("report", run, "--json").stdout)["report"]).is_file()
    assert json.loads(ptxdist("inspect", run, "--json").stdout)["pipeline"] == "smoke"
    cache = json.loads(ptxdist("inspect", work / "cache", "--json").stdout)
    assert cache["reconciliation"]["labelled"] == 39
    assert Path(cache["contact_sheet"]).stat().st_size > 10_000


def test_whatever_is_killed_the_run_ends_with_the_same_weights(work: Path, trained: Trained) -> None:
    """One run, three deaths: a worker inside an epoch; the coordinator between the stages; all workers at once."""
    run = work / "killed" / "smoke"  # a folder of its own, so that no stage of another run is used again
    command = [sys.executable, "-m", "ptxdist", *map(str, train_words(work, run))]
    first, second = stage_folder(run, 1, 64), stage_folder(run, 2, 96)
    log = work / "killed.log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)
    wait_for(first / "checkpoints" / INSIDE, process, log)
    workers = workers_of(process.pid)
    assert len(workers) == 2, log.read_text()
    os.kill(workers[-1], signal.SIGKILL)
    wait_for(first / "result.json", process, log)
    process.kill()
    process.wait()
    told = log.read_text()
    assert "a worker failed with" in told
    assert "stage 1 resumes after epoch 0 of 1 and 10 steps of the next" in told
    assert read_stage_result(second) is None, "killed before the second stage was finished"
    written = (first / "result.json").stat().st_mtime_ns

    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)
    wait_for(second / "checkpoints" / INSIDE, process, log)
    workers = workers_of(process.pid)
    assert len(workers) == 2, log.read_text()
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    assert process.wait(timeout=400) == 0, log.read_text()
    assert "stage 2 resumes after epoch 0 of 1 and 10 steps of the next" in log.read_text()
    assert "stage 1 resumes" not in log.read_text()
    assert (first / "result.json").stat().st_mtime_ns == written, "the finished stage is not trained again"
    assert [(item.stage, item.epoch) for item in read_metrics(run)] == [(1, 1), (2, 1)]
    assert sorted(path.parent.name for path in (run / "tensorboard").glob("*/*")) == [
        "1-64px", "2-96px", "evaluation",
    ]  # fmt: skip
    for before, after in zip(read_result(trained[0]).stages, read_result(run).stages, strict=True):
        assert before.weights_sha256 == after.weights_sha256


def test_a_full_disk_a_kill_and_a_damaged_checkpoint_cost_no_bit(work: Path) -> None:
    """One run without Ray, where Ray adds nothing: stopped twice, once with its newest checkpoint spoilt."""
    pipeline = work / "three.toml"
    pipeline.write_text(
        "[model]\nencoder_weights = 'none'\n[[stages]]\nsize_px = 64\nepochs = 3\nbatch_size = 8\nswa_epochs = 2\n"
    )
    whole = run_pipeline(
        plan_run(load_settings(str(pipeline), options={"data.cache": str(work / "cache")}), work / "whole" / "three"),
        on_event=cannot_show,
    )
    run, log = work / "stopped" / "three", work / "stopped.log"
    command = [sys.executable, "-m", "ptxdist", "train", "--without-ray", "--pipeline", str(pipeline)]
    command += ["--data", str(work / "cache"), "--run", str(run)]
    saved = stage_folder(run, 1, 64) / "checkpoints"

    def start() -> subprocess.Popen[bytes]:
        with open(log, "w") as file:
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)

    process = start()
    wait_for(saved / "epoch-0001-step-000000", process, log)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**20, 2**20))  # from now on no file holds more than 1 MiB
    assert process.wait(timeout=200) == 9, log.read_text()
    assert re.search(r"error: .*cannot be written: .*File too large.*; what was saved before is kept", log.read_text())
    assert [path.name for path in saved.glob("epoch-*")] == ["epoch-0001-step-000000"]

    process = start()
    wait_for(saved / "epoch-0002-step-000000", process, log)
    process.kill()
    process.wait()
    assert "resumes after epoch 1 of 3" in log.read_text()
    weights = saved / "epoch-0002-step-000000" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)

    process = start()
    assert process.wait(timeout=200) == 0, log.read_text()
    assert "checkpoint epoch-0002-step-000000 is damaged" in log.read_text()
    assert "stage 1 resumes after epoch 1 of 3" in log.read_text()
    assert read_result(run).stages[0].weights_sha256 == whole.stages[0].weights_sha256
    assert read_result(run).evaluation.scores == whole.evaluation.scores


def test_a_hung_worker_and_a_dead_node_cost_no_bit_and_a_new_node_is_taken_in(work: Path, trained: Trained) -> None:
    """On a cluster of a head and two nodes: a worker hangs in the first stage, a node dies in the second one.

    Then a run that may go on with one worker begins on the one node that is left, and another node joins.
    """
    run, words = work / "cluster" / "smoke", train_words(work, work / "cluster" / "smoke")
    words += ["--set", "train.worker_timeout_s=8", "--set", "train.max_worker_failures=4"]
    with cluster(2) as nodes:
        with Training(nodes.address, words, log=work / "cluster.log") as training:
            training.wait_for((stage_folder(run, 1, 64) / "checkpoints" / INSIDE).exists)
            os.kill(train_workers(living_nodes(nodes)[-1])[0], signal.SIGSTOP)
            training.wait_for((stage_folder(run, 2, 96) / "checkpoints" / INSIDE).exists)
            kill_node(living_nodes(nodes)[-1])
            nodes.add_node(num_cpus=1)
            training.finish()
        for stage in (1, 2):
            assert f"stage {stage} resumes after epoch 0 of 1 and 10 steps of the next" in training.words
        assert "a worker failed with WorkerHealthCheckTimeoutError" in training.words
        for before, after in zip(read_result(trained[0]).stages, read_result(run).stages, strict=True):
            assert before.weights_sha256 == after.weights_sha256

        kill_node(living_nodes(nodes)[-1])
        run = work / "grown" / "smoke"
        words = [*train_words(work, run), "--set", "train.min_workers=1", "--set", "train.resize_every_s=1"]
        with Training(nodes.address, words, log=work / "grown.log") as training:
            training.wait_for((stage_folder(run, 1, 64) / "checkpoints" / INSIDE).exists)
            assert len(workers_on(nodes)) == 1
            nodes.add_node(num_cpus=1)
            training.wait_for(lambda: len(workers_on(nodes)) == 2)
        assert "the cluster has capacity for 1 of 2 workers, 1 are needed" in training.words


def workers_on(nodes: Cluster) -> list[int]:
    """Process ids of the workers on all nodes of a cluster."""
    return [pid for node in living_nodes(nodes) for pid in train_workers(node)]


def cannot_show(event: object) -> None:
    """What a terminal that is gone does to the display; training goes on."""
    raise BrokenPipeError


def wait_for(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until a file or folder is there; its process must be alive till then."""
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def workers_of(driver: int) -> list[int]:
    """Process ids of a driver's Ray Train workers."""
    found = subprocess.run(["pgrep", "-f", "ray::RayTrainWorker"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split() if _belongs_to(int(pid), driver)]


def _belongs_to(pid: int, ancestor: int) -> bool:
    """Whether a process descends from another one."""
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            return False
    return False
