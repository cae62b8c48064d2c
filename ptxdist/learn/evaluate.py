"""A run's weights over the validation cases at the original resolution.

Owns: what `evaluate` computes and the two tables it leaves (`cases.csv`, `predictions.csv`). Refuses: runs without a
finished last stage. Called by: `cli`, `cluster.worker`. Definitions of the scores: `metrics`.
"""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ptxdist.config import Settings
from ptxdist.data import rle
from ptxdist.data.catalog import read_catalog
from ptxdist.data.store import open_store
from ptxdist.learn.checkpoint import load_weights
from ptxdist.learn.loop import choose_precision
from ptxdist.learn.metrics import image_dice, scores
from ptxdist.learn.scoring import score_cases
from ptxdist.learn.unet import build_unet
from ptxdist.rundir import (
    CASES,
    EVALUATION,
    PREDICTIONS,
    RESULT,
    EvaluationResult,
    PipelineResult,
    StageResult,
    read_result,
    read_settings,
    write_json,
)

FIXED_THRESHOLDS = (0.5, 0.55)  # the source's; they always stand beside the stage's own
CASE_COLUMNS = (
    "case_id", "group", "positive", "truth_px", "predicted_px", "intersection_px", "kaggle_dice", "score",
    "view", "sex", "age",
)  # fmt: skip


def evaluate(
    run: Path,
    settings: Settings,
    stage: StageResult,
    cache: Path,
    *,
    device: torch.device,
    on_cases: Callable[[int, int], None] = lambda done, total: None,
) -> EvaluationResult:
    """Score the weights of `stage` (the last one) on the validation cases and write the tables and the result.

    Masks come from the stage's threshold; the fixed thresholds are scored beside it from the same probabilities.
    Raises StoreError and CheckpointError when cache or weights are not what the run was made with.
    """
    started = time.perf_counter()
    stage_settings, how = settings.pipeline.stages[stage.stage - 1], settings.pipeline.evaluation
    model = build_unet(settings.pipeline.model.model_copy(update={"encoder_weights": "none"}))
    load_weights(model, run / stage.weights, stage.weights_sha256)
    model = model.to(device).to(memory_format=torch.channels_last)
    cases = read_catalog(cache).labelled
    val = np.array([i for i, case in enumerate(cases) if case.split == "val"], np.int64)
    thresholds = list(dict.fromkeys((stage_settings.threshold, *FIXED_THRESHOLDS)))
    predictions: dict[int, str] = {}

    def keep_mask(index: int, mask: npt.NDArray[np.bool_]) -> None:
        predictions[index] = rle.encode(mask)

    counts = score_cases(
        model,
        open_store(cache, stage.size_px),
        cases,
        val,
        thresholds=thresholds,
        device=device,
        precision=choose_precision(settings.train.precision, device),
        flip_averaging=how.flip_averaging,
        min_area_px=how.min_area_px,
        on_cases=lambda done: on_cases(done, len(val)),
        on_mask=keep_mask,
    )
    result = EvaluationResult(
        threshold=thresholds[0],
        min_area_px=how.min_area_px,
        flip_averaging=how.flip_averaging,
        scores=scores(counts.at_full[0]),
        at_other_thresholds={
            str(threshold): scores(counts.at_full[number]) for number, threshold in enumerate(thresholds) if number
        },
        seconds=time.perf_counter() - started,
    )
    folder = run / EVALUATION
    dice = image_dice(counts.at_full[0])
    rows = []
    for row, index in enumerate(val.tolist()):
        case, (intersection, predicted, truth) = cases[index], counts.at_full[0, row].tolist()
        rows.append(
            (case.case_id, case.group, int(bool(case.masks)), truth, predicted, intersection, f"{dice[row]:.6f}",
             f"{counts.score[row]:.6f}", case.view, case.sex, "" if case.age is None else case.age)
        )  # fmt: skip
    _write_csv(folder / CASES, CASE_COLUMNS, rows)
    _write_csv(
        folder / PREDICTIONS,
        ("ImageId", "EncodedPixels"),
        [(cases[index].case_id, predictions[index]) for index in val.tolist()],
    )
    write_json(folder / "result.json", result)
    return result


def evaluate_again(run: Path, *, on_cases: Callable[[int, int], None] = lambda done, total: None) -> PipelineResult:
    """Evaluate a finished run on this machine and renew its result; errors as `evaluate`, RunError if not finished."""
    settings, result = read_settings(run), read_result(run)
    device = torch.device("cuda" if torch.cuda.is_available() and settings.train.device != "cpu" else "cpu")
    cache = Path(settings.data.cache)
    evaluation = evaluate(run, settings, result.stages[-1], cache, device=device, on_cases=on_cases)
    result = result.model_copy(update={"evaluation": evaluation})
    write_json(run / RESULT, result)
    return result


def _write_csv(path: Path, header: Iterable[object], rows: Iterable[Iterable[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    os.replace(temporary, path)
