"""Sixty wrong uses, and the way out that the message of each shows; none of them loads torch or Ray."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny_caches import make_cache

from ptxdist import places

LONG = "x" * 4000


class Use(NamedTuple):
    """A command, its exit code, and what its message has to say."""

    command: str
    code: int
    words: tuple[str, ...]


USES = [
    # a name that is not there
    Use("trian", 2, ("No such command 'trian'", "Did you mean 'train'")),
    Use("evalute runs/first", 2, ("No such command", "'evaluate'")),
    Use("train --data cach", 7, ("nothing at cach", "did you mean 'cache'", "ptxdist preprocess")),
    Use("train --data cache --pipeline exp5", 3, ("no pipeline 'exp5'", "exp1", "paper")),
    Use("train --data cache --pipeline mine2.toml", 3, ("no settings file mine2.toml", "'exp4'")),
    Use("train --data cache --site laptop", 3, ("no config 'laptop'", "local", "gpu")),
    Use("plan cachee", 7, ("nothing at cachee", "did you mean 'cache'")),
    Use("verify nowhere", 7, ("nothing at nowhere", "ptxdist preprocess")),
    Use("inspect nowhere", 8, ("nothing at nowhere", "a run", "a cache")),
    Use("report runs/frist", 8, ("nothing at runs/frist", "did you mean 'runs/first'")),
    Use("evaluate nowhere", 8, ("nothing at nowhere", "`ptxdist train --run nowhere`")),
    Use("predict nowhere images --out o", 8, ("nothing at nowhere", "bundle of `ptxdist export`")),
    Use("predict model.ptxdist gone.dcm --out o", 6, ("PATH: nothing at gone.dcm", "give a path that exists")),
    Use("serve runs/frist", 8, ("did you mean 'runs/first'",)),
    Use("export nowhere --out m.onnx", 8, ("nothing at nowhere",)),
    Use("compare runs/first nowhere", 8, ("nothing at nowhere",)),
    Use("score gone.csv --truth labels.csv", 4, ("PREDICTIONS: nothing at gone.csv",)),
    Use("score labels.csv --truth lables.csv", 4, ("--truth: nothing at", "did you mean 'labels.csv'")),
    Use("preprocess --dicom imagse --labels labels.csv --out o", 6, ("--dicom: nothing at", "did you mean 'images'")),
    Use("preprocess --dicom images --labels lables.csv --out o", 4, ("--labels: nothing at", "'labels.csv'")),
    Use("preprocess --dicom images --labels labels.csv --patients p.csv --out o", 4, ("--patients: nothing at p.csv",)),
    Use("phantom o --labels gone.csv", 4, ("--labels: nothing at gone.csv",)),
    # a place of another kind
    Use("report model.ptxdist", 8, ("model.ptxdist is a bundle", "`predict`", "expected a run")),
    Use("evaluate model.ptxdist", 8, ("is a bundle", "evaluate --data CACHE --out OUT")),
    Use("inspect model.ptxdist", 8, ("is a bundle", "`predict`")),
    Use("train --data cache --run model.ptxdist", 8, ("--run model.ptxdist is a bundle", "give a new folder")),
    Use("train --data cache --run cache", 8, ("--run cache is a cache", "give a new folder")),
    Use("train --data runs/first", 7, ("runs/first is a run", "`evaluate`", "expected a cache")),
    Use("train --data images", 7, ("images is a folder and not a cache", "ptxdist preprocess")),
    Use("verify runs/first", 7, ("runs/first is a run", "`inspect`", "expected a cache")),
    Use("verify labels.csv", 7, ("labels.csv is a file and not a cache",)),
    Use("plan runs/first", 7, ("runs/first is a run", "expected a cache")),
    Use("predict cache images --out o", 8, ("cache is a cache", "`train --data`", "expected a run")),
    Use("predict runs/half images --out o", 8, ("not finished", "rerun the same `ptxdist train`")),
    Use("predict runs/folds images --out o", 8, ("runs/folds has runs inside", "runs/folds/fold-0")),
    Use("predict labels.csv images --out o", 8, ("labels.csv is a file and not a run",)),
    Use("report evaluation/..", 8, ("is a folder and not a run", "no settings.json")),
    Use("export predictions --out m.onnx", 8, ("a folder of `ptxdist predict`", "`score`")),
    Use("evaluate runs/first --data images --out o", 7, ("images is a folder and not a cache",)),
    Use("preprocess --dicom photos --labels labels.csv --out o", 6, ("2 .jpg", "convert them to PNG")),
    Use("preprocess --dicom empty --labels labels.csv --out o", 6, ("it is empty",)),
    Use("preprocess --dicom images --labels masks --match *_lung --out o", 6, ("none of", "a, b", "c, d")),
    Use("preprocess --dicom images --labels lungs --out o", 6, ("a_lung, b_lung", "--match '*_lung'")),
    # settings as options
    Use("train --epochs 5", 2, ("--set 'stages.*.epochs=5'", "--set stages.1.epochs=5", "ptxdist settings")),
    Use("train --seed=3", 2, ("--set seed=3",)),
    Use("train --batch-size 8", 2, ("--set 'stages.*.batch_size=8'",)),
    Use("train --lr 1e-4", 2, ("--set 'stages.*.learning_rate=1e-4'",)),
    Use("train --device gpu", 2, ("--set train.device=gpu",)),
    Use("train --resume", 2, ("Rerun the same command",)),
    Use("train --gpus 2", 2, ("--workers N",)),
    Use("predict model.ptxdist images --output o", 2, ("The option is --out",)),
    Use("train --set epochs=5", 3, ("no setting 'epochs'", "--set 'stages.*.epochs=5'")),
    Use("train --set lr=1e-4", 3, ("--set 'stages.*.learning_rate=0.0001'",)),
    Use("train --set sed=1", 3, ("unknown setting 'sed'", "did you mean 'seed'", "ptxdist settings")),
    Use("train --set stages.1.lr=1", 3, ("did you mean 'learning_rate'",)),
    Use("train --set seed", 3, ("expected key=value", "seed=1")),
    Use("train --set stages.3.epochs=1", 3, ("no stage '3'", "stages 1 to 2")),
    Use("train --set train.device=cuda", 3, ("train.device", "'auto', 'cpu' or 'gpu'", "'cuda'")),
    Use(f"train --set seed={LONG}", 3, ("seed", "integer", "characters)")),
    Use(f"train --set {LONG}=1", 3, ("unknown setting", "characters)")),
    Use("train --pipeline exp4 --workers 15", 3, ("15 workers", "batch of 14", "use at most 14 workers")),
    Use("train --data cache --set stages.1.loss=dise", 3, ("'dise'", "stages.1.loss", "dice")),
    Use("train --fold half", 3, ("fold", "integer", "'half'")),
    # values of options
    Use("evaluate", 2, ("Missing argument", "For example: ptxdist evaluate runs/first")),
    Use("preprocess --dicom images --out o", 2, ("Missing option '--labels'", "Label table", "For example")),
    Use("predict model.ptxdist", 2, ("Missing argument 'PATH...'", "new-images --out predictions")),
    Use("evaluate runs/first --split val", 3, ("--split goes with --data",)),
    Use("evaluate runs/first --prevalence 0.1", 3, ("--prevalence goes with --sensitivity",)),
    Use("evaluate runs/first --data cache", 8, ("name a folder for the evaluation with --out",)),
    Use("evaluate runs/first --sensitivity 95", 2, ("--sensitivity", "0<x<=1")),
    Use("export runs/first --out model.h5", 3, ("model.h5", ".onnx, .pt2 and .ptxdist")),
    Use("plan cache --out plan.txt", 3, ("plan.txt", "*.toml")),
    Use("predict model.ptxdist images --out o --write mask", 2, ("'mask' is not one of masks, overlays, seg",)),
    Use("submit --address http://127.0.0.1:9 -- fly", 3, ("'fly' cannot be submitted", "train")),
    Use("submit --address http://127.0.0.1:9", 2, ("give either a command after --",)),
    Use(f"inspect {LONG[:200]}/{LONG[:200]}", 8, ("nothing at",)),
]

RUN_ALL = """
import json, sys
sys.modules.update(torch=None, ray=None)  # importing them fails
from click.testing import CliRunner
from ptxdist.cli import cli
found = []
for words in json.load(sys.stdin):
    done = CliRunner().invoke(cli, words)
    ended = done.exception is None or isinstance(done.exception, SystemExit)
    found.append([done.exit_code, done.stdout, done.stderr, "" if ended else repr(done.exception)])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str, str]]:
    """Exit code, stdout, stderr and exception of each use, all run in one process without torch and Ray."""
    folder = tmp_path_factory.mktemp("wrong")
    make_cache(folder / "cache")
    for name in ("first/settings.json", "first/result.json", "half/settings.json", "folds/fold-0/settings.json"):
        _touch(folder / "runs" / name)
    for name in ("model.ptxdist", "evaluation/cases.csv", "predictions/predict.json", "photos/a.jpg", "photos/b.jpg"):
        _touch(folder / name)
    (folder / "empty").mkdir()
    (folder / "labels.csv").write_text("ImageId,EncodedPixels\na,-1\nb,1 5\n")
    for name in ("images/a", "images/b", "masks/c_lung", "masks/d_lung", "lungs/a_lung", "lungs/b_lung"):
        _png(folder / f"{name}.png")
    before = sorted(map(str, folder.rglob("*")))
    words = json.dumps([shlex.split(use.command) for use in USES])
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL], input=words, capture_output=True, text=True, check=True, cwd=folder
    )
    assert sorted(map(str, folder.rglob("*"))) == before, "a refused command leaves nothing"
    return dict(zip([use.command for use in USES], json.loads(done.stdout), strict=True))


