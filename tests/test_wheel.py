"""The wheel, installed outside of the checkout: it has every file of the package, and the whole way works with it.

The new environment has the packages of this one, but not its ptxdist.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"ptxdist": "ptxdist", "configs": "ptxdist/configs", "pipelines": "ptxdist/pipelines"}  # and where they go

WAY = """
import numpy as np
from pathlib import Path

import ptxdist
from ptxdist.finding import load_finding
from ptxdist.resolve import find, load_settings

assert Path(ptxdist.__file__).is_relative_to(PREFIX), ptxdist.__file__
for name in ("demo", "exp1", "exp4", "paper", "small"):
    assert load_settings(name, site="gpu").pipeline.name == name
    assert find("pipelines", name).is_relative_to(PREFIX)
assert load_finding("nodule")[0].name == "nodule"
ptxdist.preprocess("phantoms/dicom-images", "phantoms/train-rle.csv", "cache", size=(64, 96), quiet=True)
small = {"model.encoder": "small", "model.decoder_channels": [4, 4, 4, 4, 4], "train.device": "cpu"}
result = ptxdist.train("cache", pipeline="smoke", run="run", set=small, quiet=True)
page = Path("run/report/index.html").read_text()
assert "<style>" in page and "Kaggle Dice" in page
predictor = ptxdist.Predictor.load("run", device="cpu")
print(len(result.stages), *predictor.predict(np.zeros((90, 80), np.uint8)).mask.shape)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


def test_it_has_every_file_of_the_package(wheel: Path) -> None:
    wanted = {
        f"{target}/{path.relative_to(ROOT / source).as_posix()}"
        for source, target in FOLDERS.items()
        for path in (ROOT / source).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == wanted
    assert {"ptxdist/py.typed", "ptxdist/findings.toml", "ptxdist/pipelines/smoke.toml"} <= names


def test_the_whole_way_works_with_it_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    prefix, work = tmp_path / "environment", tmp_path / "work"
    work.mkdir()
    python = prefix / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["PYTHONPATH"] = str(ROOT / "tests" / "small_network")  # for the encoder

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert "preprocess" in run(prefix / "bin" / "ptxdist", "--help")
    run(prefix / "bin" / "ptxdist", "phantom", "phantoms", "--cases", "12", "--positive-share", "0.5", "--workers", "1")
    assert run(python, "-c", f"PREFIX = {str(prefix)!r}\n{WAY}").split() == ["2", "90", "80"]
