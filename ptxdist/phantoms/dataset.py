"""Writing a synthetic data set in the format of SIIM-ACR, for the demo and the tests.

Owns: nested folders of JPEG Baseline DICOM files, a label table with the oddities of the challenge's table, a map of
images to patients. Refuses: a folder that is not empty.

`anatomy` draws the shapes of a phantom, `greys` its grey levels. The random numbers of an image depend only on (seed,
index of the image), and not on the workers.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, SecondaryCaptureImageStorage

from ptxdist import files
from ptxdist.dicom.synthetic import phantom_uids
from ptxdist.errors import LabelError, RunError, SettingsError, system_says
from ptxdist.executor import OnCount, in_chunks, processes
from ptxdist.labels import rle
from ptxdist.labels.tables import read_labels
from ptxdist.phantoms import anatomy, greys
from ptxdist.phantoms.anatomy import SIZE_PX, Image

CHUNK = 16
UNLABELLED_SHARE = 0.004
LABEL_HEADER = ("ImageId", " EncodedPixels")  # with the blank of the challenge's table

_UNDEREXPOSED = np.round(255 * (np.arange(256) / 255) ** 1.5).astype(np.uint8)
_SPACINGS_MM = ("0.139", "0.143", "0.168", "0.171", "0.194311")


@dataclass(frozen=True)
class PhantomResult:
    """What was written: the folder of DICOM files, the two tables, and the numbers of images."""

    dicom: Path
    labels: Path
    patients: Path
    images: int
    positives: int
    unlabelled: int


@dataclass(frozen=True)
class _Task:
    """One image to draw; with `texts` None, its masks are drawn too. `rows` says whether it is in the table."""

    index: int
    patient: int
    positive: bool
    rows: bool = True
    image_id: str | None = None
    texts: tuple[str, ...] | None = None


def write_phantoms(
    out: Path,
    *,
    cases: int,
    seed: int = 0,
    positive_share: float = 0.2215,
    labels: Path | None = None,
    bedside: bool = False,
    workers: int = 1,
    on_image: OnCount = lambda done, total: None,
) -> PhantomResult:
    """Write `cases` phantoms under `out`: `dicom-images/<study>/<series>/<image>.dcm`, `train-rle.csv`, `patients.csv`.

    `positive_share` of the labelled images show a pneumothorax; about 0.4 % of the files (at least one of 20 or more)
    have no row in the table. With `labels`, a label table (CSV, may be .gz), images are drawn for its ids and masks
    instead: all of them when `cases` is 0, else the first `cases`. With `bedside`, all views are AP and darker, as from
    another hospital that images in bed. `on_image` is called with (images done, images).
    The files are the same for any number of `workers`. They are written beside `out` and renamed at the end. Raises
    SettingsError for an invalid number, LabelError for an invalid table, RunError when `out` is not empty or cannot be
    written, and BusyError when another process is writing it.
    """
    _check(cases, seed, positive_share, labels, workers)
    try:
        out = out.resolve()
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RunError(
                f"{out} exists and is not an empty folder; delete it or give another one; nothing was written"
            )
    except OSError as error:
        raise RunError(f"{out} cannot be written: {system_says(error, 'give another folder')}") from error
    tasks = _plan(cases, seed, positive_share) if labels is None else _plan_table(labels, cases, seed)
    busy = f"another `ptxdist phantom` is writing {out}; wait for it or stop it"
    with files.replacing_folder(out, over=False, busy=busy) as folder:
        with processes(workers) as executor:
            place = folder / "dicom-images"
            rows = in_chunks(executor, _write_chunk, tasks, CHUNK, place, seed, bedside, on_done=on_image)
        labelled = [(name, text) for name, texts in rows for text in texts]
        owners = [(name, f"{task.patient:08d}") for task, (name, _) in zip(tasks, rows, strict=True)]
        for name, header, table in (
            ("train-rle.csv", LABEL_HEADER, labelled),
            ("patients.csv", ("ImageId", "PatientId"), owners),
        ):
            files.write_table(folder / name, header, table, lineterminator="\n", sync=False, error=None)
    positives = sum(task.positive for task in tasks)
    unlabelled = sum(not task.rows for task in tasks)
    return PhantomResult(
        out / "dicom-images", out / "train-rle.csv", out / "patients.csv", len(rows), positives, unlabelled
    )


def _check(cases: int, seed: int, positive_share: float, labels: Path | None, workers: int) -> None:
    least = 1 if labels is None else 0
    if cases < least:
        raise SettingsError(f"cases must be at least {least}, found {cases}")
    if not 0 <= positive_share <= 1:
        raise SettingsError(f"positive_share must be between 0 and 1, found {positive_share}")
    if seed < 0 or workers < 1:
        raise SettingsError(f"seed must be at least 0 and workers at least 1, found seed {seed}, workers {workers}")


# --- which images there are -------------------------------------------------------------------------------------


def _plan(cases: int, seed: int, positive_share: float) -> list[_Task]:
    rng = np.random.default_rng((seed, 0, 1))  # (seed, index) belongs to the images
    unlabelled = max(round(UNLABELLED_SHARE * cases), 1 if cases >= 20 else 0)
    order = rng.permutation(cases)
    labelled = np.ones(cases, bool)
    labelled[order[:unlabelled]] = False
    positive = np.zeros(cases, bool)
    positive[order[unlabelled:][: round(positive_share * (cases - unlabelled))]] = True
    patients = _assign_patients(positive, rng)
    return [_Task(i, int(patients[i]), bool(positive[i]), bool(labelled[i])) for i in range(cases)]


def _plan_table(path: Path, cases: int, seed: int) -> list[_Task]:
    texts = read_labels(path)
    names = list(texts)[: cases or None]
    for name in names:
        if not files.is_relative(name) or "/" in name or files.is_formula(name):
            raise LabelError(f"{path}: the image id {name!r} cannot be a file name")
    positive = np.array([bool(texts[name]) for name in names])
    patients = _assign_patients(positive, np.random.default_rng((seed, 0, 1)))
    return [
        _Task(i, int(patients[i]), bool(positive[i]), image_id=name, texts=texts[name] or (rle.EMPTY,))
        for i, name in enumerate(names)
    ]


def _assign_patients(positive: npt.NDArray[np.bool_], rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Patient of each image: few patients have all positives and a fifth of the negatives, as in the challenge."""
    patients = np.zeros(len(positive), np.int64)

    def deal(images: npt.NDArray[np.int64], first: int, mean: float, spread: float, most: int) -> int:
        sizes = np.minimum(1 + rng.lognormal(mean, spread, len(images)).astype(np.int64), most)
        patients[images] = first + np.repeat(np.arange(len(sizes)), sizes)[: len(images)]
        return int(patients[images].max(initial=first - 1)) + 1

    end = deal(rng.permutation(np.flatnonzero(positive)), 1, 0.3, 1.25, 61)
    negatives = rng.permutation(np.flatnonzero(~positive))
    shared = len(negatives) // 5 if end > 1 else 0
    patients[negatives[:shared]] = rng.integers(1, max(end, 2), shared)
    deal(negatives[shared:], end, -1.0, 1.2, 30)
    return patients


