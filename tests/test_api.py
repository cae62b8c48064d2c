"""The Python API: importing it is light, its names and parameters are those of the commands, its examples run."""

from __future__ import annotations

import doctest
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from tiny_encoder import TINY

import ptxdist
from ptxdist import api, locks
from ptxdist.cli import cli
from ptxdist.errors import BusyError, CatalogError, LabelError, PtxdistError, RunError, SettingsError, StoreError
from ptxdist.predict import predictor
from ptxdist.run import advice, timing
from ptxdist.run.advice import Machine
from ptxdist.rundir import LOCK, SETTINGS
from ptxdist.train import encoders

FUNCTIONS = sorted(set(ptxdist.__all__) - {"__version__", "Prediction", "Predictor"})
# Options that have no meaning in Python, or another form; and parameters that commands do not have.
ONLY_OPTIONS = {"json", "markdown", "address", "without_ray", "dry_run"}
ONLY_PARAMETERS = {"quiet", "on_event"}


def test_importing_the_package_loads_nothing_heavy_and_functions_stay_functions() -> None:
    code = (
        "import sys, ptxdist\n"
        "assert not {'torch', 'numpy', 'ray', 'pydantic', 'rich'} & set(sys.modules), 'heavy'\n"
        "from ptxdist.train.losses import __doc__\n"
        "from ptxdist.report.report import write_report\n"
        "for name in ('train', 'report'):\n"
        "    assert getattr(ptxdist, name).__module__ == 'ptxdist.api'\n"
        "from ptxdist import train\n"
        "assert train is ptxdist.train\n"
        "loaded = 'torch' in sys.modules\n"
        "assert not loaded, 'the functions load torch when they are called'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(set(ptxdist.__all__) - {"__version__"}))
def test_every_name_is_documented(name: str) -> None:
    documentation = getattr(ptxdist, name).__doc__ or ""
    assert documentation.strip()
    assert name == "Prediction" or ">>> " in documentation
    assert name in dir(ptxdist)
    assert name in (ptxdist.__doc__ or "")


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fly'"):
        _ = ptxdist.fly


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parameters_and_their_defaults_are_those_of_the_command(name: str) -> None:
    parameters = inspect.signature(getattr(ptxdist, name)).parameters
    command = cli.commands[name]  # type: ignore[attr-defined]
    options = {
        option.opts[0].removeprefix("--").replace("-", "_"): option
        for option in command.params
        if isinstance(option, click.Option)
    }
    wanted = options.keys() - ONLY_OPTIONS
    arguments = [argument for argument in command.params if isinstance(argument, click.Argument)]
    assert wanted <= parameters.keys()
    assert len(parameters.keys() - wanted - ONLY_PARAMETERS) == len(arguments)
    for key in wanted - {"workers"}:  # which the command takes from the number of cores
        default, given = parameters[key].default, options[key].default
        if isinstance(given, bool | int | float | str | tuple):
            assert default == (Path(given) if isinstance(default, Path) else given), key


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "this_machine", lambda: Machine(2, 8.0, (), False, ()))
    monkeypatch.setattr(timing, "_STEPS", {"cpu": (0, 1)})
    monkeypatch.setattr(advice, "_PHANTOMS", 16)
    monkeypatch.setitem(encoders.ENCODERS, "resnet18", TINY)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"ptxdist": ptxdist, "Path": Path, "np": np}
    parsed = []
    for module in (api, predictor):
        for test in doctest.DocTestFinder(exclude_empty=True).find(module, globs={}):
            parsed.append((module is predictor, test.lineno or 0, test))
    runner, said = doctest.DocTestRunner(optionflags=doctest.REPORT_ONLY_FIRST_FAILURE), list[str]()
    for _, _, test in sorted(parsed, key=lambda item: item[:2]):
        test.globs = names
        runner.run(test, clear_globs=False, out=said.append)
        assert not runner.failures, "".join(said)
    assert runner.tries >= 2 * len(FUNCTIONS)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ptxdist.phantom("x", cases=-1), SettingsError, "cases"),
        (lambda: ptxdist.preprocess("none", "t.csv", "c"), (CatalogError, LabelError), ""),
        (lambda: ptxdist.preprocess("x", "t.csv", "c", unlisted="no"), SettingsError, "unlisted='no'"),  # type: ignore[arg-type]
        (lambda: ptxdist.plan("none"), StoreError, "none"),
        (lambda: ptxdist.train("none", pipeline="smoke"), StoreError, "none"),
        (lambda: ptxdist.train(pipeline="smoek"), SettingsError, "did you mean 'smoke'"),
        (lambda: ptxdist.train(pipeline="smoke", set={"train.devcie": "cpu"}), SettingsError, "'device'"),
        (lambda: ptxdist.train(pipeline="smoke", fold="al"), SettingsError, "fold"),  # type: ignore[arg-type]
        (lambda: ptxdist.evaluate([]), RunError, "no model to evaluate"),
        (lambda: ptxdist.evaluate("none"), RunError, "none"),
        (lambda: ptxdist.evaluate("none", data="other"), RunError, "--out"),
        (lambda: ptxdist.evaluate("none", prevalence=0.1), SettingsError, "--prevalence"),
        (lambda: ptxdist.compare(["none"]), RunError, "none"),
        (lambda: ptxdist.score("none.csv", "none.csv"), LabelError, "none.csv"),
        (lambda: ptxdist.report("none"), RunError, "none"),
    ],
)
def test_errors_are_those_of_the_commands(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[[], object],
    error: type[PtxdistError],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_without_quiet_progress_is_printed_and_with_it_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ptxdist.phantom(tmp_path / "loud", cases=1)
    assert "images: 1 of 1" in capsys.readouterr().err
    ptxdist.phantom(tmp_path / "still", cases=1, quiet=True)
    assert capsys.readouterr() == ("", "")


def test_a_run_that_is_trained_is_not_evaluated_into(tmp_path: Path) -> None:
    (tmp_path / SETTINGS).touch()
    with locks.only(tmp_path / LOCK), pytest.raises(BusyError, match="give another --out"):
        ptxdist.evaluate(tmp_path)
    with pytest.raises(PtxdistError) as caught:  # past the lock, and refused for what the file holds
        ptxdist.evaluate(tmp_path)
    assert not isinstance(caught.value, BusyError)
