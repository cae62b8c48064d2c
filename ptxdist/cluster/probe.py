"""Measurements of one machine for `doctor`: versions, GPUs, memory, disks, clock, cache, storage.

The functions run in this process or on the nodes of a cluster. They return plain values; a failure is returned as a
text. Only the standard library is imported at the start, since `doctor` sends this module to nodes that may have
nothing else installed. `network` has what nodes do together.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("ptxdist", "torch", "ray", "zarr")


def examine(cache: str | None, folder: str | None, full: bool = False) -> dict[str, Any]:
    """Everything that this machine can measure alone, as plain values; sizes in bytes.

    `cache` is a cache that a training will read; with `full`, every byte of it is read. `folder` is where runs are
    written.
    """
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "gpus": gpus(),
        "memory": _memory(),
        "shm": free_bytes("/dev/shm"),
        "disks": {"temporary files": free_bytes(tempfile.gettempdir())},
    }
    if folder is not None:
        found["disks"]["runs"] = free_bytes(folder)
    if cache is not None:
        found["cache"] = _remote_cache(cache, full) if "://" in cache else _cache(Path(cache), full)
    return found


def clock() -> float:
    """Seconds since 1970 by the clock of this machine."""
    return time.time()


def write_token(folder: str, name: str, text: str) -> str:
    """Write a small file for the other nodes to read; returns "" or what failed."""
    try:
        with open(Path(folder, name), "x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"cannot write there: {error.strerror}"
    return ""


def read_tokens(folder: str, tokens: dict[str, str], patience_s: float = 10.0) -> str:
    """Read what the other nodes have written, given as texts by file name; returns "" or what failed.

    Retries for `patience_s`, since network file systems show files of other nodes with a delay.
    """
    end = time.monotonic() + patience_s
    while True:
        missing = [name for name, text in tokens.items() if _read(Path(folder, name)) != text]
        if not missing:
            return ""
        if time.monotonic() > end:
            return f"does not see what {len(missing)} of {len(tokens)} nodes have written"
        time.sleep(0.2)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        pass
    try:  # the copy of the code in a job is not installed
        return str(__import__(package).__version__)
    except (ImportError, AttributeError):
        return "not installed"


def gpus() -> dict[str, Any]:
    """GPUs that the driver lists, and the number that torch can use."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {"driver": "", "names": [], "torch": 0}
    rows = [[part.strip() for part in line.split(",")] for line in lines if line.strip()]
    try:
        import torch

        usable = torch.cuda.device_count()
    except ImportError:
        usable = 0
    return {"driver": rows[0][1] if rows else "", "names": [row[0] for row in rows], "torch": usable}


def _memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def free_bytes(folder: str) -> int | None:
    """Free bytes on the disk of a folder, which need not exist yet; None when they cannot be determined."""
    path = Path(folder)
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _cache(cache: Path, full: bool) -> dict[str, Any]:
    """The checksum of a cache's manifest, and the first fault of the files that it names."""
    manifest = cache / "manifest.json"
    try:
        digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    except OSError as error:
        return {"digest": "", "wrong": f"manifest.json: {error.strerror}"}
    try:
        from ptxdist.cache.manifest import read_manifest
        from ptxdist.cache.store import open_store
        from ptxdist.cache.verify import refuse_damaged
        from ptxdist.errors import PtxdistError
    except ImportError:  # reported with the versions
        return {"digest": digest, "wrong": ""}
    try:
        sizes = sorted(read_manifest(cache).sizes)
        for size in sizes:
            open_store(cache, size)  # checks the length and the index of every shard
        if full:
            refuse_damaged(cache, sizes)
    except PtxdistError as error:
        return {"digest": digest, "wrong": str(error)}
    return {"digest": digest, "wrong": ""}


def _remote_cache(cache: str, full: bool) -> dict[str, Any]:
    """The same for a cache in an object store; with `full`, it is copied to this machine and verified."""
    try:
        from ptxdist.errors import PtxdistError
        from ptxdist.storage.caches import local_cache, remote_digest
    except ImportError:
        return {"digest": "", "wrong": "ptxdist is not installed"}
    try:
        digest = remote_digest(cache)
        if full:
            local_cache(cache)
    except PtxdistError as error:
        return {"digest": "", "wrong": str(error)}
    return {"digest": digest, "wrong": ""}


def try_store(url: str) -> str:
    """Write a small object, read it and delete it; returns "" or what failed."""
    try:
        from ptxdist.errors import PtxdistError
        from ptxdist.storage.remote import Remote
    except ImportError:
        return "ptxdist is not installed"
    name, text = f".ptxdist-doctor-{os.urandom(8).hex()}", b"doctor"
    try:
        remote = Remote(url)
        remote.write(name, text)
        found = remote.read(name)
        remote.delete([name])
    except PtxdistError as error:
        return str(error)
    return "" if found == text else "does not see what it has written"


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
