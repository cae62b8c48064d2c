"""`ptxdist export`: a file gives the checkpoint's numbers without ptxdist, or it is not written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner, Result
from object_store import BUCKET, Proxy

import ptxdist
from ptxdist import Predictor
from ptxdist.cache.catalog import read_catalog
from ptxdist.cache.store import open_store
from ptxdist.cli import cli
from ptxdist.errors import CheckpointError, ExportError, RunError, SettingsError
from ptxdist.predict import export as exporting
from ptxdist.predict import parity
from ptxdist.predict.bundle import load_model, write_bundle
from ptxdist.predict.export import ABOUT, describe
from ptxdist.predict.parity import LIMIT, allowed_difference, comparison_images, largest_difference
from ptxdist.records import OperatingPoint
from ptxdist.storage.caches import working_cache

SIZE_PX = 96
ROOT = Path(__file__).parents[2]
WITHOUT_PTXDIST = "import sys; sys.modules['ptxdist'] = None\n"
Exported = tuple[Path, dict[str, Any]]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def export(model: Path, out: Path) -> Exported:
    done = invoke("export", model, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    assert list(out.parent.iterdir()) == [out], "nothing beside it"
    return out, json.loads(done.stdout)


@pytest.fixture(scope="module")
def onnx_file(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(finished_run, tmp_path_factory.mktemp("onnx") / "new" / "model.onnx")


@pytest.fixture(scope="module")
def pt2_file(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Made from a bundle, which has no cache."""
    folder = tmp_path_factory.mktemp("pt2")
    write_bundle(finished_run, folder / "model.ptxdist")
    return export(folder / "model.ptxdist", folder / "new" / "model.pt2")


@pytest.fixture(scope="module")
def predictor(finished_run: Path) -> Predictor:
    card, network = load_model(finished_run)
    return Predictor([card.model_copy(update={"precision": "fp32"})], [network], torch.device("cpu"))


@pytest.fixture(scope="module")
def limit(predictor: Predictor, images: np.ndarray) -> float:
    """After two epochs logits reach thousands, and rounding shows."""
    return allowed_difference(predictor, list(images[:, 0]))


@pytest.fixture(scope="module")
def images(small_dataset: Any) -> np.ndarray:
    """Six different images, uint8 (6, 1, 96, 96)."""
    return np.stack([image[None, :SIZE_PX, :SIZE_PX] for image in list(small_dataset.images.values())[:6]])


def expected(predictor: Predictor, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return predictor.probabilities(list(images[:, 0]), SIZE_PX, fewest=1)[0].numpy()[:, None]


def test_onnx_runtime_gives_the_checkpoints_numbers_for_any_batch(
    onnx_file: Exported, predictor: Predictor, images: np.ndarray, limit: float
) -> None:
    path, printed = onnx_file
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path)
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type, taken.shape) == ("image", "tensor(uint8)", ["batch", 1, SIZE_PX, SIZE_PX])
    assert (given.name, given.type, given.shape) == ("probability", "tensor(float)", ["batch", 1, SIZE_PX, SIZE_PX])
    whole = expected(predictor, images)
    assert np.ptp(whole) > 0.01, "there is something to compare"
    for batch in (1, 2, 6):
        (found,) = session.run(None, {"image": images[:batch]})
        assert found.shape == (batch, 1, SIZE_PX, SIZE_PX)
        assert found.dtype == np.float32
        assert np.abs(found - whole[:batch]).max() <= limit
    assert printed["difference"] <= printed["limit"]
    assert LIMIT <= printed["limit"] <= 0.011
    assert printed["images_from"] == "held-out images of the run's cache"
    assert printed["size_bytes"] == path.stat().st_size
    with pytest.raises(Exception, match="uint8"):  # one that was scaled to 0..1
        session.run(None, {"image": images.astype(np.float32) / 255})


