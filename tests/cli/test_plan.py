"""The command `plan`, on a tiny cache and this machine: its file trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_caches import make_cache
from tiny_encoder import TINY

from ptxdist.cli import cli
from ptxdist.run import advice, timing
from ptxdist.run.advice import Machine
from ptxdist.train import encoders

MEASURED = "# Measured here"


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores and no weights, whatever this machine is; an encoder that trains in milliseconds, on few phantoms."""
    monkeypatch.setattr(timing, "this_machine", lambda: Machine(2, 8.0, (), False, ()))
    monkeypatch.setitem(encoders.ENCODERS, "resnet18", TINY)
    monkeypatch.setattr(advice, "_FIRST_EPOCHS", (1, 2))
    monkeypatch.setattr(advice, "_PHANTOMS", 16)


def plan(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["plan", *map(str, arguments)])


def test_a_plan_is_written_twice_alike_and_trains(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.toml"
    done = plan(cache, "--out", out)
    assert done.exit_code == 0, done.output
    assert f"ptxdist train --pipeline {out} --data {cache}" in done.stderr
    assert "only 3 positive cases" in done.stderr
    first = out.read_text().splitlines()
    done = plan(cache, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    second = out.read_text().splitlines()
    assert sum(line.startswith(MEASURED) for line in first) == 2  # phantoms, and the cases
    assert [a for a in first if not a.startswith(MEASURED)] == [b for b in second if not b.startswith(MEASURED)]
    content = json.loads(done.stdout)
    assert (content["data"]["cases"], content["machine"]["cores"], content["plan"]) == (10, 2, str(out))
    assert {item["key"]: item["value"] for item in content["decisions"]}["stages.1.size_px"] == 64
    assert content["estimate"]["stages"][0]["train_images_s"] > 0
    command = [*content["next"].split()[1:], "--run", str(tmp_path / "run"), "--without-ray"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output


def test_a_file_that_is_no_plan_is_kept(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.toml"
    out.write_text("# my pipeline\n")
    done = plan(cache, "--out", out)
    assert (done.exit_code, out.read_text()) == (3, "# my pipeline\n")
    assert "give another name with --out" in done.stderr
    for name, words in (("plan.txt", "named *.toml"), ("my plan.toml", "use only letters, digits")):
        done = plan(cache, "--out", tmp_path / name)
        assert (done.exit_code, words in done.stderr) == (3, True)


def test_caches_that_cannot_be_planned_for(tmp_path: Path) -> None:
    done = plan(tmp_path, "--out", tmp_path / "plan.toml")
    assert (done.exit_code, "is a folder and not a cache of" in done.stderr) == (7, True)
    done = plan(make_cache(tmp_path / "cache", val=0), "--out", tmp_path / "plan.toml")
    assert (done.exit_code, "one side of the split" in done.stderr) == (7, True)
    assert not (tmp_path / "plan.toml").exists()
