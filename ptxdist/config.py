"""Settings: frozen, strict models, read from TOML and written as a JSON snapshot.

Owns: what can be set, its defaults and its checks. Refuses: unknown keys, wrong types, code or imports in settings.
Every part receives only its own section. `resolve` turns files and options into Settings.

    Settings
    ├── data        where the cache is                                     configs/<site>.toml
    ├── train       how much machine: workers, device, precision           configs/<site>.toml
    └── pipeline    what is trained: model, ordered stages, evaluation     pipelines/<name>.toml
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_serializer,
    model_validator,
)

from ptxdist.errors import SettingsError

PACKAGE = Path(__file__).resolve().parent
DEFAULT_PIPELINE = "paper"

Threshold = Annotated[float, Field(gt=0.0, lt=1.0)]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]


_ADDED = "added after 0.1.0"
_ALL = "all settings"


def added(default: Any, **more: Any) -> Any:
    """A setting that came after version 0.1.0; arguments as for pydantic's Field.

    At its default it is left out of snapshots, and so of fingerprints: a new setting does not make finished stages look
    as if they were trained with other settings. Its default must therefore never change.
    """
    return Field(default, json_schema_extra={_ADDED: True}, **more)


class Section(BaseModel):
    """A frozen, strict group of settings: unknown keys and silent conversions are errors."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _without_added_defaults(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        if info.context != _ALL:
            for name, field in type(self).model_fields.items():
                is_added = isinstance(field.json_schema_extra, dict) and _ADDED in field.json_schema_extra
                if is_added and getattr(self, name) == field.default:
                    content.pop(name, None)
        return content


class DataSettings(Section):
    """Where the training data is."""

    cache: str = Field("cache", min_length=1, description="folder that `ptxdist preprocess` wrote, or s3://…")
    staging: str | None = Field(
        None, min_length=1, description="local folder for copies of s3://…; not set: PTXDIST_STAGING"
    )
    staging_gb: float = Field(200.0, gt=0, description="copies nobody uses go, the oldest first, when there are more")


class TrainSettings(Section):
    """How much machine a run may use; nothing here changes what is trained, only how fast."""

    workers: int = Field(1, ge=1, description="Ray Train workers (DDP ranks)")
    min_workers: int | None = Field(
        None, ge=1, description="go on with this few when nodes are lost, and grow again; not set: wait for all"
    )
    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="auto: a GPU per worker if there is one")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the hardware has it")
    sync_batch_norm: bool = Field(True, description="batch statistics over the global batch, whatever `workers` is")
    micro_batch: int | None = Field(
        None, ge=1, description="cases a worker passes through the network at once; the global batch is accumulated"
    )
    compile: bool = Field(
        False, description="torch.compile the training passes; minutes to start, on a GPU CUDA graphs"
    )
    data_on_device: Literal["auto", "on", "off"] = Field(
        "auto", description="the whole data set in the memory of each GPU; auto: where it fits easily"
    )
    checkpoint_every_s: float = Field(300.0, ge=0, description="seconds between checkpoints inside an epoch; 0: none")
    checkpoint_every_images: int = Field(
        0, ge=0, description="images between checkpoints inside an epoch, up to the next ten steps; 0: none"
    )
    max_worker_failures: int = Field(2, ge=0, description="restarts of a stage after a worker died")
    worker_timeout_s: float = Field(60.0, gt=0, description="a worker that does not answer for this long is replaced")
    resize_every_s: float = Field(60.0, gt=0, description="with `min_workers`: seconds between looks for new nodes")
    keep_checkpoints: int = Field(2, ge=1, description="resumable checkpoints kept for each stage")
    mlflow: str | None = Field(
        None, min_length=1, description="address of an MLflow server or store, which is told too"
    )


