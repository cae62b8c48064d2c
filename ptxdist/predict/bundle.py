"""A model as one file to share: weights, operating point, settings and scores.

    model.ptxdist               a zip file without compression
        card.json               ModelCard, with the sha256 of the other members
        README.md               the same for people
        weights.safetensors
        training-images.csv     fingerprints of its training images; not in bundles of older versions

Owns: this file, and what must be known to predict with a run. Refuses: files that are not bundles, were altered or
were written by another version (CheckpointError), runs that are not finished (RunError).

Loading runs no code: tensors are in safetensors, the rest is JSON that has to fit a strict model. The checksums detect
damage and careless changes. Against forgery only the sha256 of the whole file helps, obtained by another way.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ptxdist import files, places
from ptxdist.cache.render import TRANSFORM
from ptxdist.config import PipelineSettings, Precision, Side, fingerprint, without_removed
from ptxdist.errors import CheckpointError, PtxdistError, RunError, SettingsError, system_says
from ptxdist.finding import PNEUMOTHORAX, FindingType, unless_pneumothorax
from ptxdist.records import (
    SYNTHETIC,
    EvaluationResult,
    OperatingPoint,
    ParentModel,
    Profile,
    Record,
    when_known,
)
from ptxdist.report.model_card import made_from as in_words
from ptxdist.rundir import TRAINING_IMAGES, read_origin, read_result, read_settings, read_training_images
from ptxdist.train import encoders
from ptxdist.train.checkpoint import read_weights, refuse_other_model
from ptxdist.train.unet import UNet, build_unloaded

SUFFIX = places.SUFFIX
CARD, README, WEIGHTS = "card.json", "README.md", "weights.safetensors"
_MAX_BYTES = {CARD: 2**24, README: 2**20, WEIGHTS: 2**31, TRAINING_IMAGES: 2**28}
_EMPTY_ZIP, _EACH = 22, 76  # bytes of a zip file, and of a member in it beside its content and twice its name
_WHEN = (1980, 1, 1, 0, 0, 0)  # of every member, so that the same run gives the same bytes


class ModelCard(Record):
    """What must be known beside the weights to predict with a model, and how the model was made.

    `preprocessing` is the version of the transform from a file to the network's square (`cache.render.TRANSFORM`).
    `fingerprint` is that of the last stage: settings, code and every image and mask it was trained on. `pipeline`
    contains no path: `model.init` is the sha256 of its weights. `training_images`, `made_from`, the model that the
    network started from, and `profile`, what the training images are like, are left out where they are not known, and
    `finding`, what the model segments, where that is pneumothorax.
    """

    format: Literal["ptxdist bundle 1"] = "ptxdist bundle 1"
    name: str
    finding: FindingType = unless_pneumothorax()
    size_px: Side
    preprocessing: int
    precision: Precision
    flip_averaging: bool
    operating_point: OperatingPoint
    operating_point_from: str
    pipeline: PipelineSettings
    fingerprint: str
    evaluation: EvaluationResult
    weights_sha256: str
    training_images: int | None = when_known()
    made_from: ParentModel | None = when_known()
    profile: Profile | None = when_known()

    @property
    def synthetic(self) -> bool:
        """Whether it was trained on phantoms only, as far as is known."""
        return self.profile is not None and self.profile.synthetic

    def at(self, point: OperatingPoint, words: str) -> ModelCard:
        """The card with another operating point; the words say where it is from."""
        return self.model_copy(update={"operating_point": point, "operating_point_from": words})


def describe_run(run: Path) -> tuple[ModelCard, Path]:
    """The card of a finished run's last stage, and its weights; RunError when the run is not finished."""
    settings, result = read_settings(run), read_result(run)
    stage, pipeline = result.stages[-1], settings.pipeline
    made, model = read_origin(run), pipeline.model
    parent = made.parent if made else None
    if model.encoder_weights not in ("imagenet", "none"):  # a path, which may contain a name
        model = model.model_copy(update={"encoder_weights": "file"})
    if model.init is not None:
        model = model.model_copy(update={"init": parent.weights_sha256 if parent else "model"})
    pipeline = pipeline.model_copy(update={"model": model})
    point, origin = _operating_point(result.evaluation)
    card = ModelCard(
        name=pipeline.name,
        finding=made.finding if made else PNEUMOTHORAX,
        size_px=stage.size_px,
        preprocessing=TRANSFORM,
        precision=settings.train.precision,
        flip_averaging=result.evaluation.flip_averaging,
        operating_point=point,
        operating_point_from=origin,
        pipeline=pipeline,
        fingerprint=stage.fingerprint,
        evaluation=result.evaluation,
        weights_sha256=stage.weights_sha256,
        training_images=made.images if made else None,
        made_from=parent,
        profile=made.profile if made else None,
    )
    return card, run / stage.weights


