"""The cases that a report shows: which ones, and their pictures with truth and prediction outlined.

A case is named by its image id only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ptxdist.cache.catalog import Case
from ptxdist.cache.outlines import encode, outline, outline_path, save
from ptxdist.cache.render import fit_square
from ptxdist.cache.store import Store
from ptxdist.labels import rle
from ptxdist.report.page import SIDE_PX, Gallery, Picture, data_uri
from ptxdist.scores.tables import CaseRow

GALLERIES = (
    ("missed", "Missed, largest first"),
    ("false-alarms", "False alarms, largest first"),
    ("worst", "Found, lowest Dice"),
    ("median", "Found, median Dice"),
    ("best", "Found, highest Dice"),
)
ERRORS = 3  # the first of these show errors
SIZE = 4  # pictures in a gallery


def choose(rows: Sequence[CaseRow]) -> dict[str, tuple[int, list[CaseRow]]]:
    """For each gallery, by its name: how many rows it is chosen from, and the chosen ones in order.

    No case is in two galleries; when few masks are found, the median gallery is the first to be short of cases, then
    the worst.
    """
    found = [row for row in rows if row.positive and row.predicted_px]
    found.sort(key=lambda row: (-row.kaggle_dice, row.case_id))
    best, rest = found[:SIZE], found[SIZE:]
    worst, rest = rest[::-1][:SIZE], rest[: max(0, len(rest) - SIZE)]
    middle = max(0, len(found) // 2 - SIZE // 2 - len(best))
    missed = [row for row in rows if row.positive and not row.predicted_px]
    alarms = [row for row in rows if not row.positive and row.predicted_px]
    missed.sort(key=lambda row: (-row.truth_px, row.case_id))
    alarms.sort(key=lambda row: (-row.predicted_px, row.case_id))
    return {
        "best": (len(found), best),
        "median": (len(found), rest[middle : middle + SIZE]),
        "worst": (len(found), worst),
        "missed": (len(missed), missed[:SIZE]),
        "false-alarms": (len(alarms), alarms[:SIZE]),
    }


def draw_galleries(
    rows: Sequence[CaseRow], predictions: Mapping[str, str], cases: Sequence[Case], store: Store, overlays: Path
) -> list[Gallery]:
    """The galleries of a run's held-out cases; each picture is also written with its outlines to `overlays`, as PNG.

    `rows` say what is predicted. `predictions` are run-length texts by image id, of masks that may be of another
    operating point: where a row has no pixel, none is drawn. `cases` are the rows of the store; those that are no
    longer in the store are left out.
    """
    place = {case.case_id: index for index, case in enumerate(cases)}
    chosen = choose([row for row in rows if row.case_id in place])
    galleries: list[Gallery] = []
    for name, title in GALLERIES:
        pictures = []
        for number, row in enumerate(chosen[name][1], start=1):
            index = place[row.case_id]
            case, image = cases[index], store.checked(index)[0]
            truth = fit_square(rle.decode(case.masks or (), case.rows, case.columns))
            kept = (predictions[case.case_id],) if row.predicted_px else ()
            prediction = fit_square(rle.decode(kept, case.rows, case.columns))
            save(outline(image, truth, prediction, SIDE_PX), overlays / f"{name}-{number}.png")
            before = sum(len(gallery.pictures) for gallery in galleries)
            shown = outline(image, np.zeros((1, 1)), side_px=SIDE_PX)
            pictures.append(
                Picture(
                    number=before + number,
                    row=row,
                    source=data_uri("image/jpeg", encode(shown, ".jpg")),
                    truth=outline_path(truth, SIDE_PX),
                    prediction=outline_path(prediction, SIDE_PX),
                    words=f"Chest radiograph. Truth: {_place(truth)}. Prediction: {_place(prediction)}.",
                )
            )
        galleries.append(Gallery(name, title, chosen[name][0], tuple(pictures)))
    return galleries


def _place(mask: npt.NDArray[np.generic]) -> str:
    """The position of the centre of a square mask in words: "upper left of the image"; "nothing" for an empty mask."""
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return "nothing"
    high, side = (
        words[min(2, int(3 * places.mean() / len(mask)))]
        for words, places in ((("upper", "middle", "lower"), rows), (("left", "centre", "right"), columns))
    )
    return f"{high} {side} of the image"
