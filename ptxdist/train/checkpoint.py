"""Weights and checkpoints of a training: writing, reading and checking them.

    checkpoints/epoch-0002-step-000140/   after two epochs and 140 steps of the third: model.safetensors,
                                          optimizer.safetensors, average.safetensors (with SWA), and state.json
                                          with the sha256 of the others
    checkpoints/best-0002.safetensors

Tensors are in safetensors files, the rest is JSON; nothing is pickled. A checkpoint that is truncated or altered is
recognised, and the one before it is used.

Owns: weight keys on disk and the layout above.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ptxdist import files
from ptxdist.errors import CheckpointError, raise_limit, remedy

_STATE = "state.json"
_DAMAGED = (CheckpointError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def save_weights(state: Mapping[str, Tensor], path: Path) -> str:
    """Write a model's state dict atomically and return the sha256 of the file."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    with files.replacing(path, error=CheckpointError) as temporary:
        try:
            # Not `save`, which makes one bytes object of them: it holds the interpreter's lock for 100 ms per 100 MB,
            # and the training thread cannot start a kernel for so long.
            save_file(tensors, temporary)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        return files.sha256(temporary)


def load_weights(model: nn.Module, path: Path, sha256: str | None = None) -> None:
    """Load a file of `save_weights` into a model of the same shape.

    Raises CheckpointError when the file is missing, damaged, not the one of `sha256`, of another model, or has NaN.
    """
    state = read_weights(path, sha256)
    refuse_other_model(model.state_dict(), state, str(path))
    model.load_state_dict(state)


def read_weights(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors in a file of `save_weights`; CheckpointError when it is missing, damaged, or not that of `sha256`."""
    if sha256 is not None:
        advice = f"remove {path.parent} and rerun the same `ptxdist train`, which retrains this stage"
        files.refuse_damaged(path, sha256, advice, CheckpointError)
    return _read(path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a .safetensors file; SafetensorError when it is damaged, OSError, or torch's RuntimeError."""
    try:
        return dict(load_file(path))
    except FileNotFoundError:  # what safetensors says of any file that it cannot open
        path.open("rb").close()
        raise


def refuse_other_model(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """CheckpointError unless `state` has finite values of the names and shapes of `expected`, which may be empty."""
    problems = [f"{key} is missing" for key in expected if key not in state]
    problems += [f"{key} is not known" for key in state if key not in expected]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, not {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    problems += [
        f"{key} has values of {value.dtype}"
        for key, value in state.items()
        if key in expected and value.is_floating_point() != expected[key].is_floating_point()
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit the model of these settings: {'; '.join(problems[:3])}")
    if faulty := [key for key, value in state.items() if not value.isfinite().all()]:
        raise CheckpointError(f"{source} has values that are no numbers, in {', '.join(faulty[:3])}; it cannot be used")


@dataclass
class TrainingState:
    """Everything a stage needs to resume after `epoch` finished epochs and `step` optimiser steps of the next one.

    `progress` is plain JSON: the history and the rest of the state of `loop`. It has no state of random generators:
    order and augmentation are drawn from (seed, epoch, case), and learning rates follow from the history.
    """

    epoch: int
    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    average: Mapping[str, Tensor] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The checkpoint's folder."""
        return f"epoch-{self.epoch:04d}-step-{self.step:06d}"


def snapshot(state: TrainingState, former: TrainingState | None = None) -> TrainingState:
    """A copy in host memory, which later steps do not change.

    The memory of a `former` snapshot is reused where it fits: allocating new pages takes longer than copying 300 MB
    into old ones, while the training waits.
    """

    def copy_of(value: Any, there: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not isinstance(there, Tensor) or there.shape != value.shape or there.dtype != value.dtype:
            there = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return there.copy_(value.detach())

    def copies(tensors: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
        return {key: copy_of(value, there.get(key)) for key, value in tensors.items()}

    old = former or TrainingState(0, 0, {}, {"state": {}})
    moments = {
        index: copies(entry, old.optimizer["state"].get(index, {})) for index, entry in state.optimizer["state"].items()
    }
    optimizer = {"state": moments, "param_groups": copy.deepcopy(state.optimizer["param_groups"])}
    model, average = copies(state.model, old.model), copies(state.average, old.average)
    return replace(state, model=model, optimizer=optimizer, average=average)


def save_checkpoint(folder: Path, state: TrainingState, *, keep: int) -> None:
    """Write a checkpoint atomically, then remove all but the `keep` newest. After a failure the old ones are kept."""
    moments = {
        f"{index}.{name}": value
        for index, entry in state.optimizer["state"].items()
        for name, value in entry.items()
        if isinstance(value, Tensor)
    }
    parts = {"model": state.model, "optimizer": moments, **({"average": state.average} if state.average else {})}
    content = {
        "epoch": state.epoch,
        "step": state.step,
        "param_groups": state.optimizer["param_groups"],
        "progress": state.progress,
    }
    with files.replacing_folder(folder / state.name, error=CheckpointError) as draft:
        sums = {name: save_weights(tensors, draft / f"{name}.safetensors") for name, tensors in parts.items()}
        content["sha256"] = {**sums, _STATE: files.content_sum(content)}
        files.write_whole(draft / _STATE, json.dumps(content), error=CheckpointError)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob("epoch-????-step-??????"))


def load_checkpoint(folder: Path, on_damaged: Callable[[str], None] = lambda message: None) -> TrainingState | None:
    """The newest checkpoint that is whole; None if there is none. `on_damaged` is called for each damaged one.

    Raises CheckpointError when one may not be read, or when the disk or a limit prevents it: it may be whole.
    """
    for path in reversed(checkpoints(folder)):
        try:
            return _load(path)
        except _DAMAGED as error:
            if isinstance(error, OSError) and (advice := remedy(error)):
                raise CheckpointError(
                    f"checkpoint {path} cannot be read ({error}); {advice}, or remove it to resume from an earlier one"
                ) from error
            on_damaged(f"checkpoint {path.name} is damaged ({error}); the one before it is used")
    return None


def await_checkpoint(path: Path, patience_s: float = 90.0) -> TrainingState:
    """The checkpoint at this path, which rank 0 has read: a network file system may show it late to other nodes.

    Raises CheckpointError if it cannot be read within `patience_s`.
    """
    end = time.monotonic() + patience_s
    while True:
        try:
            return _load(path)
        except _DAMAGED as error:
            if time.monotonic() > end:
                raise CheckpointError(
                    f"{path} cannot be read on this node, but rank 0 resumes from it ({error}); put the run on shared "
                    "storage"
                ) from error
        time.sleep(0.5)


def _load(path: Path) -> TrainingState:
    content = json.loads((path / _STATE).read_bytes())
    sums = content.pop("sha256")
    if sums.pop(_STATE, None) not in (None, files.content_sum(content)):  # older versions recorded none
        raise CheckpointError(f"{_STATE} has another checksum")
    for name, expected in sums.items():
        if files.sha256(path / f"{name}.safetensors") != expected:
            raise CheckpointError(f"{name}.safetensors has another checksum")
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in _read(path / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        moments.setdefault(int(index), {})[name] = value
    return TrainingState(
        epoch=content["epoch"],
        step=content["step"],
        model=_read(path / "model.safetensors"),
        optimizer={"state": moments, "param_groups": content["param_groups"]},
        average=_read(path / "average.safetensors") if "average" in sums else {},
        progress=content["progress"],
    )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_tensors(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise_limit(error)
        raise CheckpointError(f"{path} is missing or damaged: {error}") from error


def match_device(state: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors on a device."""
    return {key: value.to(device) for key, value in state.items()}
