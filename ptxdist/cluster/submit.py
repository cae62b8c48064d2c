"""Hands a ptxdist command to a running Ray cluster as a job, through Ray's own job client.

Owns: what travels to the cluster (the code and the settings folders, never data, caches or runs), tokens, and what
the end of a job means. Refuses: addresses where no Ray cluster answers, missing or wrong tokens, clusters with a Ray
that is too old or without ptxdist's packages (ClusterError). Called by: `cli`.

Ray switches token authentication on by itself once a token exists on a machine, but its job client sends the token only
where RAY_AUTH_MODE=token is set. Here the cluster is asked first, and gets the token if it wants one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

import requests
from packaging.version import InvalidVersion, Version
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from ptxdist.config import PACKAGE
from ptxdist.errors import ClusterError
from ptxdist.resolve import settings_folders

OLDEST_RAY = "2.60"
# The dashboard takes no larger request (DASHBOARD_CLIENT_MAX_SIZE in ray/_private/ray_constants.py); the 512 MiB of
# Ray's own store are never reached. Ray uploads a zip file, so counting the files before zipping is on the safe side.
MAX_UPLOAD_BYTES = 100 * 1024**2
STOPPED = 130
_ANSWER_S = 10.0
# A job runs the `python` that was first in PATH when Ray was started, which need not be the one Ray itself runs on.
_CHECK_FILE = "check_python.py"
_CHECK = f"""import importlib.util, sys
missing = [name for name in ("ray", "torch", "zarr", "rich") if importlib.util.find_spec(name) is None]
if missing:
    print(
        f"error: {{sys.executable}}, the cluster's python, lacks {{', '.join(missing)}}: install ptxdist there, "
        "and start Ray with that environment activated"
    )
    sys.exit({ClusterError.exit_code})
