"""doctor: what is right is green, what is made wrong on purpose is found and told with what to do."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ptxdist.cache.preprocess import PreprocessResult
from ptxdist.cluster import doctor, network, nodes, probe
from ptxdist.cluster.doctor import refuse_unfit
from ptxdist.errors import ClusterError

pytestmark = pytest.mark.slow


def test_a_node_that_does_not_see_the_others_files_is_told(tmp_path: Path) -> None:
    assert probe.write_token(str(tmp_path), "one", "first") == ""
    assert probe.read_tokens(str(tmp_path), {"one": "first"}) == ""
    assert "1 of 2 nodes" in probe.read_tokens(str(tmp_path), {"one": "first", "two": "second"}, patience_s=0.1)
    assert "cannot write there" in probe.write_token(str(tmp_path / "nowhere"), "one", "first")


def test_a_wrong_cache_other_versions_and_too_little_room_are_red(
    small_cache: tuple[Path, PreprocessResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = probe.examine(str(tmp_path), str(tmp_path))
    assert doctor._cache("here", found["cache"], False).state == "wrong"
    assert probe.examine(str(small_cache[0]), None)["cache"]["wrong"] == ""
    other = {**found["versions"], "torch": "1.0"}
    versions = doctor._versions("there", other, found["versions"])
    assert (versions.state, "torch 1.0" in versions.found, "pip install" in versions.advice) == ("wrong", True, True)
    assert [doctor._disk("runs", "here", size).state for size in (2**20, 2**30, 2**40)] == ["wrong", "warning", "ok"]


def test_a_gpu_that_torch_cannot_use_and_a_clock_that_is_off_are_red(monkeypatch: pytest.MonkeyPatch) -> None:
    blind = doctor._gpus("there", {"names": ["H200", "H200"], "driver": "550.1", "torch": 0})
    assert (blind.state, "torch can use 0" in blind.found, "CUDA" in blind.advice) == ("wrong", True, True)
    assert doctor._gpus("there", {"names": [], "driver": "", "torch": 0}).state == "ok"
    right = time.time
    assert [item.state for item in doctor._clocks(nodes.ThisMachine())] == ["ok"]
    monkeypatch.setattr(probe, "clock", lambda: right() - 60)
    (late,) = doctor._clocks(nodes.ThisMachine())
    assert (late.state, late.advice) == ("wrong", "synchronise it with NTP")
    assert float(late.found.split()[0]) == pytest.approx(60, abs=5)


def test_a_node_that_does_not_answer_is_red() -> None:
    class Silent(nodes.ThisMachine):
        def ask_each(self, function, arguments):  # type: ignore[no-untyped-def]
            return {name: ClusterError("the node died") for name in arguments}

    (finding,) = doctor._examine(Silent(), None, None, False)
    assert (finding.check, finding.state, finding.advice) == ("node", "wrong", "check it, or remove it")
    assert [item.state for item in doctor._storage(Silent(), Path("/"))] == ["wrong"]
    (finding,) = doctor._storage(Silent(), "s3://bucket/run")
    assert (finding.found, finding.advice) == ("does not answer: the node died", "check it, or remove it")


@pytest.mark.parametrize("answer", ["cannot write there: {}", ClusterError("RayTaskError: OSError: [Errno 28] {}")])
@pytest.mark.parametrize("place", [Path("/runs"), "s3://bucket/run"])
@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "mount that file system for writing"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EACCES, "give this user"),
        (errno.ESTALE, "mount that network storage again"),
    ],
)
def test_the_advice_about_a_disk_fits_what_is_wrong_with_it(
    answer: Any, place: Path | str, number: int, advice: str
) -> None:
    class Failing(nodes.ThisMachine):
        def ask_each(self, function, arguments):  # type: ignore[no-untyped-def]
            return {name: type(answer)(str(answer).format(os.strerror(number))) for name in arguments}

    (finding,) = doctor._storage(Failing(), place)
    assert finding.state == "wrong"
    assert advice in finding.advice
    assert "credentials" not in finding.advice


def test_a_truncated_shard_is_found_by_the_quick_check_and_another_byte_by_the_full_one(
    small_cache: tuple[Path, PreprocessResult], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(small_cache[0], cache)
    shard = cache / "64.zarr" / "image" / "c" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    assert probe.examine(str(cache), None)["cache"]["wrong"] == ""
    assert "checksum" in probe.examine(str(cache), None, True)["cache"]["wrong"]
    shard.write_bytes(content[:-100])
    assert probe.examine(str(cache), None)["cache"]["wrong"]


def test_ranks_that_do_not_meet_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_COLLECTIVE_S", 1)
    host, port = network.free_port("127.0.0.1")
    assert "Error" in network._all_reduce("gloo", host, port, 1, 2)
    monkeypatch.setattr(network, "_all_reduce", lambda *words: time.sleep(1))
    monkeypatch.setattr(network, "_COLLECTIVE_S", 0.05)
    assert network.all_reduce("gloo", host, port, 1, 2) == "no sum within 0 s"


def test_the_interface_is_that_of_the_nodes_address_unless_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    assert network.interface_of("127.0.0.1") == "lo"
    assert network.interface_of("192.0.2.1") is None, "a test network, which no machine has"
    network.choose_interface("192.0.2.1")
    network.choose_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert "NCCL_SOCKET_IFNAME" not in os.environ
    monkeypatch.setattr(network, "interface_of", lambda address: "eth7")
    network.choose_interface("192.0.2.1")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "=eth7")


def test_training_is_refused_before_it_starts_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_unfit(tmp_path / "runs" / "one")
    monkeypatch.setattr(probe, "free_bytes", lambda folder: 10 * 2**20)
    with pytest.raises(ClusterError, match=r"disk of runs .*free some space"):
        refuse_unfit(tmp_path / "runs" / "one")


def test_the_command_prints_a_table_and_its_json_and_ends_with_11_if_anything_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ptxdist", "doctor", "--data", str(tmp_path), "--run", str(tmp_path / "run")]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == ClusterError.exit_code, done.stderr
    findings = json.loads(done.stdout)["findings"]
    assert {item["check"] for item in findings if item["state"] == "wrong"} == {"cache"}
    assert all(item["advice"] for item in findings if item["state"] != "ok")
