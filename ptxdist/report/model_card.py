"""The model card of a run and the card of its data: what is known from the run, in words and tables.

Owns: what is said of purpose, training, data and limits. Refuses: nothing. Called by: `report`. Everything is filled
from the run's records and the catalog; groups are counted, no single patient is described. The headings follow
Mitchell et al. 2019, "Model cards for model reporting".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ptxdist.cache.catalog import Case, Catalog
from ptxdist.config import Settings, StageSettings
from ptxdist.records import PipelineResult, StageResult

Pairs = tuple[tuple[str, str], ...]
_FEW_POSITIVES = 100  # below, the interval of a mean Dice is some tenths wide
_REASONS_SHOWN = 10
_VALUES_SHOWN = 4


def model_card(
    settings: Settings, result: PipelineResult, catalog: Catalog, environment: Mapping[str, Any]
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Headings and their sentences."""
    return (
        ("Intended use", _use()),
        ("Model", _model(settings, result, environment)),
        ("Training", tuple(_stage(stage, how) for stage, how in _stages(settings, result))),
        ("Training data", _training_data(catalog)),
        ("Limits", _limits(result, catalog)),
    )


def _use() -> tuple[str, ...]:
    return (
        "Made for: research on the segmentation of pneumothorax on frontal chest radiographs.",
        "Not made for: diagnosis, triage or any other decision about a patient. It is not a medical device, and no "
        "authority has seen it.",
        "Its output is a mask of px that look like a pneumothorax and a score of the image; it says nothing of other "
        "findings.",
    )


def _model(settings: Settings, result: PipelineResult, environment: Mapping[str, Any]) -> tuple[str, ...]:
    model, last = settings.pipeline.model, result.stages[-1]
    weights = {"none": "random weights", "imagenet": "weights trained on ImageNet"}.get(
        model.encoder_weights, "weights from a file"
    )
    mapping = "repeated over" if model.input_mapping == "repeat" else "mapped by a learned 1x1 convolution to"
    packages = environment.get("packages", {})
    versions = ", ".join(f"{name} {packages[name]}" for name in ("ptxdist", "torch") if name in packages)
    sentences = [
        f"U-Net: ResNet-34 encoder, started from {weights}; decoder of "
        f"{'-'.join(map(str, model.decoder_channels))} channels; the grey image is {mapping} three channels.",
        f"Input {last.size_px} px square (not square images are padded with black); probabilities are brought back to "
        "the original resolution before the threshold.",
        f"Weights: sha256 {last.weights_sha256}.",
    ]
    if versions:
        commit = environment.get("commit")
        sentences.append(f"Made with {versions}" + (f", commit {str(commit)[:12]}." if commit else "."))
    if settings.pipeline.source:
        sentences.append(f"Recipe: {settings.pipeline.source}.")
    return tuple(sentences)


def _stages(settings: Settings, result: PipelineResult) -> Iterable[tuple[StageResult, StageSettings]]:
    return ((stage, settings.pipeline.stages[stage.stage - 1]) for stage in result.stages)


def _stage(stage: StageResult, how: StageSettings) -> str:
    parts = [
        f"{stage.epochs} {'epoch' if stage.epochs == 1 else 'epochs'} at {stage.size_px} px",
        f"batches of {how.batch_size} over {stage.workers} {'worker' if stage.workers == 1 else 'workers'}",
        f"Adam from {how.learning_rate:g}, {how.schedule} schedule",
        f"BCE and Dice loss (Dice per {how.dice})",
        f"augmentation: {how.augmentation}",
    ]
    if how.positive_share:
        first, last = map(percent, how.positive_share)
        parts.append(f"positive images in a batch {first} at first, {last} at last")
    if how.swa_epochs:
        parts.append(f"weights of the last {how.swa_epochs} epochs averaged")
    best = "the averaged weights" if stage.best.averaged else f"epoch {stage.best.epoch}"
    reused = f"; taken from the run {stage.reused_from}" if stage.reused_from else ""
    return f"Stage {stage.stage}: {', '.join(parts)}; best by {how.best_by}: {best}{reused}."


def _training_data(catalog: Catalog) -> tuple[str, ...]:
    cases = [case for case in catalog.cases if case.split == "train"]
    positive = sum(bool(case.masks) for case in cases)
    grouped = catalog.leakage.grouped_by
    patients = f" of {len({case.group for case in cases}):,} patients ({grouped})" if grouped != "nothing" else ""
    return (
        f"{len(cases):,} radiographs{patients}, {positive:,} with a pneumothorax ({_share(positive, len(cases))}).",
        "Who reads the masks as truth should know that they are drawn by readers, who do not agree with each other to "
        "the last px.",
    )


def _limits(result: PipelineResult, catalog: Catalog) -> tuple[str, ...]:
    evaluation, leakage = result.evaluation, catalog.leakage
    scores = evaluation.scores
    found = ["Measured on held-out images of the same source as the training images: nothing is known of other "
             "hospitals, machines, projections or ages."]  # fmt: skip
    if scores.equals_all_empty:
        found.append("This model finds nothing: no px is predicted in any held-out image.")
    if scores.positives < _FEW_POSITIVES:
        found.append(
            f"Only {scores.positives} held-out images have a pneumothorax; read the intervals, not the fourth digit."
        )
    if leakage.grouped_by == "nothing":
        found.append("Patients are not known, so images of one patient may stand on both sides of the split.")
    elif leakage.shared_cases:
        found.append(f"{leakage.shared_cases:,} held-out images share a patient with training.")
    if leakage.near_duplicates_shared:
        found.append(f"{leakage.near_duplicates_shared:,} pairs of images look the same across the split.")
    if not catalog.dialect_proven:
        found.append(f"That the masks are written as {catalog.dialect} is assumed, not proven by the masks.")
    found.append("The same held-out images chose the best epoch, so the scores are a little too good.")
    return tuple(found)