def _operating_point(evaluation: EvaluationResult) -> tuple[OperatingPoint, str]:
    """The tuned point with the best cross-fitted estimate, else the evaluation's own threshold."""
    if best := evaluation.best_tuned:
        return best.point, f"the evaluation's tuned {best.kind}"
    threshold = evaluation.threshold
    return OperatingPoint(top=threshold, min_area_px=evaluation.min_area_px, bottom=threshold), "the stage's threshold"


def point_at(card: ModelCard, name: str) -> tuple[OperatingPoint, str]:
    """The operating point of a stored working point, such as sensitivity=0.95, and words that say where it is from.

    Images are flagged by their score. A flagged image gets all pixels from the model's lower threshold on, or from that
    of its stage if this is lower: a high one, tuned to empty masks, would leave flagged images without a mask. Raises
    SettingsError when the model's evaluation has no point of this name.
    """
    for working in card.evaluation.working:
        if working.name == name:
            return _flagging(card, working.threshold), f"the working point {name} of its evaluation"
    there = ", ".join(working.name for working in card.evaluation.working)
    kind, _, target = name.partition("=")
    if kind not in ("sensitivity", "specificity") or not target:
        raise SettingsError(f"--at {name} is no working point; give one such as sensitivity=0.95")
    raise SettingsError(
        f"{card.name} has no working point {name} ({f'it has {there}' if there else 'it has none'}): "
        f"`ptxdist evaluate RUN --{kind} {target}` stores it in the run, and `ptxdist export` in a bundle"
    )


def _flagging(card: ModelCard, threshold: float) -> OperatingPoint:
    bottom = min(card.operating_point.bottom, card.pipeline.stages[-1].threshold)
    if not card.pipeline.model.image_head:  # the score is the highest probability: then some pixel reaches it
        bottom = min(bottom, threshold)
    return OperatingPoint(image=threshold, top=bottom, min_area_px=0, bottom=bottom)


def local_point(card: ModelCard, evaluation: EvaluationResult, place: str) -> tuple[OperatingPoint, str]:
    """The point that an evaluation on other data tuned for this model, and words that say where it is from.

    RunError when the evaluation is of other models, or has no tuned point.
    """
    about = evaluation.elsewhere
    if about is None or about.weights_sha256 != (card.weights_sha256,):
        raise RunError(f"{place} is no evaluation of {card.name} alone on other data (`ptxdist evaluate MODEL --data`)")
    if (best := evaluation.best_tuned) is None:
        raise RunError(f"{place} has no tuned point: it has the images of a single patient")
    scores = evaluation.scores
    return best.point, (
        f"the {best.kind} tuned on {scores.cases:,} images ({scores.positives:,} positive) of other data (on which "
        f"its scores are optimistic), whose cross-fitted Kaggle Dice is {best.estimate.kaggle_dice:.4f}"
    )


