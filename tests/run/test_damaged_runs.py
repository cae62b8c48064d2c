"""A damaged file of a run or a cache is a sentence, with exit code 8 or 7; or the command does without it.

Run and cache are those of tests/goldens, as version 0.1.0 wrote them, and the run also written anew with checksums.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from ptxdist import files
from ptxdist.cache.store import Store
from ptxdist.cache.verify import refuse_damaged
from ptxdist.cli import cli
from ptxdist.errors import RunError, StoreError
from ptxdist.records import Origin
from ptxdist.rundir import (
    TABLES,
    read_environment,
    read_evaluation,
    read_origin,
    read_stages,
    read_training_images,
    write_evaluation,
)

# `ptxdist.report` is the function of this name.
REPORT = importlib.import_module("ptxdist.report.report")
ARCHIVE = Path(__file__).resolve().parents[1] / "goldens" / "made-by-0.1.0.tar.xz"
Damage = Callable[[bytes], bytes | None]
JSON = ("settings.json", "result.json", "environment.json", "evaluation/result.json", "stages/2-96px/result.json")
CSV = ("evaluation/cases.csv", "evaluation/predictions.csv")


def flip_digit(content: bytes) -> bytes:
    """Another digit in the last number: what only a checksum finds."""
    place = max(content.rfind(digit) for digit in b"23456789")
    return content[:place] + b"1" + content[place + 1 :]


DAMAGES: dict[str, Damage] = {
    "digit": flip_digit,
    "cut": lambda content: content[: len(content) // 2],
    "cut between lines": lambda content: b"".join(content.splitlines(True)[: content.count(b"\n") // 2]),
    "empty": lambda content: b"",
    "missing": lambda content: None,
    "0xff": lambda content: content[:40] + b"\xff" + content[41:],
    "nested": lambda content: b"[" * 100_000,
    "NaN": lambda content: content.replace(b'"seconds": ', b'"seconds": NaN, "s": ').replace(b",0.", b",nan", 1),
}
# What a command reads; the rest of a run may be damaged without a difference.
READS = {
    "report": ("settings.json", "result.json", "environment.json", "evaluation/result.json", *CSV),
    "compare": ("evaluation/result.json", "evaluation/cases.csv"),
    "inspect": ("settings.json", "result.json"),
}
WITHOUT = {  # missing, these files are done without
    ("report", "environment.json"),
    ("inspect", "result.json"),  # a run that is not finished
}


# A file of a cache, and the commands that read it; `docs/faults.md` has this table.
CACHE_FILES = {
    "manifest.json": ("verify", "train, evaluate", "inspect", "report"),
    "catalog.jsonl": ("verify", "train, evaluate", "inspect", "report"),
    "64.zarr/image/c/0/0/0": ("verify", "train, evaluate", "inspect"),  # the smallest size
    "64.zarr/mask/c/0/0/0": ("verify", "train, evaluate", "inspect"),
    "96.zarr/image/c/0/0/0": ("verify", "train, evaluate", "report"),  # the largest one
    "96.zarr/mask/c/0/0/0": ("verify", "train, evaluate", "report"),
    "near_duplicates.csv": ("verify", "train, evaluate", "report"),
    "salt": ("verify", "train, evaluate"),
    "missing.csv": ("verify", "train, evaluate"),
    "rejects.csv": ("verify", "train, evaluate"),
    "96.zarr/zarr.json": ("verify", "train, evaluate"),
    "96.zarr/split/c/0": ("verify", "train, evaluate"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `cache`, `old` and `new`: the run as it was, and with checksums."""
    folder = tmp_path_factory.mktemp("runs")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    (folder / "run").rename(folder / "old")
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    shutil.copytree(folder / "old", folder / "new")
    (folder / "new/evaluation/histograms.safetensors").touch()
    for name in JSON:
        path = folder / "new" / name
        files.write_json(path, json.loads(path.read_bytes()))
    write_evaluation(folder / "new/evaluation", read_evaluation(folder / "new/evaluation"))
    return folder


