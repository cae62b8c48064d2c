"""Each file of a trained run, of an evaluation, of predictions and of a bundle is damaged, and commands are called.

The rows are those of the table in docs/faults.md. A command that must name the file meets each kind of damage, any
other one the next kind in turn. The network is small: a run with ResNet-34 has 100 MB.
"""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from tiny_caches import make_cache
from tiny_encoder import TINY

from ptxdist.cli import cli
from ptxdist.predict import server, worker
from ptxdist.predict.predictor import Predictor
from ptxdist.predict.viewer import page_files
from ptxdist.train.encoders import ENCODERS

FAULTS = Path(__file__).parents[2] / "docs" / "faults.md"
PIPELINE = """
[model]
encoder = "tiny"
encoder_weights = "none"
decoder_channels = [16, 8, 8, 8, 8]
[[stages]]
size_px = 32
epochs = 1
batch_size = 8
[[stages]]
size_px = 64
epochs = 1
batch_size = 8
"""
TRAIN = ("train", "--without-ray", "--pipeline", "pipeline.toml", "--data", "cache", "--run", "runs/run")
# The place of what is damaged, by the start of its rows, and the commands that take it.
PLACES = {"": "runs/run", "evaluation elsewhere": "elsewhere", "predictions": "predictions", "bundle": "."}
COMMANDS = {
    "": {
        "inspect": ("inspect", "runs/run"),
        "report": ("report", "runs/run"),
        "compare": ("compare", "other", "runs/run", "--markdown"),
        "evaluate": ("evaluate", "runs/run"),
        "evaluate --data": ("evaluate", "runs/run", "--data", "cache", "--out", "new"),
        "predict": ("predict", "runs/run", "images", "--out", "new"),
        "serve": ("serve", "runs/run", "--port", "0"),
        "export": ("export", "runs/run", "--out", "new.ptxdist"),
        "train": TRAIN,
    },
    "evaluation elsewhere": {
        "report": ("report", "elsewhere"),
        "compare": ("compare", "elsewhere", "elsewhere", "--markdown"),
        "export --point": ("export", "runs/run", "--point", "elsewhere", "--out", "new.ptxdist"),
    },
    "predictions": {
        "predict": ("predict", "runs/run", "images", "--out", "predictions", "--threshold", "0.45"),
        "score": ("score", "predictions", "--truth", "truth.csv", "--markdown"),
    },
    "bundle": {
        "predict": ("predict", "model.ptxdist", "images", "--out", "new"),
        "serve": ("serve", "model.ptxdist", "--port", "0"),
        "export": ("export", "model.ptxdist", "--point", "elsewhere", "--out", "new.ptxdist"),
        "evaluate --data": ("evaluate", "model.ptxdist", "--data", "cache", "--out", "new"),
    },
}
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "flip": lambda content: bytes(byte ^ (place == len(content) // 2) for place, byte in enumerate(content)),
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "behind": lambda content: content + b"\n1",
}
OTHERS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a dangling link": lambda path: path.symlink_to("nowhere"),
}


class Row:
    """A row of the table: what is damaged in which place, and the commands of its three columns."""

    def __init__(self, line: str) -> None:
        first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        self.place = first.partition("`")[0].rstrip(": ")
        self.files = re.findall(r"`([^`]+)`", first)
        self.named, self.again, self.without = ([name for name in cell.split(", ") if name] for cell in cells)

    def __repr__(self) -> str:
        return " ".join([self.place, *self.files]).strip()


def rows() -> list[Row]:
    """Those of the table in the docs."""
    text = FAULTS.read_text(encoding="utf-8").partition("## Damage in a run,")[2].partition("\n## ")[0]
    return [Row(line) for line in text.splitlines() if line.startswith("| ")][1:]


class Here(worker.Worker):
    """Loads the models in this process: a new one would take seconds to import torch."""

    def __enter__(self) -> Here:
        models, device, at, most = self._args
        predictor = Predictor.load(*models, device=device, at=at)  # type: ignore[misc, arg-type]
        self.about = worker.About(tuple(card.name for card in predictor.cards), page_files(predictor, int(str(most))))
        return self

    def __exit__(self, *error: object) -> None:
        """There is no process."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with all that the commands take, in which the process is; `whole` has what is damaged once more."""
    folder = tmp_path_factory.mktemp("damaged")
    random = np.random.default_rng(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODERS, "tiny", TINY)
        patch.setattr(worker, "Worker", Here)
        patch.setattr(server, "serve", lambda *given: None)
        patch.chdir(folder)
        make_cache(folder / "cache", train=6, val=12)
        (folder / "pipeline.toml").write_text(PIPELINE)
        (folder / "images").mkdir()
        for name in ("one", "two"):
            cv2.imwrite(f"images/{name}.png", random.integers(0, 255, (96, 96), dtype=np.uint8))
        (folder / "truth.csv").write_text("ImageId,EncodedPixels\none,10 20\ntwo,-1\n")
        done(*TRAIN)
        shutil.copytree("runs/run", "other")
        done("evaluate", "runs/run", "--data", "cache", "--out", "elsewhere")
        done("export", "runs/run", "--out", "model.ptxdist")
        done(*COMMANDS["predictions"]["predict"])
        assert "one,-1" not in Path("predictions/submission.csv").read_text(), "there is something to flip"
        Path("whole").mkdir()
        for name in ("runs", "elsewhere", "predictions", "model.ptxdist"):
            shutil.move(name, "whole")
        yield folder


