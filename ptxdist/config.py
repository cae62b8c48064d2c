"""Settings: frozen, strict models, read from TOML and written as a JSON snapshot.

Owns: all settings with their defaults and checks. Refuses: unknown keys and wrong types; settings are values, never
code. Every part of ptxdist receives only its own section. `resolve` turns files and options into Settings.

    Settings
    ├── data        the cache                                              configs/<site>.toml
    ├── train       hardware: workers, device, precision                   configs/<site>.toml
    └── pipeline    experiment: model, ordered stages, evaluation          pipelines/<name>.toml
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from ptxdist import files
from ptxdist.errors import SettingsError, short
from ptxdist.section import Section, added
from ptxdist.section import complete as complete
from ptxdist.section import snapshot as snapshot

PACKAGE = Path(__file__).resolve().parent

Threshold = Annotated[float, Field(gt=0.0, lt=1.0)]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Side = Annotated[int, Field(ge=32, le=4096, multiple_of=32)]
Channels = Annotated[int, Field(ge=1, le=1024)]
Precision = Literal["auto", "fp32", "bf16"]
PIPELINE_NAME = "^[A-Za-z0-9_.-]+$"
YEAR_S = 366 * 86_400  # the longest time that a setting can say
_MOST_VALUES = 2**28  # of an image in one layer of the decoder: 1 GiB
# Settings of a stage that are gone: they changed the weights, and nothing in how these are used.
_REMOVED = ("ema_decay", "clip_norm")


class DataSettings(Section):
    """The training data."""

    cache: str = Field("cache", min_length=1, description="folder that `ptxdist preprocess` wrote, or s3://…")
    staging: str | None = Field(
        None, min_length=1, description="local folder for copies of s3://…; default: PTXDIST_STAGING"
    )
    staging_gb: float = Field(200.0, gt=0, description="above this size, the least recently used copies are deleted")


class TrainSettings(Section):
    """The hardware that a run uses; these settings change how fast it trains, not what is trained."""

    workers: int = Field(1, ge=1, description="Ray Train workers (DDP ranks)")
    min_workers: int | None = Field(
        None, ge=1, description="train with this many while nodes are missing; default: wait for all workers"
    )
    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="auto: one GPU per worker if there are enough")
    precision: Precision = Field("auto", description="auto: bf16 where the hardware supports it")
    sync_batch_norm: bool = Field(True, description="batch statistics over the global batch of all workers")
    micro_batch: int | None = Field(
        None, ge=1, description="cases per forward pass of a worker; gradients are accumulated over the global batch"
    )
    compile: bool = Field(
        False, description="torch.compile the training passes; on a GPU with CUDA graphs. Takes minutes to start"
    )
    data_on_device: Literal["auto", "on", "off"] = Field(
        "auto", description="keep the data set in the memory of each GPU; auto: if it takes a quarter of it at most"
    )
    checkpoint_every_s: float = Field(
        300.0, ge=0, le=YEAR_S, description="seconds between checkpoints inside an epoch; 0: none"
    )
    checkpoint_every_images: int = Field(
        0, ge=0, description="images between checkpoints inside an epoch, up to the next ten steps; 0: none"
    )
    max_worker_failures: int = Field(2, ge=0, description="restarts of a stage after a worker died")
    worker_timeout_s: float = Field(
        60.0, gt=0, le=YEAR_S, description="seconds until a worker that does not respond is replaced"
    )
    collective_timeout_s: float = added(300.0, gt=0, le=YEAR_S, description="seconds until a stuck collective ends")
    capacity_timeout_s: float | None = added(
        None,
        gt=0,
        le=YEAR_S,
        description="seconds to wait for nodes; default: 600, without limit if the cluster autoscales",
    )
    resize_every_s: float = Field(
        60.0, gt=0, le=YEAR_S, description="with `min_workers`: seconds between checks for new nodes"
    )
    keep_checkpoints: int = Field(2, ge=1, description="resumable checkpoints kept for each stage")
    mlflow: str | None = Field(None, min_length=1, description="MLflow tracking URI; metrics are also logged there")
    reuse: bool = added(True, description="take over finished stages of runs beside this one that trained the same")
    stop_on_collapse: bool = added(False, description="end a stage that has collapsed to empty masks; else only warn")


class ModelSettings(Section):
    """The network of all stages: a U-Net."""

    encoder: str = added("resnet34", min_length=1, description="resnet34, resnet18, resnet50 or timm/NAME")
    encoder_weights: str = Field("imagenet", min_length=1, description="imagenet, none, or a file of weights")
    input_mapping: Literal["repeat", "learned"] = Field(
        "repeat", description="grayscale to three channels: repeated, or by a learned 1x1 convolution"
    )
    decoder_channels: tuple[Channels, Channels, Channels, Channels, Channels] = Field(
        (256, 128, 64, 32, 16), description="channels of the decoder's five layers, from the smallest image on"
    )
    image_head: bool = added(False, description="also predict from the pooled features whether the image is positive")
    init: str | None = added(
        None, min_length=1, description="a run, a bundle or a file with weights of the whole network"
    )


class Transform(BaseModel):
    """A transform of albumentations by its name, and its arguments: values of JSON, checked by `train.choices`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, JsonValue]

    transform: str = Field(min_length=1)

    @property
    def arguments(self) -> dict[str, JsonValue]:
        """What the transform is called with."""
        return dict(self.__pydantic_extra__)