def refuse_different(cards: Sequence[ModelCard], error: type[PtxdistError]) -> None:
    """Raise the `error` when models to be used together segment different findings, or score images differently."""
    first = cards[0]
    for card in cards[1:]:
        if card.finding.is_other(first.finding):
            raise error(
                f"{first.name} segments {first.finding.name} and {card.name} {card.finding.name}; use models of one "
                "finding together"
            )
        if card.pipeline.model.image_head != first.pipeline.model.image_head:
            raise error(
                f"of {first.name} and {card.name} only one has an image head, so their scores differ in meaning; use "
                "models with the same model.image_head together"
            )


def load_model(path: Path) -> tuple[ModelCard, UNet]:
    """Card and network, on the CPU, of a finished run (a folder) or a bundle (a file); errors as `read_model`.

    The weights are compared with the card before any memory is taken for the network.
    """
    card, state = read_model(path)
    model = card.pipeline.model
    try:
        with torch.device("meta"):
            expected = build_unloaded(model).state_dict()
    except SettingsError as error:
        raise CheckpointError(f"{path}: {error}") from error
    refuse_other_model(expected, state, str(path))
    network = build_unloaded(model)
    network.load_state_dict(state)
    return card, network


def read_model(path: Path) -> tuple[ModelCard, Mapping[str, Tensor]]:
    """Card and weights of a finished run (a folder) or a bundle (a file).

    Raises RunError when there is no finished run, CheckpointError when weights or bundle are damaged.
    """
    if path.is_dir():
        card, weights = describe_run(path)
        return card, read_weights(weights, card.weights_sha256)
    if not path.is_file():
        raise RunError(f"no model at {path}: give a run folder of `ptxdist train` or a bundle of `ptxdist export`")
    card, members = read_members(path)
    try:
        return card, safetensors.torch.load(members[WEIGHTS])
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: its weights are damaged: {error}") from error


def write_bundle(model: Path, out: Path, point: tuple[OperatingPoint, str] | None = None) -> str:
    """Write the bundle of a finished run, or of a bundle with another `point`; return the sha256 of the file.

    A `point` replaces the operating point, with words that say where it is from.

    The same run gives the same bytes. Raises RunError when the run is not finished, CheckpointError when its weights
    are not those of its result, or when the file cannot be written.
    """
    if model.is_file():
        card, members = read_members(model)
    else:
        card, path = describe_run(model)
        read_weights(path, card.weights_sha256)
        members = {README: b"", WEIGHTS: path.read_bytes()}
        if seen := read_training_images(model):  # None for a run of an older version, whose bundle keeps its bytes
            members[TRAINING_IMAGES] = seen
    card = card.at(*point) if point else card
    members[README] = _readme(card).encode()
    plain = card.model_dump(mode="json")
    plain["sha256"] = {name: files.sha256(content) for name, content in members.items()} | {CARD: fingerprint(plain)}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {CARD: json.dumps(plain, indent=2).encode(), **members}.items():
            archive.writestr(zipfile.ZipInfo(name, _WHEN), content)
    files.write_whole(out, file.getvalue(), error=CheckpointError)
    return files.sha256(file.getvalue())


def read_members(path: Path) -> tuple[ModelCard, dict[str, bytes]]:
    """Card of a bundle, and the content of its other members, all checked.

    Raises CheckpointError when the file is not a bundle, is damaged, was altered, or is of another version.
    """
    foreign, again = f"{path} is not a bundle of `ptxdist export`", "get the file again from its source"
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            if names not in ([CARD, README, WEIGHTS], [CARD, README, WEIGHTS, TRAINING_IMAGES]) or any(
                member.compress_type or member.file_size > _MAX_BYTES[member.filename] for member in members
            ):
                raise CheckpointError(f"{foreign} (it should hold {CARD}, {README} and {WEIGHTS}, uncompressed)")
            if path.stat().st_size != _EMPTY_ZIP + sum(2 * len(m.filename) + m.file_size + _EACH for m in members):
                raise ValueError("it has more bytes than its members need")
            card, *contents = (archive.read(member) for member in members)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {system_says(error, again)}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{foreign}, or is damaged: {error}; {again}") from error
    found = dict(zip(names[1:], contents, strict=True))
    return _check(path, card, found), found


