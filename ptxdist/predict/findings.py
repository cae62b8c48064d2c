"""The files of one predicted case.

    OUT/findings/<id>.json      `Finding`; written last, so a case that has it is finished
    OUT/masks/<id>.png          0 and 255, of the radiograph's size
    OUT/overlays/<id>.jpg       the radiograph with the mask outlined, padded to a square of 768 pixels
    OUT/seg/<id>.dcm            DICOM SEG

Owns: these files, and the numbers that are reported for a prediction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ptxdist import files
from ptxdist.cache.outlines import encode, outline
from ptxdist.cache.render import fit_square
from ptxdist.dicom.guard import PassingError, guarded
from ptxdist.dicom.png import check_size
from ptxdist.errors import DicomError, LabelError, RunError
from ptxdist.finding import PNEUMOTHORAX
from ptxdist.labels import rle
from ptxdist.predict.bundle import ModelCard
from ptxdist.predict.dicom_seg import encode_segmentation
from ptxdist.predict.predictor import Prediction, is_flagged
from ptxdist.records import OperatingPoint, Record, when_known
from ptxdist.rundir import FINDINGS

OUTPUTS = {"masks": ".png", "overlays": ".jpg", "seg": ".dcm"}
OVERLAY_PX = 768
_BOTH = 0.1


class Finding(Record):
    """What is found in one case; areas in pixels of the original image.

    `calibrated` is the probability that the image is positive, left out where the model has no calibration.
    `area_mm2` is None where the spacing cannot be trusted, and `mm2_reason` says why; `mm2_plane` is "patient", or
    "detector", where anatomy is slightly magnified. `seg_reason` says why a DICOM SEG that was requested is missing.
    `side` and `zone` say where the mask is (`position_of`), if there is one, and `unlike` in which way the image is
    unlike the training images, if it is. `flagged` is as in `Prediction`. `digest` is a hash of the file's bytes.
    `finding` is what was looked for; None for pneumothorax.
    """

    case_id: str
    finding: str | None = when_known()
    digest: str
    rows: int
    columns: int
    score: float
    calibrated: float | None = when_known()
    area_px: int
    area_mm2: float | None
    mm2_plane: str
    mm2_reason: str
    seg_reason: str
    encoded_pixels: str
    side: str | None = when_known()
    zone: str | None = when_known()
    unlike: str | None = when_known()
    flagged: bool | None = when_known()


def measure(prediction: Prediction) -> dict[str, Any]:
    """The fields that `Finding` and the viewer's `Answer` have in common."""
    area, spacing = prediction.area_px, prediction.spacing
    return {
        "rows": prediction.mask.shape[0],
        "columns": prediction.mask.shape[1],
        "score": round(prediction.score, 6),
        "calibrated": None if prediction.calibrated is None else round(prediction.calibrated, 6),
        "area_px": area,
        "area_mm2": None if (mm2 := spacing.area_mm2(area)) is None else round(mm2, 2),
        "mm2_plane": spacing.plane,
        "mm2_reason": spacing.reason,
        "encoded_pixels": rle.encode(prediction.mask),
        "unlike": prediction.unlike or None,
    }


