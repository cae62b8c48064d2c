"""Files in, a folder of results out.

    OUT/
        submission.csv          ImageId,EncodedPixels of the last command's inputs; -1 where nothing is predicted
        rejects.csv             its files that could not be used, and why: the only file that names paths
        predict.json            what makes the masks: models and operating point
        findings/<id>.json      score, areas and mask of a case; written last, so a case that has it is finished
        masks/<id>.png          0 and 255, of the original size
        overlays/<id>.jpg       the radiograph with the mask outlined
        seg/<id>.dcm            DICOM SEG

Owns: this folder, and what is done again. Refuses: a folder that holds masks of other models or another operating point
(RunError). Called by: `cli`. Results depend on no other file of the same command and not on who does the work.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ptxdist import files, locks
from ptxdist.cache.outlines import encode, outline
from ptxdist.cache.render import fit_square
from ptxdist.dicom.spacing import read_spacing
from ptxdist.errors import CatalogError, DicomError, RunError
from ptxdist.executor import Executor, serial
from ptxdist.labels import rle
from ptxdist.predict.dicom_seg import encode_segmentation
from ptxdist.predict.inputs import FoundInput, find_inputs, look_at, refuse_repeated
from ptxdist.predict.predictor import Prediction, Predictor, ahead
from ptxdist.records import OperatingPoint, Record
from ptxdist.train.device import Device

SUBMISSION, REJECTS, SETTINGS, FINDINGS = "submission.csv", "rejects.csv", "predict.json", "findings"
OUTPUTS = {"masks": ".png", "overlays": ".jpg", "seg": ".dcm"}
OVERLAY_PX = 768
_FILES_A_TASK = 8
_WRITERS = 2

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class How:
    """What a task needs: model paths, device, operating point, the folders to fill, and torch threads (0: as it is)."""

    models: tuple[str, ...]
    device: Device
    point: OperatingPoint
    outputs: tuple[str, ...]
    out: Path
    threads: int = 0


class Finding(Record):
    """What is found in one case; areas in px of the original image.

    `area_mm2` is None where the spacing cannot be trusted, and `mm2_reason` says why; `mm2_plane` is "patient", or
    "detector", where anatomy is a little magnified. `seg_reason` says why there is no DICOM SEG although it was asked
    for. `digest` is a hash of the file's bytes.
    """

    case_id: str
    digest: str
    rows: int
    columns: int
    score: float
    area_px: int
    area_mm2: float | None
    mm2_plane: str
    mm2_reason: str
    seg_reason: str
    encoded_pixels: str


@dataclass(frozen=True)
class PredictResult:
    """Counts of one command: images predicted now, found finished, positive of both; files refused, and repeated."""

    predicted: int
    kept: int
    positive: int
    rejected: int
    repeated: int


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
    on_progress: Progress = lambda what, done, total: None,
) -> PredictResult:
    """Predict every radiograph in `paths` and fill `out`; what is finished there is kept.

    With several `workers`, processes (or Ray tasks) load the `models` again by their paths; else `predictor` is used.
    Raises CatalogError when no file can be used, RunError when `out` holds results made in another way.
    """
    if "seg" in outputs:
        files.require_extra("seg", "DICOM SEG", "highdicom")
    inputs = find_inputs(paths, skip=[out])
    _make_folder(out)
    with locks.only(out / locks.LOCK, f"another `ptxdist predict` is writing to {out}; wait for it or stop it"):
        _settle(out, predictor)
        tasks = [(start, inputs[start : start + 64]) for start in range(0, len(inputs), 64)]
        looked: dict[int, list[FoundInput]] = {}
        for start, part in executor(look_at, tasks, light=True):
            looked[start] = part
            on_progress("headers", sum(map(len, looked.values())), len(inputs))
        kept, refused = refuse_repeated([item for start, _ in tasks for item in looked[start]])
        repeated = len(inputs) - len(kept) - len(refused)
        findings: dict[str, Finding] = {}
        for item in kept:
            if finding := _finished(out, item, outputs):
                findings[item.case_id] = finding
        left = [item for item in kept if item.case_id not in findings]
        before = len(findings)
        threads = max(1, (os.cpu_count() or 1) // workers) if workers > 1 else 0
        how = How(tuple(map(str, models)), device, predictor.operating_point, tuple(outputs), out, threads)
        if workers == 1 and executor is serial:
            results = _work(predictor, how, left)
        else:
            chunks = [(how, left[start : start + _FILES_A_TASK]) for start in range(0, len(left), _FILES_A_TASK)]
            results = (pair for chunk in executor(predict_chunk, chunks) for pair in chunk)
        for number, (item, result) in enumerate(results, start=1):
            if isinstance(result, Finding):
                findings[item.case_id] = result
            else:
                refused.append(FoundInput(item.source, reason=result))
            on_progress("images", number, len(left))
        order = [item.case_id for item in kept if item.case_id in findings]
        rows = [(case_id, findings[case_id].encoded_pixels) for case_id in order]
        files.write_table(out / SUBMISSION, ("ImageId", "EncodedPixels"), rows, lineterminator="\n")
        rejected = sorted((item.source.shown, item.reason) for item in refused)
        files.write_table(out / REJECTS, ("path", "reason"), rejected, lineterminator="\n")
    if not order:
        raise CatalogError(
            f"none of the {len(inputs)} files could be used, see {out / REJECTS}; the first: {rejected[0][1]}"
        )
    positive = sum(findings[case_id].area_px > 0 for case_id in order)
    return PredictResult(len(findings) - before, before, positive, len(refused), repeated)


def predict_chunk(how: How, items: Sequence[FoundInput]) -> list[tuple[FoundInput, Finding | str]]:
    """One task: predict some inputs in any process and write their files; each with its finding, or a reason."""
    if how.threads:
        torch.set_num_threads(how.threads)
    return list(_work(_load(how.models, how.device, how.point), how, items))


@lru_cache(maxsize=1)
def _load(models: tuple[str, ...], device: Device, point: OperatingPoint) -> Predictor:
    return Predictor.load(*models, device=device, operating_point=point)


def _work(predictor: Predictor, how: How, items: Sequence[FoundInput]) -> Iterator[tuple[FoundInput, Finding | str]]:
    """Decoding, network and writing side by side, in the order of the items."""
    weights = [card.weights_sha256 for card in predictor.cards]

    def finish(pair: tuple[FoundInput, Prediction | DicomError]) -> tuple[FoundInput, Finding | str]:
        item, prediction = pair
        return item, str(prediction) if isinstance(prediction, DicomError) else _keep(how, item, prediction, weights)

    def reader(item: FoundInput) -> Callable[[], tuple[bytes, str]]:
        return lambda: (item.source.read(), item.source.name)

    predictions = predictor.stream((item, reader(item)) for item in items)
    return ahead(finish, predictions, threads=_WRITERS, most=2 * _WRITERS)


def _keep(how: How, item: FoundInput, prediction: Prediction, weights: Sequence[str]) -> Finding:
    """Write the files of a case, the finding last."""
    case_id, mask, reason = prediction.case_id, prediction.mask, ""
    if "masks" in how.outputs:
        picture = encode((mask * np.uint8(255))[:, :, None], ".png")
        files.write_whole(_path(how.out, "masks", case_id), picture, sync=False)
    if "overlays" in how.outputs:
        square, drawn = fit_square(prediction.pixels), fit_square(mask.astype(np.uint8))
        picture = encode(outline(square, np.zeros_like(drawn), drawn, OVERLAY_PX), ".jpg")
        files.write_whole(_path(how.out, "overlays", case_id), picture, sync=False)
    if "seg" in how.outputs:
        try:
            if not mask.any():
                raise DicomError("nothing is predicted")
            segmentation = encode_segmentation(prediction.content, mask, weights)
            files.write_whole(_path(how.out, "seg", case_id), segmentation, sync=False)
        except DicomError as error:
            reason = str(error)
    spacing = read_spacing(prediction.content)
    area = prediction.area_px
    finding = Finding(
        case_id=case_id,
        digest=item.digest,
        rows=mask.shape[0],
        columns=mask.shape[1],
        score=round(prediction.score, 6),
        area_px=area,
        area_mm2=None if (mm2 := spacing.area_mm2(area)) is None else round(mm2, 2),
        mm2_plane=spacing.plane,
        mm2_reason=spacing.reason,
        seg_reason=reason,
        encoded_pixels=rle.encode(mask),
    )
    files.write_whole(_path(how.out, FINDINGS, case_id), finding.model_dump_json(indent=2) + "\n", sync=False)
    return finding


def _finished(out: Path, item: FoundInput, outputs: Sequence[str]) -> Finding | None:
    """The finding of a case that has all its files, made from the same bytes; None when it is to be done."""
    try:
        finding = Finding.model_validate_json(_path(out, FINDINGS, item.case_id).read_bytes())
    except (OSError, ValueError):
        return None
    missing = [name for name in outputs if not _path(out, name, item.case_id).is_file()]
    if missing == ["seg"] and finding.seg_reason:
        missing = []
    return finding if finding.digest == item.digest and not missing else None


def _settle(out: Path, predictor: Predictor) -> None:
    """Write what makes the masks, or compare it with what made those that are there.

    To be called with the lock held. RunError when the folder holds something else.
    """
    files.remove_leftovers(out)
    plain = {
        "models": [{"name": card.name, "weights_sha256": card.weights_sha256} for card in predictor.cards],
        "operating_point": predictor.operating_point.model_dump(),
        "flip_averaging": predictor.flip_averaging,
    }
    path = out / SETTINGS
    try:
        before: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if any(found.name != locks.LOCK for found in out.iterdir()):
            with suppress(OSError):
                (out / locks.LOCK).unlink()
            raise RunError(f"{out} holds other files and no predictions; give another folder with --out") from None
        files.write_json(path, plain)
        return
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); remove {out} and predict again") from error
    if before != plain:
        changed = [name for name in plain if before.get(name) != plain[name]]
        raise RunError(
            f"{out} holds results made with other {' and '.join(changed).replace('_', ' ')}, and the two do not mix; "
            "give another folder with --out, or remove this one"
        )


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out} cannot be made: {error.strerror}; give another folder with --out") from error


def _path(out: Path, name: str, case_id: str) -> Path:
    return out / name / f"{case_id}{OUTPUTS.get(name, '.json')}"
