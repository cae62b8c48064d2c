"""Radiographs with outlined masks, for the report and the contact sheet of a cache.

The two colours are from Okabe and Ito's palette, which colour-blind readers can distinguish; truth is solid, a
prediction dashed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from ptxdist import files
from ptxdist.cache.catalog import read_catalog
from ptxdist.cache.manifest import read_manifest
from ptxdist.cache.store import open_store
from ptxdist.dicom.pixels import Pixels
from ptxdist.errors import StoreError

TRUTH_RGB = (0, 158, 115)  # bluish green
PREDICTION_RGB = (230, 159, 0)  # orange

Colour = npt.NDArray[np.uint8]


def outline(
    image: Pixels, truth: npt.NDArray[np.generic], prediction: npt.NDArray[np.generic] | None = None, side_px: int = 512
) -> Colour:
    """Square RGB picture uint8 (side, side, 3) of an image uint8 (n, n) with the outlines of masks (m, m).

    Masks have any number type and are 0 outside; their size may differ from the image's.
    """
    grey = cv2.resize(
        image, (side_px, side_px), interpolation=cv2.INTER_AREA if side_px < len(image) else cv2.INTER_CUBIC
    )
    picture = np.ascontiguousarray(np.repeat(grey[:, :, None], 3, axis=2))
    for mask, colour, dashed in ((truth, TRUTH_RGB, False), (prediction, PREDICTION_RGB, True)):
        if mask is None or not np.any(mask):
            continue
        binary = cv2.resize((mask != 0).view(np.uint8), (side_px, side_px), interpolation=cv2.INTER_NEAREST)
        contours, _ = cv2.findContours(binary, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        for contour in contours:
            points = contour[:, 0]
            for start in range(0, len(points), 12):
                end = start + (8 if dashed else 13)
                cv2.polylines(picture, [points[start:end]], False, colour, thickness=2, lineType=cv2.LINE_AA)
    return np.asarray(picture, np.uint8)


def outline_path(mask: npt.NDArray[np.generic], side_px: int = 512) -> str:
    """The outlines of a square mask (m, m), 0 outside, as SVG path data in a box of side_px; "" for an empty mask."""
    scale = side_px / len(mask)
    found, _ = cv2.findContours((mask != 0).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    # A tolerance of half a pixel cannot be seen and leaves a tenth of the points.
    parts = [(cv2.approxPolyDP(contour, 0.5 / scale, True)[:, 0] + 0.5) * scale for contour in found]
    return "".join("M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in part) + "Z" for part in parts)


def grid(pictures: Sequence[Colour]) -> Colour:
    """At least one picture uint8 (side, side, 3), all of one side, in rows of six; the rest of the last is black."""
    columns = min(6, len(pictures))
    padded = [*pictures, *[np.zeros_like(pictures[0])] * (-len(pictures) % columns)]
    return np.vstack([np.hstack(padded[start : start + columns]) for start in range(0, len(padded), columns)])


def draw_contact_sheet(cache: Path) -> Path:
    """Draw up to 24 cases of a cache with their masks outlined, and return the PNG's path.

    Twelve are positive, or more if there are fewer than twelve negative ones.
    """
    cases, sizes = read_catalog(cache).labelled, sorted(read_manifest(cache).sizes)
    store = open_store(cache, sizes[0] if sizes else 256)
    used = [index for index, case in enumerate(cases) if case.split in ("train", "val")]
    positive, negative = ([index for index in used if bool(cases[index].masks) == wanted] for wanted in (True, False))
    positive = positive[: max(12, 24 - len(negative))]
    pictures = [outline(*store.checked(index), side_px=256) for index in (*positive, *negative[: 24 - len(positive)])]
    path = cache / "contact-sheet.png"
    save(grid(pictures), path)
    return path


def encode(picture: Colour, suffix: str) -> bytes:
    """A picture as PNG (`.png`) or JPEG (`.jpg`) bytes."""
    done, content = cv2.imencode(suffix, picture[:, :, ::-1])
    if not done:
        raise ValueError(f"cv2 cannot encode {suffix}")
    return bytes(content)


def save(picture: Colour, path: Path) -> None:
    """Write a picture as PNG or JPEG, by the suffix of `path`; StoreError when that fails."""
    files.write_whole(path, encode(picture, path.suffix), sync=False, error=StoreError)
