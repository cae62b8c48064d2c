"""Evaluation of finished runs on the cases they have held out, at the original resolution.

Runs that held out the same fold are an ensemble, whose probabilities are averaged; the cases of different folds are
pooled. All ranks of a process group must call `evaluate` together; each scores its share of the cases. What
follows from the counts is in `scores.analysis`, the definition of the scores in `scores.metrics`.

Owns: which weights see which cases. Refuses: runs that do not go together (RunError).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ptxdist import files
from ptxdist.cache.catalog import Catalog, read_catalog
from ptxdist.cache.salt import read_salt
from ptxdist.cache.split import split_indices
from ptxdist.cache.store import open_store
from ptxdist.cache.verify import refuse_damaged
from ptxdist.config import Settings
from ptxdist.dicom.radiograph import hash_text
from ptxdist.errors import RunError
from ptxdist.labels import rle
from ptxdist.labels.patients import read_patients
from ptxdist.places import refuse_taken
from ptxdist.records import EvaluationResult, OperatingPoint, PipelineResult, StageResult
from ptxdist.rundir import EVALUATION, RESULT, read_evaluation, read_settings, read_stages, write_evaluation
from ptxdist.scores.analysis import Evaluated, conclude
from ptxdist.scores.counts import CaseCounts
from ptxdist.scores.tables import FIXED_THRESHOLDS, refuse_other_split, write_tables
from ptxdist.scores.working import NO_POINTS, Wanted
from ptxdist.storage.caches import local_cache
from ptxdist.storage.remote import is_remote
from ptxdist.train.checkpoint import load_weights
from ptxdist.train.dataset import Indices
from ptxdist.train.device import choose_device, choose_precision, keep_freed_memory
from ptxdist.train.distributed import barrier, gather_texts, rank, world_size
from ptxdist.train.losses import heads
from ptxdist.train.scoring import score_cases
from ptxdist.train.unet import Output, build_unloaded


@dataclass(frozen=True)
class Member:
    """A run in an evaluation: its folder, its settings, and the result of its last stage."""

    run: Path
    settings: Settings
    stage: StageResult

    @classmethod
    def of(cls, run: Path) -> Member:
        """A run whose stages are finished, evaluated or not; RunError for others."""
        return cls(run, read_settings(run), read_stages(run)[-1])


class Ensemble(nn.Module):
    """Several models as one: the logits of the mean of their probabilities, of pixels and of image heads.

    Either all models have an image head, or none has one.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, image: Tensor) -> Output:
        """Logits B1HW of images B1HW, and with image heads also logits (B,)."""
        outputs: list[Output] = [model(image) for model in self.models]
        if len(outputs) == 1:
            return outputs[0]
        masks, images = zip(*map(heads, outputs), strict=True)
        return _average(masks) if images[0] is None else (_average(masks), _average(images))


def _average(logits: Sequence[Tensor]) -> Tensor:
    mean = torch.stack([part.float().sigmoid() for part in logits]).mean(0)
    return torch.logit(mean, eps=1e-6)


def load_ensemble(members: Sequence[Member], device: torch.device) -> Ensemble:
    """The networks of some runs with their weights; CheckpointError when a file is not what its run wrote."""
    models = []
    for member in members:
        model = build_unloaded(member.settings.pipeline.model)
        load_weights(model, member.run / member.stage.weights, member.stage.weights_sha256)
        models.append(model)
    return Ensemble(models).to(device).to(memory_format=torch.channels_last)


