"""Every command explains itself; bad input ends with a sentence and its own exit code."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from ptxdist.cli import cli
from ptxdist.cli.submit import absolute_paths
from ptxdist.config import ModelSettings, complete
from ptxdist.console import ray_log
from ptxdist.errors import PtxdistError, RunError, TrainingError
from ptxdist.places import RESULT, SETTINGS
from ptxdist.resolve import load_settings

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(cli.commands)
PRINTS_RESULTS = sorted(set(COMMANDS) - {"submit"})


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_help_answers_in_well_under_a_second_and_loads_nothing_heavy() -> None:
    started = time.perf_counter()
    code = (
        "import sys; from ptxdist.cli import cli; cli(['--help'], standalone_mode=False);"
        "heavy = {'torch', 'ray', 'zarr', 'albumentations', 'pydicom', 'cv2'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "preprocess" in done.stdout
    assert time.perf_counter() - started < 5  # well under one on an idle machine; here other tests may run beside it


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_and_stands_in_the_readme(name: str) -> None:
    done = run(name, "--help")
    assert done.exit_code == 0
    assert re.search(rf"Examples?:\n    ptxdist {name}\b", done.output)
    assert max(map(len, done.output.splitlines())) <= 80
    assert f"ptxdist {name}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_in_the_help_can_be_copied(name: str) -> None:
    """As they are shown, with their line breaks; each parses."""
    shown = run(name, "--help").output
    examples = re.findall(r"^    (ptxdist (?:.*\\\n)*.*)$", shown, re.MULTILINE)
    assert examples
    for words in (shlex.split(example.replace("\\\n", "")) for example in examples):
        assert words[:2] == ["ptxdist", name]
        cli.commands[name].make_context(name, words[2:])


def test_the_commands_stand_in_the_order_of_use_and_no_line_is_cut() -> None:
    shown = run("--help").output
    names = re.findall(r"^  ([a-z]+)  ", shown[shown.index("Commands:") :], re.MULTILINE)
    way = ["demo", "preprocess", "plan", "train", "evaluate", "report", "predict", "serve", "export", "submit"]
    assert [name for name in names if name in way] == way
    assert sorted(names) == COMMANDS
    assert "..." not in shown.replace("[ARGS]...", "")
    assert run().output == shown


def test_settings_are_listed_with_type_default_and_meaning() -> None:
    items = {item["key"]: item for item in json.loads(run("settings", "--json").stdout)}
    assert items["stages.*.epochs"] == {
        "key": "stages.*.epochs", "type": "whole number from 1 to 100,000", "default": "",
        "meaning": "passes over the training cases",
    }  # fmt: skip
    assert all(item["meaning"] for item in items.values())
    assert json.loads(items["model.decoder_channels"]["default"]) == list(ModelSettings().decoder_channels)
    settings = complete(load_settings("small"))
    leaves = {
        *(f"{group}.{name}" for group in ("data", "train") for name in settings[group]),
        *(name for name, value in settings["pipeline"].items() if not isinstance(value, dict | list)),
        *(f"{group}.{name}" for group in ("model", "evaluation") for name in settings["pipeline"][group]),
        *(f"stages.*.{name}" for name in settings["pipeline"]["stages"][0]),
    }
    assert items.keys() == leaves
    shown = run("settings", "epochs", "batch").stdout
    assert "stages.*.batch_size  whole number" in shown
    assert "    passes over the training cases" in shown
    assert "model." not in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_is_a_wall_of_flags(name: str) -> None:
    options = [p for p in cli.commands[name].params if isinstance(p, click.Option) and p.name != "as_json"]
    assert len(options) <= 14


@pytest.mark.parametrize("name", PRINTS_RESULTS)
def test_commands_that_print_results_take_json(name: str) -> None:
    assert any(parameter.name == "as_json" for parameter in cli.commands[name].params)


def test_train_alone_is_the_full_recipe_and_dry_run_prints_it() -> None:
    done = run("train", "--workers", 4, "--dry-run")
    assert done.exit_code == 0
    assert '"name": "paper"' in done.stdout
    assert '"workers": 4' in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "--set", "stages.1.epohs=3"], 3, ["epoch", "did you mean 'epochs'?"]),
        (["train", "--pipeline", "exp5"], 3, ["exp5", "exp1"]),
        (["train", "--set", "stages.1.epochs=many"], 3, ["stages.1.epochs", "integer"]),
        (["train", "--pipeline", "exp4", "--workers", 15], 3, ["15 workers", "batch of 14", "stage 2"]),
        (["train", "--data", "nowhere"], 7, ["nowhere", "ptxdist preprocess"]),
        (["evaluate", "nowhere"], 8, ["nowhere", "ptxdist train"]),
        (["report", "nowhere"], 8, ["nowhere"]),
        (["inspect", "nowhere"], 8, ["nowhere"]),
        (["serve", "nowhere", "--port", 0], 8, ["nowhere", "a run of `ptxdist train` or a bundle"]),
        (["preprocess", "--dicom", "nowhere", "--labels", "nothing.csv", "--out", "c"], 4, ["nothing.csv"]),
        (["phantom", "p", "--cases", -1], 3, ["cases"]),
        (["submit", "--address", "http://127.0.0.1:8265", "--", "fly"], 3, ["fly", "train"]),
        (["submit", "--address", "http://[h", "--", "report", "r"], 11, ["http://[h", "address of a Ray dashboard"]),
    ],
)
def test_bad_input_is_a_sentence_with_its_own_exit_code(
    arguments: list[object], code: int, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == code, done.output
    assert isinstance(done.exception, SystemExit)
    for word in words:
        assert word in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert list(tmp_path.iterdir()) == [], "nothing half written"


HOSTILE = "a\x1b]0;title\x07\x1b[2J\r\u202e[/red][bold]:smile:\udcff"
HARMLESS = r"a\x1b]0;title\x1b[2J\u202e[/red][bold]:smile:\udcff"  # rich leaves out bell and return


@pytest.mark.parametrize("words", [["report"], ["inspect"], ["verify"], ["phantom", "--cases"], ["--nothing"]])
def test_control_characters_and_markup_of_file_names_do_not_reach_the_terminal(words: list[str]) -> None:
    done = run(*words, HOSTILE)
    assert done.exit_code in (2, 7, 8), done.output
    shown = done.stdout + done.stderr
    assert not {sign for sign in shown if not sign.isprintable()} - {"\n"}
    assert words == ["--nothing"] or HARMLESS in re.sub(r"\n|\\x07|\\r", "", shown)


def test_what_is_printed_is_plain_in_lines_and_tables(capsys: pytest.CaptureFixture[str]) -> None:
    from ptxdist import console

    console.say(HOSTILE)
    console.fail(HOSTILE)
    console.out.print(HOSTILE, soft_wrap=True)
    console.show_pairs(HOSTILE, [(HOSTILE, "1")])
    shown = "".join(capsys.readouterr())
    assert not {sign for sign in shown if not sign.isprintable()} - {"\n"}
    assert shown.replace("\n", "").count("[/red][bold]:smile:") >= 4


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "No space left on device; free some space there"),
        (errno.EMFILE, "Too many open files; raise the limit of open files (`ulimit -n`)"),
        (errno.ENAMETOOLONG, "File name too long\n"),
    ],
)
def test_a_disk_that_fails_is_a_line_and_a_defect_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, sentence: str
) -> None:
    for name in (SETTINGS, RESULT):
        (tmp_path / name).touch()

    def fail(place: object) -> None:
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr("ptxdist.storage.runs.local_run", fail)
    done = run("report", tmp_path)
    assert (done.exit_code, done.stderr.splitlines()[-1].startswith("error: some/file: ")) == (1, True)
    assert sentence in done.stderr
    number = errno.EBADF
    assert isinstance(run("report", tmp_path).exception, OSError)


def test_every_error_has_an_exit_code_of_its_own() -> None:
    codes = [error.exit_code for error in PtxdistError.__subclasses__()]
    assert len(set(codes)) == len(codes)
    assert not {0, 1, 2} & set(codes)


def test_submitted_paths_are_absolute_and_defaults_spelt_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = absolute_paths(cli.commands, ["train", "--workers", "2", "--pipeline", "smoke", "--data=here"])
    assert command == [
        "train", "--workers", "2", "--pipeline", "smoke", f"--data={tmp_path}/here", "--run", f"{tmp_path}/runs/smoke",
    ]  # fmt: skip
    assert absolute_paths(cli.commands, ["report", "runs/x"]) == ["report", f"{tmp_path}/runs/x"]
    several = absolute_paths(cli.commands, ["evaluate", "runs/x", "y", "--out", "z"])
    assert several == ["evaluate", f"{tmp_path}/runs/x", f"{tmp_path}/y", "--out", f"{tmp_path}/z"]


def test_a_submitted_command_that_does_not_parse_is_refused_before_it_is_sent() -> None:
    done = run("submit", "--address", "http://127.0.0.1:1", "--", "train", "--wokers", 3)
    assert done.exit_code == 2
    assert "--wokers" in done.stderr


@pytest.mark.parametrize(
    ("error", "stays"), [(RunError("other findings"), False), (TrainingError("a worker failed"), True)]
)
def test_a_refusal_while_ray_runs_leaves_nothing(tmp_path: Path, error: PtxdistError, stays: bool) -> None:
    out = tmp_path / "runs" / "out"
    with pytest.raises(type(error), match=str(error)) as caught, ray_log(out):
        raise error
    assert [path.name for path in tmp_path.rglob("*.log")] == ["ray.log"][: int(stays)]
    assert (tmp_path / "runs").exists() == stays
    assert (str(out / "ray.log") in str(caught.value)) == stays


FIRST_LINES = """
import json, sys
sys.modules.update(dict.fromkeys(["torch", "ray", "numpy", "cv2", "zarr", "rich"]))  # importing them fails
from click.testing import CliRunner
from ptxdist.cli import cli
print(json.dumps([CliRunner().invoke(cli, words).stderr.splitlines()[:1] for words in json.load(sys.stdin)]))
"""


def test_every_command_says_what_it_does_before_it_imports_anything_heavy(cache: Path, tmp_path: Path) -> None:
    for name in (SETTINGS, RESULT):
        (tmp_path / name).touch()
    (tmp_path / "a.csv").touch()
    run, table, out = str(tmp_path), str(tmp_path / "a.csv"), str(tmp_path / "out")
    commands = {
        "demo": ["--out", out],
        "phantom": [out],
        "preprocess": ["--dicom", run, "--labels", table, "--out", out],
        "verify": [str(cache)],
        "inspect": [str(cache)],
        "plan": [str(cache), "--out", f"{out}.toml"],
        "train": ["--data", str(cache), "--run", out],
        "evaluate": [run],
        "compare": [run],
        "report": [run],
        "predict": [run, run, "--out", out],
        "serve": [run],
        "export": [run, "--out", f"{out}.onnx"],
        "score": [table, "--truth", table],
        "doctor": [],
        "submit": ["--address", "http://127.0.0.1:9", "--status", "job"],
    }
    assert sorted([*commands, "settings"]) == COMMANDS
    done = subprocess.run(
        [sys.executable, "-c", FIRST_LINES], capture_output=True, text=True, check=True,
        input=json.dumps([[name, *words] for name, words in commands.items()]),
    )  # fmt: skip
    lines = dict(zip(commands, json.loads(done.stdout), strict=True))
    assert [name for name, line in lines.items() if not line or line[0].startswith(("error", "Usage"))] == []
    assert lines["verify"] == [f"checks {cache}"]


def test_a_locale_without_some_characters_gets_others_instead() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ptxdist", "settings"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "?" in done.stdout
