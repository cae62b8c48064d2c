"""The content of RUN/environment.json: versions, commit and hardware that a run was made with.

Unknown values are null. It contains no host name, address or user name.
"""

from __future__ import annotations

import os
import platform
import runpy
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ptxdist.config import PACKAGE

_PACKAGES = ("ptxdist", "torch", "torchvision", "ray", "zarr", "numpy", "albumentations", "pydicom", "safetensors")


def environment(nodes: list[dict[str, float]]) -> dict[str, Any]:
    """Versions, commit and hardware of this machine; `nodes` are those of the engine."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": _gpus(),
        "cuda": _cuda(),
        "nodes": nodes,
        "packages": packages,
        "commit": _output("git", "-C", str(PACKAGE), "rev-parse", "HEAD") or None,
    }


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _cuda() -> str | None:
    """The version of CUDA that torch was built for, without the seconds that loading torch takes."""
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return None
    cuda: str | None = runpy.run_path(str(Path(torch.origin).with_name("version.py")))["cuda"]
    return cuda


def _gpus() -> list[dict[str, str]]:
    """The GPUs as nvidia-smi lists them: torch would create a CUDA context in this process."""
    keys = ("name", "driver_version", "memory.total")
    text = _output("nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader")
    names = ("name", "driver", "memory")
    return [dict(zip(names, map(str.strip, line.split(",")), strict=False)) for line in text.splitlines()]
