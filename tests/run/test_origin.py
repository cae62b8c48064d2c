"""`model.init`: a whole network goes on, what does not fit is named, and the record says what is known of it."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny_caches import make_cache
from tiny_encoder import TINY

from ptxdist import files
from ptxdist.config import Settings
from ptxdist.errors import CheckpointError, PtxdistError, RunError
from ptxdist.events import Event, Message
from ptxdist.predict.bundle import load_model, write_bundle
from ptxdist.records import Origin
from ptxdist.report import model_card
from ptxdist.resolve import load_settings
from ptxdist.run.origin import load_init
from ptxdist.run.pipeline import run_pipeline, train
from ptxdist.run.plan import plan_run
from ptxdist.rundir import read_origin, read_result
from ptxdist.train.encoders import ENCODERS, read_weights
from ptxdist.train.unet import build_unet


@pytest.fixture(scope="module", autouse=True)
def _encoders() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("small", "other"):
            patch.setitem(ENCODERS, name, TINY)
        yield


def settings(cache: Path, *more: str) -> Settings:
    return load_settings(
        "smoke",
        assignments=[
            "model.encoder=small", "model.decoder_channels=[8, 8, 4, 4, 4]", "train.device=cpu",
            "train.precision=fp32", "stages.1.size_px=32", "stages.2.size_px=64", "stages.*.epochs=1",
            "stages.*.batch_size=2", "stages.1.learning_rate=1e-9", *more,
        ],
        options={"data.cache": str(cache)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a salt, and `base`, a run on it with its bundle base.ptxdist and its weights base.pt."""
    folder = tmp_path_factory.mktemp("origin")
    cache = make_cache(folder / "cache")
    (cache / "salt").write_bytes(b"1" * 32)
    result = train(settings(cache), folder / "base")
    write_bundle(folder / "base", folder / "base.ptxdist")
    torch.save(dict(read_weights(folder / "base" / result.stages[-1].weights)), folder / "base.pt")
    return folder


def planned(folder: Path, init: Path | str, *more: str, cache: Path | None = None) -> Any:
    made = settings(cache or folder / "cache", f"model.init={init}", *more)
    return plan_run(made, folder / "not made", writes=False)


def test_a_run_without_init_records_its_training_images(folder: Path) -> None:
    origin = read_origin(folder / "base")
    assert origin is not None
    assert origin.profile is not None
    assert (origin.profile.images, origin.profile.positives) == (6, 3)
    assert origin == Origin(images=6, positives=3, profile=origin.profile)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("base", ("run", "smoke", 6, 0, "patient")),
        ("base.ptxdist", ("bundle", "smoke", 6, None, None)),
        ("base.pt", ("file", None, None, None, None)),
    ],
)
def test_the_whole_network_is_loaded_and_what_is_known_of_it_recorded(
    folder: Path, source: str, expected: tuple[object, ...]
) -> None:
    parent = planned(folder, folder / source).origin.parent
    assert (parent.kind, parent.name, parent.images, parent.seen, parent.seen_by) == expected
    last = read_result(folder / "base").stages[-1]
    assert parent.weights_sha256 == (files.sha256(folder / source) if source == "base.pt" else last.weights_sha256)
    assert parent.fingerprint == (None if source == "base.pt" else last.fingerprint)
    network = build_unet(settings(folder / "cache").pipeline.model)
    load_init(network, str(folder / source), parent.weights_sha256)
    weights = read_weights(folder / "base" / last.weights)
    assert all(value.equal(weights[name]) for name, value in network.state_dict().items())