def _touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def _png(path: Path) -> None:
    import cv2
    import numpy as np

    path.parent.mkdir(exist_ok=True)
    values = np.zeros((64, 64), np.uint8)
    values[20:40, 10:30] = 255
    cv2.imwrite(str(path), values)


@pytest.mark.parametrize("use", USES, ids=lambda use: use.command[:60])
def test_a_wrong_use_shows_the_way_out(use: Use, outcomes: dict[str, tuple[int, str, str, str]]) -> None:
    code, out, err, exception = outcomes[use.command]
    assert (code, out, exception) == (use.code, "", ""), err
    assert [word for word in use.words if word not in err] == [], err
    assert err.splitlines()[-1].startswith(("error: ", "Error: ")), err
    assert len(err) < 1300


def test_there_are_sixty_and_each_kind_of_place_is_told_apart() -> None:
    assert len(USES) >= 60
    assert len({use.command for use in USES}) == len(USES)


def test_a_bundle_is_told_by_its_content_too(tmp_path: Path) -> None:
    renamed = tmp_path / "model.zip"
    renamed.write_bytes(b"PK\3\4" + bytes(26) + b"card.json" + bytes(100))
    assert (places.kind_of(renamed), places.kind_of(tmp_path)) == (places.BUNDLE, "folder")