@pytest.fixture
def place(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the cache that the settings name, in which the process is, and `old` and `new` to be damaged."""
    (tmp_path / "cache").symlink_to(runs / "cache")
    for version in ("old", "new"):
        shutil.copytree(runs / version, tmp_path / version, ignore=shutil.ignore_patterns("tensorboard"))
    monkeypatch.chdir(tmp_path)
    for name, value in (("draw_galleries", []), ("render", "the page")):  # which take most of the time
        monkeypatch.setattr(REPORT, name, lambda *given, value=value: value)
    return tmp_path


def call(command: str, run: Path) -> Result:
    words = ["--markdown", str(run)] if command == "compare" else [str(run)]
    return CliRunner().invoke(cli, [command, str(run), *words][: None if command == "compare" else 2])


@pytest.mark.parametrize("command", READS)
@pytest.mark.parametrize("version", ["old", "new"])
def test_damage_of_any_file_of_a_run_is_a_sentence(place: Path, version: str, command: str) -> None:
    run = place / version
    whole = call(command, run)
    assert whole.exit_code == 0, whole.output
    for name in READS[command]:
        content = (run / name).read_bytes()
        for kind, damage in DAMAGES.items():
            damaged = damage(content)
            if damaged == content or (kind == "cut between lines" and name not in CSV):
                continue
            if damaged is None:
                (run / name).unlink()
            else:
                (run / name).write_bytes(damaged)
            done = call(command, run)
            where = f"{command} {version} {name} {kind}: {done.output}"
            assert done.exception is None or isinstance(done.exception, SystemExit), where
            silent = kind == "digit" and version == "old"  # nothing was recorded
            if (kind == "missing" and (command, name) in WITHOUT) or silent:
                assert done.exit_code in (0, 8), where
            else:
                assert done.exit_code in (7, 8) if kind == "missing" else done.exit_code == 8, where
                assert done.stderr.splitlines()[-1].startswith("error: "), where
                assert kind == "missing" or Path(name).name in done.stderr.replace("\n", ""), where
                assert len(done.stderr) < 2500, where
            (run / name).write_bytes(content)
    assert call(command, run).output == whole.output


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a dangling link"])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("origin.json", read_origin),
        ("origin.json", read_training_images),
        ("training-images.csv", read_training_images),
        ("environment.json", read_environment),
        ("stages/2-96px/result.json", read_stages),
        ("evaluation/cases.csv", lambda run: read_evaluation(run / "evaluation", *TABLES)),
    ],
)
def test_what_is_no_file_in_the_place_of_one_is_neither_waited_for_nor_taken_for_none(
    place: Path, kind: str, name: str, read: Callable[[Path], object]
) -> None:
    run = place / "new"
    (run / "training-images.csv").write_text("pixels,look,patient\n")
    files.write_json(run / "origin.json", Origin(images=2, positives=1), beside=("training-images.csv",))
    read(run)
    path = run / name
    path.unlink()
    {"a pipe": os.mkfifo, "a folder": Path.mkdir, "a dangling link": lambda path: path.symlink_to("nowhere")}[kind](
        path
    )
    with pytest.raises(RunError, match=f"{name} (cannot be read|is damaged|is missing|has another checksum)"):
        read(run)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda result: result["evaluation"].update(folds=[1]), "result.json is not of the run in .*settings.json"),
        (lambda result: result["stages"].pop(), "result.json is not of the run in .*settings.json"),
        (lambda result: result["stages"][1].update(size_px=-1), "result.json is not of the run in .*settings.json"),
        (lambda result: result["stages"][0].update(seconds=1.0), "result.json and .*stages.* are not of one run"),
        (lambda result: result["stages"][0]["best"].update(val_loss=1e308), "result.json is damaged"),
        (lambda result: result["evaluation"]["tuned"][0]["areas_px"].pop(), "result.json is damaged"),
        (lambda result: result["evaluation"]["calibration"][0]["counts"].pop(), "result.json is damaged"),
    ],
)
@pytest.mark.parametrize("version", ["old", "new"])
def test_the_result_of_another_run_or_an_impossible_one_is_refused(
    place: Path, version: str, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    path = place / version / "result.json"
    result = json.loads(path.read_bytes())
    change(result)
    files.write_json(path, result)
    for command in ("inspect", "report"):
        done = call(command, place / version)
        assert done.exit_code == 8
        assert re.search(words, done.stderr.replace("\n", " "))


def test_fingerprints_without_their_record_are_refused(place: Path) -> None:
    """Else a model of phantoms would lose the sentence that says so."""
    (place / "new/training-images.csv").write_text("pixels,look,patient\n")
    for read in (read_origin, read_training_images):
        with pytest.raises(RunError, match=r"origin.json cannot be read: No such file .*; rerun the same"):
            read(place / "new")


def test_other_files_of_a_run_may_be_damaged(place: Path) -> None:
    """Those that are for people and other programs: the epochs are in the results of the stages too."""
    for name in ("metrics.jsonl", "lock", "evaluation/histograms.safetensors", "stages/2-96px/result.json"):
        (place / "new" / name).write_bytes(b"\xff")
        assert call("report", place / "new").exit_code == 0


def test_inspect_of_a_run_before_its_first_stage_shows_no_empty_table(place: Path) -> None:
    (place / "old/result.json").unlink()
    shutil.rmtree(place / "old/stages")
    done = call("inspect", place / "old")
    assert (done.exit_code, done.stdout) == (0, "")
    assert "not finished: 0 of 2 stages" in done.stderr


def test_tables_and_result_of_different_evaluations_are_refused(place: Path) -> None:
    """As after a kill of `evaluate` between its files; the tables alone are whole."""
    run = place / "old"
    table = run / "evaluation/predictions.csv"
    table.write_bytes(table.read_bytes().replace(b"\n1.", b"\n2."))
    done = call("report", run)
    assert done.exit_code == 8
    assert "are of different evaluations" in done.stderr.replace("\n", " ")
    evaluation = read_evaluation(place / "new/evaluation").model_copy(update={"seconds": 1.0})
    write_evaluation(place / "new/evaluation", evaluation)
    done = call("report", place / "new")
    assert done.exit_code == 8
    assert "differ; `ptxdist evaluate" in done.stderr.replace("\n", " ")
    (place / "new/evaluation/cases.csv").unlink()
    with pytest.raises(RunError, match=r"cases.csv is missing; rerun `ptxdist evaluate`"):
        read_evaluation(place / "new/evaluation", *TABLES)


def check(command: str, cache: Path, run: Path) -> tuple[int, str]:
    """Exit code of a command that reads the cache, and what it says."""
    if command == "train, evaluate":  # what both do first
        try:
            refuse_damaged(cache, [64, 96])
        except StoreError as error:
            return error.exit_code, str(error)
        return 0, ""
    done = CliRunner().invoke(cli, [command, str(run if command == "report" else cache)])
    assert done.exception is None or isinstance(done.exception, SystemExit), (command, done.exception)
    return done.exit_code, done.output.replace("\n", "")


@pytest.mark.parametrize("name", CACHE_FILES)
def test_no_command_accepts_damage_of_a_file_of_a_cache_that_it_reads(
    place: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whatever the damage; a command that does not read the file says the same as before."""
    (place / "cache").unlink()
    cache, run = Path(shutil.copytree(runs / "cache", place / "cache")), place / "new"
    settings = json.loads((run / "settings.json").read_bytes())
    settings["pipeline"]["fold"] = 1  # fold 0 needs no near_duplicates.csv
    files.write_json(run / "settings.json", settings)
    write_evaluation(run / "evaluation", read_evaluation(run / "evaluation").model_copy(update={"folds": (1,)}))
    result = json.loads((run / "result.json").read_bytes())
    result["evaluation"]["folds"] = [1]
    files.write_json(run / "result.json", result)
    monkeypatch.setattr(REPORT, "refuse_other_split", lambda *given: None)
    monkeypatch.setattr("ptxdist.cache.outlines.outline", lambda *given, side_px: np.zeros((1, 1, 3), np.uint8))

    def look(
        rows: object, predictions: object, cases: Sequence[object], store: Store, overlays: object
    ) -> list[object]:
        for index in range(len(cases)):
            store.checked(index)
        return []

    monkeypatch.setattr(REPORT, "draw_galleries", look)
    commands = ("verify", "train, evaluate", "inspect", "report")
    whole = {command: check(command, cache, run) for command in commands}
    assert {code for code, _ in whole.values()} == {0}
    path, content = cache / name, (cache / name).read_bytes()
    damages = {kind: DAMAGES[kind] for kind in ("cut", "empty", "missing", "nested")}
    damages["flip"] = lambda content: bytes([content[0] ^ 1]) + content[1:]
    damages["NaN"] = lambda content: content.replace(b": 0,", b": NaN,", 1)
    for kind, damage in damages.items():
        damaged = damage(content)
        if damaged == content:
            continue
        path.unlink(missing_ok=True)
        if damaged is not None:
            path.write_bytes(damaged)
        for command in commands:
            code, words = check(command, cache, run)
            where = f"{command} {name} {kind}: {code} {words}"
            if command == "inspect" and name.startswith("96.zarr/") and code:
                assert (code, name in words) == (7, True), where  # it looks at the length of all shards
            elif command in CACHE_FILES[name]:
                assert code == 7, where
                assert name in words or (name, kind) == ("manifest.json", "missing"), where
            else:
                assert (code, words) == whole[command], where
    path.write_bytes(content)
    assert {command: check(command, cache, run) for command in commands} == whole


def test_the_documented_table_is_the_one_that_is_tested() -> None:
    text = (Path(__file__).parents[2] / "docs" / "faults.md").read_text(encoding="utf-8")
    for name, commands in CACHE_FILES.items():
        shown = [command for command in ("verify", "train, evaluate", "inspect", "report") if command in commands]
        assert f"| `{name}` | {', '.join(shown)} |" in text
