"""Training on hosts of their own: two that train, a head, and what happens to them. See tests/hosts.py."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import INSIDE, train_words
from hosts import NETWORK, PORT, Host, hosts, start_ray, wait_until, why_not

from ptxdist.errors import ClusterError
from ptxdist.resolve import find
from ptxdist.rundir import read_result, stage_folder

pytestmark = pytest.mark.slow
PTXDIST = (sys.executable, "-m", "ptxdist")
# As in test_lost_nodes: how long Ray Train waits for a node that has gone, and for a process group to end.
IMPATIENT = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5", "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "2",
             "RAY_ADDRESS": f"{NETWORK}.1:{PORT}", "SLOW_S": "0.4"}  # fmt: skip


@pytest.fixture(scope="module")
def three(work: Path) -> Iterator[dict[str, Host]]:
    """A head and two hosts with one CPU each, with Ray; they share the folder `work`."""
    if reason := why_not(work):
        pytest.skip(reason)
    with hosts(work, ("head", "one", "two")) as made:
        for name, host in made.items():
            host.variables = dict(IMPATIENT)
            start_ray(host, work / f"ray-{name}.log", head=name == "head")
        yield made


def words(work: Path, run: Path) -> list[object]:
    """The first stage of the smoke pipeline on two workers."""
    pipeline = work / "one.toml"
    pipeline.write_text("[[stages]]".join(find("pipelines", "smoke").read_text().split("[[stages]]")[:2]))
    return [*PTXDIST, *train_words(work, run, inside=True), "--pipeline", pipeline, "--set", "train.worker_timeout_s=8"]


def refusal(head: Host, work: Path, name: str) -> str:
    """What a training says that is refused because of a host."""
    done = head.run(*words(work, work / name / "run"), check=False)
    assert done.returncode == ClusterError.exit_code, done.stderr
    return " ".join(done.stderr.split())


def test_doctor_finds_three_sound_hosts_though_each_calls_itself_127_0_1_1(three: dict[str, Host], work: Path) -> None:
    command = ("doctor", "--address", IMPATIENT["RAY_ADDRESS"], "--run", work / "new", "--json")
    done = three["head"].run(*PTXDIST, *command, check=False)
    findings = json.loads(done.stdout)["findings"]
    assert [item for item in findings if item["state"] == "wrong"] == []
    summed = [item["where"] for item in findings if item["check"] == "all-reduce, gloo"]
    assert sorted(summed) == [f"{NETWORK}.{number}" for number in (1, 2, 3)]


def test_a_host_without_the_shared_folder_is_refused(three: dict[str, Host], work: Path) -> None:
    three["two"].run("mount", "-t", "tmpfs", "tmpfs", work)
    said = refusal(three["head"], work, "unshared")
    three["two"].run("umount", work)
    assert f"storage of {NETWORK}.3: " in said
    assert "mount the same storage" in said


@pytest.mark.skipif("PTXDIST_LONG_TESTS" not in os.environ, reason="takes three minutes; set PTXDIST_LONG_TESTS")
def test_a_cut_cable_is_said_and_costs_no_bit_once_it_is_mended(three: dict[str, Host], work: Path) -> None:
    undisturbed = work / "uncut" / "one"  # not that of two processes on one machine, which have a core each
    three["head"].run(*words(work, undisturbed))
    run, log = work / "cut" / "one", work / "cut.log"
    training = three["head"].start(*words(work, run), log=log)

    def said(pattern: str) -> bool:
        assert training.poll() is None, log.read_text()
        return re.search(pattern, log.read_text()) is not None

    wait_until((stage_folder(run, 1, 64) / "checkpoints" / INSIDE).exists, 200, log.read_text)
    three["two"].cut()
    wait_until(lambda: said(rf"a worker on {NETWORK}\.3 (did not answer within|was lost with)"), 120, log.read_text)
    wait_until(lambda: said("1 of 2 workers has room; waiting for a node"), 60, log.read_text)
    three["two"].mend()  # Ray notices there that the cluster has given it up, ends, and is started again
    assert training.wait(300) == 0, log.read_text()
    assert "RAY_" not in log.read_text()
    sums = [[stage.weights_sha256 for stage in read_result(one).stages] for one in (run, undisturbed)]
    assert sums[0] == sums[1]


def test_a_host_with_another_version_is_refused(three: dict[str, Host], work: Path) -> None:
    other = work / "other" / "ptxdist-9.9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: ptxdist\nVersion: 9.9.9\n")
    three["two"].kill()
    three["two"].boot()
    path = os.pathsep.join((str(other.parent), os.environ["PYTHONPATH"]))
    start_ray(three["two"], work / "ray-two.log", variables={"PYTHONPATH": path})
    said = refusal(three["head"], work, "versions").replace(".3 (2):", ".3:")  # Ray may still count the one that died
    assert f"versions of {NETWORK}.3: ptxdist 9.9.9, locally" in said
