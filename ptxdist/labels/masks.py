"""Masks that any tool has written, read one image at a time, to be scored: tables, PNG, NIfTI, `ptxdist predict`.

    table       ImageId,EncodedPixels as `tables` reads it, in any dialect; several masks of an image are united
    PNG         <image id>.png: masks of 0 and 1, masks of 0 and the highest value, or probabilities times it
    NIfTI       <image id>.nii.gz or .nii: masks of 0 and 1, or probabilities of 0 to 1
    predict     submission.csv of a folder of `ptxdist predict`, with the sizes in its findings/

`images` reads the folders of image files.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Protocol

from ptxdist import files
from ptxdist.errors import LabelError, RunError, SettingsError
from ptxdist.finding import PNEUMOTHORAX_LIMITS, Limits
from ptxdist.labels.dialect import SIIM, Dialect, check_mask_files, detect_dialect, parse_dialect, read_union
from ptxdist.labels.evidence import Size
from ptxdist.labels.found import read_size
from ptxdist.labels.images import PNG, NiftiMasks, PngMasks
from ptxdist.labels.nifti import SUFFIXES as NIFTI
from ptxdist.labels.reader import read_any
from ptxdist.labels.rle import Spans
from ptxdist.labels.tables import line_of, read_labels
from ptxdist.rundir import FINDINGS, PREDICT_SETTINGS, SUBMISSION

THRESHOLD = 0.5
OnFile = Callable[[int, int], None]
_TABLES = (".csv", ".csv.gz", ".csv.zip", ".txt")


class Masks(Protocol):
    """Masks of `ids`, in the order of the table or of the paths; `sizes` are (rows, columns) in files, {} for a table.

    To be called in this order: `prepare` once, `spans` for any images, `describe` once.
    """

    @property
    def ids(self) -> Collection[str]:
        """The image ids."""

    @property
    def sizes(self) -> Mapping[str, Size]:
        """Rows and columns of each image; empty if only the user can know them."""

    def prepare(self, sizes: Mapping[str, Size], on_file: OnFile) -> None:
        """Find out how the masks are written, from the images of `sizes`, which are those to read.

        `on_file` is called with (files done, files) where files are read for it. LabelError if that fails.
        """

    def spans(self, case_id: str, size: Size) -> Spans:
        """One mask as spans down its columns, see `rle.read_spans`. LabelError for a mask that cannot be used."""

    def describe(self) -> tuple[str, tuple[str, ...]]:
        """What the masks were taken for, and what is doubtful. LabelError if their values contradict each other."""


def open_predictions(
    path: Path,
    *,
    threshold: float | None = None,
    dialect: str | None = None,
    limits: Limits = PNEUMOTHORAX_LIMITS,
) -> Masks:
    """Masks of a table, of a folder of PNG or NIfTI files, or of the folder of `ptxdist predict`.

    `threshold` makes masks of probabilities (None: 0.5; pixels that reach it are inside), `dialect` is that of a table
    (None: detected by the `limits` of the finding). Raises LabelError for another suffix, an empty folder and files
    that cannot be read. Raises SettingsError for a threshold that is not in (0, 1], a threshold without images, a
    dialect without a table, and a missing extra.
    """
    if threshold is not None and not 0 < threshold <= 1:
        raise SettingsError(f"--threshold {threshold:g} is not a probability above 0, up to 1")
    if not path.is_dir():
        _refuse_threshold(path, threshold)
        return _open_table(path, dialect, "--dialect", limits)
    if dialect:
        raise SettingsError(f"{path} is a folder, whose masks have no dialect; leave out --dialect {dialect}")
    has = {name for name in (SUBMISSION, PREDICT_SETTINGS, FINDINGS) if os.path.lexists(path / name)}
    if PREDICT_SETTINGS in has or len(has) > 1:  # what lacks a part of it is no folder of mask images
        _refuse_threshold(path, threshold)
        return _open_predict_folder(path)
    kind = PngMasks if _suffix_of_masks(path) in PNG else NiftiMasks
    return kind(path, THRESHOLD if threshold is None else threshold)


def open_labels(
    path: Path,
    *,
    dialect: str | None = None,
    match: str | None = None,
    finding: str = "",
    limits: Limits = PNEUMOTHORAX_LIMITS,
    on_file: OnFile,
) -> Masks:
    """The true masks: labels of any format that `ptxdist preprocess --labels` takes. Errors as `reader.read_any`."""
    labels = read_any(path, match=match, dialect=dialect, option="--truth-dialect", finding=finding, on_file=on_file)
    given = parse_dialect(dialect) if dialect else None
    words = "" if labels.sizes is None else labels.kind
    return TextMasks(
        path,
        labels.masks,
        labels.sizes or {},
        words=words,
        judged=True,
        dialect=given,
        option="--truth-dialect",
        limits=limits,
    )


class TextMasks:
    """Masks as run-length texts. With `words`, these are in the challenge's dialect; else the dialect is detected.

    With `judged`, masks that are no table go through the evidence too.
    """

    def __init__(
        self,
        path: Path,
        texts: Mapping[str, tuple[str, ...]],
        sizes: Mapping[str, Size],
        *,
        words: str = "",
        judged: bool = False,
        dialect: Dialect | None = None,
        option: str = "",
        limits: Limits = PNEUMOTHORAX_LIMITS,
    ) -> None:
        self.ids, self.sizes = tuple(texts), sizes
        self._path, self._texts, self._words, self._option = path, texts, words, option
        self._judged, self._dialect, self._notes = judged, dialect, tuple[str, ...]()
        self._limits = limits

    def prepare(self, sizes: Mapping[str, Size], on_file: OnFile) -> None:
        """As in `Masks`: detects the dialect of a table, and judges mask images."""
        if self._words:
            self._dialect = SIIM
            if self._judged:
                check_mask_files(self._texts, sizes, self._path, self._words, self._limits)
            return
        found = detect_dialect(
            self._texts,
            sizes,
            self._dialect,
            lambda case_id, text: f"{self._path}, line {line_of(self._path, case_id, text)}",
            self._option,
            self._limits,
        )
        self._words = f"run-length table, {found.dialect.name} ({'given' if found.given else 'detected'})"
        if any(self._texts.values()) and not found.given and not found.proven:
            self._notes = (f"{self._path}: the encoding of the masks is not proven: {'; '.join(found.evidence)}",)
        self._dialect = found.dialect

    def spans(self, case_id: str, size: Size) -> Spans:
        """As in `Masks`."""
        try:
            return read_union(self._texts[case_id], self._dialect or SIIM, *size)
        except LabelError as error:
            raise LabelError(f"{self._path}: the mask of {case_id} does not fit its image: {error}") from None

    def describe(self) -> tuple[str, tuple[str, ...]]:
        """As in `Masks`."""
        return self._words, self._notes


def _open_table(path: Path, dialect: str | None, option: str, limits: Limits) -> Masks:
    if not path.exists():
        raise LabelError(f"{path}: there is no such file or folder")
    if not path.name.lower().endswith(_TABLES):
        raise LabelError(
            f"{path}: files of this kind are not read; give a table ({', '.join(_TABLES)}), or a folder of PNG or "
            "NIfTI files named by image id"
        )
    texts = read_labels(path)
    given = parse_dialect(dialect) if dialect else None
    return TextMasks(path, texts, {}, dialect=given, option=option, limits=limits)


def _open_predict_folder(path: Path) -> Masks:
    otherwise = f"rerun `ptxdist predict`, or give {path / SUBMISSION} alone"
    files.read_json(path / PREDICT_SETTINGS, otherwise, SUBMISSION, error=LabelError)
    texts, sizes = read_labels(path / SUBMISSION), {}
    for case_id in texts:
        try:
            finding = files.read_json(files.below(path / FINDINGS, f"{case_id}.json"), "")
            sizes[case_id] = read_size(finding["rows"], finding["columns"])
        except (RunError, LabelError, KeyError):
            raise LabelError(f"{path}: {FINDINGS}/{case_id}.json is missing or damaged; {otherwise}") from None
    return TextMasks(path, texts, sizes, words="folder of ptxdist predict")


def _suffix_of_masks(folder: Path) -> str:
    """`.png` or `.nii.gz`; LabelError for a folder with none or both."""
    found = Counter[str]()
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            name = path.name.lower()
            found[next((end for end in (*PNG, *NIFTI) if name.endswith(end)), path.suffix.lower() or "none")] += 1
    png, nifti = found[".png"], sum(found[end] for end in NIFTI)
    if png and nifti:
        raise LabelError(f"{folder} has {png} PNG and {nifti} NIfTI files; give a folder with one kind")
    if not png and not nifti:
        others = ", ".join(f"{count} with the suffix {suffix}" for suffix, count in found.most_common(3))
        raise LabelError(
            f"{folder} has no mask images (<image id>.png or .nii.gz) in it or below it; "
            + (f"its files: {others}" if found else "it is empty")
        )
    return ".png" if png else ".nii.gz"


def _refuse_threshold(path: Path, threshold: float | None) -> None:
    if threshold is not None:
        raise SettingsError(f"{path} has masks and no probabilities; leave out --threshold {threshold:g}")
