"""Data sets that several tests share: small DICOM files written here, and the real files where they are."""

from __future__ import annotations

import atexit
import csv
import gc
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import hypothesis
import numpy as np
import numpy.typing as npt
import object_store
import pytest
from locking import made_once
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, SecondaryCaptureImageStorage
from tiny_encoder import TINY
from xdist.scheduler import LoadFileScheduling

from ptxdist.cache.preprocess import PreprocessResult, preprocess
from ptxdist.labels import rle
from ptxdist.storage import caches
from ptxdist.train.encoders import ENCODERS

pytest_plugins = ("dicom_files", "tiny_caches")  # fixtures of several folders, in files of their own

hypothesis.settings.register_profile("ptxdist", deadline=None)  # other tests run at the same time
hypothesis.settings.load_profile("ptxdist")

Image = npt.NDArray[np.generic]
WriteDicom = Callable[..., Path]
SetTags = Callable[[FileDataset, Mapping[str, object]], None]
# A shell's background jobs ignore SIGINT, those of nohup SIGHUP, and so would the commands that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# What takes seconds to import is imported once, by the process from which all with "forkserver" are forked.
multiprocessing.set_forkserver_preload(["torch._dynamo", "ptxdist.cache.preprocess", "ptxdist.train.loop"])
os.environ.update(RAY_worker_niceness="0")  # else Ray's workers yield to the other test processes
REAL = Path(__file__).resolve().parents[1].parent / "shared" / "data"

# What must never be found in anything that ptxdist writes; the files of `small_dataset` lie below PATIENT_FOLDER.
PATIENT_NAME, PATIENT_ID, BIRTH_DATE, MAPPED_PATIENT = "Quagmire^Zebulon", "QX7-HOSPITAL-", "19391207", "MAPPED-PERSON-"
PATIENT_FOLDER = "Quagmire_Zebulon"
# Files that start Ray, the longest first; not storage/test_runs, which comes when these end. Folders of long files.
WITH_RAY = tuple(
    f"tests/{name}"
    for name in (
        "integration/test_lost", "integration/test_smoke", "cluster/test_several_nodes", "cluster/test_submit",
        "cluster/test_engine", "cluster/test_doctor", "cluster/test_connection",
    )
)  # fmt: skip
LONG = ("tests/integration/", "tests/predict/", "tests/train/", "tests/test_")


@dataclass(frozen=True)
class Dataset:
    """DICOM files with their tables; `images` as they were before encoding, `masks` united, by image id."""

    dicom: Path
    labels: Path
    patients: Path
    images: Mapping[str, Image]
    masks: Mapping[str, Image]


