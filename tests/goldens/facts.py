"""What users and their files depend on, read through the command line only: the same for every version of the code.

`python tests/goldens/facts.py` writes golden.json and made-by-0.1.0.tar.xz anew; they were made before the package was
laid out anew, and `tests/test_goldens.py` holds the present code to them. Make them again only for a change that is
meant to be seen by users.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import struct
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import safetensors.numpy
import torch
from click.testing import CliRunner
from tensorboardX.proto.event_pb2 import Event

from ptxdist.cli import cli

HERE = Path(__file__).parent
GOLDEN, ARCHIVE = HERE / "golden.json", HERE / "made-by-0.1.0.tar.xz"
SETTINGS = (
    "train.precision=fp32", "train.device=cpu", "stages.1.epochs=2", "stages.1.swa_epochs=2", "stages.1.batch_size=4",
    "stages.1.positive_share=[0.8, 0.5]", "stages.2.dice=batch", "stages.2.schedule=plateau",
    "model.decoder_channels=[16, 8, 8, 4, 4]", "model.input_mapping=learned",
)  # fmt: skip


def run(*words: object) -> str:
    """What a command prints on stdout; it has to succeed."""
    done = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, f"{words}\n{done.output}"
    return done.stdout


def command_line() -> dict[str, Any]:
    """Every command with its arguments, options and defaults."""
    return {
        name: [
            {
                "names": sorted([*parameter.opts, *parameter.secondary_opts]),
                "kind": type(parameter).__name__,
                "required": parameter.required,
                "many": parameter.multiple if isinstance(parameter, click.Option) else parameter.nargs,
                "flag": getattr(parameter, "is_flag", False),
                "default": _plain(parameter.default),
            }
            for parameter in command.params
        ]
        for name, command in sorted(cli.commands.items())
    }


def _plain(default: Any) -> Any:
    if callable(default):
        return "computed"
    return default if isinstance(default, bool | int | float | str) else str(default) if default else None


def keys(content: Any, place: str = "") -> set[str]:
    """Dotted names of all keys; `[]` for the items of a list, `*` for names that are data."""
    if isinstance(content, list):
        return set().union(*(keys(item, f"{place}[]") for item in content), set())
    if not isinstance(content, dict):
        return {place}
    found = set()
    for name, value in content.items():
        data = place.endswith(("intervals", "at_other_thresholds", "packages")) or name.isdecimal()
        found |= keys(value, f"{place}.{'*' if data else name}".lstrip("."))
    return found


def make_data(folder: Path) -> None:
    """Phantoms, a cache of them, and a run on it, in one process without Ray."""
    ph = folder / "ph"
    run("phantom", ph, "--cases", 24, "--positive-share", 0.5, "--workers", 1)
    run(
        "preprocess", "--dicom", ph / "dicom-images", "--labels", ph / "train-rle.csv", "--patients",
        ph / "patients.csv", "--out", folder / "cache", "--size", 64, "--size", 96, "--folds", 4, "--workers", 1,
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)  # with which 0.1.0 trained, whatever OMP_NUM_THREADS said
    try:
        run(*train_words(folder), "--json")
    finally:
        torch.set_num_threads(threads)


def train_words(folder: Path) -> list[object]:
    """The training that `make_data` runs."""
    words: list[object] = ["train", "--without-ray", "--pipeline", "smoke", "--data", folder / "cache"]
    return [*words, "--run", folder / "run", *(word for item in SETTINGS for word in ("--set", item))]


def printed_keys(folder: Path) -> dict[str, list[str]]:
    """The keys of what each command prints with --json, on the data of `make_data`."""
    ph, cache, runs = folder / "ph", folder / "cache", folder / "run"
    image = next((ph / "dicom-images").rglob("*.dcm")).parent
    commands: dict[str, tuple[object, ...]] = {
        "phantom": ("phantom", folder / "ph2", "--cases", 2),
        "preprocess": (
            "preprocess", "--dicom", ph / "dicom-images", "--labels", ph / "train-rle.csv", "--patients",
            ph / "patients.csv", "--out", cache, "--size", 64, "--size", 96, "--folds", 4, "--workers", 1,
        ),
        "verify": ("verify", cache, "--workers", 1),
        "inspect cache": ("inspect", cache),
        "inspect run": ("inspect", runs),
        "train": tuple(train_words(folder)),
        "train --dry-run": (*train_words(folder), "--dry-run"),
        "evaluate": ("evaluate", runs),
        "compare": ("compare", runs, runs),
        "report": ("report", runs),
        "predict": ("predict", runs, image, "--out", folder / "predictions"),
        "export": ("export", runs, "--out", folder / "out.ptxdist"),
        "doctor": ("doctor", "--data", cache, "--run", folder / "other"),
    }  # fmt: skip
    return {name: sorted(keys(json.loads(run(*words, "--json")))) for name, words in commands.items()}


def tensorboard(run_folder: Path) -> dict[str, list[str]]:
    """The metric names in each folder of event files."""
    found: dict[str, set[str]] = {}
    for path in sorted((run_folder / "tensorboard").rglob("events.*")):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack("<Q", content[place : place + 8])
            event = Event.FromString(content[place + 12 : place + 12 + length])
            found.setdefault(path.parent.name, set()).update(value.tag for value in event.summary.value)
            place += 12 + length + 4
    return {name: sorted(tags) for name, tags in found.items()}


def machine() -> dict[str, str]:
    """What the last bits of a training depend on."""
    return {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "torch": version("torch"),
        "numpy": version("numpy"),
    }


def files_of(folder: Path) -> dict[str, Any]:
    """Settings, manifest and results of the run and cache of `make_data`; no path of this machine, no seconds."""
    settings = json.loads((folder / "run/settings.json").read_text())
    assert settings["data"].pop("cache") == str(folder / "cache")
    stages = [json.loads(path.read_text()) for path in sorted((folder / "run/stages").glob("*/result.json"))]
    manifest = json.loads((folder / "cache/manifest.json").read_text())
    for of, name in ((manifest["files"], "salt"), (manifest["files"], "catalog.jsonl"), (manifest, "sha256")):
        of[name] = "random"  # every cache has a salt of its own
    return {
        "settings": settings,
        "manifest": manifest,
        "fingerprints": [stage["fingerprint"] for stage in stages],
        "run": sorted(str(path.relative_to(folder / "run")) for path in (folder / "run").rglob("*.*") if _named(path)),
        "cache": sorted(
            str(path.relative_to(folder / "cache")) for path in (folder / "cache").rglob("*") if path.is_file()
        ),
        "tensorboard": tensorboard(folder / "run"),
        "training": {
            "machine": machine(),
            "losses": [[item["train_loss"], item["val_loss"]] for stage in stages for item in stage["history"]],
            "weights": [stage["weights_sha256"] for stage in stages],
        },
    }


def _named(path: Path) -> bool:
    return path.is_file() and "events.out" not in path.name and path.parent.name != "overlays"


def bundle_sha256(run_folder: Path, out: Path) -> str:
    """The sha256 of a run's bundle."""
    run("export", run_folder, "--out", out)
    return hashlib.sha256(out.read_bytes()).hexdigest()


