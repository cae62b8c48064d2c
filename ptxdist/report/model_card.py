"""The model card of a run: intended use, model, training, training data, limits.

Everything is filled in from the run's records and the catalog. The headings follow Mitchell et al. 2019, "Model cards
for model reporting".
"""

from __future__ import annotations

from collections.abc import Iterator

from ptxdist.cache.catalog import Catalog
from ptxdist.cache.summary import percent, share, split_doubts
from ptxdist.config import Settings
from ptxdist.records import SYNTHETIC, Environment, Origin, ParentModel, PipelineResult, StageResult
from ptxdist.report.data_card import UNKNOWN_PATIENTS
from ptxdist.report.page import Facts
from ptxdist.train import augment, encoders, losses

_IMAGE_HEAD = (
    "An image head predicts from the encoder's coarsest features whether the image is positive. The score of an image "
    "is the mean of its probability and of that of the highest pixels."
)
_FEW_POSITIVES = 100  # below, the interval of a mean Dice is some tenths wide


def model_card(
    settings: Settings, result: PipelineResult, catalog: Catalog, environment: Environment, origin: Origin | None
) -> tuple[Facts, ...]:
    """A list of sentences for each heading; `origin` is None for runs of older versions."""
    parent = origin.parent if origin else None
    return (
        Facts(_use(catalog), "Intended use"),
        Facts(_model(settings, result, environment, parent), "Model"),
        Facts(tuple(_stage(stage, settings) for stage in result.stages), "Training"),
        Facts(_training_data(catalog), "Training data"),
        Facts((*_limits(result, catalog), *_seen(parent)), "Limits"),
    )


def _use(catalog: Catalog) -> tuple[str, ...]:
    finding = catalog.finding
    return (
        *((SYNTHETIC,) if catalog.synthetic else ()),
        f"Intended for research on {finding.name} segmentation on frontal chest radiographs.",
        "Not intended for diagnosis, triage or any other decision about a patient. It is not a medical device, and no "
        "authority has reviewed it.",
        f"Its output is a mask of the pixels that look like {finding.one}, and a score of the image. It says nothing "
        "about other findings.",
    )


def made_from(parent: ParentModel) -> tuple[str, ...]:
    """What a network was made from, and how much of that is known, in sentences."""
    what = {"run": "run", "bundle": "bundle", "file": "file of weights"}[parent.kind]
    name = f" {parent.name}" if parent.name else ""
    data = "its training data are not known"
    if parent.fingerprint is not None:
        images = "an unknown number of" if parent.images is None else f"{parent.images:,}"
        data = f"trained on {images} images, data fingerprint {parent.fingerprint}"
    found = [f"The whole network started from the {what}{name}: weights sha256 {parent.weights_sha256}, {data}."]
    if parent.finding:
        found.append(f"It was trained for another finding: {parent.finding.name}.")
    if parent.fresh:
        found.append(f"It had no {' and no '.join(parent.fresh)}; that started from random weights.")
    if parent.unused:
        found.append(f"Its {' and '.join(parent.unused)} was not used.")
    if parent.parent:
        before = parent.parent
        found.append(
            f"It was made from another model itself: {before.name or 'weights'}, sha256 {before.weights_sha256}."
        )
    return tuple(found)


def _seen(parent: ParentModel | None) -> Iterator[str]:
    """The warning that held-out patients may have been trained on before."""
    if parent is None:
        return
    if parent.seen is None:
        yield (
            "Whether the model that the network started from was trained on held-out patients is not known; if it was, "
            "the scores are too high."
        )
    elif parent.seen:
        what = "of patients" if parent.seen_by == "patient" else "among the images"
        yield (
            f"{parent.seen:,} held-out images are {what} on which the model that the network started from was trained: "
            "the scores are too high."
        )
    elif parent.seen_by == "image":
        yield (
            "The model that the network started from was trained on none of the held-out images; whether it was on "
            "other images of their patients is not known."
        )
    if parent.parent:
        yield "What the model before that one was trained on was not compared with the held-out patients."