def test_pt2_runs_in_a_process_of_its_own_with_torch_alone(
    pt2_file: Exported, predictor: Predictor, images: np.ndarray, limit: float, tmp_path: Path
) -> None:
    np.save(tmp_path / "images.npy", images)
    code = WITHOUT_PTXDIST + (
        "import numpy, torch\n"
        "files = {'ptxdist.json': ''}\n"
        "network = torch.export.load(sys.argv[1], extra_files=files).module()\n"
        "image = torch.from_numpy(numpy.load('images.npy'))\n"
        "found = [network(image[:batch]).numpy() for batch in (1, 2, 6)]\n"
        "numpy.savez('found.npz', *found)\n"
        "open('about.json', 'w').write(files['ptxdist.json'])\n"
        "assert 'torchvision' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, pt2_file[0]], cwd=tmp_path, check=True)
    whole, found = expected(predictor, images), np.load(tmp_path / "found.npz")
    for number, batch in enumerate((1, 2, 6)):
        assert found[f"arr_{number}"].shape == (batch, 1, SIZE_PX, SIZE_PX)
        assert np.abs(found[f"arr_{number}"] - whole[:batch]).max() <= limit
    assert json.loads((tmp_path / "about.json").read_text()) == describe(predictor.cards[0]) | {
        "card": load_model(pt2_file[0].parents[1] / "model.ptxdist")[0].model_dump(mode="json")
    }
    assert pt2_file[1]["images_from"] == "phantoms (a bundle has no images)"
    assert pt2_file[1]["difference"] <= pt2_file[1]["limit"]


def test_the_metadata_say_all_that_is_needed_and_name_no_file(
    onnx_file: Exported, pt2_file: Exported, finished_run: Path
) -> None:
    card, _ = load_model(finished_run)
    (entry,) = onnx.load(onnx_file[0]).metadata_props
    about = json.loads(entry.value)
    assert (entry.key, about) == (ABOUT, json.loads(json.dumps(describe(card))))
    assert about["operating_point"] == card.operating_point.model_dump()
    assert about["card"]["weights_sha256"] == card.weights_sha256
    assert about["flip_averaging_inside"] is card.flip_averaging is True
    assert "research use only" in about["use"]
    for path, _ in (onnx_file, pt2_file):
        content = path.read_bytes()
        for place in (Path(ptxdist.__file__).parent, Path(torch.__file__).parent, finished_run, Path.home()):
            assert str(place).encode() not in content or str(place) == "/"
        assert b"export.py" not in content


def test_without_flip_averaging_there_is_one_pass(predictor: Predictor, images: np.ndarray, limit: float) -> None:
    card = predictor.cards[0].model_copy(update={"flip_averaging": False})
    single = Predictor([card], predictor.models, torch.device("cpu"))
    content = exporting.encode(predictor.models[0], card, ".pt2")
    exported = exporting.load(content, ".pt2")
    assert largest_difference(single, exported, list(images[:, 0])) <= limit
    assert largest_difference(predictor, exported, list(images[:, 0])) > limit
    assert describe(card)["flip_averaging_inside"] is False


@pytest.mark.parametrize("smaller", [False, True])
def test_the_documented_lines_give_the_mask_without_ptxdist(
    onnx_file: Exported,
    predictor: Predictor,
    images: np.ndarray,
    limit: float,
    tmp_path: Path,
    write_dicom: Any,
    smaller: bool,
) -> None:
    """Of images that are not square, and larger or smaller than the network's size."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "predict.md").read_text(), re.DOTALL)
    (lines,) = (block for block in blocks if "onnxruntime" in block)
    point = OperatingPoint(top=0.6, min_area_px=20, bottom=0.4)
    proto = onnx.load(onnx_file[0])
    proto.metadata_props[0].value = json.dumps({"size_px": SIZE_PX, "operating_point": point.model_dump()})
    onnx.save(proto, tmp_path / "model.onnx")
    pixels = images[0, 0][::2, ::3] if smaller else np.repeat(np.repeat(images[0, 0], 2, axis=0), 3, axis=1)
    path = write_dicom(tmp_path / "image.dcm", pixels, "1.2.3", raw=True)
    code = WITHOUT_PTXDIST + lines + "np.savez('found.npz', whole=whole, mask=mask)\n"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    found = np.load(tmp_path / "found.npz")
    prediction = Predictor(predictor.cards, predictor.models, predictor.device, point).predict(path)
    assert found["whole"].shape == found["mask"].shape == pixels.shape
    assert np.abs(found["whole"] - prediction.probability).max() <= 2 * limit
    near = np.abs(prediction.probability - point.bottom) <= 2 * limit
    assert np.array_equal(found["mask"] | near, prediction.mask | near)
    assert smaller or 0 < np.count_nonzero(found["mask"] & ~near) < found["mask"].size


def test_a_cache_in_an_object_store_is_copied_to_compare_on(
    s3: Proxy, finished_run: Path, small_cache: tuple[Path, object], tmp_path: Path
) -> None:
    """Held-out images of the fold, equal to those of the local cache; if the store has none, the words say so."""
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}/cache"
    run = with_cache(finished_run, tmp_path / "run", url)
    images, origin = comparison_images(run, SIZE_PX)
    assert len(images) == 8
    assert origin.startswith(f"phantoms (the run's cache cannot be read: {url} is no")
    with working_cache(url) as folder:
        shutil.copytree(small_cache[0], folder, dirs_exist_ok=True)
    images, origin = comparison_images(run, SIZE_PX)
    assert origin == "held-out images of the run's cache"
    local, _ = comparison_images(finished_run, SIZE_PX)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in local]
    s3.requests.clear()
    comparison_images(run, SIZE_PX)
    assert not [path for _, path in s3.requests if ".zarr/" in path], "the copy on this node is used"


@pytest.mark.parametrize("fold", [0, 1])
def test_images_to_compare_on_are_held_out(fold: int, finished_run: Path, small_cache: Any, tmp_path: Path) -> None:
    run = with_cache(finished_run, tmp_path / "run", str(small_cache[0]), fold)
    images, origin = comparison_images(run, SIZE_PX)
    cases, store = read_catalog(small_cache[0]).labelled, open_store(small_cache[0], SIZE_PX)
    held_out = {store.sample(row)[0].tobytes() for row, case in enumerate(cases) if case.fold == fold}
    assert origin == "held-out images of the run's cache"
    assert {image.tobytes() for image in images} <= held_out
    assert len(images) == min(8, len(held_out))


def with_cache(run: Path, copy: Path, cache: str, fold: int = 0) -> Path:
    """A run with the files of this one, whose settings name this cache and this fold."""
    shutil.copytree(run, copy, copy_function=os.link)
    settings = json.loads((copy / "settings.json").read_text())
    (copy / "settings.json").unlink()
    settings["data"]["cache"], settings["pipeline"]["fold"] = cache, fold
    del settings["sha256"]
    (copy / "settings.json").write_text(json.dumps(settings))
    return copy


def test_what_differs_from_the_checkpoint_is_not_written(
    finished_run: Path, pt2_file: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = pt2_file[0].read_bytes()
    monkeypatch.setattr(exporting, "encode", lambda network, card, suffix: content)  # which takes seconds
    monkeypatch.setattr(parity, "LIMIT", -1.0)
    former = tmp_path / "model.pt2"
    former.write_text("the former one")
    done = invoke("export", finished_run, "--out", former)
    assert done.exit_code == ExportError.exit_code, done.output
    assert isinstance(done.exception, SystemExit)
    for words in ("differ by", "nothing was written", "held-out images"):
        assert words in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    assert former.read_text() == "the former one"


def test_another_network_and_not_a_number_are_seen(
    predictor: Predictor, images: np.ndarray, limit: float, finished_run: Path, pt2_file: Exported
) -> None:
    def shifted(offset: float) -> Callable[[np.ndarray], tuple[np.ndarray]]:
        def same(image: np.ndarray) -> tuple[np.ndarray]:
            found = expected(predictor, image)
            found[-1, 0, 3, 5] += offset  # one pixel of the last image of each batch
            return (found,)

        return same

    pixels = list(images[:2, 0])  # fewer than are compared
    assert largest_difference(predictor, shifted(0), pixels) == 0
    assert largest_difference(predictor, shifted(0.25), pixels) == pytest.approx(0.25)
    assert not largest_difference(predictor, shifted(float("nan")), pixels) <= limit
    _, other = load_model(finished_run)
    with torch.no_grad():
        other.head.bias += 1
    small = Predictor(predictor.cards, [other], torch.device("cpu"))
    assert largest_difference(small, exporting.load(pt2_file[0].read_bytes(), ".pt2"), pixels) > limit
    with torch.no_grad():
        other.head.weight /= 1e6
    assert allowed_difference(small, pixels) == LIMIT
    with torch.no_grad():
        other.head.bias += 1e9
    assert allowed_difference(small, pixels) == pytest.approx(0.01)


def test_bad_input_is_refused_and_leaves_nothing(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "in" / "model.ptxdist"
    write_bundle(finished_run, bundle)
    unfinished = tmp_path / "in" / "unfinished"
    unfinished.mkdir()
    shutil.copy(finished_run / "settings.json", unfinished)
    (tmp_path / "in" / "folder.onnx").mkdir()
    (tmp_path / "in" / "file").touch()
    out = tmp_path / "out" / "model"
    for model, path, error, words in (
        (finished_run, out.with_suffix(".h5"), SettingsError, ".onnx, .pt2 and .ptxdist"),
        (finished_run, out, SettingsError, "names the format"),
        (unfinished, out.with_suffix(".onnx"), RunError, "is not finished"),
        (unfinished, out.with_suffix(".ptxdist"), RunError, "is not finished"),
        (tmp_path / "nowhere", out.with_suffix(".pt2"), RunError, "nothing at"),
        (tmp_path / "nowhere", out.with_suffix(".ptxdist"), RunError, "nowhere"),
        (bundle, out.with_suffix(".ptxdist"), RunError, "copy it"),
        (tmp_path / "in" / "file", out.with_suffix(".onnx"), RunError, "is a file and not a run"),
        (finished_run, tmp_path / "in" / "folder.onnx", CheckpointError, "a folder has this name"),
        (finished_run, tmp_path / "in" / "file" / "model.onnx", CheckpointError, "can write to"),
        (finished_run, tmp_path / "in" / "file" / "model.ptxdist", CheckpointError, "can write to"),
        (finished_run, Path("/proc/model.pt2"), CheckpointError, "cannot be written"),
    ):
        done = invoke("export", model, "--out", path)
        assert done.exit_code == error.exit_code, (path, done.output)
        assert isinstance(done.exception, SystemExit)
        assert words in done.stderr
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    done = invoke("export", finished_run, "--out", out.with_suffix(".onnx"))
    assert done.exit_code == SettingsError.exit_code
    assert "onnxscript" in done.stderr
    assert "ptxdist[export]" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
    assert {path.name for path in (tmp_path / "in").iterdir()} == {"model.ptxdist", "unfinished", "folder.onnx", "file"}


def test_an_exported_bundle_predicts_what_its_run_predicts(
    finished_run: Path, small_dataset: Any, tmp_path: Path
) -> None:
    done = invoke("export", finished_run, "--out", tmp_path / "model.ptxdist")
    assert done.exit_code == 0, done.output
    assert zipfile.is_zipfile(tmp_path / "model.ptxdist")
    source = next(iter(sorted(small_dataset.dicom.rglob("*.dcm"))))
    for model, out in ((tmp_path / "model.ptxdist", "of-bundle"), (finished_run, "of-run")):
        done = invoke("predict", model, source, "--out", tmp_path / out, "--threshold", 0.3, "--device", "cpu")
        assert done.exit_code == 0, done.output
    for name in ("submission.csv", f"findings/{source.stem}.json", f"masks/{source.stem}.png"):
        assert (tmp_path / "of-bundle" / name).read_bytes() == (tmp_path / "of-run" / name).read_bytes()
