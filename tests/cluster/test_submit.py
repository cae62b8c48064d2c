"""Jobs on a real Ray cluster on loopback, with and without token authentication."""

from __future__ import annotations

import contextlib
import http.server
import os
import shutil
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
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray.job_submission import JobSubmissionClient

import ptxdist.cluster.submit as submit_module
from ptxdist.cache.verify import verify
from ptxdist.cluster.submit import MAX_UPLOAD_BYTES, STOPPED, follow, status, submit
from ptxdist.errors import ClusterError, StoreError

pytestmark = pytest.mark.slow
with_token = pytest.mark.parametrize("head", ["token"], indirect=True)
without_token = pytest.mark.parametrize("head", ["disabled"], indirect=True)

TOKEN = "0123456789abcdef0123456789abcdef"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module", params=["token", "disabled"])
def head(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Addresses of the dashboard and of Ray of a cluster whose token this machine has, without RAY_AUTH_MODE."""
    # Ray's sockets have paths of limited length: not below pytest's folder.
    port, ray_port = free_port(), free_port()
    folder = Path(f"/tmp/ptxdist-ray-{os.getpid()}-{request.param}")
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(TOKEN)
    environment = {**os.environ, "RAY_AUTH_MODE": request.param, "RAY_AUTH_TOKEN_PATH": str(token)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # as with the environment activated
    environment.pop("RAY_ADDRESS", None)
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2",
        f"--port={ray_port}", "--node-ip-address=127.0.0.1",
        f"--dashboard-port={port}", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}",
        f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    address = f"http://127.0.0.1:{port}"
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        patch.delenv(name, raising=False)
    try:
        wait_for(address, process)
        yield address, f"127.0.0.1:{ray_port}"
    finally:
        patch.undo()
        stop(process)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(head: tuple[str, str]) -> str:
    """Address of the dashboard of `head`."""
    return head[0]


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if requests.get(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=5).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(0.3)
    pytest.fail(f"no cluster at {address} after 90 s")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill the processes of this cluster and no others, by their ids.

    On SIGTERM the head would first drain its node, for up to half a minute when there are actors.
    """
    for pid in [process.pid, *descendants(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """Ids of the processes below one, wherever their groups and sessions are."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children: dict[int, list[int]] = {}
    for child, parent in (map(int, line.split()) for line in table.splitlines()):
        children.setdefault(parent, []).append(child)
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def client(address: str) -> JobSubmissionClient:
    return JobSubmissionClient(address, headers={"Authorization": f"Bearer {TOKEN}"})


def test_a_job_runs_with_its_log_streamed_and_ends_with_0(cluster: str, tmp_path: Path) -> None:
    log: list[str] = []
    jobs: list[str] = []
    command = ["phantom", str(tmp_path / "out with a blank"), "--cases", "2", "--workers", "1"]
    assert submit(command, address=cluster, on_log=log.append, on_submitted=jobs.append) == 0
    assert len(list((tmp_path / "out with a blank").rglob("*.dcm"))) == 2
    text = "".join(log)
    assert "images" in text
    assert "Running entrypoint" not in text
    assert "job_manager" not in text
    assert [job.submission_id for job in client(cluster).list_jobs()] == jobs


@with_token
def test_the_command_ends_with_the_job_s_exit_code_and_keeps_ray_s_words_out(cluster: str, tmp_path: Path) -> None:
    arguments = ["inspect", str(tmp_path)]
    command = [sys.executable, "-m", "ptxdist"]
    here = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    job = [*command, "submit", "--address", cluster, "--", *arguments]
    done = subprocess.run(job, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == here.returncode != 0, done.stderr
    assert " ".join(here.stderr.split()) in " ".join(done.stdout.split()), "a job says what the command says here"
    for noise in ("INFO", "WARNING", "entrypoint"):
        assert noise not in done.stdout + done.stderr


@without_token
def test_a_job_uses_the_settings_of_the_folder_it_was_submitted_from(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smoke = Path(submit_module.__file__).parents[2] / "pipelines" / "smoke.toml"
    (tmp_path / "pipelines").mkdir()
    shutil.copyfile(smoke, tmp_path / "pipelines" / "mine.toml")
    (tmp_path / "data.bin").write_bytes(b"x" * 1000)
    monkeypatch.chdir(tmp_path)
    log: list[str] = []
    command = ["train", "--pipeline", "mine", "--data", str(tmp_path / "no-cache"), "--run", str(tmp_path / "run")]
    assert submit(command, address=cluster, on_log=log.append) == StoreError.exit_code
    assert "no-cache" in "".join(log), "the settings were found, and only the cache was missing"


@without_token
def test_a_stopped_job_ends_like_an_interrupted_command(cluster: str, tmp_path: Path) -> None:
    def stop_it(job: str) -> None:
        client(cluster).stop_job(job)

    command = ["phantom", str(tmp_path / "out"), "--cases", "5000", "--workers", "1"]
    assert submit(command, address=cluster, on_log=lambda text: None, on_submitted=stop_it) == STOPPED


@with_token
def test_a_job_left_running_is_asked_after_followed_and_stopped(cluster: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ptxdist", "submit", "--address", cluster]
    words = ["--", "phantom", str(tmp_path / "out"), "--cases", "5000", "--workers", "1"]
    process = subprocess.Popen([*command, *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    job = next(line for line in process.stderr if line.startswith("job ")).split()[1].rstrip(":")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--logs {job}" in said
    assert "Traceback" not in said
    found = status(job, address=cluster)
    assert found["status"] in ("PENDING", "RUNNING"), "Ctrl-C leaves the job running"
    assert found["command"].startswith("ptxdist phantom")
    assert submit_module.stop(job, address=cluster) == "STOPPED"
    assert follow(job, address=cluster, on_log=lambda text: None) == STOPPED
    with pytest.raises(ClusterError, match="knows no job nothing"):
        status("nothing", address=cluster)


def test_the_command_finds_its_token_where_the_cluster_wants_one(
    head: tuple[str, str], small_dataset, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    command = [sys.executable, "-m", "ptxdist", "preprocess", "--size", "32", "--address", head[1]]
    words = ["--dicom", small_dataset.dicom, "--labels", small_dataset.labels, "--out", tmp_path / "cache"]
    done = subprocess.run([*command, *map(str, words)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert verify(tmp_path / "cache") == []


@without_token
def test_a_token_is_not_sent_to_a_cluster_that_wants_none(head: tuple[str, str]) -> None:
    """Such a cluster takes the token, but its actors die at once, Ray Train's among them."""
    command = [sys.executable, "-m", "ptxdist", "doctor", "--address", head[1], "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert TOKEN not in done.stdout + done.stderr


@with_token
def test_a_wrong_or_missing_token_is_one_sentence(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 32)
    with pytest.raises(ClusterError, match="does not accept this machine's token") as caught:
        submit(["--version"], address=cluster, on_log=print)
    assert "f" * 32 not in str(caught.value), "no token in an error"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(ClusterError, match="asks for a token"):
        submit(["--version"], address=cluster, on_log=print)


@without_token
def test_token_mode_without_a_token_is_told_where_the_cluster_wants_none(cluster: str, tmp_path: Path) -> None:
    # In a process of its own: Ray reads RAY_AUTH_MODE once.
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "nowhere")}
    command = [sys.executable, "-m", "ptxdist", "submit", "--address", cluster, "--", "phantom", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == ClusterError.exit_code, done.stderr
    assert "unset RAY_AUTH_MODE" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_upload_limit_is_ray_s() -> None:
    assert MAX_UPLOAD_BYTES == DASHBOARD_CLIENT_MAX_SIZE


def test_only_code_and_settings_travel_and_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job").mkdir()
    submit_module._pack(tmp_path / "job")
    files = [path for path in (tmp_path / "job").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".py", ".toml", ".typed", ".html", ".css", ".js", ".svg"}
    assert {path.name for path in (tmp_path / "job").iterdir()} == {
        "ptxdist", "configs", "pipelines", submit_module._CHECK_FILE,
    }  # fmt: skip
    monkeypatch.setattr(submit_module, "MAX_UPLOAD_BYTES", sum(path.stat().st_size for path in files) - 1)
    (tmp_path / "again").mkdir()
    with pytest.raises(ClusterError, match="more than the"):
        submit_module._pack(tmp_path / "again")


def test_a_lost_connection_names_the_job_and_the_way_back() -> None:
    class Answer(http.server.BaseHTTPRequestHandler):
        """A dashboard that takes a job and is gone when asked for its log."""

        def do_GET(self) -> None:
            if self.path.endswith("/logs/tail"):
                self.send_response(500)
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""}')

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"job_id": "raysubmit_1", "submission_id": "raysubmit_1"}')

        def log_message(self, *arguments: object) -> None:
            """Keep quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ClusterError, match=r"job raysubmit_1 is running: `ptxdist submit .* --logs raysubmit_1`"):
            submit(["--version"], address=f"http://127.0.0.1:{server.server_port}", on_log=print)
        server.shutdown()


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