def evaluate(
    members: Sequence[Member],
    cache: Path,
    folder: Path,
    *,
    device: torch.device,
    patients: Path | None = None,
    working: Wanted = NO_POINTS,
    on_cases: Callable[[int, int], None] = lambda done, total: None,
) -> EvaluationResult:
    """Score the members on the cases of `cache` that each has held out, and write tables and result into `folder`.

    Masks come from the stage's threshold; the fixed thresholds are scored beside it, and the operating point is
    searched on the same probabilities. `patients` is a map of image ids to patients, for caches made without one;
    `working` are the working points to find. Every rank returns the result; rank 0 writes. Raises RunError, StoreError
    and CheckpointError when members, cache and weights do not go together; LabelError for a map that cannot be read.
    """
    catalog = read_catalog(cache)
    first = members[0]
    stage, how = first.settings.pipeline.stages[first.stage.stage - 1], first.settings.pipeline.evaluation
    for member in members:
        if member.stage.size_px != first.stage.size_px:
            raise RunError(
                f"{member.run} ends at {member.stage.size_px} pixels and {first.run} at {first.stage.size_px} pixels; "
                "runs are evaluated together at one size"
            )
        if _has_head(member) != _has_head(first):
            with_head, without = (member, first) if _has_head(member) else (first, member)
            raise RunError(
                f"{with_head.run} has an image head and {without.run} has none; evaluate runs with the same "
                "model.image_head together"
            )
        if member.settings.pipeline.fold >= catalog.folds:
            raise RunError(f"{member.run} held out fold {member.settings.pipeline.fold}; {cache} has {catalog.folds}")
    folds = sorted({member.settings.pipeline.fold for member in members})
    held_out = {fold: split_indices(catalog.labelled, fold)[1] for fold in folds}
    if not sum(map(len, held_out.values())):
        raise RunError(f"{cache} has no labelled case in fold {folds[0]}, which {first.run} held out")
    indices = np.concatenate(list(held_out.values()))

    def network(fold: int) -> nn.Module:
        return load_ensemble([member for member in members if member.settings.pipeline.fold == fold], device)

    return score_and_write(
        [(partial(network, fold), held_out[fold]) for fold in folds],
        catalog,
        cache,
        folder,
        Masks(
            size_px=stage.size_px,
            threshold=stage.threshold,
            min_area_px=how.min_area_px,
            flip_averaging=how.flip_averaging,
            image_head=_has_head(first),
            precision=choose_precision(first.settings.train.precision, device),
            models=len(members),
        ),
        working=working,
        device=device,
        known=_patients_of(catalog, indices, folds, patients, read_salt(cache)) if rank() == 0 else NOBODY,
        on_cases=on_cases,
    )


@dataclass(frozen=True)
class Masks:
    """How masks are made in an evaluation: size of the network's input, thresholds, averaging, number of models.

    With a `point`, that is the operating point of the masks, and `threshold` its lower one.
    """

    size_px: int
    threshold: float
    min_area_px: int
    flip_averaging: bool
    image_head: bool
    precision: torch.dtype
    models: int = 1
    point: OperatingPoint | None = None


Known = tuple[Sequence[str], Sequence[bool | None], str]  # groups, whether in training, and known from where
NOBODY: Known = ((), (), "")


def score_and_write(
    parts: Sequence[tuple[Callable[[], nn.Module], Indices]],
    catalog: Catalog,
    cache: Path,
    folder: Path,
    how: Masks,
    *,
    device: torch.device,
    known: Known,
    working: Wanted = NO_POINTS,
    complete: Callable[[EvaluationResult, CaseCounts], EvaluationResult] = lambda result, counts: result,
    on_cases: Callable[[int, int], None] = lambda done, total: None,
) -> EvaluationResult:
    """Score each network, which its function loads, on its positions in the store; write tables and result to `folder`.

    `known` is about the patients of all positions in their order; `complete` may add to the result, from the counts in
    that order. Rank 0 uses both, and writes; every rank returns the result.
    """
    keep_freed_memory(device)
    started, store = time.perf_counter(), open_store(cache, how.size_px)
    if store.cases != len(catalog.labelled):
        raise RunError(f"{store.path} and the catalog of {cache} differ; rerun `ptxdist preprocess`")
    total, done = sum(len(indices) for _, indices in parts), 0
    thresholds = list(dict.fromkeys((how.threshold, *FIXED_THRESHOLDS)))
    if how.point is not None:  # its masks are not those of its lower threshold
        thresholds = [how.threshold, *FIXED_THRESHOLDS]
    predictions: dict[int, str] = {}
    found = []
    for load, indices in parts:
        before = done
        found.append(
            score_cases(
                load(),
                store,
                catalog.labelled,
                indices,
                thresholds=thresholds,
                device=device,
                precision=how.precision,
                flip_averaging=how.flip_averaging,
                min_area_px=how.min_area_px,
                point=how.point,
                histograms=True,
                on_cases=lambda count, before=before: on_cases(min(total, before + count * world_size()), total),  # type: ignore[misc]
                on_mask=lambda index, mask: predictions.update({index: rle.encode(mask)}),
            )
        )
        done += len(indices)
    indices = np.concatenate([part for _, part in parts])
    counts = _join(found)
    texts = [json.loads(text) for text in gather_texts(json.dumps(predictions))]
    masks = {int(index): text for share in texts for index, text in share.items()}
    if rank() == 0:  # the others wait and leave the cores to it
        folder.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(folder, deep=False)
        evaluated = Evaluated([catalog.labelled[index] for index in indices], counts, *known)
        result, rows = conclude(
            evaluated,
            thresholds,
            min_area_px=how.min_area_px,
            flip_averaging=how.flip_averaging,
            runs=how.models,
            image_head=how.image_head,
            point=how.point,
            working=working,
        )
        result = complete(result, counts).model_copy(
            update={"finding": catalog.finding, "seconds": time.perf_counter() - started}
        )
        ids = [catalog.labelled[index].case_id for index in indices]
        predicted = [(case_id, masks[int(index)]) for case_id, index in zip(ids, indices, strict=True)]
        write_tables(folder, rows, predicted, counts.histograms)
        write_evaluation(folder, result)
    barrier()
    # Another rank's machine may not have the folder: a run in an object store has one on each.
    written = read_evaluation(folder).model_dump_json() if rank() == 0 else ""
    return EvaluationResult.model_validate_json(gather_texts(written)[0])


