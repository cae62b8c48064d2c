"""Jobs on a real Ray cluster on loopback, with and without token authentication."""

from __future__ import annotations

import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from ptxdist.cluster.submit import submit
from ptxdist.errors import ClusterError, SettingsError

pytestmark = pytest.mark.slow

TOKEN = "0123456789abcdef0123456789abcdef"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module", params=["token", "disabled"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a cluster of its own, and the environment in which this machine has its token."""
    # Ray's sockets have paths of limited length: not below pytest's folder.
    port, folder = free_port(), Path(f"/tmp/ptxdist-ray-{os.getpid()}-{request.param}")
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(TOKEN)
    environment = {**os.environ, "RAY_AUTH_MODE": request.param, "RAY_AUTH_TOKEN_PATH": str(token)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # as with the environment activated
    environment.pop("RAY_ADDRESS", None)
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2", "--port=0",
        f"--dashboard-port={port}", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}",
        f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    address = f"http://127.0.0.1:{port}"
    headers = {"Authorization": f"Bearer {TOKEN}"} if request.param == "token" else {}
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            if requests.get(f"{address}/api/jobs/", headers=headers, timeout=5).ok:
                break
        except requests.RequestException:
            pass
        time.sleep(0.5)
    else:
        pytest.fail(f"no cluster at {address} after 90 s")
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        patch.delenv(name, raising=False)
    try:
        yield address
    finally:
        patch.undo()
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        finally:  # Ray's helpers have groups of their own; the command lines of all of them name the folder
            subprocess.run(["pkill", "-9", "-f", str(folder)], check=False)
            subprocess.run(["rm", "-rf", str(folder)], check=False)


def test_a_job_runs_with_its_log_streamed_and_ends_with_0(cluster: str, tmp_path: Path) -> None:
    log: list[str] = []
    jobs: list[str] = []
    command = ["phantom", str(tmp_path / "out with a blank"), "--cases", "2", "--workers", "1"]
    assert submit(command, address=cluster, on_log=log.append, on_submitted=jobs.append) == 0
    assert len(jobs) == 1
    assert "images" in "".join(log)
    assert len(list((tmp_path / "out with a blank").rglob("*.dcm"))) == 2


def test_a_job_that_refuses_passes_its_exit_code_on(cluster: str, tmp_path: Path) -> None:
    log: list[str] = []
    code = submit(["train", "--set", "stages.1.epoch=1"], address=cluster, on_log=log.append)
    assert code == SettingsError.exit_code
    assert "did you mean 'epochs'?" in "".join(log)


def test_a_wrong_or_missing_token_is_one_sentence(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if "disabled" in request.node.name:
        pytest.skip("this cluster asks for no token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 32)
    with pytest.raises(ClusterError, match="does not accept this machine's token") as caught:
        submit(["--version"], address=cluster, on_log=print)
    assert "f" * 32 not in str(caught.value), "no token in an error"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(ClusterError, match="asks for a token"):
        submit(["--version"], address=cluster, on_log=print)


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "auto", "ray://127.0.0.1:10001", "http://"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ClusterError, match="not the address of a Ray dashboard"):
        submit(["--version"], address=address, on_log=print)


def test_nothing_listening_is_one_sentence() -> None:
    with pytest.raises(ClusterError, match="no Ray cluster answers at"):
        submit(["--version"], address=f"http://127.0.0.1:{free_port()}", on_log=print)


@pytest.mark.parametrize(
    ("body", "words"), [(b'{"ray_version": "2.9.0"}', "runs Ray 2.9.0"), (b"<html>", "not a Ray dashboard")]
)
def test_another_server_and_an_old_ray_are_told(body: bytes, words: str) -> None:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Keep quiet."""

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ClusterError, match=words):
            submit(["--version"], address=f"http://127.0.0.1:{server.server_port}", on_log=print)
        server.shutdown()
