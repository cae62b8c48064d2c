"""Predict many files into a folder of results.

    OUT/
        index.html              what was found in the last command's inputs, with pictures
        findings.csv            the same as a table, highest score first
        submission.csv          ImageId,EncodedPixels of the same; -1 where nothing is predicted
        rejects.csv             inputs that were rejected, and why; the only file that names paths
        predict.json            what the masks depend on: models and operating point; checksum of submission.csv
        findings/ masks/ …      the files of each case, see `findings`
        .lock                   held while a command writes here, empty

Owns: this folder, and which cases are skipped because they are finished. Refuses: a folder that holds masks of other
models or of another operating point (RunError). The result of a file depends neither on the other files of the command
nor on the executor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ptxdist import files, locks
from ptxdist.dicom.guard import guarded
from ptxdist.errors import CatalogError, DicomError, LabelError, RunError, plain, system_says
from ptxdist.executor import Executor, OnProgress, ahead, in_chunks, serial
from ptxdist.predict.findings import Finding, read_finished, write_case
from ptxdist.predict.inputs import FoundInput, find_inputs, read_headers, reject_repeated
from ptxdist.predict.page import Context, write_page, write_table
from ptxdist.predict.predictor import Prediction, Predictor
from ptxdist.records import OperatingPoint
from ptxdist.rundir import PREDICT_SETTINGS, SUBMISSION
from ptxdist.train.device import Device

REJECTS = "rejects.csv"
_HEADERS_A_TASK = 64
_FILES_A_TASK = 8
_WRITERS = 2
_NO_MAP = np.zeros((0, 0), np.float32)  # of a prediction that waits to be written


@dataclass(frozen=True)
class Options:
    """What a task needs beside its files: models, operating point, outputs, folder, and torch threads (0: default)."""

    models: tuple[str, ...]
    device: Device
    point: OperatingPoint
    outputs: tuple[str, ...]
    out: Path
    threads: int = 0


@dataclass(frozen=True)
class PredictResult:
    """Counts of one command: images predicted, finished before; files rejected, and repeated.

    Of all images, those with a mask (`positive`), those unlike the training images, and those that are flagged, with a
    mask or without one.
    """

    predicted: int
    kept: int
    positive: int
    rejected: int
    repeated: int
    unlike: int
    flagged: int


def predict_files(
    paths: Sequence[Path],
    out: Path,
    predictor: Predictor,
    models: Sequence[Path],
    *,
    device: Device = "auto",
    outputs: Sequence[str] = ("masks", "overlays"),
    executor: Executor = serial,
    workers: int = 1,
    keep_names: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
) -> PredictResult:
    """Predict every radiograph in `paths` and write the results to `out`; finished cases are skipped.

    With `keep_names`, findings.csv and index.html name the files too. With several `workers`, processes (or Ray tasks)
    load the `models` from their paths; otherwise `predictor` is used.
    Raises CatalogError when no file can be used, RunError when `out` holds results that were made in another way,
    BusyError when another process writes there.
    """
    if "seg" in outputs:
        files.require_extra("seg", "DICOM SEG", "highdicom")
    inputs = find_inputs(paths, skip=[out])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out} cannot be created: {system_says(error, 'give another folder with --out')}") from error
    with locks.only(out / locks.LOCK, f"another `ptxdist predict` is writing to {out}; wait for it or stop it"):
        _check_folder(out, predictor)
        headers = in_chunks(
            executor, read_headers, inputs, _HEADERS_A_TASK, light=True, on_done=partial(on_progress, "headers")
        )
        items, rejected = reject_repeated(headers)
        repeated = len(inputs) - len(items) - len(rejected)
        findings = {
            item.case_id: read_finished(out, item.case_id, item.digest, outputs, predictor.operating_point)
            for item in items
        }
        left = [item for item in items if findings[item.case_id] is None]
        threads = max(1, (os.cpu_count() or 1) // workers) if workers > 1 else 0
        options = Options(tuple(map(str, models)), device, predictor.operating_point, tuple(outputs), out, threads)
        if workers == 1 and executor is serial:
            results = _predict(predictor, options, left)
        else:
            chunks = [(options, left[start : start + _FILES_A_TASK]) for start in range(0, len(left), _FILES_A_TASK)]
            results = (pair for chunk in executor(predict_chunk, chunks) for pair in chunk)
        for number, (item, result) in enumerate(results, start=1):
            if isinstance(result, Finding):
                findings[item.case_id] = result
            else:
                rejected.append(FoundInput(item.source, reason=result))
            on_progress("images", number, len(left))
        found = [finding for item in items if (finding := findings[item.case_id])]
        rows = [(finding.case_id, finding.encoded_pixels) for finding in found]
        names = {item.case_id: plain(item.source.name) for item in items} if keep_names else None
        write_table(out, found, names)
        write_page(out, found, names, _context(predictor, len(rejected), repeated))
        files.write_table(out / SUBMISSION, ("ImageId", "EncodedPixels"), rows, lineterminator="\n")
        reasons = sorted((item.source.shown, item.reason) for item in rejected)
        files.write_table(out / REJECTS, ("path", "reason"), reasons, lineterminator="\n")
        files.write_json(out / PREDICT_SETTINGS, _settings_of(predictor), beside=(SUBMISSION,))
    if not found:
        raise CatalogError(
            f"none of the {len(inputs)} files could be used, see {out / REJECTS}; the first one {reasons[0][1]}"
        )
    positive = sum(finding.area_px > 0 for finding in found)
    before = len(items) - len(left)
    other = sum(finding.unlike is not None for finding in found)
    flagged = sum(bool(finding.flagged) for finding in found)
    return PredictResult(len(found) - before, before, positive, len(rejected), repeated, other, flagged)


def _context(predictor: Predictor, rejected: int, repeated: int) -> Context:
    cards = predictor.cards
    return Context(
        finding=cards[0].finding.name,
        one=cards[0].finding.one,
        models=tuple(card.name for card in cards),
        rule=predictor.operating_point.words,
        caution=predictor.caution,
        rejected=rejected,
        repeated=repeated,
    )


def _settings_of(predictor: Predictor) -> dict[str, Any]:
    """What the masks depend on."""
    return {
        "models": [{"name": card.name, "weights_sha256": card.weights_sha256} for card in predictor.cards],
        "operating_point": predictor.operating_point.model_dump(),
        "flip_averaging": predictor.flip_averaging,
    }


def _check_folder(out: Path, predictor: Predictor) -> None:
    """Write what the masks depend on, or compare it with what the masks in the folder depend on.

    The lock must be held. Raises RunError when the two differ, or when the folder holds other files.
    """
    files.remove_leftovers(out)
    plain, path = _settings_of(predictor), out / PREDICT_SETTINGS
    if not path.is_file():
        if any(other.name != locks.LOCK for other in out.iterdir()):
            with suppress(OSError):
                (out / locks.LOCK).unlink()
            raise RunError(f"{out} holds other files and no predictions; give another folder with --out")
        files.write_json(path, plain)
        return
    before = files.read_json(path, f"remove {out} and rerun the command")
    if before != plain:
        changed = ", ".join(name.replace("_", " ") for name in plain if before.get(name) != plain[name])
        raise RunError(
            f"{out} holds results with other settings ({changed}), which cannot be mixed with new ones; give another "
            "folder with --out, or remove this one"
        )


def predict_chunk(options: Options, items: Sequence[FoundInput]) -> list[tuple[FoundInput, Finding | str]]:
    """One task, in any process: predict some inputs and write their files; findings, or the reasons for none."""
    if options.threads:
        torch.set_num_threads(options.threads)
    return list(_predict(_load(options.models, options.device, options.point), options, items))


@lru_cache(maxsize=1)
def _load(models: tuple[str, ...], device: Device, point: OperatingPoint) -> Predictor:
    return Predictor.load(*models, device=device, operating_point=point)


def _predict(
    predictor: Predictor, options: Options, items: Sequence[FoundInput]
) -> Iterator[tuple[FoundInput, Finding | str]]:
    """The items in their order; files are decoded and written in threads while the network runs."""
    models = predictor.cards

    def write(pair: tuple[FoundInput, Prediction | DicomError]) -> tuple[FoundInput, Finding | str]:
        item, prediction = pair
        if isinstance(prediction, DicomError):
            return item, str(prediction)
        try:
            with guarded():
                return item, write_case(options.out, prediction, item.digest, outputs=options.outputs, models=models)
        except (DicomError, LabelError) as error:  # a mask of millions of pieces
            return item, str(error)

    def reader(item: FoundInput) -> Callable[[], tuple[bytes, str]]:
        return lambda: (item.source.read(), item.source.name)

    def without_map(
        pair: tuple[FoundInput, Prediction | DicomError],
    ) -> tuple[FoundInput, Prediction | DicomError]:
        item, found = pair
        return item, found if isinstance(found, DicomError) else replace(found, probability=_NO_MAP)

    predictions = predictor.stream(((item, reader(item)) for item in items), with_content="seg" in options.outputs)
    return ahead(write, map(without_map, predictions), threads=_WRITERS, most=2 * _WRITERS)