def _check(path: Path, content: bytes, members: Mapping[str, bytes]) -> ModelCard:
    try:
        plain: Any = files.parse_json(content)
        sums = plain.pop("sha256")
        found = {name: files.sha256(member) for name, member in members.items()} | {CARD: fingerprint(plain)}
        altered = [name for name in sorted({*sums, *found}) if sums.get(name) != found.get(name)]
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path}: its {CARD} cannot be read; get the file again") from error
    if altered:
        raise CheckpointError(f"{path} was altered after it was written: wrong checksum of {', '.join(altered)}")
    try:
        card = ModelCard.model_validate_json(json.dumps({**plain, "pipeline": without_removed(plain.get("pipeline"))}))
    except (ValueError, RecursionError) as error:
        first = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise CheckpointError(
            f"{path}: its {CARD} does not fit this version of ptxdist ({first}); "
            "use the version that wrote it, or export the run again"
        ) from error
    if card.size_px != card.pipeline.stages[-1].size_px:
        raise CheckpointError(f"{path}: its {CARD} has {card.size_px} pixels and another size in its last stage")
    if card.weights_sha256 != found[WEIGHTS]:
        raise CheckpointError(f"{path}: its weights are not those of its {CARD}")
    if card.preprocessing != TRANSFORM:
        raise CheckpointError(
            f"{path} was trained on images of transform {card.preprocessing}, this version has transform {TRANSFORM}; "
            "use the version that wrote it"
        )
    return card


def _readme(card: ModelCard) -> str:
    scores, point, model = card.evaluation.scores, card.operating_point, card.pipeline.model
    # Not `point.words`: the same run must go on giving the same bytes.
    needed = (f"the score reaches {point.image:g} and " if point.image else "") + f"{point.min_area_px} px"
    positive = "not defined" if scores.positive_dice is None else f"{scores.positive_dice:.4f}"
    encoder = encoders.chosen(model).words
    head = ", with an image head" if model.image_head else ""
    start = f"encoder from {encoders.start_in_words(model)}"
    if card.training_images is None:  # a run of an older version, whose bundle keeps its bytes
        start = f"encoder from {model.encoder_weights}"
    elif card.made_from:
        start = "from another model (below)"
    synthetic = f"- **Synthetic**: {SYNTHETIC}\n" if card.synthetic else ""
    made_from = f"- **Made from**: {' '.join(in_words(card.made_from))}\n" if card.made_from else ""
    return f"""# {card.finding.title} segmentation: {card.name}

Research use only; not a medical device. Made with ptxdist: `ptxdist predict FILE.ptxdist IMAGES --out DIR`.

- **What it does**: finds the px of {card.finding.one} in one frontal chest radiograph (grayscale DICOM or PNG).
- **Network**: U-Net on a {encoder}, decoder {"-".join(map(str, model.decoder_channels))}, {card.size_px} px{head},
  {start}; {"image and mirror image averaged" if card.flip_averaging else "one pass"}.
- **Operating point** (from {card.operating_point_from}): a mask is empty unless {needed} of the original
  image reach {point.top:g}; it is made of all px that reach {point.bottom:g}.
- **Measured** at threshold {card.evaluation.threshold:g} on {scores.cases} held-out images, {scores.positives} of them
  positive: Kaggle Dice {scores.kaggle_dice:.4f} (predicting nothing: {scores.all_empty_dice:.4f}), positives-only Dice
  {positive}, pooled Dice {scores.pooled_dice:.4f}.
{synthetic}- **Not known**: how it does on other scanners, countries, ages, devices in the chest, or lateral views.
{made_from}- **Data**: fingerprint {card.fingerprint}, over settings, code and every image and mask of its training.
- **Weights**: sha256 {card.weights_sha256}.
"""