def make_archive(folder: Path) -> None:
    """Pack cache and run; the weights are replaced by a pattern that packs well, and the run is evaluated with them."""
    results = sorted((folder / "run/stages").glob("*/result.json"))
    for path in results:
        weights, result = path.parent / "best.safetensors", json.loads(path.read_text())
        state = safetensors.numpy.load_file(weights)
        for number, (name, value) in enumerate(sorted(state.items())):
            if value.ndim == 1:
                state[name] = np.full_like(value, name.endswith(("bn1.weight", "bn2.weight", "running_var")))
            elif value.dtype.kind == "f":
                pattern = np.random.default_rng(number % 7).standard_normal(256).astype(np.float32)
                scale = np.sqrt(2 / np.prod(value.shape[1:]))
                state[name] = (np.resize(pattern, value.shape) * np.float32(scale)).astype(value.dtype)
        safetensors.numpy.save_file(state, weights)
        result["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
        path.write_text(json.dumps(result, indent=2) + "\n")
    whole = json.loads((folder / "run/result.json").read_text())
    whole["stages"] = [json.loads(path.read_text()) for path in results]
    (folder / "run/result.json").write_text(json.dumps(whole, indent=2) + "\n")
    run("evaluate", folder / "run")
    settings = json.loads((folder / "run/settings.json").read_text())
    settings["data"]["cache"] = "cache"  # whoever unpacks it works in its folder
    (folder / "run/settings.json").write_text(json.dumps(settings, indent=2) + "\n")
    shutil.rmtree(folder / "run/report", ignore_errors=True)
    for picture in (folder / "cache").glob("*.png"):
        picture.unlink()
    with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
        for name in ("cache", "run"):
            archive.add(folder / name, name, filter=_anonymous)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def main() -> None:
    """Write both golden files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        golden = {"command_line": command_line(), "files": files_of(folder), "json": printed_keys(folder)}
        make_archive(folder)
        golden["bundle_sha256"] = bundle_sha256(folder / "run", folder / "golden.ptxdist")
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
