"""A small cache, and the weights that a run on it ends with when undisturbed; made once for all test processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from commands import train_words
from locking import made_once

from ptxdist import locks
from ptxdist.cache.preprocess import preprocess
from ptxdist.phantoms.dataset import write_phantoms
from ptxdist.rundir import RESULT, read_result


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache of 40 phantoms at 64 and 96 px. Each test has its own folder for runs in it."""

    def make(work: Path) -> None:
        write_phantoms(work / "ph", cases=40, positive_share=0.5, workers=1)
        preprocess(
            work / "ph/dicom-images", work / "ph/train-rle.csv", work / "cache", patients=work / "ph/patients.csv",
            sizes_px=(64, 96),
        )  # fmt: skip

    return made_once(tmp_path_factory, "integration", make)


@pytest.fixture(scope="session")
def torchrun(work: Path) -> Path:
    """The run of `train_words` by two processes of torchrun, without Ray."""
    run = work / "without" / "smoke"  # a folder of its own, so that no stage of another run is reused
    words = [*train_words(work, run), "--without-ray"]
    program = Path(sys.executable).with_name("torchrun")
    command = [program, "--nproc-per-node", "2", "--standalone", "-m", "--", "ptxdist", *words]
    with locks.only(work / "torchrun.lock"):
        if not (run / RESULT).exists():
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=400)
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("held-out images,") == 1, "one rank prints"
    return run


@pytest.fixture(scope="session")
def reference(torchrun: Path) -> list[str]:
    """sha256 of the weights of both stages."""
    return [stage.weights_sha256 for stage in read_result(torchrun).stages]