def reconciliation(catalog: Catalog) -> Pairs:
    """How table and files fit together: names (a leading blank: part of the one above) and values."""
    counts, areas = catalog.reconciliation, [case.area_px for case in catalog.cases if case.masks]
    return (
        ("rows of the label table", f"{counts.table_rows:,}"),
        ("images in the label table", f"{counts.table_images:,}"),
        (" with a pneumothorax", f"{counts.table_positive:,}"),
        (" with several masks", f"{counts.table_several_masks:,}"),
        (" with overlapping masks, united", f"{counts.table_overlapping:,}"),
        (" without a file", f"{counts.ids_without_file:,}"),
        ("image files", f"{counts.files:,}"),
        (" rejected", f"{len(catalog.rejects):,}"),
        (" copies of another one", f"{counts.duplicates:,}"),
        ("images with a label", f"{counts.labelled:,}"),
        (" with a pneumothorax", f"{counts.positive:,} ({_share(counts.positive, counts.labelled)})"),
        (" median mask area (5 % to 95 %)", f"{_spread(areas)} px" if areas else "none"),
        ("images without a label, not used", f"{counts.unlabelled:,}"),
    )


def sides(catalog: Catalog) -> tuple[tuple[str, str, str], ...]:
    """Who trains and who validates: what is counted, in training, held out."""
    parts = [[case for case in catalog.cases if case.split == side] for side in ("train", "val")]

    def row(name: str, value: Callable[[Sequence[Case]], str]) -> tuple[str, str, str]:
        train, val = (value(part) for part in parts)
        return name, train, val

    def share(matches: Callable[[Case], bool]) -> Callable[[Sequence[Case]], str]:
        return lambda part: f"{(hits := sum(map(matches, part))):,} ({_share(hits, len(part))})"

    def same(field: str, value: str) -> Callable[[Case], bool]:
        return lambda case: bool(getattr(case, field) == value)

    def ages(part: Sequence[Case]) -> str:
        known = [case.age for case in part if case.age is not None]
        return f"{_spread(known)} years" if known else "not known"

    def areas(part: Sequence[Case]) -> str:
        known = [case.area_px for case in part if case.masks]
        return f"{_spread(known)} px" if known else "none"

    rows = [row("images", lambda part: f"{len(part):,}")]
    if catalog.leakage.grouped_by != "nothing":
        rows.append(row("patients", lambda part: f"{len({case.group for case in part}):,}"))
    rows.append(row("with a pneumothorax", share(lambda case: bool(case.masks))))
    rows.append(row("with several masks", share(lambda case: len(case.masks or ()) > 1)))
    for field in ("view", "sex"):
        values = Counter(str(getattr(case, field)) for part in parts for case in part)
        for value, _ in values.most_common(_VALUES_SHOWN):
            rows.append(row(f"{field} {value or 'not known'}", share(same(field, value))))
    rows.append(row("median age (5 % to 95 %)", ages))
    rows.append(row("median mask area (5 % to 95 %)", areas))
    return tuple(rows)


def rejected(catalog: Catalog) -> Pairs:
    """Reasons for rejecting files, the most frequent first, and how many files each; () when all could be read."""
    reasons = Counter(
        re.sub(r"\b[\d.]{20,}\b", "…", reject.reason) for reject in catalog.rejects
    )  # an id makes each its own
    return tuple((reason, f"{times:,}") for reason, times in reasons.most_common(_REASONS_SHOWN))


def leakage_words(catalog: Catalog) -> tuple[str, ...]:
    """What the split leaks, in sentences."""
    leakage = catalog.leakage
    if leakage.grouped_by == "nothing":
        grouping = (
            "Nothing is known of patients: PatientID groups nothing and no map was given. One patient may stand on "
            "both sides of the split, and the scores may be too good."
        )
    else:
        grouping = (
            f"Patients are known by {leakage.grouped_by}: {leakage.groups:,}, of them {leakage.positive_groups:,} with "
            f"a pneumothorax. {leakage.shared_cases:,} of {leakage.val_cases:,} held-out images share a patient with "
            f"training; a random split of this size would share {percent(leakage.random_shared)} of them "
            f"({percent(leakage.random_shared_positive)} of the positive ones)."
        )
    return (
        grouping,
        f"Near-duplicates: {leakage.near_duplicates:,} pairs of images look the same, "
        f"{leakage.near_duplicates_shared:,} of them with one image on each side.",
        f"Masks are read as {catalog.dialect}, "
        + ("proven by the masks themselves." if catalog.dialect_proven else "which the masks do not prove."),
    )


def percent(share: float) -> str:
    """A share as 27.5 %, with a blank that does not break."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _share(part: int, whole: int) -> str:
    return percent(part / whole) if whole else "none"


def _spread(values: Sequence[int]) -> str:
    ordered = sorted(values)
    low, middle, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.05, 0.5, 0.95))
    return f"{middle:,} ({low:,} to {high:,})"
