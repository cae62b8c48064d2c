"""The checks before a run starts, and the plan that comes out of them.

Owns: everything that can be wrong with cache, split, weights file and run folder; the fingerprints of stages.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ptxdist import files
from ptxdist.cache.catalog import Catalog, read_catalog
from ptxdist.cache.fingerprints import look_at
from ptxdist.cache.manifest import refuse_other_transform
from ptxdist.cache.render import TRANSFORM
from ptxdist.cache.salt import read_salt
from ptxdist.cache.split import split_indices
from ptxdist.cache.store import open_store
from ptxdist.cache.verify import refuse_damaged
from ptxdist.config import PipelineSettings, Settings, StageSettings, fingerprint
from ptxdist.errors import CheckpointError, ClusterError, SettingsError, StoreError
from ptxdist.events import RunStart
from ptxdist.finding import PNEUMOTHORAX
from ptxdist.records import Origin, StageResult
from ptxdist.run.engine import StageTask
from ptxdist.run.origin import origin_of
from ptxdist.run.tracking import refuse_missing_mlflow
from ptxdist.rundir import ORIGIN, TRAINING_IMAGES, read_origin, start_run
from ptxdist.storage.caches import local_cache
from ptxdist.storage.remote import is_remote
from ptxdist.storage.runs import Mirror
from ptxdist.train.choices import refuse_unknown
from ptxdist.train.schedule import positive_share

# Raised by changes of the code that change what a stage learns: stages of another number are not reused. Stages with
# `dice = "batch"` have a number of their own since validation reports their Dice of the batch.
TRAINING, TRAINING_BATCH_DICE = 3, 4
_LEAST_FREE = 2**29  # bytes; a checkpoint is about 400 MB

OnProgress = Callable[[str, int, int], None]  # what, done, total


@dataclass(frozen=True)
class Plan:
    """A run that can start: its settings, its folder, and the fingerprint of each stage.

    `mirror` sends what is written to the folder, if the run is in an object store. `token` identifies the check that a
    copy of the cache has passed. `origin` is what the network will be made from. `start` describes it to people.
    """

    settings: Settings
    mirror: Mirror
    token: str
    fingerprints: tuple[str, ...]
    origin: Origin
    start: RunStart

    @property
    def run(self) -> Path:
        """The folder of the run on this node, absolute."""
        return self.mirror.folder

    def task(self, number: int, former: list[StageResult]) -> StageTask:
        """The task of a stage, whose predecessors left the results `former`."""
        return StageTask(
            settings=self.settings,
            token=self.token,
            run=self.mirror.remote.url if self.mirror.remote else str(self.run),
            number=number,
            fingerprint=self.fingerprints[number - 1],
            parent=former[-1] if former else None,
            init_sha256=self.origin.parent.weights_sha256 if self.origin.parent else None,
        )


def plan_run(
    settings: Settings,
    run: Path | Mirror,
    *,
    writes: bool = True,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Plan:
    """Check the cache (every byte of it), the split, the weights file and the run folder, and make the folder.

    Of torchrun's processes only one `writes` into the folder. Raises SettingsError, StoreError, CheckpointError or
    RunError; ClusterError when the disk is nearly full.
    """
    refuse_unknown(settings)
    refuse_missing_mlflow(settings)
    place, token = settings.data.cache, secrets.token_hex(8)
    if settings.pipeline.model.init is not None:  # for workers, whose current folder is another one
        model = settings.pipeline.model.model_copy(update={"init": str(Path(settings.pipeline.model.init).absolute())})
        settings = settings.model_copy(update={"pipeline": settings.pipeline.model_copy(update={"model": model})})
    sizes = {stage.size_px for stage in settings.pipeline.stages}
    if not is_remote(place):
        place = str(Path(place).absolute())
    cache = local_cache(place, sizes, data=settings.data, token=token, on_progress=on_progress)
    refuse_other_transform(cache, TRANSFORM)
    catalog = read_catalog(cache)
    _refuse_empty_sides(cache, catalog, settings.pipeline.fold)
    origin = origin_of(settings, cache, catalog)
    _refuse_unfit_phantoms(settings.pipeline, cache, catalog)
    fingerprints = _fingerprints(settings.pipeline, cache, catalog, origin)
    if not is_remote(place):  # a copy of a remote one has just been checked
        refuse_damaged(cache, sorted(sizes), on_progress=on_progress)
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"cache": place})})
    mirror = run if isinstance(run, Mirror) else Mirror(run)
    if writes:
        start_run(mirror.folder, settings)
        _refuse_full_disk(mirror.folder)
        if not (os.path.lexists(mirror.folder / ORIGIN) and read_origin(mirror.folder)):
            last = open_store(cache, settings.pipeline.stages[-1].size_px)
            train, _ = split_indices(catalog.labelled, settings.pipeline.fold)
            seen, profile = look_at(last, catalog, train, read_salt(cache))
            files.write_whole(mirror.folder / TRAINING_IMAGES, seen.write())
            whole = origin.model_copy(update={"profile": profile})
            files.write_json(mirror.folder / ORIGIN, whole, beside=(TRAINING_IMAGES,))
    place = mirror.remote.url if mirror.remote else str(mirror.folder)
    return Plan(settings, mirror, token, fingerprints, origin, _start(settings, catalog, place))


def _start(settings: Settings, catalog: Catalog, run: str) -> RunStart:
    fold = settings.pipeline.fold
    train, held_out = split_indices(catalog.labelled, fold)
    positive = sum(bool(catalog.labelled[index].masks) for index in train)
    return RunStart(
        run=run,
        train=len(train),
        positive=positive,
        shown=catalog.finding.one,
        held_out=len(held_out),
        images=tuple(_images(stage, len(train), positive) for stage in settings.pipeline.stages),
        fold=fold,
        workers=settings.train.workers,
        cores=len(os.sched_getaffinity(0)),
    )


def _images(stage: StageSettings, train: int, positive: int) -> int:
    """Images of an epoch; where their number changes from epoch to epoch, the mean."""
    if stage.phantoms:
        return stage.phantoms
    shares = [positive_share(stage, number) for number in range(1, stage.epochs + 1)]
    if stage.epoch == "positives" and positive:
        return round(sum(positive / share for share in shares if share) / len(shares))
    return train


def _refuse_empty_sides(cache: Path, catalog: Catalog, fold: int) -> None:
    if fold >= catalog.folds:
        raise SettingsError(
            f"no fold {fold}: {cache} has folds 0 to {catalog.folds - 1} (`ptxdist preprocess --folds`)"
        )
    for side, indices in zip(("train", "val"), split_indices(catalog.labelled, fold), strict=True):
        if not len(indices):
            raise StoreError(
                f"{cache} has no {side} cases for fold {fold}; a split needs images of at least two patients"
            )


def _refuse_unfit_phantoms(pipeline: PipelineSettings, cache: Path, catalog: Catalog) -> None:
    train, _ = split_indices(catalog.labelled, pipeline.fold)
    for number, stage in enumerate(pipeline.stages, start=1):
        if stage.phantoms and catalog.finding.is_other(PNEUMOTHORAX):
            raise SettingsError(
                f"stages.{number}.phantoms draws radiographs with a pneumothorax, and the masks in {cache} show "
                f"{catalog.finding.name}; leave this stage out, or set stages.{number}.phantoms = 0"
            )
        if stage.phantoms and not any(catalog.labelled[index].masks for index in train):
            raise SettingsError(
                f"stages.{number}.phantoms takes the masks of the training cases, and no training case of {cache} is "
                f"positive; set stages.{number}.phantoms = 0"
            )


def _fingerprints(pipeline: PipelineSettings, cache: Path, catalog: Catalog, origin: Origin) -> tuple[str, ...]:
    """Fingerprint of each stage: over its data, settings and code, and over the stages before it."""
    weights = "none" if origin.parent else pipeline.model.encoder_weights
    if weights not in ("imagenet", "none") and not Path(weights).is_file():
        raise CheckpointError(f"no encoder weights at {weights}; give imagenet, none, or the path of a file")
    source = files.sha256(Path(weights)) if Path(weights).is_file() else weights
    init = origin.parent.weights_sha256 if origin.parent else None
    model = pipeline.model.model_copy(update={"encoder_weights": source, "init": init})
    found: list[str] = []
    for stage in pipeline.stages:
        store = open_store(cache, stage.size_px)
        if store.cases != len(catalog.labelled):
            raise StoreError(f"{store.path} and the catalog of {cache} differ; rerun `ptxdist preprocess`")
        parent = found[-1] if found else None
        code = TRAINING_BATCH_DICE if stage.dice == "batch" else TRAINING
        found.append(fingerprint(code, store.fingerprint, stage, model, pipeline.seed, pipeline.fold, parent))
    return tuple(found)


def _refuse_full_disk(run: Path) -> None:
    free = shutil.disk_usage(run).free
    if free < _LEAST_FREE:
        raise ClusterError(
            f"disk of runs of this machine: {free / 2**30:,.1f} GiB free; free some space, or use another disk "
            "(`ptxdist doctor` looks at everything)"
        )