def restore() -> None:
    """Everything as it was, by hard links: what ptxdist writes are new files."""
    for name in ("runs", "elsewhere", "predictions", "new", "model.ptxdist", "new.ptxdist"):
        if Path(name).is_dir():
            shutil.rmtree(name)
        else:
            Path(name).unlink(missing_ok=True)
    shutil.copytree("whole", ".", copy_function=os.link, dirs_exist_ok=True)


def call(words: tuple[str, ...]) -> tuple[int, str]:
    """Exit code of a command, and what it prints without the seconds and the port; no traceback."""
    result = CliRunner().invoke(cli, words)
    assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exception)
    text = " ".join(result.output.split())
    return result.exit_code, re.sub(r"127\.0\.0\.1:\d+|\d+(\.\d+)? s\b", "", text)


def done(*words: str) -> None:
    code, text = call(words)
    assert code == 0, text


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    path.unlink()  # a hard link
    if kind in BYTES:
        path.write_bytes(BYTES[kind](content))
    else:
        OTHERS[kind](path)


def damage_member(name: str, kind: str) -> None:
    """Damage a member of the bundle, in a zip file that is whole."""
    with zipfile.ZipFile("whole/model.ptxdist") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    assert name in members
    Path("model.ptxdist").unlink()
    with zipfile.ZipFile("model.ptxdist", "w") as archive:
        for member, content in members.items():
            if (member, kind) != (name, "missing"):
                archive.writestr(member, BYTES[kind](content) if member == name else content)


@pytest.mark.parametrize(("first", "row"), [*enumerate(rows())], ids=[*map(repr, rows())])
def test_damage_of_a_file_is_said_by_the_commands_of_its_row_and_by_no_other(
    folder: Path, first: int, row: Row
) -> None:
    commands, place = COMMANDS[row.place], Path(PLACES[row.place])
    assert {*row.named, *row.again, *row.without} <= {*commands}, "the table has commands of the trial only"
    whole = {name: whole_of(row.place, name) for name in commands}
    for file in row.files:
        found = [file] if row.place == "bundle" else files_of(place, file)
        assert found, file
        path = place / found[0]
        is_member = row.place == "bundle" and path.name != "model.ptxdist"
        kinds = [*BYTES, "missing"] if is_member else [*BYTES, *OTHERS]
        for number, (name, words) in enumerate(commands.items(), start=first):
            for kind in kinds if name in row.named else [kinds[number % len(kinds)]]:
                restore()
                damage_member(path.name, kind) if is_member else damage(path, kind)
                code, text = call(words)
                where = f"{name}, {kind} {path}: {code} {text}"
                if kind == "missing" and name in row.without:
                    assert code == 0, where
                elif name in row.named or (name in row.again and kind == "a folder"):
                    assert code == code_of(row, path, name, "" if is_member else kind), where
                    shown = "model.ptxdist" if row.place == "bundle" else path.name
                    assert shown in text.replace(" ", "") or (kind in OTHERS and str(place) in text), where
                elif name in row.again:
                    assert code == 0, where
                    restored = path.read_bytes() == Path("whole", path).read_bytes()
                    assert restored or path.name == "result.json", where  # which has the seconds
                    for reader in row.named[:1]:
                        assert call(commands[reader]) == whole[reader], where
                elif kind == "a folder" and text != whole[name][1]:  # in the place of what `train` writes for people
                    assert (code, name, "could not be written" in text) == (0, "train", True), where
                else:
                    assert (code, text) == whole[name], where


def code_of(row: Row, path: Path, command: str, kind: str) -> int:
    """The exit code that is promised."""
    if row.place == "bundle":
        return 8 if kind in OTHERS else 9
    if path.name == "best.safetensors" and command != "train":
        return 9
    return 4 if command == "score" else 8


@cache
def whole_of(place: str, command: str) -> tuple[int, str]:
    """What a command says when nothing is damaged."""
    restore()
    found = call(COMMANDS[place][command])
    assert found[0] == 0, found
    return found


def files_of(place: Path, pattern: str) -> list[str]:
    """Names in a place when nothing is damaged."""
    return sorted(str(path.relative_to("whole" / place)) for path in ("whole" / place).glob(pattern))


def test_each_file_has_a_row(folder: Path) -> None:
    table = rows()
    for name in ("runs/run", "elsewhere", "predictions"):
        there = {path for path in files_of(Path(name), "**/*") if Path("whole", name, path).is_file()}
        known = {
            path
            for row in table
            if PLACES[row.place] == name
            for file in row.files
            for path in files_of(Path(name), file)
        }
        assert there - known == {"runs/run": {"lock"}, "predictions": {".lock"}}.get(name, set())
    with zipfile.ZipFile("whole/model.ptxdist") as archive:
        assert {*archive.namelist(), "model.ptxdist"} == {
            file for row in table if row.place == "bundle" for file in row.files
        }
