"""The data layer's work on a Ray cluster of several nodes: the same bytes as on one machine."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from ptxdist.cache.preprocess import preprocess
from ptxdist.cache.verify import verify, verify_source
from ptxdist.cluster.executor import ray_tasks
from ptxdist.errors import ClusterError, StoreError
from ptxdist.predict import folder as command
from ptxdist.predict.predictor import Predictor

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and two nodes with one each, on this machine."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_cache_made_by_tasks_on_two_nodes_has_the_same_bytes(cluster: Cluster, many_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data, here, there = many_dataset, tmp_path / "here", tmp_path / "there"
    preprocess(data.dicom, data.labels, here, patients=data.patients, sizes_px=(32, 48))
    there.mkdir()
    shutil.copy(here / "salt", there)  # of paths and groups: a random one for each cache
    heard: list[str] = []
    preprocess(
        data.dicom, data.labels, there, patients=data.patients, sizes_px=(32, 48),
        executor=ray_tasks(cluster.address), on_progress=lambda step, done, total: heard.append(step),
    )  # fmt: skip
    assert digests(here) == digests(there)
    assert {"headers", "images"} <= set(heard)
    assert verify(there) == []
    with ray_tasks(cluster.address) as executor:
        assert verify_source(there, data.dicom, executor=executor) == []


def test_predictions_made_by_tasks_on_two_nodes_have_the_same_bytes(
    cluster: Cluster, finished_run: Path, small_dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(command, "_FILES_A_TASK", 3)
    files = sorted(small_dataset.dicom.rglob("*.dcm"))[:6]
    predictor, here, there = Predictor.load(finished_run, device="cpu"), tmp_path / "here", tmp_path / "there"
    command.predict_files(files, here, predictor, [finished_run], device="cpu")
    with ray_tasks(cluster.address) as executor:
        result = command.predict_files(
            files, there, predictor, [finished_run], device="cpu", executor=executor, workers=2
        )
    assert result.predicted == 6
    assert digests(here) == digests(there)


def test_tasks_are_spread_over_the_nodes_and_all_come_back(cluster: Cluster) -> None:
    def node_of(number: int) -> tuple[int, str]:  # inside, so that Ray sends it along
        import ray

        return number, ray.get_runtime_context().get_node_id()

    with ray_tasks(cluster.address) as executor:
        done = dict(executor(node_of, [(number,) for number in range(40)]))
    assert sorted(done) == list(range(40))
    assert len(set(done.values())) == 2


def test_a_refusal_in_a_task_is_the_callers(cluster: Cluster) -> None:
    def refuse(number: int) -> int:
        raise StoreError(f"task {number} refuses")

    with pytest.raises(StoreError, match="task 3 refuses"), ray_tasks(cluster.address) as executor:
        list(executor(refuse, [(3,)]))


def test_after_a_refusal_no_task_writes_any_more(cluster: Cluster, tmp_path: Path) -> None:
    def write_or_refuse(number: int) -> None:
        if number == 0:
            raise StoreError("task 0 refuses")
        for second in range(600):
            (tmp_path / f"{number}-{second}").touch()
            time.sleep(0.1)

    with ray_tasks(cluster.address) as executor:
        with pytest.raises(StoreError, match="task 0 refuses"):
            list(executor(write_or_refuse, [(number,) for number in range(4)]))
        written = sorted(tmp_path.iterdir())
        time.sleep(0.5)
        assert sorted(tmp_path.iterdir()) == written
        assert len(written) < 600, "the tasks were cancelled, not waited for"


def test_a_slow_machine_does_not_hold_up_the_others(cluster: Cluster) -> None:
    slow = cluster.list_all_nodes()[-1].node_id

    def work(number: int) -> str:
        import ray

        here = ray.get_runtime_context().get_node_id()
        time.sleep(1.0 if here == slow else 0.1)
        return here

    with ray_tasks(cluster.address) as executor:
        list(executor(work, [(number,) for number in range(4)]))  # workers are up
        started = time.monotonic()
        done = list(executor(work, [(number,) for number in range(40)]))
        seconds = time.monotonic() - started
    # Ten times as slow: at best it does 4 of 40 and all is over after 3.7 s, in equal shares after 20 s.
    assert done.count(slow) <= 8, done.count(slow)
    assert seconds < 9


def test_a_cluster_that_is_not_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ClusterError, match=r"no Ray cluster can be reached at 127\.0\.0\.1:1"),
        ray_tasks("127.0.0.1:1"),
    ):
        pass


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_the_command_finds_its_token_where_the_cluster_wants_one(mode: str, small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, folder = tmp_path / "token", Path(f"/tmp/ptxdist-spread-{os.getpid()}-{mode}")  # Ray's sockets: short paths
    token.write_text("0123456789abcdef0123456789abcdef")
    environment = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(token)}
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        environment.pop(name, None)
    head = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=1", f"--port={port}",
        "--include-dashboard=false", f"--temp-dir={folder}", "--node-ip-address=127.0.0.1",
    ]  # fmt: skip
    process = subprocess.Popen(
        head, env={**environment, "RAY_AUTH_MODE": mode}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.2)
        time.sleep(3)  # the port is open before the node is there
        command = [sys.executable, "-m", "ptxdist", "preprocess", "--size", "32", "--address", f"127.0.0.1:{port}"]
        words = ["--dicom", small_dataset.dicom, "--labels", small_dataset.labels, "--out", tmp_path / "cache"]
        done = subprocess.run(
            [*command, *map(str, words)], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert verify(tmp_path / "cache") == []
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
