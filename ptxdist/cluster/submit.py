"""Submits a ptxdist command to a running Ray cluster as a job, with Ray's job client.

Owns: what is uploaded to the cluster (the code and the settings folders, never data, caches or runs), tokens, and the
exit code of a job. Refuses: addresses where no Ray cluster answers, missing or wrong tokens, clusters with a Ray that
is too old or without ptxdist's packages (ClusterError).

Ray enables token authentication by itself once a token exists on a machine, but its job client sends the token only if
RAY_AUTH_MODE=token is set. So this module first asks the cluster, and sends the token if the cluster requires one.
"""

from __future__ import annotations

import asyncio
import logging
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

from ptxdist.cluster.connection import GIVE_TOKEN, token
from ptxdist.config import PACKAGE
from ptxdist.errors import ClusterError, reason
from ptxdist.resolve import settings_folders

OLDEST_RAY = "2.60"
# The largest request that the dashboard accepts (DASHBOARD_CLIENT_MAX_SIZE in ray/_private/ray_constants.py), which is
# less than the 512 MiB of Ray's own store. Ray uploads a zip file, so the size of the unzipped files is an upper bound.
MAX_UPLOAD_BYTES = 100 * 1024**2
STOPPED = 130
_ANSWER_S = 10.0
# A job runs the `python` that was first in PATH when Ray was started, which need not be the one that runs Ray.
_CHECK_FILE = "check_python.py"
_CHECK = f"""import importlib.util, sys
missing = [name for name in ("ray", "torch", "zarr", "rich") if importlib.util.find_spec(name) is None]
if missing:
    print(
        f"error: {{sys.executable}}, the python of the cluster, lacks {{', '.join(missing)}}: install ptxdist there, "
        "and start Ray with that environment activated"
    )
    sys.exit({ClusterError.exit_code})
"""
# What Ray writes into the log of a job before the command starts.
_PREAMBLE = re.compile(r"^(?:[-\d]{10} [\d:,]+\tINFO job_manager\.py:.*|Running entrypoint for job .*)\n", re.MULTILINE)
_VERBOSE_LOGGERS = (
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

    `address` is the URL of the cluster's dashboard; `on_submitted` is called with the id of the job. The exit code of a
    stopped job is 130. Without `following`, the function returns 0 as soon as the job is submitted. KeyboardInterrupt
    while following leaves the job running. Raises ClusterError.
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
    """Pass the log of a job to `on_log`, from its start to its end, and return its exit code as `submit` does."""
    with _client(address, job_id) as (client, _):
        _follow(client, job_id, on_log)
        return _exit_code(client, job_id)


def status(job_id: str, *, address: str) -> dict[str, Any]:
    """The state of a job: `job`, `status` (Ray's: RUNNING, …), `command`, `seconds`, `exit_code`, `message`."""
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
    """Stop a job and return its last status. Finished work is kept; submitted again, the command skips it."""
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
    """Ray's job client for the cluster, and the job that errors name; every failure becomes a ClusterError."""
    headers = _authorise(address)
    for name in _VERBOSE_LOGGERS:  # these set levels of their own, below those of their parents
        logging.getLogger(name).setLevel(logging.ERROR)
    job = _Job(job_id)
    try:
        yield JobSubmissionClient(address, headers=headers), job
    except AuthenticationError as error:
        if not headers and not job.id:
            raise ClusterError(
                f"RAY_AUTH_MODE=token is set without a token, and the Ray cluster at {address} requires none; "
                "unset RAY_AUTH_MODE"
            ) from error
        raise ClusterError(f"the Ray cluster at {address} no longer accepts this machine's token") from error
    except BrokenPipeError:  # the reader of what `on_log` writes is gone
        raise
    except (ConnectionError, requests.RequestException, RuntimeError) as error:
        if job_id and "does not exist" in str(error):
            raise ClusterError(f"the Ray cluster at {address} knows no job {job_id}") from error
        if job.id:
            raise ClusterError(
                f"lost the connection to {address} ({reason(error)[:200]}); if the cluster is still up, job {job.id} "
                f"is running: `ptxdist submit --address {address} --logs {job.id}` shows its log"
            ) from error
        raise ClusterError(f"a request to the Ray cluster at {address} failed: {reason(error)[:300]}") from error


def _authorise(address: str) -> dict[str, str]:
    """The headers that the cluster requires; checks that a cluster with a recent enough Ray answers there."""
    try:
        parts = urlsplit(address)
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an open bracket, a port above 65535
        is_one = False
    if not is_one:
        raise ClusterError(
            f"'{address}' is not the address of a Ray dashboard; expected one such as http://127.0.0.1:8265"
        )
    answer = _ask(address, {})
    headers: dict[str, str] = {}
    if answer.status_code in (401, 403):
        if not (own := token()):
            raise ClusterError(
                f"the Ray cluster at {address} asks for a token, and this machine has none; {GIVE_TOKEN}"
            )
        headers = {"Authorization": f"Bearer {own}"}
        answer = _ask(address, headers)
        if answer.status_code in (401, 403):
            raise ClusterError(f"the Ray cluster at {address} does not accept this machine's token; {GIVE_TOKEN}")
    try:
        found = str(answer.json()["ray_version"])
        too_old = Version(found) < Version(OLDEST_RAY)
    except (ValueError, KeyError, TypeError, InvalidVersion):
        raise ClusterError(f"the server at {address} is not a Ray dashboard (HTTP {answer.status_code})") from None
    if too_old:
        raise ClusterError(f"the cluster at {address} runs Ray {found}; ptxdist needs Ray {OLDEST_RAY} or newer")
    return headers


def _ask(address: str, headers: dict[str, str]) -> requests.Response:
    try:
        return requests.get(f"{address.rstrip('/')}/api/version", headers=headers, timeout=_ANSWER_S)
    except requests.RequestException as error:
        raise ClusterError(
            f"no Ray cluster answers at {address}; check that it is up and that this machine can reach its dashboard "
            "(`ray dashboard cluster.yaml` forwards it)"
        ) from error


def _pack(folder: Path) -> None:
    """Copy what the job needs into an empty folder: package and settings; those of the working folder come first."""
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
            "Ray accepts; remove what does not belong in configs/ and pipelines/"
        )


def _follow(client: Any, job_id: str, on_log: Callable[[str], None]) -> None:
    """Pass the log on until the job ends; read in a thread, since interrupting asyncio prints tracebacks."""
    texts: SimpleQueue[str | Exception | None] = SimpleQueue()

    async def read() -> None:
        async for text in client.tail_job_logs(job_id):
            texts.put(text)

    def work() -> None:
        try:
            asyncio.run(read())
        except Exception as error:  # of whichever library Ray's client uses
            texts.put(error)
        else:
            texts.put(None)

    threading.Thread(target=work, name="ptxdist-log", daemon=True).start()
    while (item := texts.get()) is not None:
        if isinstance(item, Exception):
            raise ConnectionError(f"the log broke off: {str(item) or type(item).__name__}") from item
        if text := _PREAMBLE.sub("", item):
            on_log(text)


def _exit_code(client: Any, job_id: str) -> int:
    while (status := client.get_job_status(job_id)) not in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED):
        time.sleep(_POLL_S)
    if status == JobStatus.SUCCEEDED:
        return 0
    if status == JobStatus.STOPPED:
        return STOPPED
    info = client.get_job_info(job_id)
    if info.driver_exit_code is None:  # the command was not started, or its supervisor died
        raise ClusterError(f"job {job_id} failed without an exit code: {(info.message or 'no reason given')[:300]}")
    return int(info.driver_exit_code) or 1