def evaluate_runs(
    runs: Sequence[Path],
    *,
    folder: Path | None = None,
    patients: Path | None = None,
    working: Wanted = NO_POINTS,
    device: torch.device | None = None,
    on_cases: Callable[[int, int], None] = lambda done, total: None,
) -> EvaluationResult:
    """Evaluate finished runs, each on the cases that it has held out, on this machine; returns the scores.

    Runs of one fold are an ensemble, whose probabilities are averaged; runs of several folds are pooled. The files of
    the evaluation are written to `folder`; for one run without `folder`, to RUN/evaluation, and RUN/result.json is
    rewritten. `patients` is a table of image ids and patients, for caches made without one; `working` are the working
    points to find; `device` is that of the first run's settings by default. All ranks of a process group call it, and
    divide the cases. `on_cases` is called with (images done, images). Errors as for `evaluate`; RunError for a run that
    is not finished or is of another cache or split, StoreError for a cache that is damaged.
    """
    members = [Member.of(run) for run in runs]
    places = [member.settings.data.cache for member in members]
    caches = {place if is_remote(place) else str(Path(place).resolve()) for place in places}
    if len(caches) > 1:
        raise RunError(f"the runs were trained on different caches ({', '.join(sorted(caches))})")
    if folder is None and len(runs) > 1:
        raise RunError("name a folder for the evaluation of several runs with --out")
    if folder is not None:
        refuse_taken(folder)
    sizes = sorted({member.stage.size_px for member in members})
    cache = local_cache(places[0], sizes, data=members[0].settings.data)
    catalog = read_catalog(cache)
    for member in members:
        refuse_other_split(member.run, catalog, member.settings.pipeline.fold)
    if not is_remote(places[0]):  # the copy of a remote one has just been compared
        refuse_damaged(cache, sizes)
    evaluation = evaluate(
        members,
        cache,
        folder or runs[0] / EVALUATION,
        device=device or choose_device("cpu" if members[0].settings.train.device == "cpu" else "auto"),
        patients=patients,
        working=working,
        on_cases=on_cases,
    )
    if folder is not None:
        return evaluation
    stages = tuple(read_stages(runs[0]))
    result = PipelineResult(
        pipeline=members[0].settings.pipeline.name,
        stages=stages,
        evaluation=evaluation,
        seconds=sum(stage.seconds for stage in stages) + evaluation.seconds,
    )
    if rank() == 0:
        files.write_json(runs[0] / RESULT, result)
    return evaluation


def _has_head(member: Member) -> bool:
    return member.settings.pipeline.model.image_head


def _join(parts: Sequence[CaseCounts]) -> CaseCounts:
    """The counts of one fold after another."""
    return CaseCounts(
        **{
            field.name: np.concatenate(
                [getattr(part, field.name) for part in parts], axis=1 if field.name == "at_full" else 0
            )
            for field in fields(CaseCounts)
        }
    )


def _patients_of(
    catalog: Catalog, indices: Iterable[int], folds: Sequence[int], patients: Path | None, salt: bytes
) -> tuple[list[str], list[bool | None], str]:
    """Group of each case, whether its patient has images in the training side of its fold, and the source of both."""
    cases = catalog.labelled
    known_from = "nothing" if catalog.leakage.grouped_by == "nothing" else "catalog"
    if patients is not None:
        known_from = "patient map"
        who = read_patients(patients, [case.case_id for case in cases])
        cases = tuple(
            replace(case, group=hash_text(who[case.case_id], salt) if case.case_id in who else case.group)
            for case in cases
        )
    taught = {fold: {cases[index].group for index in split_indices(cases, fold)[0]} for fold in folds}
    chosen = [cases[index] for index in indices]
    shared = [None if known_from == "nothing" else case.group in taught[case.fold] for case in chosen]
    return [case.group for case in chosen], shared, known_from