def position_of(mask: npt.NDArray[np.bool_], orientation: str) -> dict[str, str]:
    """Side and zone of a mask (rows, columns): its halves and the third of its centre; {} for an empty one.

    Sides are the patient's where `orientation`, the directions along a row and down a column, tells them ("LF": to the
    left, to the feet), else those of the image. A tenth of the mask in the other half makes it both sides.
    """
    if not (area := int(np.count_nonzero(mask))):
        return {}
    counts = dict(zip(orientation, (mask.sum(0), mask.sum(1)), strict=False))
    is_known = len({*counts} & {*"LR"}) == len({*counts} & {*"HF"}) == 1
    if not is_known:
        counts = {"L": mask.sum(0), "F": mask.sum(1)}
    to_left = counts["L"] if "L" in counts else counts["R"][::-1]
    to_feet = counts["F"] if "F" in counts else counts["H"][::-1]
    sides = ("patient's right", "patient's left") if is_known else ("left of the image", "right of the image")
    first = float(to_left[: len(to_left) // 2].sum()) / area
    centre = float(to_feet @ np.arange(len(to_feet))) / area / len(to_feet)
    side = sides[int(first < _BOTH)] if not _BOTH <= first <= 1 - _BOTH else "both sides"
    return {"side": side, "zone": ("upper", "middle", "lower")[min(2, int(3 * centre))]}


def write_case(
    out: Path, prediction: Prediction, digest: str, *, outputs: Sequence[str], models: Sequence[ModelCard]
) -> Finding:
    """Write the files of a case, the finding last; `models` are the cards of the models.

    Raises RunError when a file cannot be written, PassingError when there is no memory for the DICOM SEG.
    """
    weights, sought = [card.weights_sha256 for card in models], models[0].finding
    case_id, mask, reason = prediction.case_id, prediction.mask, ""
    contents: dict[str, bytes] = {}
    if "masks" in outputs:
        contents["masks"] = encode((mask * np.uint8(255))[:, :, None], ".png")
    if "overlays" in outputs:
        square, drawn = fit_square(prediction.pixels), fit_square(mask.view(np.uint8))
        contents["overlays"] = encode(outline(square, np.zeros((1, 1)), drawn, OVERLAY_PX), ".jpg")
    if "seg" in outputs:
        try:
            if not mask.any():
                raise DicomError("nothing is predicted")
            with guarded():
                contents["seg"] = encode_segmentation(prediction.content, mask, weights, sought)
        except PassingError:  # of want of memory: a rerun may write it
            raise
        except DicomError as error:
            reason = str(error)
    other = None if sought == PNEUMOTHORAX else sought.name
    finding = Finding(
        case_id=case_id,
        finding=other,
        digest=digest,
        seg_reason=reason,
        **measure(prediction),
        **position_of(mask, prediction.orientation),
        flagged=prediction.flagged,
    )
    for name, content in contents.items():
        files.write_whole(_path(out, name, case_id), content, sync=False)
    (out / FINDINGS).mkdir(exist_ok=True)
    files.write_json(_path(out, FINDINGS, case_id), finding, beside=_beside(case_id, contents), sync=False)
    return finding


def read_finished(
    out: Path, case_id: str, digest: str, outputs: Sequence[str], point: OperatingPoint
) -> Finding | None:
    """The finding of a case that has all its files, whole and made from the same bytes; None: it has to be predicted.

    `point` is that of the folder.
    """
    try:
        content = files.read_json(_path(out, FINDINGS, case_id), "", *_beside(case_id, outputs))
        finding = Finding.model_validate(content)
        if finding.area_px and finding.side is None:  # of an older version
            check_size(finding.rows, finding.columns)
            mask = rle.decode((finding.encoded_pixels,), finding.rows, finding.columns) > 0
            finding = finding.model_copy(update=position_of(mask, ""))
        if finding.flagged is None:
            finding = finding.model_copy(update={"flagged": is_flagged(point, finding.score, finding.area_px)})
    except (RunError, DicomError, LabelError, ValueError):
        return None
    missing = [name for name in outputs if not _path(out, name, case_id).is_file()]
    if missing == ["seg"] and finding.seg_reason:
        missing = []
    is_same = (finding.case_id, finding.digest) == (case_id, digest)
    return finding if is_same and not missing else None


def overlay_path(out: Path, case_id: str) -> Path:
    """The file of a case's overlay."""
    return _path(out, "overlays", case_id)


def _beside(case_id: str, outputs: Iterable[str]) -> list[str]:
    """Names of these files of a case from the folder of the findings, which have their checksums."""
    return [_path(Path(".."), name, case_id).as_posix() for name in outputs]


def _path(out: Path, name: str, case_id: str) -> Path:
    return out / name / f"{case_id}{OUTPUTS.get(name, '.json')}"
