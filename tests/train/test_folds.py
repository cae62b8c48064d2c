"""`train --fold all` as a user types it: one run a fold, and every case held out once."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ptxdist.cache.catalog import FILE_NAME, read_catalog, write_catalog
from ptxdist.cache.store import shard_path, store_path
from ptxdist.cli import cli
from ptxdist.rundir import CASES, read_result, read_settings

PIPELINE = """
purpose = "a test"
[model]
encoder = "small"
encoder_weights = "none"
[[stages]]
size_px = 32
epochs = 1
batch_size = 8
"""


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(folds: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("folds")
    (folder / "tiny.toml").write_text(PIPELINE)
    done = call(
        "train", "--without-ray", "--workers", 1, "--pipeline", folder / "tiny.toml", "--data", folds,
        "--run", folder / "run", "--fold", "all", "--set", "train.device=cpu", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder / "run", done


def test_every_case_is_held_out_once(folds: Path, trained: tuple[Path, Result]) -> None:
    run, done = trained
    pooled = json.loads(done.stdout)
    assert (pooled["runs"], pooled["folds"], pooled["scores"]["cases"]) == (2, [0, 1], 40)
    found = []
    for fold in (0, 1):
        assert read_settings(run / f"fold-{fold}").pipeline.fold == fold
        with open(run / f"fold-{fold}" / "evaluation" / CASES, newline="") as file:
            rows = list(csv.DictReader(file))
        assert {row["fold"] for row in rows} == {str(fold)}
        found += [row["case_id"] for row in rows]
    assert len(found) == len(set(found)) == 40
    first, second = (read_result(run / f"fold-{fold}").stages[0] for fold in (0, 1))
    assert first.fingerprint != second.fingerprint
    assert second.reused_from is None


def name_cache(run: Path, cache: Path) -> None:
    """Let the settings of a run name another cache."""
    settings = json.loads((run / "settings.json").read_text())
    settings["data"]["cache"] = str(cache)
    del settings["sha256"]
    (run / "settings.json").write_text(json.dumps(settings))


def test_the_report_of_a_fold_tells_who_trained_and_who_was_held_out(
    folds: Path, trained: tuple[Path, Result], tmp_path: Path
) -> None:
    cache, run = Path(shutil.copytree(folds, tmp_path / "cache")), tmp_path / "run"
    shutil.copytree(trained[0] / "fold-1", run)
    name_cache(run, cache)
    catalog = read_catalog(cache)
    cases = tuple(replace(case, view="LL" if case.fold == 1 else "PA") for case in catalog.cases)
    write_catalog(replace(catalog, cases=cases), cache / FILE_NAME)
    assert call("report", run).exit_code == 0
    page = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert re.search(r">view LL</th><td>0 \(0\.0\s%\)</td><td>20 \(100\.0\s%\)</td>", page)


def test_evaluations_that_would_be_lost_or_overwritten_are_refused(trained: tuple[Path, Result]) -> None:
    run, _ = trained
    first, second = run / "fold-0", run / "fold-1"
    assert "--out" in call("evaluate", first, second).stderr
    before = (first / "result.json").read_bytes()
    done = call("evaluate", first, second, "--out", first)
    assert (done.exit_code, "is a run" in done.stderr) == (8, True)
    assert (first / "result.json").read_bytes() == before
    unfinished = call("evaluate", run)
    assert unfinished.exit_code == 8
    report = call("report", run / "out-of-fold")
    assert (report.exit_code, "is an evaluation; give a run" in report.stderr) == (8, True)


def test_a_comparison_tells_runs_of_one_name_apart(trained: tuple[Path, Result], tmp_path: Path) -> None:
    run, _ = trained
    other = tmp_path / "other" / "fold-0"
    shutil.copytree(run / "fold-0" / "evaluation", other / "evaluation")
    names = [item["run"] for item in json.loads(call("compare", run / "fold-0", other, "--json").stdout)["runs"]]
    assert names == ["run/fold-0", "other/fold-0"]
    text, markdown = call("compare", run / "fold-0", other).stdout, call("compare", run / "fold-0", other, "--markdown")
    for name in names:
        assert name in text
        assert f"\n| {name} | " in markdown.stdout


@pytest.fixture
def moved(folds: Path, trained: tuple[Path, Result], tmp_path: Path) -> tuple[Path, Path]:
    """A cache and a run of its fold 0, which a test may change."""
    cache, run = Path(shutil.copytree(folds, tmp_path / "cache")), tmp_path / "run"
    shutil.copytree(trained[0] / "fold-0", run)
    name_cache(run, cache)
    return cache, run


def test_no_run_is_scored_on_what_it_was_trained_on(moved: tuple[Path, Path]) -> None:
    """Two cases change sides, as with another patient map; one that cannot be read any more does no harm."""
    cache, run = moved
    catalog = read_catalog(cache)
    with_one_less = tuple(
        replace(case, split="rejected", fold=-1) if number == 0 else case for number, case in enumerate(catalog.cases)
    )
    assert catalog.cases[0].fold == 0
    write_catalog(replace(catalog, cases=with_one_less), cache / FILE_NAME)
    assert json.loads(call("evaluate", run, "--json").stdout)["scores"]["cases"] == 19
    split_anew = tuple(replace(case, fold=1 - case.fold) if case.fold >= 0 else case for case in with_one_less)
    write_catalog(replace(catalog, cases=(*split_anew[:6], *with_one_less[6:])), cache / FILE_NAME)
    before = (run / "result.json").read_bytes()
    for command in ("evaluate", "report"):
        done = call(command, run)
        assert done.exit_code == 8
        assert (
            "split differently after the run: 3 of the 19 images that it held out are training images now"
            in done.stderr
        )
    assert (run / "result.json").read_bytes() == before


def test_what_was_damaged_since_the_training_is_not_evaluated(moved: tuple[Path, Path]) -> None:
    cache, run = moved
    shard = shard_path(store_path(cache, 32), "image", 0)
    content = bytearray(shard.read_bytes())
    content[0] ^= 1
    shard.write_bytes(content)
    done = call("evaluate", run)
    assert done.exit_code == 7
    assert "has another checksum than when it was written (cases case-0); repair it with" in done.stderr


def test_folds_of_a_single_run_are_refused_where_they_cannot_be(
    folds: Path, trained: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "--without-ray", "--data", folds, "--pipeline", trained[0].parent / "tiny.toml"]
    done = call(*words, "--run", trained[0].parent / "other", "--workers", 1, "--fold", 2)
    assert (done.exit_code, "has folds 0 to 1" in done.stderr) == (3, True)
    assert call(*words, "--fold", "some").exit_code == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = call(*words, "--workers", 2, "--fold", "all")
    assert (done.exit_code, "one after the other" in done.stderr) == (3, True)