class OneRayAtOnce(LoadFileScheduling):  # type: ignore[misc]
    """Each file goes to one process. One process gets the files with Ray, one after the other, the others the rest.

    Two Ray clusters at once on two cores take several times as long as one after the other. Only what is left when all
    others are given out, of one kind or the other, goes to any process.
    """

    _ray: Any = None  # the process that gets the files with Ray

    def _assign_work_unit(self, node: Any) -> None:
        self._ray = self._ray or node
        mine = (file for file in self.workqueue if file.startswith(WITH_RAY) == (node is self._ray))
        self.workqueue.move_to_end(next(mine, next(iter(self.workqueue))), last=False)
        super()._assign_work_unit(node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneRayAtOnce:
    """Of pytest-xdist: who runs which test."""
    return OneRayAtOnce(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with Ray first, in the order given above, and the other long ones next."""

    def place(item: pytest.Item) -> int:
        places = (*WITH_RAY, LONG)
        return next((number for number, start in enumerate(places) if item.nodeid.startswith(start)), len(places))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Let the garbage collector look no more through what all imports have made, which takes it half a second."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # so that it is taken apart in the end


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Give torch the number of threads of `make test` again: commands called in this process set their own."""
    if (torch := sys.modules.get("torch")) and (threads := os.environ.get("OMP_NUM_THREADS")):
        torch.set_num_threads(int(threads))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real SIIM-ACR files, which no repository holds."""
    if not REAL.is_dir():
        pytest.skip("the real SIIM-ACR files are not on this machine (../shared/data beside the repository)")
    return REAL


@pytest.fixture(scope="session")
def write_dicom(set_tags: SetTags) -> WriteDicom:
    """Function that writes one DICOM file: JPEG Baseline for uint8 unless `raw`, further tags by keyword."""

    def write(path: Path, pixels: Image, uid: str, *, raw: bool = False, **tags: object) -> Path:
        raw = raw or pixels.dtype != np.uint8
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = SecondaryCaptureImageStorage, uid
        meta.TransferSyntaxUID = ExplicitVRLittleEndian if raw else JPEGBaseline8Bit
        file = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        file.SOPClassUID, file.SOPInstanceUID, file.Modality = SecondaryCaptureImageStorage, uid, "CR"
        file.PatientName, file.PatientBirthDate, file.PatientID = PATIENT_NAME, BIRTH_DATE, PATIENT_ID + uid[-20:]
        file.PatientSex, file.PatientAge, file.ViewPosition = "F", "062Y", "PA"
        file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
        file.Rows, file.Columns = pixels.shape[:2]
        file.BitsAllocated = file.BitsStored = 8 * pixels.dtype.itemsize
        file.HighBit, file.PixelRepresentation = file.BitsStored - 1, int(pixels.dtype.kind == "i")
        data = pixels.tobytes() if raw else cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
        file.PixelData = data if raw else encapsulate([data])
        path.parent.mkdir(parents=True, exist_ok=True)
        set_tags(file, tags)
        with warnings.catch_warnings(action="ignore"):
            file.save_as(path, enforce_file_format=True)
        return path

    return write


@pytest.fixture(scope="session")
def set_tags() -> SetTags:
    """Function that sets tags by keyword, to values that the standard does not allow too; None takes one away."""

    def change(file: FileDataset, tags: Mapping[str, object]) -> None:
        with warnings.catch_warnings(action="ignore"):
            for name, value in tags.items():
                if value is None:
                    delattr(file, name)
                else:
                    setattr(file, name, value)

    return change


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory, write_dicom: WriteDicom) -> Dataset:
    """24 files of 128 to 256 px: 23 labelled (8 positive), 1 without a row; 2 ids of the table without a file.

    Case 0 has two overlapping masks, case 3 two separate ones; every fourth image is not square.
    """
    folder = tmp_path_factory.mktemp("small")
    random = np.random.default_rng(20)
    images, masks, rows = {}, {}, []
    for number in range(24):
        uid = f"1.2.826.0.1.{1000 + number}"
        height, width = [(128, 128), (256, 256), (192, 192), (160, 224)][number % 4]
        image = cv2.GaussianBlur(random.integers(0, 256, (height, width), dtype=np.uint8), (9, 9), 0)
        image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX)
        parts = []
        if number % 3 == 0:
            parts.append(_box(height, width, 10, 20, 50, 30))
        if number in (0, 3):
            parts.append(_box(height, width, 40 if number == 0 else 90, 30, 60, 40))
        images[uid] = image
        masks[uid] = np.maximum.reduce(parts) if parts else np.zeros_like(image)
        write_dicom(folder / "dicom" / PATIENT_FOLDER / f"study{number}" / f"{uid}.dcm", image, uid)
        if number != 23:
            rows += [(uid, f" {rle.encode(part)}") for part in parts] or [(uid, " -1")]
    rows += [("1.2.826.0.1.9001", " -1"), ("1.2.826.0.1.9002", " 5 10")]
    labels = _write_csv(folder / "train-rle.csv", ("ImageId", " EncodedPixels"), rows)
    patients = [(uid, f"{MAPPED_PATIENT}{number // 2}") for number, uid in enumerate(images)]
    return Dataset(
        folder / "dicom", labels, _write_csv(folder / "patients.csv", ("id", "patient"), patients), images, masks
    )


@pytest.fixture(scope="session")
def small_cache(small_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreprocessResult]:
    """The cache of `small_dataset` at 64 and 96 px, and what its run returned; nothing may write to it."""
    out = tmp_path_factory.mktemp("small") / "cache"
    data = small_dataset
    return out, preprocess(data.dicom, data.labels, out, patients=data.patients, sizes_px=(64, 96))


@pytest.fixture(scope="session", autouse=True)
def small_network() -> Iterator[None]:
    """`model.encoder = "small"` is known here, and in every process that a test starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODERS, "small", TINY)
        patch.setenv("PYTHONPATH", str(Path(__file__).parent / "small_network"), prepend=os.pathsep)
        yield


@pytest.fixture(scope="session")
def finished_run(small_cache: tuple[Path, PreprocessResult], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 96 px on `small_cache`, trained once for all test processes; nothing may write to it.

    Its network is a small one, since many tests load it, and some in processes of their own.
    """
    from ptxdist.resolve import load_settings
    from ptxdist.run.pipeline import run_pipeline
    from ptxdist.run.plan import plan_run

    def make(folder: Path) -> None:
        few = [f"stages.{n}.{setting}" for n in (1, 2) for setting in ("epochs=1", "threshold=0.45")]
        few += ["model.encoder=small", "model.decoder_channels=[32, 16, 16, 8, 8]"]
        settings = load_settings("smoke", assignments=few, options={"data.cache": str(small_cache[0])})
        run_pipeline(plan_run(settings, folder / "run"))

    return made_once(tmp_path_factory, "learn", make) / "run"


@pytest.fixture(scope="session")
def many_dataset(tmp_path_factory: pytest.TempPathFactory, write_dicom: WriteDicom) -> Dataset:
    """300 files of 64 px, every third one positive: three shards. Nothing may write to it."""
    folder = tmp_path_factory.mktemp("many")
    random = np.random.default_rng(21)
    images, masks, rows = {}, {}, []
    for number in range(300):
        uid = f"1.2.3.{10000 + number}"
        images[uid] = random.integers(0, 256, (64, 64), dtype=np.uint8)
        write_dicom(folder / "dicom" / f"{uid}.dcm", images[uid], uid)
        left = (38 if number % 2 else 6) + number % 14  # one lung or the other: the dialect of the table is looked at
        mask = _box(64, 64, 8 + number % 37, left, 12, 6) if number % 3 == 0 else np.zeros((64, 64), np.uint8)
        masks[uid] = mask
        rows.append((uid, rle.encode(mask)))
    labels = _write_csv(folder / "train-rle.csv", ("ImageId", "EncodedPixels"), rows)
    patients = [(uid, str(number // 2)) for number, uid in enumerate(masks)]
    return Dataset(
        folder / "dicom", labels, _write_csv(folder / "patients.csv", ("id", "patient"), patients), images, masks
    )


def _box(height: int, width: int, top: int, left: int, rows: int, columns: int) -> npt.NDArray[np.uint8]:
    mask = np.zeros((height, width), np.uint8)
    mask[top : top + rows, left : left + columns] = 1
    return mask


def _write_csv(path: Path, header: tuple[str, ...], rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture(scope="session")
def s3_server() -> Iterator[int]:
    """Port of an S3 server on loopback."""
    with object_store.running_server() as port:
        yield port


@pytest.fixture
def s3(s3_server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object_store.Proxy]:
    """The way to the server, which can be made to fail; environment and staging folder are set for it."""
    proxy = object_store.Proxy(s3_server)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", object_store.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", object_store.SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("PTXDIST_STAGING", str(tmp_path / "staging"))
    monkeypatch.setenv("PTXDIST_STORAGE_PATIENCE_S", "20")
    yield proxy
    proxy.stop()
    for lock in caches._held.values():  # what a test has used is not in use for the next one
        lock.close()
    caches._held.clear()