_TRANSFORMS = TypeAdapter(list[Transform])


def _recipe(value: object, _: ValidatorFunctionWrapHandler) -> str | tuple[Transform, ...]:
    if not value or not isinstance(value, str | list | tuple):
        raise ValueError('expected the name of a recipe, or a list such as [{transform = "HorizontalFlip", p = 0.5}]')
    return value if isinstance(value, str) else tuple(_TRANSFORMS.validate_python(list(value)))


Recipe = Annotated[str | tuple[Transform, ...], WrapValidator(_recipe)]


class StageSettings(Section):
    """One training at one size."""

    size_px: Side = Field(description="side of the square images, in pixels")
    epochs: int = Field(ge=1, le=100_000, description="passes over the training cases")
    batch_size: int = Field(ge=1, le=100_000, description="cases per optimiser step over all workers together")
    learning_rate: float = Field(1e-3, gt=0, description="of Adam, at the start of the schedule")
    weight_decay: float = added(0.0, ge=0, description="decoupled from the gradient, as in AdamW; 0: Adam")
    warmup_steps: int = added(0, ge=0, description="first optimiser steps, over which the learning rate rises from 0")
    schedule: Literal["plateau", "cosine", "constant"] = Field(
        "cosine", description="learning rate over the epochs; plateau: lower when the validation loss stops falling"
    )
    plateau_factor: float = Field(0.2, gt=0, lt=1, description="by which a plateau multiplies the learning rate")
    plateau_patience: int = Field(5, ge=0, description="epochs without a lower validation loss")
    swa_epochs: int = Field(0, ge=0, description="SWA over this many last epochs; 0: no SWA")
    swa_update_batch_norm: bool = Field(True, description="re-estimate the batch-norm statistics of the SWA weights")
    augmentation: Recipe = Field("siim", description="a name in `train.augment.RECIPES`, or a list of transforms")
    loss: str = added("bce_dice", min_length=1, description="a name in `train.losses.LOSSES`")
    dice: Literal["image", "batch"] = Field(
        "image", description="Dice in the loss: per image, or flattened over a batch"
    )
    image_weight: float = added(0.2, ge=0, description="weight in the loss of the image head's BCE")
    negative_weight: float = added(
        1.0,
        ge=0,
        le=1,
        description="weight in the loss of the masks of negative cases; 0: only positive ones teach masks",
    )
    mix: float = added(0.0, ge=0, le=1, description="probability that a part of a case is replaced by that of another")
    phantoms: int = added(
        0,
        ge=0,
        le=1_000_000,
        description="train on so many phantoms with the masks of the training cases instead of on the cases, and keep "
        "the last epoch; 0: the cases",
    )
    positive_share: tuple[Share, Share] | None = Field(
        None, description="share of positive cases in the first and the last epoch; default: as in the data"
    )
    epoch: Literal["cases", "positives"] = added(
        "cases", description="as many cases as there are, or each positive case once and negatives to the share"
    )
    threshold: Threshold = Field(0.5, description="probability from which a pixel is in the mask")
    best_by: Literal["kaggle_dice", "positive_dice", "loss"] = Field(
        "kaggle_dice", description="validation score that selects the best weights"
    )

    @model_validator(mode="after")
    def _fits(self) -> StageSettings:
        if self.swa_epochs > self.epochs:
            raise ValueError(f"swa_epochs ({self.swa_epochs}) is more than epochs ({self.epochs})")
        if self.epoch == "positives" and self.positive_share is None:
            raise ValueError(
                'epoch = "positives" needs positive_share, the share of positive cases that it is filled to'
            )
        if self.negative_weight < 1 and self.best_by == "kaggle_dice":
            raise ValueError(
                'negative_weight below 1 leaves masks in negative cases, which best_by = "kaggle_dice" judges by; use '
                '"loss" or "positive_dice"'
            )
        return self


