"""Cross-validation: one run for each fold, and the pooled evaluation of all of them."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from ptxdist.cache.catalog import read_catalog
from ptxdist.config import Settings
from ptxdist.errors import SettingsError
from ptxdist.events import Event, Message, OnEvent, RunStart
from ptxdist.records import EvaluationResult
from ptxdist.run.engine import OpenEngine
from ptxdist.run.pipeline import train
from ptxdist.run.plan import OnProgress
from ptxdist.storage.caches import local_cache
from ptxdist.storage.remote import is_remote

OUT_OF_FOLD = "out-of-fold"


def train_folds(
    settings: Settings,
    run: Path | str,
    *,
    engine: OpenEngine | None = None,
    on_event: OnEvent = lambda event: None,
    on_progress: OnProgress = lambda what, done, total: None,
) -> EvaluationResult:
    """Train the runs RUN/fold-0, RUN/fold-1, …, each with its own fold held out, and evaluate them together.

    Returns the scores over the held-out cases of all folds and writes them to RUN/out-of-fold. `run` is a folder;
    `settings.pipeline.fold` is ignored. Otherwise parameters and errors are those of `train`. Under torchrun, and for a
    run in an object store, raises SettingsError.
    """
    from ptxdist.train.evaluate import evaluate_runs  # loads torch

    if is_remote(run):
        raise SettingsError(f"--fold all writes to a folder, not to {run}; give --fold 0, --fold 1, … a run each")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SettingsError(
            "--fold all under torchrun is not possible; give --fold 0, --fold 1, … one after the other, or let Ray "
            "start the workers"
        )
    run = Path(run)
    folds = read_catalog(local_cache(settings.data.cache, (), data=settings.data)).folds

    def pass_on(event: Event) -> None:
        if isinstance(event, RunStart):
            event = event.model_copy(update={"folds_left": folds - event.fold})
        on_event(event)

    for fold in range(folds):
        on_event(Message(text=f"fold {fold} of 0 to {folds - 1} is held out"))
        pipeline = settings.pipeline.model_copy(update={"fold": fold})
        train(
            settings.model_copy(update={"pipeline": pipeline}),
            run / f"fold-{fold}",
            engine=engine,
            on_event=pass_on,
            on_progress=on_progress,
        )
    runs = [run / f"fold-{fold}" for fold in range(folds)]
    return evaluate_runs(runs, folder=run / OUT_OF_FOLD, on_cases=partial(on_progress, "images"))
