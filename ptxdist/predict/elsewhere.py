"""Evaluation of models on data that they were not trained with: any cache of `preprocess`.

Scored first is the operating point that the models have. Points tuned on these cases are beside it, cross-fitted by
patient. Images that a model was trained on are recognised by their fingerprints, and scores without them are given.

Owns: which models go together, and which cases are scored. Refuses: caches without the models' size (StoreError),
models of different sizes, kinds or findings, and masks of another finding (RunError).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ptxdist.cache.catalog import Case, read_catalog
from ptxdist.cache.fingerprints import Fingerprints, look_at
from ptxdist.cache.manifest import read_manifest, refuse_other_transform
from ptxdist.cache.salt import read_salt
from ptxdist.cache.store import open_store
from ptxdist.cache.verify import refuse_damaged
from ptxdist.config import DataSettings
from ptxdist.dicom.radiograph import hash_text
from ptxdist.errors import RunError, StoreError
from ptxdist.labels.patients import read_patients, without_patient
from ptxdist.places import refuse_taken
from ptxdist.predict.bundle import ModelCard, load_model, read_members, refuse_different
from ptxdist.records import Elsewhere, EvaluationResult, SeenImages
from ptxdist.rundir import TRAINING_IMAGES, read_training_images
from ptxdist.scores.counts import CaseCounts
from ptxdist.scores.intervals import score_intervals
from ptxdist.scores.metrics import scores
from ptxdist.scores.tables import read_cases
from ptxdist.scores.working import NO_POINTS, Wanted
from ptxdist.storage.caches import local_cache
from ptxdist.storage.remote import is_remote
from ptxdist.train.device import choose_device, choose_precision
from ptxdist.train.distributed import rank
from ptxdist.train.evaluate import NOBODY, Ensemble, Known, Masks, score_and_write

Split = Literal["all", "train", "val"]


def evaluate_elsewhere(
    models: Sequence[Path],
    data: Path | str,
    *,
    folder: Path,
    split: Split = "all",
    patients: Path | None = None,
    working: Wanted = NO_POINTS,
    device: torch.device | None = None,
    on_cases: Callable[[int, int], None] = lambda done, total: None,
) -> EvaluationResult:
    """Score finished runs or bundles, of several the mean, on the labelled cases of the cache `data`.

    `split` is the side of the cache's own split. The files of an evaluation are written to `folder`, with `point` and
    `elsewhere` in the result. `patients` is a table of image ids and patients, for a cache made without one, `working`
    the working points to find. `on_cases` is called with (images done, images). Operating point, flip averaging and
    precision are those of the first model. All ranks of a process group call it, and divide the cases.
    """
    refuse_taken(folder)
    loaded = [load_model(model) for model in models]
    cards = [card for card, _ in loaded]
    card = cards[0]
    refuse_different(cards, RunError)
    _refuse_other_sizes(cards)
    device = device or choose_device("auto")
    cache = local_cache(data, [card.size_px], data=DataSettings(cache=str(data)))
    catalog = read_catalog(cache)
    if card.finding.is_other(catalog.finding):
        raise RunError(
            f"{card.name} segments {card.finding.name}, and the masks in {data} show {catalog.finding.name}; give a "
            f"cache whose masks show {card.finding.name}"
        )
    refuse_other_transform(cache, card.preprocessing)
    _refuse_without_size(cache, card)
    if not is_remote(str(data)):  # the copy of a remote one has just been compared
        refuse_damaged(cache, [card.size_px])
    store = open_store(cache, card.size_px)
    sides = ("train", "val") if split == "all" else (split,)
    indices = np.array([row for row, case in enumerate(catalog.labelled) if case.split in sides], np.int64)
    if not len(indices):
        raise RunError(f"{cache} has no labelled case in the split {split!r}")
    trained_on = [_training_images(model) for model in models]  # before the long work: they may be damaged
    network = Ensemble(model for _, model in loaded).to(device).to(memory_format=torch.channels_last)

    cases = [catalog.labelled[row] for row in indices.tolist()]

    def complete(result: EvaluationResult, counts: CaseCounts) -> EvaluationResult:
        found, here = look_at(store, catalog, indices, read_salt(cache))
        about = Elsewhere(
            data=str(data) if is_remote(str(data)) else str(Path(data).absolute()),
            split=split,
            models=tuple(card.name for card in cards),
            weights_sha256=tuple(card.weights_sha256 for card in cards),
            point_from=card.operating_point_from,
            here=here,
            there=card.profile,
            seen=_seen(trained_on, found, cases, counts),
        )
        return result.model_copy(update={"elsewhere": about})

    return score_and_write(
        [(lambda: network, indices)],
        catalog,
        cache,
        folder,
        Masks(
            size_px=card.size_px,
            threshold=card.operating_point.bottom,
            min_area_px=card.evaluation.min_area_px,
            flip_averaging=card.flip_averaging,
            image_head=card.pipeline.model.image_head,
            precision=choose_precision(card.precision, device),
            models=len(cards),
            point=card.operating_point,
        ),
        device=device,
        known=_known(cases, patients, read_salt(cache)) if rank() == 0 else NOBODY,
        working=working,
        complete=complete,
        on_cases=on_cases,
    )


def _refuse_other_sizes(cards: Sequence[ModelCard]) -> None:
    for card in cards[1:]:
        if card.size_px != cards[0].size_px:
            raise RunError(
                f"{card.name} has {card.size_px} pixels and {cards[0].name} {cards[0].size_px}; models are evaluated "
                "together at one size"
            )


def _refuse_without_size(cache: Path, card: ModelCard) -> None:
    sizes = {size for size, record in read_manifest(cache).sizes.items() if record.complete}
    if card.size_px not in sizes:
        raise StoreError(
            f"{cache} has {', '.join(f'{size} px' for size in sorted(sizes)) or 'no finished size'}, and {card.name} "
            f"needs {card.size_px} px: `ptxdist preprocess … --size {card.size_px}`"
        )


def _known(cases: Sequence[Case], patients: Path | None, salt: bytes) -> Known:
    """Patients of the cases. Whether they are in training is not known: names are hashed with another salt there."""
    groups = [case.group for case in cases]
    if patients is not None:
        who = read_patients(patients, [case.case_id for case in cases])
        groups = [hash_text(who[case.case_id], salt) if case.case_id in who else case.group for case in cases]
    return groups, [None] * len(cases), "nothing"


def unknown_patients(folder: Path, patients: Path) -> str:
    """Which images of an evaluation the table `patients` lacks, as a sentence; "" if none."""
    return without_patient(patients, [row.case_id for row in read_cases(folder)])


def _seen(
    trained_on: Sequence[Fingerprints | None], found: Fingerprints, cases: Sequence[Case], counts: CaseCounts
) -> SeenImages | None:
    """What the models were trained on; None if one of them has no fingerprints."""
    equal, alike, patients = (np.zeros(len(cases), bool) for _ in range(3))
    compared = True
    for training in trained_on:
        if training is None:
            return None
        same, close = found.seen_in(training)
        equal, alike = equal | same, alike | close
        known = found.patients_in(training)
        compared = compared and known is not None
        patients = patients if known is None else patients | known
    alike &= ~equal
    patients &= ~(equal | alike)
    seen = equal | alike | patients
    rows = np.flatnonzero(~seen)
    own, groups = counts.at_full[0][rows], [cases[row].group for row in rows.tolist()]
    return SeenImages(
        equal=int(equal.sum()),
        alike=int(alike.sum()),
        patients=int(patients.sum()) if compared else None,
        case_ids=tuple(cases[row].case_id for row in np.flatnonzero(seen).tolist()),
        without=scores(own) if len(rows) else None,
        without_intervals=score_intervals(own, groups) if len(rows) else {},
    )


def _training_images(model: Path) -> Fingerprints | None:
    content = read_training_images(model) if model.is_dir() else read_members(model)[1].get(TRAINING_IMAGES)
    return None if content is None else Fingerprints.read(content, str(model))
