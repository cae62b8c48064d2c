"""Training on hosts of their own: two that train, a head, one outside, and what happens to them.

See tests/host_faults.py and tests/hosts.py. They take five minutes, so only `make hosts` runs them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import host_faults
import pytest
from commands import INSIDE, SMALL_NETWORK
from host_faults import ADDRESS, CASES, PTXDIST, Case, Scene, nothing
from hosts import NETWORK, wait_until, why_not

from ptxdist.errors import ClusterError
from ptxdist.resolve import find
from ptxdist.rundir import stage_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("PTXDIST_HOSTS" not in os.environ, reason="takes minutes; `make hosts` runs it"),
]
# As in test_lost_nodes: how long Ray Train waits for a node that has gone. Each step takes 0.1 s.
IMPATIENT = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5", "SLOW_S": "0.1"}
SURVIVED = ("a cable is cut for two seconds", "a slow and lossy line to a host", "a training thread hangs",
            "a host loses power and starts again", "a cable is cut, and mended when the training waits",
            "the object store is cut off for 15 seconds")  # fmt: skip
EPOCHS = len(SURVIVED) + 1
WORDS = ("--workers", 2, "--set", "stages.*.batch_size=2", *SMALL_NETWORK)  # thirteen steps an epoch


@pytest.fixture(scope="module")
def scene(work: Path) -> Iterator[Scene]:
    """A head and two hosts with one CPU each, with Ray; they share the folder `work`. One more is outside."""
    if reason := why_not(work):
        pytest.skip(reason)
    with host_faults.cluster_of_hosts(work, IMPATIENT) as made:
        yield made


def words(work: Path) -> list[object]:
    """Those of every training here: the first stage of the smoke pipeline, with an epoch for each fault."""
    pipeline = work / "one.toml"
    pipeline.write_text("[[stages]]".join(find("pipelines", "smoke").read_text().split("[[stages]]")[:2]))
    settings = (f"stages.1.epochs={EPOCHS}", "stages.1.best_by=loss", "train.worker_timeout_s=8",
                "train.checkpoint_every_images=20", f"train.max_worker_failures={EPOCHS}")  # fmt: skip
    return [*WORDS, "--pipeline", pipeline, *(word for setting in settings for word in ("--set", setting))]


@pytest.fixture(scope="module")
def undisturbed(scene: Scene) -> list[str]:
    """The weights of the same training without Ray, by torchrun on both hosts, which nothing happens to."""
    run, log = scene.work / "undisturbed" / "run", scene.work / "undisturbed.log"
    command = ("-m", "--", "ptxdist", "train", "--without-ray", "--data", scene.work / "cache", "--run", run)
    started = []
    for number, name in enumerate(("one", "two")):
        meet = ("--nnodes=2", f"--node-rank={number}", f"--master-addr={NETWORK}.2", "--master-port=29500")
        change = ("env", "SLOW_S=0", "GLOO_SOCKET_IFNAME=eth0")
        started.append(scene.at[name].start(*change, "torchrun", *meet, *command, *words(scene.work), log=log))
    assert [process.wait(300) for process in started] == [0, 0], log.read_text()
    return scene.weights(run)


def test_a_training_outlives_faults_of_its_hosts_one_after_the_other(scene: Scene, undisturbed: list[str]) -> None:
    """It is submitted from outside, with cache and run in the object store; each epoch but the first has a fault."""
    cases = [CASES[name] for name in SURVIVED]
    settings = tuple(setting for case in cases for setting in case.settings)
    place = host_faults.start(scene, "in turn", Case(nothing, True, True, settings), words(scene.work))
    for epoch, case in enumerate(cases, start=1):
        wait_for(scene, f"stage 1 epoch {epoch}/")
        scene.listen()
        case.fault(scene)
        wait_for(scene, case.says, since=scene.heard)
        case.after(scene)
    ends(scene, 0)
    assert scene.weights(place) == undisturbed


@pytest.mark.parametrize("name", ["a host never comes back", "the local disk of a host is full"])
def test_a_training_that_cannot_go_on_says_why(name: str, scene: Scene) -> None:
    case = CASES[name]
    run = host_faults.start(scene, name, case, [*words(scene.work), "--set", "stages.1.epochs=1"])
    inside = stage_folder(Path(run), 1, 64) / "checkpoints" / INSIDE
    wait_until(lambda: inside.exists() or not scene.goes_on(), 200, lambda: scene.words)
    case.fault(scene)
    try:
        ends(scene, case.code)
    finally:
        case.after(scene)
    assert re.search(case.says, scene.words), scene.words


def wait_for(scene: Scene, pattern: str, since: int = 0) -> None:
    """Wait until the training says it, after so many characters; AssertionError when it ends without."""
    wait_until(lambda: bool(re.search(pattern, scene.words[since:])) or not scene.goes_on(), 200, lambda: scene.words)
    assert re.search(pattern, scene.words[since:]), scene.words


def ends(scene: Scene, code: int) -> None:
    """Wait for the end of the training, which has this exit code, and check what no training says."""
    assert scene.training is not None
    assert scene.training.wait(200) == code, scene.words
    assert "RAY_" not in scene.words
    assert "Traceback" not in scene.words


def test_doctor_finds_three_sound_hosts_though_each_calls_itself_127_0_1_1(scene: Scene) -> None:
    done = scene.at["head"].run(*PTXDIST, *doctor(scene), "--json", check=False)
    findings = json.loads(done.stdout)["findings"]
    assert [item for item in findings if item["state"] == "wrong"] == []
    summed = [item["where"].split()[0] for item in findings if item["check"] == "all-reduce, gloo"]
    assert sorted(summed) == [f"{NETWORK}.{number}" for number in (1, 2, 3)]


def test_a_host_without_the_shared_folder_is_refused(scene: Scene) -> None:
    scene.at["two"].run("mount", "-t", "tmpfs", "tmpfs", scene.work)
    said = refusal(scene, "unshared")
    scene.at["two"].run("umount", scene.work)
    assert f"storage of {NETWORK}.3: " in said
    assert "mount the same storage" in said


def test_a_host_with_another_version_or_a_wrong_clock_is_refused(scene: Scene) -> None:
    host_faults.restart_ray(scene, host_faults.make_other(scene.work / "other", version="9.9.9", clock_s=60))
    assert f"versions of {NETWORK}.3: ptxdist 9.9.9, locally" in refusal(scene, "versions")
    done = scene.at["head"].run(*PTXDIST, *doctor(scene), check=False)
    assert done.returncode == ClusterError.exit_code
    assert re.search(r"clock.* 60", done.stdout), done.stdout


def doctor(scene: Scene) -> tuple[object, ...]:
    """The words of a check of the cluster."""
    return ("doctor", "--address", ADDRESS, "--run", scene.work / "new")


def refusal(scene: Scene, name: str) -> str:
    """What a training says that is refused because of a host."""
    command = ("train", "--data", scene.work / "cache", "--run", scene.work / name / "run", "--pipeline", "smoke")
    done = scene.at["head"].run(*PTXDIST, *command, *WORDS, check=False)
    assert done.returncode == ClusterError.exit_code, done.stderr
    return re.sub(r"\.3 \(\d\):", ".3:", " ".join(done.stderr.split()))  # Ray may still count one that died
