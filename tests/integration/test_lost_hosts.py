"""Training on hosts of their own: two that train, a head, one outside, and what happens to them.

See tests/host_faults.py and tests/hosts.py. Trainings with faults take minutes, so only `make hosts` runs them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import host_faults
import pytest
from commands import INSIDE, SMALL_NETWORK
from host_faults import ADDRESS, CASES, PTXDIST, UNDISTURBED, Case, Scene, store_is_cut_off
from hosts import NETWORK, wait_until, why_not

from ptxdist.errors import ClusterError
from ptxdist.resolve import find
from ptxdist.rundir import stage_folder

pytestmark = pytest.mark.slow
# As in test_lost_nodes: how long Ray Train waits for a node that has gone. Each step takes 0.4 s.
IMPATIENT = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5", "SLOW_S": "0.4"}
WORDS = ("--workers", 2, "--set", "stages.*.batch_size=2", *SMALL_NETWORK)  # thirteen steps an epoch
FAULTS: dict[str, Case] = {
    name: replace(case, fault=partial(store_is_cut_off, seconds=15)) if case.fault is store_is_cut_off else case
    for name, case in CASES.items()
    if name != UNDISTURBED
}


@pytest.fixture(scope="module")
def scene(work: Path) -> Iterator[Scene]:
    """A head and two hosts with one CPU each, with Ray; they share the folder `work`. One more is outside."""
    if reason := why_not(work):
        pytest.skip(reason)
    with host_faults.cluster_of_hosts(work, IMPATIENT) as made:
        yield made


def start(scene: Scene, name: str) -> Path | str:
    """Start the first stage of the smoke pipeline with two workers; returns where its run will be."""
    pipeline = scene.work / "one.toml"
    pipeline.write_text("[[stages]]".join(find("pipelines", "smoke").read_text().split("[[stages]]")[:2]))
    more = ["--pipeline", pipeline, "--set", "train.worker_timeout_s=8", "--set", "train.checkpoint_every_images=20"]
    return host_faults.start(scene, name, [*WORDS, *more])


@pytest.fixture(scope="module")
def undisturbed(scene: Scene) -> list[str]:
    """The weights of a training that nothing happens to, which has two cores for each rank."""
    place = start(scene, UNDISTURBED)
    assert scene.training is not None
    assert scene.training.wait(200) == 0, scene.words
    return scene.weights(place)


@pytest.mark.skipif("PTXDIST_HOSTS" not in os.environ, reason="takes minutes; `make hosts` runs it")
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_costs_no_bit_or_ends_in_a_sentence(name: str, scene: Scene, undisturbed: list[str]) -> None:
    case, place = FAULTS[name], start(scene, name)
    assert scene.training is not None
    if isinstance(place, Path) and not case.submitted:
        inside = stage_folder(place, 1, 64) / "checkpoints" / INSIDE
        wait_until(lambda: inside.exists() or not scene.goes_on(), 200, lambda: scene.words)
    else:
        wait_until(lambda: "epoch 1 of 1: train" in scene.words or not scene.goes_on(), 200, lambda: scene.words)
    assert scene.goes_on(), scene.words
    case.fault(scene)
    try:
        assert scene.training.wait(300) == case.code, scene.words
    finally:
        case.after(scene)
    assert re.search(case.says, scene.words), scene.words
    assert "RAY_" not in scene.words
    assert "Traceback" not in scene.words
    if not case.code:
        assert scene.weights(place) == undisturbed


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
