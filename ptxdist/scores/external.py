"""Scores of masks that any tool has predicted: every Dice in use, with baselines and intervals, without a model.

Each image is read, counted and dropped, so memory does not grow with the masks of image files. `definitions` has the
scores, `constant` and `surfaces` what they need besides.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ptxdist.errors import LabelError, SettingsError
from ptxdist.executor import OnProgress
from ptxdist.finding import DEFAULT, load_finding
from ptxdist.labels import rle
from ptxdist.labels.dialect import down_columns
from ptxdist.labels.evidence import Size
from ptxdist.labels.masks import Masks, OnFile, open_labels, open_predictions
from ptxdist.labels.patients import read_patients
from ptxdist.records import Record
from ptxdist.scores.constant import ConstantMask
from ptxdist.scores.counts import Counts
from ptxdist.scores.definitions import DEFINITIONS, Definition, of_ratio, resampled
from ptxdist.scores.intervals import FEWEST, number_groups, ratio_interval, score_intervals
from ptxdist.scores.names import TOO_FEW, markdown
from ptxdist.scores.surfaces import SURFACES, require_surfaces, surface_scores

SIZE_PX = 1024
_EXAMPLES = 3
_COMPARED = 100  # hits that are also compared with rows and columns swapped
_MOST = 0.5  # of all pixels: where so many are predicted, and not in truth, the masks are probably inverted
_CLEAR_SHARE = 0.2  # of the predicted pixels, which have to be in the truth for a verdict

Floats = npt.NDArray[np.float64]


class ExternalScore(Record):
    """One score: value, 95 % interval, the values of predicting nothing and of the constant mask; None: not defined.

    `groups` patients (or images, see `ExternalScores.unit`) contribute to it; fewer than five give no interval.
    `definition` says how it is computed and `compare` with which published numbers it may be compared.
    """

    name: str
    value: float | None
    interval: tuple[float, float] | None
    groups: int
    all_empty: float | None
    constant_mask: float | None
    definition: str
    compare: str
    digits: int


class ExternalScores(Record):
    """Scores of the predictions of any tool, by the field's name; see `definitions.DEFINITIONS`.

    `cases` images were scored, of which `positives` have a true mask and `hits` have a true and a predicted one.
    Intervals are by `unit`, "patients" or "images", of which there are `groups`. `predictions` and `truth` say what the
    masks were taken for. `only_predicted` and `only_true` images are in one of the two and were left out. `notes` are
    doubts about the input.
    """

    cases: int
    positives: int
    hits: int
    unit: str
    groups: int
    predictions: str
    truth: str
    only_predicted: int
    only_true: int
    notes: tuple[str, ...]
    scores: dict[str, ExternalScore]


def score_predictions(
    predictions: Path,
    truth: Path,
    *,
    patients: Path | None = None,
    threshold: float | None = None,
    dialect: str | None = None,
    truth_dialect: str | None = None,
    match: str | None = None,
    finding: str = DEFAULT,
    size_px: int | None = None,
    subset: bool = False,
    surfaces: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
) -> ExternalScores:
    """Score masks of any tool against true masks, both by image id.

    `predictions` and `truth` are as in `labels.masks.open_predictions` and `open_labels`, with `match` for the names of
    true masks and `finding` for what is plausible of all masks (as in `preprocess`), `patients` as in
    `labels.patients.read_patients`; an image that is not in it counts as one patient. Where neither side has images,
    each image has `size_px` rows and columns (None: 1024). Both sides must have the same images, unless `subset` allows
    to score those that are in both. `surfaces` adds `hd95_px` and `surface_dice`, which need the extra `surfaces`.
    `on_progress` is called with ("truth", "predictions" or "images", done, total).

    Raises LabelError for input that cannot be read, ids or sizes that do not match, and a mask that does not fit its
    image; SettingsError for options that do not fit the input, and a missing extra.
    """
    if surfaces:
        require_surfaces()
    shown, limits = load_finding(finding)
    predicted = open_predictions(predictions, threshold=threshold, dialect=dialect, limits=limits)
    on_file = partial(on_progress, "truth")
    true = open_labels(truth, dialect=truth_dialect, match=match, finding=shown.name, limits=limits, on_file=on_file)
    if size_px is not None and (predicted.sizes or true.sizes):
        raise SettingsError(f"the size of the images is known from their masks; leave out --size-px {size_px}")
    ids = _common(predicted.ids, true.ids, predictions, truth, subset)
    patient_of = read_patients(patients, ids) if patients else {}
    sizes = _sizes(ids, predicted, true, size_px or SIZE_PX)
    _prepare(predicted, predictions, sizes, partial(on_progress, "predictions"))
    _prepare(true, truth, sizes, partial(on_progress, "truth"))
    counts, distances, constant, order = _count(ids, sizes, predicted, true, surfaces, on_progress)
    described = predicted.describe(), true.describe()
    groups = [f"patient {patient_of[case_id]}" if case_id in patient_of else f"image {case_id}" for case_id in ids]
    group, group_count = number_groups(groups)
    notes = [] if order == "as read" else [*described[0][1], *described[1][1]]
    if order == "swapped":
        notes.insert(
            0,
            f"{predictions}: the masks fit the truth better with rows and columns swapped; check the order of the "
            "axes, or for a table --dialect",
        )
    shares = counts[:, 1:3].sum(0) / counts[:, 3].sum()
    if shares[0] > _MOST and shares[1] < _MOST:
        notes.append(
            f"{predictions}: the masks cover {100 * shares[0]:.0f} % of the images, the true ones "
            f"{100 * shares[1]:.2g} %; are they inverted?"
        )
    if patients and (missing := sum(case_id not in patient_of for case_id in ids)):
        notes.append(f"{patients}: {missing} of the {len(ids)} images are not in it; each counts as one patient")
    return ExternalScores(
        cases=len(ids),
        positives=int((counts[:, 2] > 0).sum()),
        hits=int(((counts[:, 1] > 0) & (counts[:, 2] > 0)).sum()),
        unit="patients" if patients else "images",
        groups=group_count,
        predictions=described[0][0],
        truth=described[1][0],
        only_predicted=len(predicted.ids) - len(ids),
        only_true=len(true.ids) - len(ids),
        notes=tuple(notes),
        scores=_scores(counts, constant, distances, group),
    )


def _common(
    predicted: Collection[str], true: Collection[str], predictions: Path, truth: Path, subset: bool
) -> list[str]:
    """The ids in both, in the order of the predictions; LabelError when there is none, or some are in one only."""
    of_predictions, of_truth = set(predicted), set(true)
    ids = [case_id for case_id in predicted if case_id in of_truth]
    left = [case_id for case_id in predicted if case_id not in of_truth]
    right = [case_id for case_id in true if case_id not in of_predictions]
    if ids and (subset or not (left or right)):
        return ids
    sides = [
        f"{len(only):,} of {len(whole):,} images of {path} are not in {other} ({_some(only)})"
        for only, whole, path, other in ((left, predicted, predictions, truth), (right, true, truth, predictions))
        if only
    ]
    advice = (
        "An image without a predicted mask needs a row with -1, or a black image; --subset scores the "
        f"{len(ids):,} images that are in both"
        if ids
        else "No image is in both; do they belong to the same data set, and are ids written without a suffix?"
    )
    raise LabelError(f"{'; '.join(sides)}. {advice}")


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:_EXAMPLES]) + (", …" if len(ids) > _EXAMPLES else "")


def _sizes(ids: Sequence[str], predicted: Masks, true: Masks, size_px: int) -> dict[str, Size]:
    """Rows and columns of each image, by the files of either side; LabelError where both have them and they differ."""
    sizes = {}
    for case_id in ids:
        found = predicted.sizes.get(case_id) or true.sizes.get(case_id) or (size_px, size_px)
        other = true.sizes.get(case_id, found)
        if found != other:
            of_prediction, of_truth = (f"{columns}x{rows}" for rows, columns in (found, other))
            raise LabelError(
                f"the predicted mask of {case_id} has {of_prediction} pixels and the true one {of_truth}; resize the "
                "predictions to the size of the images (probabilities first, and then the threshold)"
            )
        sizes[case_id] = found
    return sizes


def _prepare(masks: Masks, path: Path, sizes: dict[str, Size], on_file: OnFile) -> None:
    try:
        masks.prepare(sizes, on_file)
    except LabelError as error:
        where = "" if str(path) in str(error) else f"{path}: "
        one = set(sizes.values())
        rows, columns = one.pop()
        hint = "" if masks.sizes or one else f". The images are taken to have {columns}x{rows} pixels; see --size-px"
        raise LabelError(f"{where}{error}{hint}") from None


def _count(
    ids: Sequence[str], sizes: dict[str, Size], predicted: Masks, true: Masks, surfaces: bool, on_progress: OnProgress
) -> tuple[Counts, Floats | None, Counts | None, str]:
    """Read all images once.

    Returns counts int64 (n, 4), see `definitions`; distances float64 (n, 2), if wanted; counts of the constant mask
    int64 (n, 4), if there is one; and whether the masks fit the truth "as read" or with rows and columns "swapped",
    "" if neither is clear.
    """
    counts = np.zeros((len(ids), 4), np.int64)
    distances = np.full((len(ids), 2), np.nan) if surfaces else None
    constant = ConstantMask()
    compared, as_read, swapped, area = 0, 0, 0, 0
    for number, case_id in enumerate(ids):
        size = sizes[case_id]
        first, second = predicted.spans(case_id, size), true.spans(case_id, size)
        common = rle.intersection_px(first, second)
        counts[number] = common, int(np.diff(first).sum()), int(np.diff(second).sum()), size[0] * size[1]
        constant.add(second, size)
        if len(first) and len(second):
            if compared < _COMPARED and size[0] == size[1]:
                compared, as_read, area = compared + 1, as_read + common, area + int(counts[number, 1])
                swapped += rle.intersection_px(down_columns(first, *size), second)
            if distances is not None:
                distances[number] = surface_scores(first, second, size)
        on_progress("images", number + 1, len(ids))
    fixed = constant.counts()
    pairs = (("as read", as_read, swapped), ("swapped", swapped, as_read))
    order = next((name for name, more, less in pairs if more > max(2 * less, _CLEAR_SHARE * area)), "")
    return counts, distances, None if fixed is None else np.column_stack((fixed, counts[:, 3])), order


def _scores(
    counts: Counts, constant: Counts | None, distances: Floats | None, group: npt.NDArray[np.intp]
) -> dict[str, ExternalScore]:
    """All scores, by field."""
    nothing, names = counts * np.array([0, 0, 1, 1]), [str(number) for number in group]
    values = {field: definition.of(counts) for field, definition in DEFINITIONS.items()}
    patients = {field: len(np.unique(group[one.used(counts)])) for field, one in DEFINITIONS.items()}
    standard, intervals = score_intervals(counts[:, :3], names), dict[str, tuple[float, float] | None]()
    functions: dict[str, Callable[[npt.NDArray[np.intp]], float | None]] = {}
    for field, definition in DEFINITIONS.items():
        if definition.same_as:
            intervals[field] = standard.get(definition.same_as)
        elif definition.ratio:
            intervals[field] = ratio_interval(*definition.ratio(counts), names)
        elif patients[field] >= FEWEST:
            functions[field] = partial(_of, definition, counts)
    if distances is not None:
        hits = ~np.isnan(distances[:, 0])
        distance, share = np.where(hits, distances.T, 0.0)
        values |= {"hd95_px": of_ratio(distance, hits), "surface_dice": of_ratio(share, hits)}
        patients |= dict.fromkeys(SURFACES, len(np.unique(group[hits])))
        intervals["surface_dice"] = ratio_interval(share, hits.astype(np.float64), names)
        if patients["hd95_px"] >= FEWEST:
            functions["hd95_px"] = lambda places: of_ratio(distance[places], hits[places])
    intervals |= resampled(functions, group)
    return {
        field: ExternalScore(
            name=definition.name,
            value=values[field],
            interval=intervals.get(field),
            groups=patients[field],
            all_empty=definition.of(nothing),
            constant_mask=None if constant is None else definition.of(constant),
            definition=definition.definition,
            compare=definition.compare,
            digits=definition.digits,
        )
        for field, definition in (DEFINITIONS if distances is None else {**DEFINITIONS, **SURFACES}).items()
    }


def _of(definition: Definition, counts: Counts, places: npt.NDArray[np.intp]) -> float | None:
    """A score of some images."""
    return definition.of(counts[places])


def as_markdown(result: ExternalScores) -> str:
    """The scores as a Markdown table, and a list of what each is and may be compared with."""
    head, scores = [f"{result.cases:,} images, {result.positives:,} positive", *COLUMNS], result.scores.values()
    lines = [f"- **{score.name}**: {score.definition} Compare with: {score.compare}\n" for score in scores]
    return markdown(head, ([score.name, *cells(score)] for score in scores)) + "\n" + "".join(lines)


COLUMNS = ("value", "95 % interval", "predicting nothing", "constant mask")


def cells(score: ExternalScore) -> tuple[str, str, str, str]:
    """Value, interval and the two baselines as text; "" where they are not defined, "too few" without an interval."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:,.{score.digits}f}"

    few = TOO_FEW if score.value is not None and score.groups < FEWEST else ""
    interval = " to ".join(map(number, score.interval)) if score.interval else few
    return number(score.value), interval, number(score.all_empty), number(score.constant_mask)
