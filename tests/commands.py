"""Commands started as a user starts them, and how tests of whole runs find and await what they kill."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from ptxdist.resolve import find

SMALL_NETWORK = ("--set", "model.encoder=small", "--set", "model.decoder_channels=[32, 16, 16, 8, 8]")
INSIDE = "epoch-0000-step-000010"  # the checkpoint inside the first epoch of a stage, with `train_words`


def ptxdist(*arguments: str | Path, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ptxdist", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=400)
    assert done.returncode == code, f"{arguments}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


def one_stage(folder: Path) -> Path:
    """A pipeline in this folder: the first stage of smoke."""
    path = folder / "one.toml"
    path.write_text("[[stages]]".join(find("pipelines", "smoke").read_text().split("[[stages]]")[:2]))
    return path


def train_words(work: Path, run: Path, workers: int = 2, *, inside: bool = False) -> list[str | Path | int]:
    """The smoke pipeline with a small network, thirteen steps an epoch; with `inside`, it writes the checkpoint INSIDE.

    The network is that of tests/small_network.
    """
    words = ["train", "--pipeline", "smoke", "--workers", workers, "--data", work / "cache", "--run", run]
    # Without augmentation, since loading albumentations takes a second in each process.
    words += ["--set", "stages.*.batch_size=2", "--set", "stages.*.augmentation=none", *SMALL_NETWORK]
    return [*words, "--set", "train.checkpoint_every_images=20"] if inside else words


def wait_for(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until `path` exists; AssertionError when the process ends before that."""
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def workers_of(driver: int) -> list[int]:
    """Process ids of a driver's Ray Train workers."""
    found = subprocess.run(["pgrep", "-f", "ray::RayTrainWorker"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split() if _belongs_to(int(pid), driver)]


def _belongs_to(pid: int, ancestor: int) -> bool:
    """Whether a process descends from another one."""
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            return False
    return False