class ModelSettings(Section):
    """The network of all stages: a U-Net."""

    encoder: str = added("resnet34", min_length=1, description="a name in `train.encoders.ENCODERS`")
    encoder_weights: str = Field("imagenet", min_length=1, description="imagenet, none, or a file of weights")
    input_mapping: Literal["repeat", "learned"] = Field(
        "repeat", description="grayscale to three channels: repeated, or by a learned 1x1 convolution"
    )
    decoder_channels: tuple[int, int, int, int, int] = Field((256, 128, 64, 32, 16))


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

    size_px: int = Field(ge=32, multiple_of=32, description="side of the square images, in px")
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1, description="cases per optimiser step over all workers together")
    learning_rate: float = Field(1e-3, gt=0)
    schedule: Literal["plateau", "cosine", "constant"] = "cosine"
    plateau_factor: float = Field(0.2, gt=0, lt=1)
    plateau_patience: int = Field(5, ge=0, description="epochs without a lower validation loss")
    swa_epochs: int = Field(0, ge=0, description="average the weights of this many last epochs; 0: none")
    swa_update_batch_norm: bool = Field(True, description="re-estimate batch-norm statistics of the average")
    augmentation: Recipe = Field("siim", description="a name in `train.augment.RECIPES`, or a list of transforms")
    loss: str = added("bce_dice", min_length=1, description="a name in `train.losses.LOSSES`")
    dice: Literal["image", "batch"] = Field(
        "image", description="Dice in the loss: per image, or flattened over a batch"
    )
    positive_share: tuple[Share, Share] | None = Field(
        None, description="share of positive cases in a batch, of the first and of the last epoch; none: as they come"
    )
    threshold: Threshold = Field(0.5, description="probability from which a pixel counts as pneumothorax")
    best_by: Literal["kaggle_dice", "positive_dice", "loss"] = Field(
        "kaggle_dice", description="validation number that chooses the best weights"
    )

    @model_validator(mode="after")
    def _swa_fits(self) -> StageSettings:
        if self.swa_epochs > self.epochs:
            raise ValueError(f"swa_epochs ({self.swa_epochs}) is more than epochs ({self.epochs})")
        return self


class EvaluationSettings(Section):
    """How the last stage's weights are evaluated, at the resolution of the original images."""

    flip_averaging: bool = Field(True, description="average the probabilities of the image and its mirror image")
    min_area_px: int = Field(0, ge=0, description="predicted masks below this many original px are emptied")


class PipelineSettings(Section):
    """One experiment: a model, its ordered stages and its evaluation."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")
    purpose: str = ""
    source: str = ""
    target: str = ""
    seed: int = Field(0, ge=0, lt=2**31)
    fold: int = Field(
        0, ge=0, description="the fold that is held out for validation; the cache has `preprocess --folds`"
    )
    model: ModelSettings = ModelSettings()
    stages: tuple[StageSettings, ...] = Field(min_length=1)
    evaluation: EvaluationSettings = EvaluationSettings()


class Settings(Section):
    """Everything that decides a run."""

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
            if stage.dice == "batch" and self.train.micro_batch is not None:
                raise ValueError(
                    f"stage {number} takes the Dice over whole batches (dice = 'batch'), and train.micro_batch divides "
                    "them; use dice = 'image' or no micro_batch"
                )
        return self


def snapshot(section: Section) -> dict[str, Any]:
    """The section as plain JSON values, without added settings at their default; `restore(snapshot(s)) == s`."""
    return section.model_dump(mode="json")


def complete(section: Section) -> dict[str, Any]:
    """All settings of the section as plain JSON values, as people read them."""
    return section.model_dump(mode="json", context=_ALL)


def restore(content: Mapping[str, Any]) -> Settings:
    """Settings from a snapshot; SettingsError when it does not fit this version of ptxdist."""
    try:
        return Settings.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise SettingsError(explain(error, (), "settings snapshot")) from error


def fingerprint(*parts: object) -> str:
    """16 hex digits over the canonical JSON of the parts (sections, texts, numbers, lists, None)."""
    plain = [snapshot(part) if isinstance(part, Section) else part for part in parts]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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


def explain(error: ValidationError, sources: Sequence[tuple[str, str]], default: str) -> str:
    """What is wrong, with the source of each value; `default` is named for what no source sets."""
    lines = []
    problems = error.errors()
    for problem in problems:
        if any(other["loc"][: len(problem["loc"])] == problem["loc"] != other["loc"] for other in problems):
            continue  # a consequence of what is wrong inside
        place = ".".join(str(part + 1) if isinstance(part, int) else str(part) for part in problem["loc"])
        matching = (
            name for key, name in reversed(sources) if fnmatchcase(place, key) or fnmatchcase(place, f"{key}.*")
        )
        message = problem["msg"].removeprefix("Value error, ")
        found = "" if problem["type"] in ("missing", "value_error") else f", found {problem['input']!r}"
        lines.append(f"{next(matching, default)}: {place}: {message}{found}" if place else message)
    return "; ".join(lines)