def _write_chunk(tasks: Sequence[_Task], folder: Path, seed: int, bedside: bool) -> list[tuple[str, list[str]]]:
    """Draw and write some images; ids and label rows in the order of `tasks`."""
    cv2.setNumThreads(1)
    rows = []
    for task in tasks:
        name, texts, content, place = _draw(task, seed, bedside)
        path = folder / place
        path.parent.mkdir(parents=True)
        path.write_bytes(content)  # not by pydicom, whose errors of a full disk have tracebacks in them
        rows.append((name, texts if task.rows else []))
    return rows


# --- one file ---------------------------------------------------------------------------------------------------


def draw_file(seed: int) -> bytes:
    """One phantom with a pneumothorax, as the bytes of a DICOM file like those of `write_phantoms`."""
    return _draw(_Task(index=0, patient=0, positive=True), seed, bedside=False)[2]


def _draw(task: _Task, seed: int, bedside: bool) -> tuple[str, list[str], bytes, str]:
    """Id, label texts and content of a file, and its place below the folder of images."""
    rng = np.random.default_rng((seed, task.index))
    node, second = rng.integers(1, 32768), 1517875160 + rng.integers(0, 100)
    study, series, image = phantom_uids(int(node), int(second), task.index)
    name = task.image_id or image
    view = "PA" if rng.random() < 0.6 and not bedside else "AP"
    chest = anatomy.pose(rng, view)
    if task.texts is None:
        masks = anatomy.draw_masks(rng, chest) if task.positive else []
        texts = [rle.encode(mask) for mask in masks] or [rle.EMPTY]
    else:
        texts = list(task.texts)
        masks = [rle.decode(texts, SIZE_PX, SIZE_PX)] if task.positive else []
    union = np.maximum.reduce(masks) if masks else np.zeros((SIZE_PX, SIZE_PX), np.uint8)
    grey = greys.draw_image(rng, chest, union)
    data = _encode(cv2.LUT(grey, _UNDEREXPOSED) if bedside else grey)
    file = io.BytesIO()
    # '62' is not a valid age and ID_… not a valid UID; the challenge has both.
    with pydicom.config.disable_value_validation():
        _dataset(rng, (study, series, name), view, task.patient, data).save_as(file, enforce_file_format=True)
    return name, texts, file.getvalue(), f"{study}/{series}/{name}.dcm"


def _encode(image: Image) -> bytes:
    """JPEG of about 100 to 190 kB, as in the challenge."""
    data = b""
    for quality in (90, 94):
        data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(data) > 105_000:
            break
    return data


def _dataset(rng: np.random.Generator, uids: tuple[str, str, str], view: str, patient: int, data: bytes) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = uids[2]
    meta.TransferSyntaxUID = JPEGBaseline8Bit
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.SOPClassUID, ds.SOPInstanceUID = SecondaryCaptureImageStorage, uids[2]
    ds.StudyInstanceUID, ds.SeriesInstanceUID = uids[:2]
    ds.StudyDate, ds.StudyTime, ds.AccessionNumber, ds.StudyID = "19010101", "000000.00", "", ""
    ds.Modality, ds.ConversionType, ds.BodyPartExamined = "CR", "WSD", "CHEST"
    ds.SeriesDescription, ds.ViewPosition, ds.PatientOrientation = f"view: {view}", view, ""
    ds.SeriesNumber, ds.InstanceNumber = "1", "1"
    ds.PatientName = ds.PatientID = str(uuid.UUID(bytes=rng.bytes(16), version=4))  # one per image: groups nothing
    ds.PatientBirthDate, ds.ReferringPhysicianName = "", ""
    ds.PatientSex, ds.PatientAge = "MF"[patient % 2], str(20 + patient * 37 % 70)
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows = ds.Columns = SIZE_PX
    ds.PixelSpacing = [_SPACINGS_MM[rng.integers(len(_SPACINGS_MM))]] * 2
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.PixelRepresentation = 7, 0
    ds.LossyImageCompression, ds.LossyImageCompressionMethod = "01", "ISO_10918_1"
    ds.PixelData = encapsulate([data])
    return ds
