"""Work on a Ray cluster of several nodes, which starts once: tasks give the same bytes as on one machine; doctor."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import cluster as local_cluster
from ray.cluster_utils import Cluster

from ptxdist.cache.preprocess import PreprocessResult, preprocess
from ptxdist.cache.verify import verify, verify_source
from ptxdist.cluster.doctor import Finding, diagnose
from ptxdist.cluster.executor import ray_tasks
from ptxdist.errors import ClusterError, StoreError
from ptxdist.predict import folder as command
from ptxdist.predict.predictor import Predictor

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and two nodes with one each, on this machine."""
    with local_cluster(2) as made:
        yield made


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
        time.sleep(0.5 if here == slow else 0.05)
        return here

    with ray_tasks(cluster.address) as executor:
        list(executor(work, [(number,) for number in range(4)]))  # workers are up
        started = time.monotonic()
        done = list(executor(work, [(number,) for number in range(40)]))
        seconds = time.monotonic() - started
    # Ten times as slow: at best it does 4 of 40, in 1.9 s; equal shares would take 10 s.
    assert done.count(slow) <= 8, done.count(slow)
    assert seconds < 7


def test_a_cluster_that_is_not_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ClusterError, match=r"no Ray cluster can be reached at 127\.0\.0\.1:1"),
        ray_tasks("127.0.0.1:1"),
    ):
        pass


# --- doctor ---------------------------------------------------------------------------------------------------------


def states(findings: list[Finding], check: str) -> list[str]:
    return [item.state for item in findings if item.check == check]


def test_every_node_of_a_sound_cluster_is_green(
    cluster: Cluster, small_cache: tuple[Path, PreprocessResult], tmp_path: Path
) -> None:
    findings = diagnose(cluster.address, cache=small_cache[0], run=tmp_path / "runs" / "new", full=True)
    assert [item for item in findings if item.state == "wrong"] == []
    for check in ("versions", "GPU", "memory", "/dev/shm", "disk of runs", "cache", "clock", "storage",
                  "all-reduce, gloo"):  # fmt: skip
        assert len(states(findings, check)) == 3, check
    assert list(tmp_path.iterdir()) == [], "no file is left behind"