def test_a_first_stage_goes_on_from_it_and_the_cards_say_so(folder: Path, tmp_path: Path) -> None:
    said: list[Event] = []
    run, init = tmp_path / "tuned", folder / "base.ptxdist"
    more = ("model.encoder_weights=/nowhere/which/is/not/read", "model.image_head=true")
    train(settings(folder / "cache", f"model.init={init}", *more), run, on_event=said.append)

    before = read_weights(folder / "base" / read_result(folder / "base").stages[-1].weights)
    first = read_weights(run / read_result(run).stages[0].weights)
    assert (first["decoder.0.conv1.weight"] - before["decoder.0.conv1.weight"]).abs().max() < 1e-7
    origin, words = read_origin(run), "The whole network started from the bundle smoke: weights sha256"
    assert any(isinstance(event, Message) and words in event.text for event in said)
    page = (run / "report" / "index.html").read_text()
    assert words in page
    assert "It had no image head; that started from random weights." in page
    assert "trained on held-out patients is not known" in page
    write_bundle(run, tmp_path / "tuned.ptxdist")
    with zipfile.ZipFile(tmp_path / "tuned.ptxdist") as archive:
        readme, card = archive.read("README.md").decode(), archive.read("card.json").decode()
    assert words in readme
    assert str(folder) not in readme + card + page
    assert "/nowhere" not in readme + card + page
    assert json.loads(card)["training_images"] == 6
    assert origin is not None
    assert load_model(tmp_path / "tuned.ptxdist")[0].made_from == origin.parent
    again = planned(folder, run).origin.parent
    assert (again.unused, again.parent) == (("image head",), origin.parent)


def test_the_fingerprint_is_of_the_weights_not_of_the_path_or_kind(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "base.ptxdist", tmp_path / "renamed.ptxdist")
    fingerprints = [planned(folder, init).fingerprints for init in (folder / "base", tmp_path / "renamed.ptxdist")]
    assert fingerprints[0] == fingerprints[1]
    assert fingerprints[0] == planned(folder, folder / "base", "model.encoder_weights=imagenet").fingerprints
    assert not {*fingerprints[0]} & {*plan_run(settings(folder / "cache"), folder / "x", writes=False).fingerprints}


def test_held_out_patients_and_images_that_were_trained_on_are_counted(folder: Path, tmp_path: Path) -> None:
    parent = planned(folder, folder / "base", "fold=1").origin.parent
    assert parent.seen == 6
    assert list(model_card._seen(parent)) == [
        "6 held-out images are of patients on which the model that the network started from was trained: the scores "
        "are too high."
    ]
    other = tmp_path / "other"  # a copy, whose salt is another one
    shutil.copytree(folder / "cache", other)
    (other / "salt").write_bytes(b"2" * 32)
    found = planned(folder, folder / "base", "fold=1", cache=other).origin.parent
    assert (found.seen, found.seen_by) == (6, "image")


@pytest.mark.parametrize(
    ("init", "more", "message"),
    [
        ("nothing", (), r"no model at .*nothing: give a run, a bundle or a file with weights of the whole network"),
        ("cache", (), r"is not a run folder"),
        ("base", ("model.encoder=other",), r"base has other settings: model.encoder small \(here other\); give"),
        ("base.ptxdist", ("model.decoder_channels=[8, 8, 8, 4, 4]",), r"other settings: model.decoder_channels \(8, "),
        ("base.pt", ("model.input_mapping=learned",), r"2 missing: input.bias, input.weight; compare model.encoder"),
        ("base.pt", ("model.decoder_channels=[8, 8, 8, 4, 4]",), r"of another shape: decoder.2.bn1.bias"),
        ("base/settings.json", (), r"cannot be read as weights"),
    ],
)
def test_what_does_not_fit_is_named(folder: Path, init: str, more: tuple[str, ...], message: str) -> None:
    with pytest.raises((CheckpointError, RunError), match=message):
        planned(folder, folder / init, *more)


def test_weights_that_change_after_the_plan_are_refused(folder: Path, tmp_path: Path) -> None:
    state = torch.load(folder / "base.pt", weights_only=True)
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    plan = plan_run(settings(folder / "cache", f"model.init={tmp_path / 'w.safetensors'}"), tmp_path / "run")
    state["head.bias"] += 1
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(PtxdistError, match="was altered since this training began"):
        run_pipeline(plan)
