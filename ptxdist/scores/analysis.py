"""All numbers of an evaluation from the counts of its cases: scores, operating points, calibration, subgroups.

No model, image or file is needed. The rows for `tables` come with the numbers, which can be computed from them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ptxdist.cache.catalog import Case
from ptxdist.records import EvaluationResult, OperatingPoint, Reliability, SharedPatients, Subgroup, TunedPoint
from ptxdist.scores.counts import LEVELS, CaseCounts, Counts, Histograms
from ptxdist.scores.intervals import difference_intervals, score_intervals
from ptxdist.scores.metrics import auroc, differences, image_dice, scores
from ptxdist.scores.operating import tune
from ptxdist.scores.tables import FIXED_THRESHOLDS
from ptxdist.scores.working import NO_POINTS, Wanted, calibrate, folds_of, roc, working_point

BINS = 10
SMALL_CASES, SMALL_POSITIVES = 30, 10  # a group with fewer is marked as small
_AGES = ((0, "under 40"), (40, "40 to 59"), (60, "60 and over"))
_SIZES = ((0.0, "under 0.2 % of the image"), (0.002, "0.2 to 1 %"), (0.01, "1 to 2 %"), (0.02, "2 % and over"))
_EXPOSURES = ("dark third", "middle third", "bright third")
# Of names that are not in alphabetical order.
_ORDER = {name: number for number, name in enumerate((*(name for _, name in (*_AGES, *_SIZES)), *_EXPOSURES))}

Floats = npt.NDArray[np.float64]
Row = dict[str, object]


@dataclass(frozen=True)
class Evaluated:
    """The n evaluated cases with their counts, all in one order.

    `groups` identify patients. `in_training` says whether the patient has images in training; None if that is not
    known. `known_from` is "catalog", "patient map" or "nothing".
    """

    cases: Sequence[Case]
    counts: CaseCounts
    groups: Sequence[str]
    in_training: Sequence[bool | None]
    known_from: str


def conclude(
    evaluated: Evaluated,
    thresholds: Sequence[float],
    *,
    min_area_px: int,
    flip_averaging: bool,
    runs: int,
    image_head: bool = False,
    point: OperatingPoint | None = None,
    working: Wanted = NO_POINTS,
) -> tuple[EvaluationResult, list[Row]]:
    """All numbers, with `seconds` 0, and the rows of cases.csv by `tables.COLUMNS`.

    `thresholds` are those of `counts.at_full`: first the run's own one; FIXED_THRESHOLDS are among them. There must be
    at least one case. With an `image_head`, operating points have a threshold of the score too. With a `point`, the
    first counts are those at the point, and tuned points are compared with it. `working` are the points to find.
    """
    cases, counts, groups = evaluated.cases, evaluated.counts, evaluated.groups
    own = counts.at_full[0]
    positive = own[:, 2] > 0
    ids = [case.case_id for case in cases]
    image_scores = counts.score if image_head else None
    tuned = {kind: tune(counts.histograms, own[:, 2], ids, groups, kind, image_scores) for kind in ("pair", "triplet")}
    folds = folds_of(ids, groups, own[:, 2])
    calibration = calibrate(counts.score, positive, folds)
    after = () if calibration is None else (_reliability_of_images(calibration[1], positive, "images, calibrated"),)
    points = (
        working_point(counts.score, positive, groups, folds, kind=kind, target=target, prevalence=working.prevalence)
        for kind, target in working.targets
    )
    result = EvaluationResult(
        threshold=thresholds[0],
        min_area_px=min_area_px,
        flip_averaging=flip_averaging,
        runs=runs,
        folds=tuple(sorted({case.fold for case in cases})),
        point=point,
        scores=scores(own),
        auroc=auroc(counts.score, positive),
        intervals=score_intervals(own, groups, image_score=counts.score),
        at_other_thresholds={
            str(threshold): scores(counts.at_full[number]) for number, threshold in enumerate(thresholds) if number
        },
        tuned=tuple(_compared(*found, own, groups) if point else found[0] for found in tuned.values() if found),
        calibration=(_reliability_of_px(counts.histograms), _reliability_of_images(counts.score, positive), *after),
        platt=calibration[0] if calibration else None,
        roc=roc(counts.score, positive),
        working=tuple(found for found in points if found),
        subgroups=tuple(subgroups(cases, own, counts.brightness, groups)),
        shared_patients=_shared_patients(evaluated),
        image_head=image_head,
        seconds=0.0,
    )
    return result, list(_rows(evaluated, thresholds, tuned))


def _compared(tuned: TunedPoint, estimate: Counts, own: Counts, groups: Sequence[str]) -> TunedPoint:
    """The tuned point with how much better its estimate is than the given point."""
    return tuned.model_copy(
        update={"gains": differences(own, estimate), "gain_intervals": difference_intervals(own, estimate, groups)}
    )


def _rows(
    evaluated: Evaluated, thresholds: Sequence[float], tuned: Mapping[str, tuple[TunedPoint, Counts] | None]
) -> Iterator[Row]:
    counts, own = evaluated.counts, evaluated.counts.at_full[0]
    dice = image_dice(own)
    for row, case in enumerate(evaluated.cases):
        intersection, predicted, truth = own[row].tolist()
        known = evaluated.in_training[row]
        at_points = {kind: found[1][row].tolist() if found else ("", "", "") for kind, found in tuned.items()}
        at_points |= {
            # The last one: an operating point may have the same threshold.
            f"at_{value}": counts.at_full[-1 - list(reversed(thresholds)).index(value), row].tolist()
            for value in FIXED_THRESHOLDS
        }
        yield {
            "case_id": case.case_id,
            "group": evaluated.groups[row],
            "fold": case.fold,
            "positive": int(truth > 0),
            "masks": len(case.masks or ()),
            "truth_px": truth,
            "predicted_px": predicted,
            "intersection_px": intersection,
            "kaggle_dice": f"{dice[row]:.6f}",
            "score": f"{counts.score[row]:.6f}",
            "view": case.view,
            "sex": case.sex,
            "age": "" if case.age is None else case.age,
            "brightness": f"{counts.brightness[row]:.6f}",
            "rows": case.rows,
            "columns": case.columns,
            "patient_in_training": "" if known is None else int(known),
            **{f"{point}_predicted_px": found[1] for point, found in at_points.items()},
            **{f"{point}_intersection_px": found[0] for point, found in at_points.items()},
        }


def _reliability_of_px(histograms: Histograms) -> Reliability:
    """Of pixels by level; the middle of a level is taken as its probability."""
    px, truth = histograms[:, 0].astype(float), histograms[:, 1].astype(float)
    sums = np.stack((px, px * (np.arange(LEVELS) + 0.5) / LEVELS, truth), axis=1)
    return _reliability("px", sums.reshape(len(px), 3, BINS, LEVELS // BINS).sum(3))


def _reliability_of_images(score: Floats, positive: npt.NDArray[np.bool_], things: str = "images") -> Reliability:
    place = np.minimum((score * BINS).astype(np.int64), BINS - 1)
    sums = np.zeros((len(score), 3, BINS))
    sums[np.arange(len(score)), :, place] = np.stack((np.ones(len(score)), score, positive), axis=1)
    return _reliability(things, sums)


def _reliability(things: str, sums: Floats) -> Reliability:
    """`sums` is (n, 3, BINS): by case and bin, number of things, sum of their probabilities, number of true ones."""
    total = sums.sum(0)
    counts, probability, true = total[:, total[0] > 0]
    return Reliability(
        things=things,
        counts=tuple(counts.astype(np.int64).tolist()),
        predicted=tuple((probability / counts).tolist()),
        observed=tuple((true / counts).tolist()),
        error=float(np.abs(probability - true).sum() / counts.sum()),
    )


def subgroups(cases: Sequence[Case], counts: Counts, brightness: Floats, groups: Sequence[str]) -> Iterator[Subgroup]:
    """The groups of every property that divides the cases into at least two.

    `counts` of the masks, `brightness` (mean grey levels) and `groups` (patients) are in the order of `cases`.
    """
    thirds = np.searchsorted(np.quantile(brightness, (1 / 3, 2 / 3)), brightness, side="right")
    properties = {
        "view": [case.view for case in cases],
        "sex": [case.sex for case in cases],
        "age": ["" if case.age is None else _band(case.age, _AGES) for case in cases],
        "mask size": [_band(case.area_px / (case.rows * case.columns), _SIZES) if case.masks else "" for case in cases],
        "masks": ["" if not case.masks else "one" if len(case.masks) == 1 else "several" for case in cases],
        "exposure": [_EXPOSURES[third] for third in thirds],
    }
    for by, names in properties.items():
        members: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            if name:
                members.setdefault(name, []).append(row)
        if len(members) < 2:
            continue
        for name, rows in sorted(members.items(), key=lambda item: (_ORDER.get(item[0], len(_ORDER)), item[0])):
            found = scores(counts[rows])
            yield Subgroup(
                by=by,
                name=name,
                scores=found,
                intervals=score_intervals(counts[rows], [groups[row] for row in rows]),
                small=found.cases < SMALL_CASES or found.positives < SMALL_POSITIVES,
            )


def _band(value: float, bands: Sequence[tuple[float, str]]) -> str:
    return next(name for start, name in reversed(bands) if value >= start)


def _shared_patients(evaluated: Evaluated) -> SharedPatients | None:
    """Scores of cases whose patient is in training, and of the others; None if patients are not known."""
    if evaluated.known_from == "nothing":
        return None
    own = evaluated.counts.at_full[0]
    sides = []
    for wanted in (True, False):
        rows = [row for row, known in enumerate(evaluated.in_training) if known is wanted]
        groups = [evaluated.groups[row] for row in rows]
        sides.append((scores(own[rows]), score_intervals(own[rows], groups)) if rows else (None, {}))
    (shared, shared_intervals), (apart, apart_intervals) = sides
    return SharedPatients(
        known_from=evaluated.known_from,
        shared=shared,
        shared_intervals=shared_intervals,
        apart=apart,
        apart_intervals=apart_intervals,
    )