class EvaluationSettings(Section):
    """How the last stage's weights are evaluated, at the resolution of the original images."""

    flip_averaging: bool = Field(True, description="average the probabilities of the image and its mirror image")
    min_area_px: int = Field(0, ge=0, description="predicted masks with fewer pixels of the original image are emptied")


class PipelineSettings(Section):
    """One experiment: a model, its ordered stages and its evaluation."""

    name: str = Field(min_length=1, pattern=PIPELINE_NAME, description="of the pipeline; its file's name by default")
    purpose: str = Field("", description="what the pipeline is for, in reports")
    source: str = Field("", description="where it is from, in reports")
    target: str = Field("", description="the score that its source reports")
    seed: int = Field(0, ge=0, lt=2**31, description="of random weights, of the order of cases and of augmentation")
    fold: int = Field(
        0, ge=0, description="the fold that is held out for validation; the cache has `preprocess --folds`"
    )
    model: ModelSettings = ModelSettings()
    stages: tuple[StageSettings, ...] = Field(min_length=1)
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _fits(self) -> PipelineSettings:
        for number, stage in enumerate(self.stages, start=1):
            for halved, channels in enumerate(reversed(self.model.decoder_channels)):
                if channels * (side := stage.size_px >> halved) ** 2 > _MOST_VALUES:
                    raise ValueError(f"model.decoder_channels: {channels} at {side} pixels take over 1 GiB an image")
            if stage.negative_weight < 1 and not self.model.image_head:
                raise ValueError(
                    f"stages.{number}.negative_weight below 1 needs model.image_head = true: the masks then say less "
                    "about whether an image is positive"
                )
        return self


class Settings(Section):
    """All settings of a run."""

    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    pipeline: PipelineSettings

    @model_validator(mode="after")
    def _workers_fit(self) -> Settings:
        if (self.train.min_workers or 1) > self.train.workers:
            raise ValueError(
                f"train.min_workers ({self.train.min_workers}) is more than workers ({self.train.workers})"
            )
        for number, stage in enumerate(self.pipeline.stages, start=1):
            if self.train.workers > stage.batch_size:
                raise ValueError(
                    f"{self.train.workers} workers cannot share the global batch of {stage.batch_size} cases of "
                    f"stage {number} of pipeline '{self.pipeline.name}'; use at most {stage.batch_size} workers or set "
                    f"pipeline.stages.{number}.batch_size"
                )
        return self


def without_removed(pipeline: Any) -> Any:
    """The snapshot of a pipeline without settings that former versions had, so that their runs can be read."""
    if not isinstance(pipeline, dict) or not isinstance(pipeline.get("stages"), list):
        return pipeline
    kept = [
        {name: value for name, value in stage.items() if name not in _REMOVED} if isinstance(stage, dict) else stage
        for stage in pipeline["stages"]
    ]
    return {**pipeline, "stages": kept}