"""
# What Ray writes into a job's log before the command does.
_PREAMBLE = re.compile(r"^(?:[-\d]{10} [\d:,]+\tINFO job_manager\.py:.*|Running entrypoint for job .*)\n", re.MULTILINE)
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_POLL_S = 0.5


def submit(
    command: Sequence[str],
    *,
    address: str,
    on_log: Callable[[str], None],
    on_submitted: Callable[[str], None] = lambda job_id: None,
    following: bool = True,
) -> int:
    """Run `python -m ptxdist <command>` as a job, pass its log to `on_log` as it comes, and return its exit code.

    `address` is the URL of the cluster's dashboard; `on_submitted` is called with the job's id. A stopped
    job gives 130, one that is not `following` 0 at once. An interruption while following (KeyboardInterrupt)
    leaves the job running. Raises ClusterError in one sentence.
    """
    with _client(address) as (client, job):
        with tempfile.TemporaryDirectory(prefix="ptxdist-job-") as folder:
            _pack(Path(folder))
            job.id = client.submit_job(
                entrypoint=f"python {_CHECK_FILE} && exec {shlex.join(['python', '-m', 'ptxdist', *command])}",
                runtime_env={"working_dir": folder, "env_vars": {"PYTHONUNBUFFERED": "1"}},
            )
        on_submitted(job.id)
        if not following:
            return 0
        _follow(client, job.id, on_log)
        return _exit_code(client, job.id)


def follow(job_id: str, *, address: str, on_log: Callable[[str], None]) -> int:
    """Pass the log of a job to `on_log`, from its start to its end, and return its exit code, as `submit` does."""
    with _client(address, job_id) as (client, _):
        _follow(client, job_id, on_log)
        return _exit_code(client, job_id)


def status(job_id: str, *, address: str) -> dict[str, Any]:
    """What a job does: `job`, `status` (Ray's word, such as RUNNING), `command`, `seconds`, `exit_code`, `message`."""
    with _client(address, job_id) as (client, _):
        info = client.get_job_info(job_id)
        started, ended = info.start_time or 0, info.end_time or int(time.time() * 1000)
        return {
            "job": job_id,
            "status": str(info.status.value),
            "command": info.entrypoint.rpartition("-m ")[2],
            "seconds": round((ended - started) / 1000, 1) if started else None,
            "exit_code": info.driver_exit_code,
            "message": info.message,
        }


def stop(job_id: str, *, address: str) -> str:
    """Stop a job and return its last status; what it has finished is kept, and the same command goes on from there."""
    with _client(address, job_id) as (client, _):
        client.stop_job(job_id)
        with suppress(ClusterError):
            _exit_code(client, job_id)
        return str(client.get_job_status(job_id).value)


@dataclass
class _Job:
    id: str = ""


@contextmanager
def _client(address: str, job_id: str = "") -> Iterator[tuple[Any, _Job]]:
    """Ray's job client for the cluster, and the job it is about; what goes wrong becomes a ClusterError."""
    headers = _authorise(address)
    for name in _TALKATIVE:  # these set levels of their own, below what their parents say
        logging.getLogger(name).setLevel(logging.ERROR)
    job = _Job(job_id)
    try:
        yield JobSubmissionClient(address, headers=headers), job
    except AuthenticationError as error:
        if not headers and not job.id:
            raise ClusterError(
                f"RAY_AUTH_MODE=token is set here without a token, and the Ray cluster at {address} asks for none; "
                "unset RAY_AUTH_MODE"
            ) from error
        raise ClusterError(f"the Ray cluster at {address} no longer accepts this machine's token") from error
    except BrokenPipeError:  # whoever read what `on_log` writes is gone
        raise
    except (ConnectionError, requests.RequestException, RuntimeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        if job_id and "does not exist" in str(error):
            raise ClusterError(f"the Ray cluster at {address} knows no job {job_id}") from error
        if job.id:
            raise ClusterError(
                f"lost the connection to {address} ({lines[0][:200]}); if the cluster is still up, job {job.id} goes "
                f"on: `ptxdist submit --address {address} --logs {job.id}` shows it"
            ) from error
        raise ClusterError(f"the Ray cluster at {address} did not do as asked: {lines[0][:300]}") from error


def _authorise(address: str) -> dict[str, str]:
    """Headers that the cluster wants; checks that a cluster of a Ray that is new enough answers there."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ClusterError(f"'{address}' is not the address of a Ray dashboard; expected such as http://127.0.0.1:8265")
    answer = _ask(address, {})
    headers: dict[str, str] = {}
    if answer.status_code in (401, 403):
        headers = {"Authorization": f"Bearer {_token(address)}"}
        answer = _ask(address, headers)
        if answer.status_code in (401, 403):
            raise ClusterError(
                f"the Ray cluster at {address} does not accept this machine's token; set RAY_AUTH_TOKEN to the "
                "cluster's own (`ray get-auth-token` prints it on the head node)"
            )
    try:
        found = str(answer.json()["ray_version"])
        too_old = Version(found) < Version(OLDEST_RAY)
    except (ValueError, KeyError, TypeError, InvalidVersion):
        raise ClusterError(f"what answers at {address} is not a Ray dashboard (HTTP {answer.status_code})") from None
    if too_old:
        raise ClusterError(f"the cluster at {address} runs Ray {found}, ptxdist needs {OLDEST_RAY} or newer there")
    return headers


def _ask(address: str, headers: dict[str, str]) -> requests.Response:
    try:
        return requests.get(f"{address.rstrip('/')}/api/version", headers=headers, timeout=_ANSWER_S)
    except requests.RequestException as error:
        raise ClusterError(
            f"no Ray cluster answers at {address}; is it up, and is its dashboard reachable from here "
            "(`ray dashboard cluster.yaml` forwards it)?"
        ) from error


def _token(address: str) -> str:
    """This machine's token, where Ray looks for it: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text().strip()
    except OSError:
        raise ClusterError(
            f"the Ray cluster at {address} asks for a token and there is none here; set RAY_AUTH_TOKEN to the "
            "cluster's own (`ray get-auth-token` prints it on the head node)"
        ) from None


def _pack(folder: Path) -> None:
    """Copy what the job needs into an empty folder: the package and the settings, those of this folder first."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "*.yaml")
    shutil.copytree(PACKAGE, folder / "ptxdist", ignore=ignore)
    for kind in ("configs", "pipelines"):
        for source in reversed(settings_folders(kind)):
            shutil.copytree(source, folder / kind, ignore=ignore, dirs_exist_ok=True)
    (folder / _CHECK_FILE).write_text(_CHECK)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MAX_UPLOAD_BYTES:
        raise ClusterError(
            f"code and settings are {size / 1024**2:,.0f} MiB, more than the {MAX_UPLOAD_BYTES // 1024**2} MiB that "
            "Ray takes; remove what does not belong into configs/ and pipelines/"
        )


def _follow(client: Any, job_id: str, on_log: Callable[[str], None]) -> None:
    """Pass the log on until the job ends; read in a thread, since an interruption inside asyncio is noisy."""
    words: SimpleQueue[str | Exception | None] = SimpleQueue()

    async def read() -> None:
        async for text in client.tail_job_logs(job_id):
            words.put(text)

    def work() -> None:
        try:
            asyncio.run(read())
        except Exception as error:  # of the library below Ray's client, whichever that is
            words.put(error)
        else:
            words.put(None)

    threading.Thread(target=work, name="ptxdist-log", daemon=True).start()
    while (word := words.get()) is not None:
        if isinstance(word, Exception):
            raise ConnectionError(f"the log broke off: {str(word) or type(word).__name__}") from word
        if text := _PREAMBLE.sub("", word):
            on_log(text)


def _exit_code(client: Any, job_id: str) -> int:
    while (status := client.get_job_status(job_id)) not in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED):
        time.sleep(_POLL_S)
    if status == JobStatus.SUCCEEDED:
        return 0
    if status == JobStatus.STOPPED:
        return STOPPED
    info = client.get_job_info(job_id)
    if info.driver_exit_code is None:  # the command was never started, or what watched over it died
        raise ClusterError(f"job {job_id} failed without an exit code: {(info.message or 'no reason given')[:300]}")
    return int(info.driver_exit_code) or 1
