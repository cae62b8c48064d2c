"""What users and their files depend on is as it was in 0.1.0; caches and runs of that version are used as they are.

`tests/goldens/facts.py` made the files compared here, with the code of 0.1.0 and through the command line only.
"""

from __future__ import annotations

import copy
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from goldens import facts

from ptxdist.config import ModelSettings, StageSettings, TrainSettings, complete, snapshot

GOLDEN = json.loads(facts.GOLDEN.read_text())
ADDED_OPTIONS = {
    "phantom": ["--bedside"],
    "preprocess": ["--patient-key", "--match", "--finding", "--unlisted", "--replace"],
    "train": ["--init", "--no-reuse"],
    "evaluate": ["--data", "--split", "--sensitivity", "--specificity", "--prevalence", "--workers"],
    "export": ["--point", "--at"],
    "predict": ["--at", "--keep-names"],
    "serve": ["--at"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache and run, made by the present code."""
    folder = tmp_path_factory.mktemp("goldens")
    facts.make_data(folder)
    return folder


@pytest.fixture(scope="module")
def files(data: Path) -> dict[str, Any]:
    return facts.files_of(data)


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder with `cache` and `run` as 0.1.0 wrote them, and in it the process, as its settings name `cache`."""
    with tarfile.open(facts.ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("name", GOLDEN["command_line"])
def test_commands_options_and_defaults(name: str) -> None:
    """Options that were added since are left out."""
    added = ADDED_OPTIONS.get(name, [])
    found = [option for option in facts.command_line()[name] if not {*option["names"]} & {*added}]
    assert found == GOLDEN["command_line"][name]


def test_no_command_is_gone() -> None:
    """`plan`, `score` and `settings` were added after 0.1.0."""
    assert facts.command_line().keys() == {*GOLDEN["command_line"], "plan", "score", "settings"}


@pytest.mark.parametrize("name", ["settings", "manifest", "run", "cache", "tensorboard"])
def test_what_is_written(files: dict[str, Any], name: str) -> None:
    """Added after 0.1.0: what a network is made from, fingerprints of its training images, checksums of settings."""
    if name == "settings":
        assert list(files[name].pop("sha256")) == ["settings.json"]
    added = ["origin.json", "training-images.csv"] if name == "run" else []
    assert files[name] == (sorted([*GOLDEN["files"][name], *added]) if added else GOLDEN["files"][name])


def test_fingerprints(files: dict[str, Any]) -> None:
    """The second stage has `dice = "batch"`: since validation reports that Dice, its fingerprint is another one."""
    found, recorded = files["fingerprints"], GOLDEN["files"]["fingerprints"]
    assert [new == old for new, old in zip(found, recorded, strict=True)] == [True, False]


def test_training_at_a_fixed_seed(files: dict[str, Any]) -> None:
    """Equal to the bit on the kind of machine where it was recorded, close on another.

    But for the last validation loss, of a stage with `dice = "batch"`: 0.1.0 reported the Dice per image there.
    """
    found, recorded = copy.deepcopy((files["training"], GOLDEN["files"]["training"]))
    assert found["losses"][-1].pop() != pytest.approx(recorded["losses"][-1].pop(), abs=1e-6)
    if found["machine"] == recorded["machine"]:
        assert found == recorded
    for loss, before in zip(found["losses"], recorded["losses"], strict=True):
        assert loss == [value and pytest.approx(value, rel=0.02) for value in before]


def test_keys_of_every_json(data: Path) -> None:
    """As in 0.1.0, but the calibration error has no interval.

    Added since are the ROC curve and the calibration of an evaluation, what the masks of a cache show, images without
    a patient, the mark of phantoms, images that are unlike the training images or flagged, settings, which `--dry-run`
    shows, and the point in use of a comparison, with the scores at the stage's threshold.
    """
    added = {
        f"{place}{name}"
        for place, section in (
            ("train.", TrainSettings()),
            ("pipeline.model.", ModelSettings()),
            ("pipeline.stages[].", StageSettings(size_px=32, epochs=1, batch_size=1)),
        )
        for name in {*complete(section)} - {*snapshot(section)}
    }
    golden = {
        name: [key for key in keys if not key.endswith("calibration[].interval[]")]
        for name, keys in GOLDEN["json"].items()
    }
    for name in ("preprocess", "inspect cache"):
        golden[name] = sorted([*golden[name], "finding", "reconciliation.without_patient", "synthetic"])
    golden["predict"] = sorted([*golden["predict"], "caution", "flagged", "page", "unlike"])
    own = [key.replace("scores", "at_threshold") for key in golden["compare"] if key.startswith("runs[].scores.")]
    golden["compare"] = sorted([*golden["compare"], *own, "runs[].point"])
    for name, place in (("evaluate", ""), ("train", "evaluation."), ("inspect run", "evaluation.")):
        golden[name] = sorted([*golden[name], *(place + key for key in ("platt.intercept", "platt.slope", "roc[][]"))])
    wanted = {**golden, "train --dry-run": sorted({*GOLDEN["json"]["train --dry-run"], *added})}
    assert facts.printed_keys(data) == wanted


def test_a_run_of_the_former_version_gives_the_same_bundle(old: Path) -> None:
    assert facts.bundle_sha256(old / "run", old / "golden.ptxdist") == GOLDEN["bundle_sha256"]


def test_a_cache_and_a_run_of_the_former_version_are_used_as_they_are(old: Path) -> None:
    assert "no damage" in facts.run("verify", "cache", "--workers", 1)
    before = json.loads((old / "run/evaluation/result.json").read_text())["scores"]
    weights = {path: path.stat().st_mtime_ns for path in (old / "run").rglob("best.safetensors")}
    again = json.loads(facts.run("evaluate", old / "run", "--json"))
    assert again["scores"] == pytest.approx(before)
    with pytest.raises(
        AssertionError, match=r"stage 2 of .* was trained .* by another version of ptxdist; give another"
    ):
        facts.run(*facts.train_words(old))
    assert {path: path.stat().st_mtime_ns for path in weights} == weights, "no finished stage is trained again"
    assert Path(json.loads(facts.run("report", old / "run", "--json"))["report"]).is_file()
    assert facts.run("compare", old / "run", old / "run", "--markdown").count("| run |") == 2


def test_a_run_beside_one_of_the_former_version_uses_its_stages(old: Path) -> None:
    """But not the stage whose `dice = "batch"` 0.1.0 did not validate with."""
    words = [old / "beside" if word == old / "run" else word for word in facts.train_words(old)]
    again = json.loads(facts.run(*words, "--json"))
    assert [stage["reused_from"] for stage in again["stages"]] == ["run", None]
