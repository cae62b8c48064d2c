"""A bundle predicts what its run predicts; foreign, damaged and altered files are rejected."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import resource
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ptxdist.config import fingerprint
from ptxdist.errors import CheckpointError, RunError
from ptxdist.predict.bundle import CARD, README, WEIGHTS, load_model, read_members, write_bundle


@pytest.fixture(scope="module")
def bundle(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "model.ptxdist"
    write_bundle(finished_run, path)
    return path


def altered(bundle: Path, out: Path, **members: bytes) -> Path:
    """A copy with other contents; names by the part before the dot."""
    with zipfile.ZipFile(bundle) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, members.get(name.split(".")[0], old.read(name)))
    return out


def test_a_bundle_holds_the_runs_model_and_is_the_same_each_time(
    finished_run: Path, bundle: Path, tmp_path: Path
) -> None:
    (card, model), (again, same) = load_model(finished_run), load_model(bundle)
    assert card == again
    assert all(torch.equal(value, same.state_dict()[key]) for key, value in model.state_dict().items())
    first, second = (write_bundle(finished_run, tmp_path / name) for name in ("a", "b"))
    assert first == second
    with zipfile.ZipFile(bundle) as archive:
        assert card.weights_sha256 in archive.read(README).decode()
        assert str(finished_run) not in archive.read(CARD).decode()


def test_what_is_altered_is_named(bundle: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(bundle) as archive:
        card, weights = json.loads(archive.read(CARD)), bytearray(archive.read(WEIGHTS))
    card["operating_point"]["top"] = 0.01
    weights[-1] ^= 1
    for members, words in (
        ({"card": json.dumps(card).encode()}, "wrong checksum of card.json"),
        ({"weights": bytes(weights)}, "wrong checksum of weights.safetensors"),
        ({"README": b"trust me"}, "wrong checksum of README.md"),
        ({"card": b"{}"}, "cannot be read"),
        ({"card": b"[" * 100_000}, "cannot be read"),
        ({"card": b"\xff"}, "cannot be read"),
    ):
        with pytest.raises(CheckpointError, match=words):
            read_members(altered(bundle, tmp_path / "altered", **members))


def test_what_is_no_bundle_is_refused(bundle: Path, finished_run: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.ptxdist"
    text.write_text("hello")
    cut = tmp_path / "cut.ptxdist"
    cut.write_bytes(bundle.read_bytes()[:1000])
    other = tmp_path / "other.ptxdist"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("data.pkl", b"cos\nsystem\n")
    weights = finished_run / "stages" / "2-96px" / "best.safetensors"
    for version, words in (
        ("ptxdist bundle 9", "does not fit this version"),
        ("ptxdist bundle 1", "of transform 99"),
    ):
        with zipfile.ZipFile(bundle) as archive:
            card = json.loads(archive.read(CARD))
        card |= {"format": version, "preprocessing": 99}
        card["sha256"][CARD] = fingerprint({key: value for key, value in card.items() if key != "sha256"})
        with pytest.raises(CheckpointError, match=words):
            load_model(altered(bundle, tmp_path / "version", card=json.dumps(card).encode()))
    for path in (text, cut, other, weights):
        with pytest.raises(CheckpointError, match="not a bundle"):
            load_model(path)
    with pytest.raises(RunError, match="no model at"):
        load_model(tmp_path / "nowhere")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.write_text, (self.path, "code was run")


def forged(bundle: Path, out: Path, weights: bytes, changes: dict[str, Any] | None = None) -> Path:
    """A copy with other weights and settings whose checksums are all right, as somebody makes who means harm."""
    with zipfile.ZipFile(bundle) as archive:
        card = json.loads(archive.read(CARD))
    for place, value in (changes or {}).items():
        *groups, name = place.split(".")
        inner = card
        for group in groups:
            inner = inner[int(group) if group.isdecimal() else group]
        inner[name] = value
    card["weights_sha256"] = card["sha256"][WEIGHTS] = hashlib.sha256(weights).hexdigest()
    card["sha256"][CARD] = fingerprint({key: value for key, value in card.items() if key != "sha256"})
    return altered(bundle, out, card=json.dumps(card).encode(), weights=weights)


ABSURD = (
    ({"size_px": 33}, "size_px"),
    ({"size_px": 0}, "size_px"),
    ({"size_px": -32}, "size_px"),
    ({"size_px": 2**31}, "size_px"),
    ({"size_px": 64}, "another size in its last stage"),
    ({"precision": "int3"}, "precision"),
    ({"operating_point": {"top": 1.5, "min_area_px": 0, "bottom": 0.5}}, "operating_point.top"),
    ({"operating_point": {"top": 0.5, "min_area_px": -1, "bottom": 0.5}}, "operating_point.min_area_px"),
    ({"operating_point": {"top": 0.5, "min_area_px": 0, "bottom": float("nan")}}, "cannot be read"),
    ({"pipeline.model.decoder_channels": [60000] * 5}, "decoder_channels"),
    ({"pipeline.model.decoder_channels": [0, 8, 8, 8, 8]}, "decoder_channels"),
    ({"pipeline.model.decoder_channels": [-1, 8, 8, 8, 8]}, "decoder_channels"),
    ({"pipeline.model.decoder_channels": [1024] * 5}, "does not fit the model of these settings"),
    ({"pipeline.model.encoder": "nobody"}, "nobody"),
    ({"pipeline.model.encoder": "timm/vit_giant_patch14_dinov2"}, "vit_giant"),
    ({"pipeline.stages.0.size_px": 10**6}, "size_px"),
    ({"pipeline.stages.0.batch_size": 10**12}, "batch_size"),
    ({"pipeline.model": [[]]}, "pipeline.model"),
    ({"evaluation.threshold": 7}, "evaluation.threshold"),
    ({"profile.likeness": {"ranges": {"size": [9, 9, 10, 10]}, "layout": "00" * 256}}, "profile.likeness.ranges"),
    ({"profile.likeness": {"ranges": {}, "layout": "00" * 255}}, "profile.likeness"),
    ({"profile.images": 0}, "profile.images"),
    ({"profile.images": 10**400}, "profile.images"),
    ({"profile.positives": 10**9}, "more positives"),
    ({"profile.side_px": [9.0]}, "not five percentiles"),
    ({"profile.positives": 0, "profile.mask_share": [0.1] * 5}, "areas of masks without a positive image"),
    ({"profile.brightness": [1e300] * 5}, "profile.brightness"),
    ({"profile.views": {"\x1b[31m": 1}}, "profile.views"),
)  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), ABSURD, ids=lambda value: str(value)[:40])
def test_absurd_settings_with_right_checksums_are_refused_before_memory_is_taken(
    bundle: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    path, before = forged(bundle, tmp_path / "absurd", safetensors.torch.save({}), changes), peak_memory()
    with pytest.raises(CheckpointError, match=words) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 9
    assert peak_memory() - before < 2**28


def peak_memory() -> int:
    """The most bytes that this process has had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_loading_runs_no_code(bundle: Path, tmp_path: Path) -> None:
    trace, file = tmp_path / "trace", io.BytesIO()
    torch.save(Bomb(trace), file)
    for content in (pickle.dumps(Bomb(trace)), file.getvalue()):
        with pytest.raises(CheckpointError, match="weights are damaged"):
            load_model(forged(bundle, tmp_path / "forged", content))
        assert not trace.exists()
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists(), "it is dangerous where it is unpickled"