def _model(
    settings: Settings, result: PipelineResult, environment: Environment, parent: ParentModel | None
) -> tuple[str, ...]:
    model, last = settings.pipeline.model, result.stages[-1]
    weights = encoders.start_in_words(model)
    mapping = "repeated over" if model.input_mapping == "repeat" else "mapped by a learned 1x1 convolution to"
    packages = environment.packages
    versions = ", ".join(f"{name} {packages[name]}" for name in ("ptxdist", "torch") if name in packages)
    sentences = [
        f"U-Net: {encoders.chosen(model).words} encoder{'' if parent else f', started from {weights}'}; decoder of "
        f"{'-'.join(map(str, model.decoder_channels))} channels; the grey image is {mapping} three channels.",
        *((_IMAGE_HEAD,) if model.image_head else ()),
        f"Input: {last.size_px} x {last.size_px} pixels; images that are not square are padded with black. "
        "Probabilities are resized to the original resolution before the threshold is applied.",
        *(made_from(parent) if parent else ()),
        f"Weights: sha256 {last.weights_sha256}.",
    ]
    if versions:
        commit = f", commit {environment.commit[:12]}" if environment.commit else ""
        sentences.append(f"Made with {versions}{commit}.")
    if settings.pipeline.source:
        sentences.append(f"Recipe: {settings.pipeline.source}.")
    return tuple(sentences)


def _stage(stage: StageResult, settings: Settings) -> str:
    how, image_head = settings.pipeline.stages[stage.stage - 1], settings.pipeline.model.image_head
    parts = [
        f"{stage.epochs} {'epoch' if stage.epochs == 1 else 'epochs'} at {stage.size_px} pixels",
        f"batches of {how.batch_size} over {stage.workers} {'worker' if stage.workers == 1 else 'workers'}",
        f"{f'AdamW, weight decay {how.weight_decay:g}' if how.weight_decay else 'Adam'}, learning rate from "
        f"{how.learning_rate:g}, {how.schedule} schedule"
        + (f", warm-up over {how.warmup_steps} steps" if how.warmup_steps else ""),
        losses.chosen(how).words + (f" + {how.image_weight:g} x BCE of the image head" if image_head else ""),
        f"augmentation: {augment.in_words(how.augmentation)}",
    ]
    if how.negative_weight != 1:
        parts.append(f"negative images count {how.negative_weight:g} in the loss of the masks")
    if how.mix:
        parts.append(f"parts of other images in {percent(how.mix)} of the images")
    if how.phantoms:
        parts.insert(1, f"on {how.phantoms:,} phantoms with the masks of the training cases")
    if how.positive_share:
        first, last = map(percent, how.positive_share)
        kind = (
            "all positive images in each epoch, their share" if how.epoch == "positives" else "share of positive images"
        )
        parts.append(f"{kind} in a batch from {first} to {last}")
    if how.swa_epochs:
        parts.append(f"weights averaged over the last {how.swa_epochs} epochs (SWA)")
    best = "the averaged weights" if stage.best.averaged else f"epoch {stage.best.epoch}"
    chosen = f"the last one: {best}" if how.phantoms else f"best by {how.best_by}: {best}"
    reused = f"; taken from run {stage.reused_from}" if stage.reused_from else ""
    return f"Stage {stage.stage}: {', '.join(parts)}; {chosen}{reused}."


def _training_data(catalog: Catalog) -> tuple[str, ...]:
    cases = [case for case in catalog.cases if case.split == "train"]
    positive = sum(bool(case.masks) for case in cases)
    grouped = catalog.leakage.grouped_by
    patients = f" of {len({case.group for case in cases}):,} patients ({grouped})" if grouped != "nothing" else ""
    one = catalog.finding.one
    return (
        f"{len(cases):,} radiographs{patients}, {positive:,} with {one} ({share(positive, len(cases))}).",
        f"The masks were drawn by readers, who differ in the outline of {one}; treat them as a reference, not as the "
        "exact truth.",
    )


def _limits(result: PipelineResult, catalog: Catalog) -> Iterator[str]:
    scores, leakage = result.evaluation.scores, catalog.leakage
    yield (
        "Evaluated on held-out images of the same source as the training images. Nothing is known of other hospitals, "
        "machines, projections or ages."
    )
    if scores.equals_all_empty:
        yield "This model finds nothing: no pixel is predicted in any held-out image."
    if scores.positives < _FEW_POSITIVES:
        yield f"Only {scores.positives} held-out images have {catalog.finding.one}, so the intervals are wide."
    if leakage.grouped_by == "nothing":
        yield f"Patients are not known, so {UNKNOWN_PATIENTS}."
    elif leakage.shared_cases:
        yield f"{leakage.shared_cases:,} held-out images share a patient with training."
    yield from (f"{doubt[0].upper()}{doubt[1:]}." for doubt in split_doubts(catalog))
    if leakage.near_duplicates_shared:
        yield f"{leakage.near_duplicates_shared:,} pairs of similar images are on different sides of the split."
    if not catalog.dialect_proven:
        yield f"The encoding of the masks, {catalog.dialect}, is assumed; the masks do not prove it."
    yield "The best epoch was chosen on the same held-out images, so the scores are slightly optimistic."
