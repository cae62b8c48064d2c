"""What the viewer's server sends: the answer to a radiograph, and the files of the page.

Owns: what leaves the server about a radiograph. It contains no image id, no name and no path; only a DICOM SEG, which
the page asks for when its user saves one, has them, see `dicom_seg`.

The page applies the threshold itself: it receives the level of every pixel, that is, how many thresholds the pixel's
probability reaches. The thresholds include those of the operating point, so the area that the page counts there is the
one that `predict` writes.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ptxdist import files
from ptxdist.dicom.png import SIGNATURE
from ptxdist.errors import DicomError
from ptxdist.phantoms.dataset import draw_file
from ptxdist.predict.dicom_seg import encode_segmentation
from ptxdist.predict.findings import measure, position_of
from ptxdist.predict.predictor import Prediction, Predictor
from ptxdist.records import OperatingPoint, Record, when_known
from ptxdist.report.page import TEMPLATES as REPORT_TEMPLATES
from ptxdist.scores.counts import LEVELS

TEMPLATES = Path(__file__).resolve().parent / "templates"
PICTURE_PX = 2048  # longer side of the picture on the page, at most; areas are counted at the original resolution
EXAMPLE_SEED = 7
_BLOCK_ROWS = 512
_FILES = {
    "viewer.css": "text/css",
    "picture.js": "text/javascript",
    "save.js": "text/javascript",
    "viewer.js": "text/javascript",
    "viewer.svg": "image/svg+xml",
}
_PNG = "A PNG does not say what it shows: nothing has checked that this is a frontal chest radiograph."


class Answer(Record):
    """What is found in one radiograph; areas and `encoded_pixels` (run-length text) at the original resolution.

    `px_mm2` is the area of a pixel, None where the spacing cannot be trusted, and `mm2_reason` says why. `rule` is the
    operating point in words. `side` and `zone` say where the mask is, see `position_of`. `cautions` are sentences that
    say why the answer may mean less than usual.
    """

    rows: int
    columns: int
    score: float
    calibrated: float | None
    area_px: int
    area_mm2: float | None
    px_mm2: float | None
    mm2_plane: str
    mm2_reason: str
    operating_point: OperatingPoint
    rule: str
    cautions: tuple[str, ...] = ()
    encoded_pixels: str
    side: str | None = when_known()
    zone: str | None = when_known()
    unlike: str | None = when_known()
    note: str = "research use only; not a medical device"


def answer_of(prediction: Prediction, predictor: Predictor) -> Answer:
    """The answer to one radiograph that `predictor` has predicted."""
    point = predictor.operating_point
    cautions = (
        predictor.caution,
        f"This image is unlike the training images: {prediction.unlike}." if prediction.unlike else "",
        _PNG if prediction.content.startswith(SIGNATURE) else "",
    )
    return Answer(
        px_mm2=prediction.spacing.area_mm2(1),
        operating_point=point,
        rule=point.words,
        cautions=tuple(filter(None, cautions)),
        **measure(prediction),
        **position_of(prediction.mask, prediction.orientation),
    )


def segmentation_of(prediction: Prediction, predictor: Predictor) -> bytes:
    """The DICOM SEG of the mask at the operating point.

    Raises DicomError when the mask is empty, and as `encode_segmentation`; SettingsError without the extra `seg`.
    """
    files.require_extra("seg", "DICOM SEG", "highdicom")
    if not prediction.area_px:
        raise DicomError("has no mask at the operating point, so there is nothing to save")
    weights = [card.weights_sha256 for card in predictor.cards]
    return encode_segmentation(prediction.content, prediction.mask, weights, predictor.cards[0].finding)


def thresholds_at(point: OperatingPoint) -> list[float]:
    """The thresholds that can be chosen, ascending: steps of 1 / LEVELS, and those of the operating point."""
    return sorted({*(step / LEVELS for step in range(1, LEVELS)), point.top, point.bottom})


def levels_of(probability: npt.NDArray[np.float32], thresholds: list[float]) -> npt.NDArray[np.uint8]:
    """How many thresholds each probability reaches, uint8 of the same shape; at most 255 thresholds.

    A pixel has a level > i exactly where `mask_at` would include it in a mask at thresholds[i].
    """
    edges = torch.tensor(thresholds, dtype=torch.float64).float()
    levels = np.empty(probability.shape, np.uint8)
    for start in range(0, len(probability), _BLOCK_ROWS):  # `bucketize` takes four bytes for each
        rows = torch.from_numpy(np.ascontiguousarray(probability[start : start + _BLOCK_ROWS]))
        levels[start : start + _BLOCK_ROWS] = torch.bucketize(rows, edges, right=True, out_int32=True).numpy()
    return levels


def with_maps(prediction: Prediction, answer: Answer) -> tuple[str, bytes]:
    """Media type and content of the answer with everything that the page draws, as multipart/form-data.

    Parts: `answer`, `thresholds` and `shape`, rows and columns of the picture (JSON); `picture` (at most PICTURE_PX)
    and `levels`, both uint8, row by row. The picture is no PNG: some browsers blur what is read from a canvas.
    """
    thresholds = thresholds_at(answer.operating_point)
    scale = PICTURE_PX / max(prediction.pixels.shape)
    pixels = prediction.pixels
    if scale < 1:
        size = (max(1, round(answer.columns * scale)), max(1, round(answer.rows * scale)))
        pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
    parts = (
        ("answer", "application/json", answer.model_dump_json().encode()),
        ("thresholds", "application/json", json.dumps(thresholds).encode()),
        ("shape", "application/json", json.dumps(pixels.shape).encode()),
        ("picture", "application/octet-stream", pixels.tobytes()),
        ("levels", "application/octet-stream", levels_of(prediction.probability, thresholds).tobytes()),
    )
    boundary = secrets.token_hex(16)
    lines: list[bytes] = []
    for name, kind, content in parts:
        file = "" if kind == "application/json" else f'; filename="{name}"'
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\nContent-Type: {kind}\r\n\r\n'
        lines += [head.encode(), content, b"\r\n"]
    return f"multipart/form-data; boundary={boundary}", b"".join([*lines, f"--{boundary}--\r\n".encode()])


def page_files(predictor: Predictor, max_bytes: int) -> Mapping[str, tuple[str, bytes]]:
    """Media type and content of the page (name "") and of each file it loads, by name."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    seg_missing = "" if find_spec("highdicom") else files.install_command("seg")
    page = environment.get_template("viewer.html").render(
        cards=predictor.cards,
        image_head=predictor.image_head,
        caution=predictor.caution,
        max_bytes=max_bytes,
        seg_missing=seg_missing,
    )
    sent = {name: (kind, (TEMPLATES / name).read_bytes()) for name, kind in _FILES.items()}
    sent["report.css"] = ("text/css", (REPORT_TEMPLATES / "report.css").read_bytes())  # defines the colours
    return {"": ("text/html", page.encode()), "example.dcm": ("application/dicom", _example()), **sent}


@lru_cache(maxsize=1)
def _example() -> bytes:
    return draw_file(EXAMPLE_SEED)