def test_forged_weights_have_to_fit_the_model(bundle: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(bundle) as archive:
        state = safetensors.torch.load(archive.read(WEIGHTS))
    assert load_model(forged(bundle, tmp_path / "same", safetensors.torch.save(state)))[0].size_px == 96
    for changed, words in (
        ({key: value for key, value in state.items() if key != "head.bias"}, "head.bias is missing"),
        (state | {"extra": torch.zeros(1)}, "extra is not known"),
        (state | {"head.bias": torch.zeros(2)}, "head.bias has shape"),
        (state | {"head.bias": torch.zeros(1, dtype=torch.int64)}, "head.bias has values of torch.int64"),
        (state | {"head.bias": torch.tensor([float("nan")])}, "has values that are no numbers, in head.bias"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load_model(forged(bundle, tmp_path / "forged", safetensors.torch.save(changed)))


def test_a_bundle_that_would_inflate_or_holds_more_is_refused(bundle: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(bundle) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for compressed, more in ((README, {}), ("", {"../../outside.py": b"import os"})):
        with zipfile.ZipFile(tmp_path / "more", "w") as archive:
            for name, value in (members | more).items():
                archive.writestr(name, value, zipfile.ZIP_DEFLATED if name == compressed else zipfile.ZIP_STORED)
        with pytest.raises(CheckpointError, match="it should hold"):
            load_model(tmp_path / "more")
    assert {path.name for path in tmp_path.iterdir()} == {"more"}