def _within_a_year(train: Any) -> Any:
    """The snapshot of `train` without longer times, which former versions accepted, so that their runs can be read."""
    if not isinstance(train, dict):
        return train
    return {
        name: YEAR_S if name.endswith("_s") and isinstance(value, int | float) and value > YEAR_S else value
        for name, value in train.items()
    }


def restore(content: Mapping[str, Any]) -> Settings:
    """Settings from a snapshot; SettingsError when it does not fit this version of ptxdist."""
    try:
        present = {
            **content,
            "train": _within_a_year(content.get("train", {})),
            "pipeline": without_removed(content.get("pipeline")),
        }
        return Settings.model_validate_json(json.dumps(present))
    except ValidationError as error:
        raise SettingsError(explain(error, (), "settings snapshot")) from error


def fingerprint(*parts: object) -> str:
    """16 hex digits over the canonical JSON of the parts (sections, texts, numbers, lists, None)."""
    plain = [snapshot(part) if isinstance(part, Section) else part for part in parts]
    return files.fingerprint(*plain)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Lines `key: old -> new` for every leaf that differs between two snapshots."""
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        name = f"{prefix}{key}"
        if isinstance(before, list) and isinstance(after, list) and before and isinstance(before[0], dict):
            before = {str(number): item for number, item in enumerate(before, start=1)}
            after = {str(number): item for number, item in enumerate(after, start=1)}
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{name}.")
        elif before != after:
            yield f"{name}: {json.dumps(before)} -> {json.dumps(after)}"


def leaves(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys, with stages from 1 as in `--set`, and values of all that is not a group of settings."""
    if isinstance(content, list) and content and isinstance(content[0], dict):
        content = {str(number): item for number, item in enumerate(content, start=1)}
    if isinstance(content, dict):
        for key, value in content.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, content


def explain(error: ValidationError, sources: Sequence[tuple[str, str]], default: str) -> str:
    """The errors as one sentence each, with the source of the value.

    `sources` are pairs of a pattern of dotted keys and the name of where their values come from; the last match counts.
    `default` is named for values without a source.
    """
    lines = []
    problems = error.errors()
    for problem in problems:
        loc = problem["loc"]
        if any(other["loc"][: len(loc)] == loc != other["loc"] for other in problems):
            continue  # a consequence of an error inside
        place = ".".join(str(part + 1) if isinstance(part, int) else str(part) for part in loc)
        matching = (
            name
            for key, name in reversed(sources)
            if fnmatchcase(place, key) or fnmatchcase(place, f"{key}.*") or key.startswith(f"{place}.")
        )
        where = next(matching, default)
        message = problem["msg"].removeprefix("Value error, ")
        found = "" if problem["type"] in ("missing", "value_error") else f", found {short(repr(problem['input']), 200)}"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown setting '{short(place, 100)}'{nearest(str(loc[-1]), _names(loc[:-1]))}")
        elif problem["type"].endswith("_type") and _names(loc):
            lines.append(f"{where}: '{place}' must be a group of settings{found}")
        else:
            lines.append(f"{where}: {place}: {message}{found}" if place else message)
    return "; ".join(lines)


def section_of(model: type[Section], key: str) -> Any:
    """The type of a setting; for the list of stages that of one stage."""
    annotation = model.model_fields[key].annotation
    return StageSettings if annotation == tuple[StageSettings, ...] else annotation


def _names(loc: tuple[int | str, ...]) -> list[str]:
    """Names of the settings in the group at a place; [] if no group is there."""
    model: Any = Settings
    for key in loc:
        if isinstance(key, str):
            if not (_is_section(model) and key in model.model_fields):
                return []
            model = section_of(model, key)
    return list(model.model_fields) if _is_section(model) else []


def _is_section(model: Any) -> bool:
    return isinstance(model, type) and issubclass(model, Section)


def nearest(name: str, valid: Iterable[str]) -> str:
    """The valid name nearest to a wrong one, or all of them, as the end of a message."""
    valid = list(valid)
    matches = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f" (did you mean '{matches[0]}'?)" if matches else f" (valid: {', '.join(valid)})" if valid else ""
