"""From DICOM files and a label table to arrays of 512 and 256 px: `ptxdist preprocess` beside what people use instead.

    python tests/benchmarks/bench_preprocess.py [--dicom DIR --labels CSV] [--files N] [--rounds R] [--only a,d1]
                                                [--save]

a   naive: `dcmread(path).pixel_array` with the decoder that pydicom picks (gdcm, else pylibjpeg, else Pillow), cv2
    INTER_AREA, the challenge's loop over runs, zarr sample by sample. One process.
a2  the same with pydicom's Pillow plugin: the quickest of its decoders for these files, and an exact one.
b   MONAI: PersistentDataset with LoadImaged (PydicomReader) and Resized, first pass, to its .pt files. One process.
b2  the same, filled through MONAI's DataLoader with two workers.
c   torchxrayvision: `utils.load_image` and XRayResizer, back to bytes, to zarr as in a. One process.
d1  ours: `preprocess(..., workers=1)`, and d2 with two processes.
e   limits: JPEG decoding alone from memory by the faster of simplejpeg and cv2 (e1), reading the files (e2), writing
    as many bytes as ours with np.tofile and fsync (e3).

Without --dicom, N phantoms are drawn (200 if not given). With it, all labelled files are used with the table as it is,
or the first N of them with their rows of it. DIR and CSV are laid out as the challenge's: file names are image ids.
`pip install torchxrayvision` adds c, the extra `dev` has monai for b and python-gdcm, the plugin that pydicom prefers;
a way whose package is missing is left out and named.

How it is measured: each run in a process of its own, to a new folder below the temporary one (TMPDIR), ways in turn and
each round in another order, first round dropped; after each run its output is removed and the disk synchronised. Files
lie in the page cache. `start` is the time of imports (for e1 also of reading the files) and not in the rate; all else
is: listing, tables, headers, starting worker processes and, for ours and e3 only, fsync. CPU is user + system of the
process and its children, without the kernel's own writing back. Peak is the largest resident set of any one process,
mapped files included.

Given to the others: no compression, chunks of one sample, masks only where there are any (but MONAI's batches need one
each), bytes (MONAI's .pt files would hold floats), cv2 for torchxrayvision's resizing (its default is several times
slower), the threads that each library starts by itself. Only ours hashes the files, checks labels, groups patients,
writes checksums and looks for near-duplicates.

Pixels: where files are square 8-bit JPEG, masks are equal everywhere, and so are images in a2, and in a with gdcm;
pylibjpeg decodes some px one level differently. MONAI (at 512) and torchxrayvision round means that end in a half to
the other side: one level in up to 13 % of px. Files that are not square are stretched by all but ours, which pads them.

Heavy imports stand inside the ways: each process measures its own.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import importlib.util
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

SIZES_PX = (512, 256)
SHARD_CASES = 128  # samples in a file of e3, as in ours
MOST_IN_MEMORY = 1000  # files that e1 decodes
PACKAGES = """ptxdist numpy opencv-python-headless pydicom pillow imagecodecs pylibjpeg pylibjpeg-libjpeg python-gdcm
              simplejpeg zarr torch monai torchxrayvision"""


@dataclass(frozen=True)
class Job:
    """What every way gets: the DICOM files, the label table, and the folder that it makes."""

    dicom: Path
    labels: Path
    out: Path


Case = tuple[str, Path, list[str]]  # image id, file, run-length texts ([] for a negative one)
Work = Callable[[], tuple[int, str]]  # does it, and gives the number of images and a note


def find_cases(job: Job) -> list[Case]:
    """Each image that has a file and a row, in the order of the table."""
    files = {path.stem: path for path in sorted(job.dicom.rglob("*.dcm"))}
    opened = gzip.open if job.labels.suffix == ".gz" else open
    table: dict[str, list[str]] = {}
    with opened(job.labels, "rt", encoding="utf-8-sig", newline="") as text:
        for case_id, runs in csv.reader(text):
            table.setdefault(case_id.strip(), []).append(runs.strip())
    return [(name, files[name], [runs for runs in table[name] if runs != "-1"]) for name in table if name in files]


# --- the ways: each imports what it needs, then returns the work ------------------------------------------------


def paint(texts: Sequence[str], height: int, width: int) -> Any:
    """Union of the masks, uint8 (width, height) of 0 and 255, run by run as in the challenge's kernels."""
    import numpy as np

    mask = np.zeros(height * width, np.uint8)
    for text in texts:
        numbers = [int(word) for word in text.split()]
        position = 0
        for gap, length in zip(numbers[0::2], numbers[1::2], strict=True):
            position += gap
            mask[position : position + length] = 255
            position += length
    return mask.reshape(width, height)


def write_samples(job: Job, read: Callable[[Path], Any], resize: Callable[[Any, int], Any]) -> int:
    """All cases as arrays of a zarr group, sample by sample; `read` gives an image, `resize` its bytes at one size."""
    import cv2
    import zarr

    cases = find_cases(job)
    group = zarr.create_group(job.out, attributes={"case_id": [case_id for case_id, _, _ in cases]})
    arrays = {}
    for size in SIZES_PX:
        for name in ("image", "mask"):
            arrays[name, size] = group.create_array(
                f"{name}_{size}",
                shape=(len(cases), size, size),
                chunks=(1, size, size),
                dtype="uint8",
                compressors=None,
            )
    for row, (_, file, texts) in enumerate(cases):
        image = read(file)
        for size in SIZES_PX:
            arrays["image", size][row] = resize(image, size)
        if texts:
            mask = paint(texts, *image.shape[-2:]).T
            for size in SIZES_PX:
                arrays["mask", size][row] = cv2.resize(mask, (size, size), interpolation=cv2.INTER_AREA)
    return len(cases)


def naive(job: Job, plugin: str = "") -> Work:
    import cv2
    import pydicom
    import zarr  # noqa: F401  for `write_samples`
    from pydicom.pixels.decoders import JPEGBaseline8BitDecoder as Decoder

    choice = next(name for name in ("gdcm", "pylibjpeg", "pillow") if name in Decoder.available_plugins)

    def read(file: Path) -> Any:
        dataset = pydicom.dcmread(file)
        if plugin:
            dataset.pixel_array_options(decoding_plugin=plugin)
        return dataset.pixel_array

    def resize(image: Any, size: int) -> Any:
        return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)

    return lambda: (write_samples(job, read, resize), f"decoder: {plugin or choice}")


def monai(job: Job, workers: int = 0) -> Work:
    import torch
    from monai.data import DataLoader, PersistentDataset
    from monai.transforms import Compose, CopyItemsd, Lambdad, LoadImaged, Resized

    def mask_of(texts: Sequence[str]) -> Any:  # PydicomReader's first axis is x, as in the challenge's runs
        return torch.from_numpy(paint(texts, 1024, 1024)[None]).float()

    def as_bytes(values: Any) -> Any:
        return values.round().to(torch.uint8)

    large, small = ("image", "mask"), ("image_256", "mask_256")
    transform = Compose(
        [
            LoadImaged("image", reader="PydicomReader", ensure_channel_first=True),
            Lambdad("mask", mask_of),
            CopyItemsd(large, times=1, names=small),
            Resized(large, (512, 512), mode="area"),
            Resized(small, (256, 256), mode="area"),
            Lambdad((*large, *small), as_bytes),
        ]
    )

    def work() -> tuple[int, str]:
        data = [{"image": str(file), "mask": texts} for _, file, texts in find_cases(job)]
        dataset = PersistentDataset(data, transform, cache_dir=job.out)
        for _ in DataLoader(dataset, batch_size=1, num_workers=workers) if workers else dataset:
            pass
        return len(data), f"torch threads: {1 if workers else torch.get_num_threads()}"

    return work


def xrayvision(job: Job) -> Work:
    import numpy as np
    import torchxrayvision as xrv
    import zarr  # noqa: F401  for `write_samples`

    resizers = {size: xrv.datasets.XRayResizer(size, engine="cv2") for size in SIZES_PX}

    def resize(image: Any, size: int) -> Any:  # from -1024..1024 back to 0..255
        return np.rint((resizers[size](image)[0] + 1024) * (255 / 2048)).astype(np.uint8)

    return lambda: (write_samples(job, xrv.utils.load_image, resize), "decoder: pydicom's choice")


def ours(job: Job, workers: int) -> Work:
    import zarr  # noqa: F401  # preprocess imports these two only when it needs them; here they belong to the start

    from ptxdist.cache.preprocess import preprocess
    from ptxdist.dicom import decoding  # noqa: F401

    def work() -> tuple[int, str]:
        result = preprocess(job.dicom, job.labels, job.out, sizes_px=SIZES_PX, workers=workers)
        return len(result.catalog.labelled), "fsync"

    return work


def decode_alone(job: Job) -> Work:
    import cv2
    import numpy as np
    import pydicom
    from pydicom.encaps import get_frame

    pixels = np.ones(4096 * 4096, np.uint8)  # memory that is there already: no page faults
    decoders: dict[str, Callable[[bytes], Any]] = {
        "cv2": lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    }
    if importlib.util.find_spec("simplejpeg"):
        import simplejpeg

        decoders["simplejpeg"] = lambda data: simplejpeg.decode_jpeg(data, "GRAY", buffer=pixels)
    files = [file for _, file, _ in find_cases(job)][:MOST_IN_MEMORY]
    frames = [bytes(get_frame(pydicom.dcmread(file).PixelData, 0, number_of_frames=1)) for file in files]

    def seconds(name: str) -> float:
        started = time.perf_counter()
        for frame in frames[:50]:
            decoders[name](frame)
        return time.perf_counter() - started

    best = min(decoders, key=lambda name: min(seconds(name) for _ in range(3)))

    def work() -> tuple[int, str]:
        for frame in frames:
            decoders[best](frame)
        return len(frames), f"decoder: {best}"

    return work


def read_alone(job: Job) -> Work:
    files = [file for _, file, _ in find_cases(job)]

    def work() -> tuple[int, str]:
        for file in files:
            file.read_bytes()
        return len(files), ""

    return work


def write_alone(job: Job) -> Work:
    import numpy as np

    cases = find_cases(job)
    samples = {
        size: np.random.default_rng(0).integers(0, 256, (SHARD_CASES, size, size), np.uint8) for size in SIZES_PX
    }
    counts = {"image": len(cases), "mask": sum(bool(texts) for _, _, texts in cases)}

    def work() -> tuple[int, str]:
        job.out.mkdir()
        for name, count in counts.items():
            for start in range(0, count, SHARD_CASES):
                for size in SIZES_PX:
                    with open(job.out / f"{name}_{size}_{start}", "wb") as file:
                        samples[size][: count - start].tofile(file)
                        os.fsync(file.fileno())
        return len(cases), "fsync"

    return work


@dataclass(frozen=True)
class Way:
    """One row of the table; `package` must be installed for it."""

    title: str
    prepare: Callable[[Job], Work]
    package: str = ""


WAYS = {
    "a": Way("naive, pydicom's choice", naive),
    "a2": Way("naive, Pillow plugin", partial(naive, plugin="pillow")),
    "b": Way("MONAI, 1 process", monai, "monai"),
    "b2": Way("MONAI, 2 loader workers", partial(monai, workers=2), "monai"),
    "c": Way("torchxrayvision", xrayvision, "torchxrayvision"),
    "d1": Way("ours, 1 process", partial(ours, workers=1)),
    "d2": Way("ours, 2 processes", partial(ours, workers=2)),
    "e1": Way("limit: decoding", decode_alone),
    "e2": Way("limit: reading", read_alone),
    "e3": Way("limit: writing", write_alone),
}
# Two ways whose files/s are compared, and the least ratio that is asked for (0: none).
RATIOS = (("d2", "a", 6), ("d2", "a2", 0), ("d1", "a2", 0), ("d2", "b", 4), ("d2", "b2", 0), ("d2", "c", 0))
MOST_CPU, MOST_MIB = 2, 600  # asked for: CPU time per file of that of decoding and writing; peak of one process


# --- measuring --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One measured run of a way."""

    images: int
    note: str
    seconds: float
    cpu_s: float
    start_s: float
    peak_mib: float

    @property
    def files_per_s(self) -> float:
        return self.images / self.seconds

    @property
    def cpu_ms(self) -> float:
        """CPU time per file."""
        return 1000 * self.cpu_s / self.images


def run_here(key: str, job: Job) -> Run:
    """Do the work of one way in this process, which must be a fresh one."""
    begin = time.perf_counter()
    work = WAYS[key].prepare(job)
    start, cpu_s = time.perf_counter(), _cpu_s()
    images, note = work()
    seconds, cpu_s = time.perf_counter() - start, _cpu_s() - cpu_s
    # Not RUSAGE_SELF for the peak: that begins with what the parent had when it started this process.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kib = max(int(status["VmHWM"].split()[0]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    return Run(images, note, seconds, cpu_s, start - begin, kib / 1024)


def _cpu_s() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(times.ru_utime + times.ru_stime for times in usage)


def run_apart(key: str, job: Job) -> Run:
    """Do the work of one way in a process of its own."""
    command = [sys.executable, __file__, "--one", key, str(job.dicom), str(job.labels), str(job.out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{WAYS[key].title} failed:\n{done.stderr}")
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def choose(only: str) -> tuple[list[str], dict[str, str]]:
    """Keys of the ways to run (`a,d1` is a, a2 and d1; all if empty), and the missing package of those left out."""
    parts = only.split(",")
    wanted = [key for key in WAYS if not only or key in parts or key[0] in parts]
    missing = {key: WAYS[key].package for key in wanted if not _is_there(WAYS[key].package)}
    return [key for key in wanted if key not in missing], missing


def _is_there(package: str) -> bool:
    return not package or importlib.util.find_spec(package) is not None


def run_all(keys: Sequence[str], dicom: Path, labels: Path, folder: Path, rounds: int) -> list[dict[str, Run]]:
    """Runs of each way in each round; one round more is done, and its first dropped."""
    found: list[dict[str, Run]] = []
    for number in range(rounds + 1):
        found.append({})
        turn = number % len(keys)
        for key in (*keys[turn:], *keys[:turn]):
            out = folder / f"{number}-{key}"
            run = found[-1][key] = run_apart(key, Job(dicom, labels, out))
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            step = f"round {number} of {rounds}" if number else "warm-up"
            print(f"{step}, {WAYS[key].title}: {run.files_per_s:.0f} files/s, {run.cpu_ms:.2f} CPU ms", file=sys.stderr)
    return found[1:]


def summarise(rounds: Sequence[Mapping[str, Run]]) -> dict[str, Any]:
    """`ways` by key, and `compared`: measures with what is asked for. Ratios are taken round by round."""
    ways = {
        key: {
            "images": rounds[0][key].images,
            "note": rounds[0][key].note,
            **{
                name: _spread([getattr(found[key], name) for found in rounds])
                for name in ("files_per_s", "cpu_ms", "peak_mib", "start_s")
            },
        }
        for key in WAYS
        if key in rounds[0]
    }
    compared = []
    for one, other, least in RATIOS:
        if one in ways and other in ways:
            values = [found[one].files_per_s / found[other].files_per_s for found in rounds]
            compared.append(_measure(f"files/s: {WAYS[one].title} / {WAYS[other].title}", values, least=least))
    own = [key for key in ("d1", "d2") if key in ways]
    for key in own if {"e1", "e3"} <= set(ways) else ():
        values = [found[key].cpu_ms / (found["e1"].cpu_ms + found["e3"].cpu_ms) for found in rounds]
        compared.append(_measure(f"CPU per file: {WAYS[key].title} / decoding and writing", values, most=MOST_CPU))
    for key in own:
        values = [found[key].peak_mib for found in rounds]
        compared.append(_measure(f"MiB, peak of a process: {WAYS[key].title}", values, most=MOST_MIB))
    return {"ways": ways, "compared": compared}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _measure(title: str, values: Sequence[float], least: float = 0, most: float = 0) -> dict[str, Any]:
    asked = f">= {least}" if least else f"<= {most}" if most else ""
    reached = least <= statistics.median(values) <= (most or float("inf"))
    return {"title": title, **_spread(values), "asked": asked, "reached": ("yes" if reached else "NO") if asked else ""}


# --- telling ----------------------------------------------------------------------------------------------------


def tables(report: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of each table of a report: the ways, and what is compared if anything is."""
    order = ("min", "median", "max")
    rows = []
    for key, way in WAYS.items():
        if key in report["missing"]:
            rows.append([key, way.title, *[""] * 6, f"left out: {report['missing'][key]} is not installed"])
        elif found := report["ways"].get(key):
            cpu, peak, start = (found[name]["median"] for name in ("cpu_ms", "peak_mib", "start_s"))
            rate = [f"{found['files_per_s'][name]:.0f}" for name in order]
            rows.append([key, way.title, *rate, f"{cpu:.2f}", f"{peak:.0f}", f"{start:.1f}", found["note"]])
    compared = [
        [item["title"], *[f"{item[name]:.2f}" for name in order], item["asked"], item["reached"]]
        for item in report["compared"]
    ]
    head = ["", "way", "files/s min", *order[1:], "CPU ms/file", "peak MiB", "start s", "note"]
    found = (f"{report['data']} to 512 and 256 px, rounds: {report['rounds']}", head, rows)
    return [found, ("Compared", ["", *order, "asked", "reached"], compared)] if compared else [found]


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page."""
    machine = f"{report['cpu']}, {report['cores']} cores, {report['system']}"
    parts = [f"# From DICOM to arrays, {report['date']}", f"{machine}. How: `tests/benchmarks/bench_preprocess.py`."]
    for title, header, rows in tables(report):
        lines = [header, ["---"] * len(header), *rows]
        parts.append(f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return "\n\n".join([*parts, f"Versions: {versions}."]) + "\n"


def show(report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    for title, header, rows in tables(report):
        table = Table(title=title)
        for name in header:
            table.add_column(name, justify="left" if name in ("", "way", "note") else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def describe_machine() -> dict[str, Any]:
    """CPU, cores and versions; nothing that says whose machine it is."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    versions = {"python": platform.python_version()}
    for name in PACKAGES.split():
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "cpu": next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
        ),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }


def draw(folder: Path, files: int) -> tuple[Path, Path]:
    """Phantoms: their folder of DICOM files and their table."""
    from ptxdist.phantoms.dataset import write_phantoms

    written = write_phantoms(folder, cases=files)
    return written.dicom, written.labels


def take(dicom: Path, labels: Path, files: int, folder: Path) -> tuple[Path, Path]:
    """Copies of the first labelled files in folders like theirs, and a table of their rows."""
    table = folder / "train-rle.csv"
    with open(table, "w", newline="") as text:
        rows = csv.writer(text)
        rows.writerow(("ImageId", " EncodedPixels"))
        for name, file, texts in find_cases(Job(dicom, labels, folder))[:files]:
            copy = folder / "dicom" / file.relative_to(dicom)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
            rows.writerows((name, f" {runs}") for runs in texts or ["-1"])
    return folder / "dicom", table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dicom", type=Path, metavar="DIR", help="DICOM files named by image id; needs --labels")
    parser.add_argument("--labels", type=Path, metavar="CSV", help="label table, CSV or CSV.GZ")
    parser.add_argument("--files", type=int, help="number of labelled files; of phantoms without --dicom: 200")
    parser.add_argument("--rounds", type=int, default=5, help="rounds beside the one that is dropped (5)")
    parser.add_argument("--only", default="", help="ways, or their first letters: a,d1")
    parser.add_argument("--save", action="store_true", help="write to tests/benchmarks/results, by date")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # what run_apart calls
    given = parser.parse_args()
    if given.one:
        print(json.dumps(asdict(run_here(given.one[0], Job(*map(Path, given.one[1:]))))))
        return
    keys, missing = choose(given.only)
    if (given.dicom is None) != (given.labels is None) or not keys or given.rounds < 1:
        parser.error(f"--dicom needs --labels, --rounds at least 1, --only one of {', '.join(WAYS)} that is installed")
    with tempfile.TemporaryDirectory() as temporary:
        folder, dicom, labels = Path(temporary), given.dicom, given.labels
        if dicom is None:
            dicom, labels = draw(folder / "phantoms", given.files or 200)
        elif given.files:
            dicom, labels = take(dicom, labels, given.files, folder)
        images = len(find_cases(Job(dicom, labels, folder)))
        if not images:
            parser.error("no file below --dicom is named by an image id of --labels")
        rounds = run_all(keys, dicom, labels, folder, given.rounds)
    report = {
        "date": date.today().isoformat(),
        "data": f"{images} labelled {'phantoms' if given.dicom is None else 'DICOM files'}",
        "rounds": given.rounds,
        **describe_machine(),
        "missing": missing,
        **summarise(rounds),
        "runs": [{key: asdict(run) for key, run in found.items()} for found in rounds],
    }
    show(report)
    if given.save:
        path = Path(__file__).parent / "results" / f"{report['date']}-preprocess"
        path.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        path.with_suffix(".md").write_text(markdown(report))


# --- as a test: few files, one run ------------------------------------------------------------------------------

Measured = dict[str, tuple[Run, Path]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """One run each over 24 phantoms, one of them without a row, and the folder that it made."""
    folder = tmp_path_factory.mktemp("preprocess")
    dicom, labels = draw(folder / "phantoms", 24)
    return {key: (run_apart(key, Job(dicom, labels, folder / key)), folder / key) for key in ("a", "a2", "d1", "e1")}


def _arrays(folder: Path, size: int) -> dict[str, tuple[Any, Any]]:
    """Image and mask, int16, of each image id, from what ours or the naive way wrote."""
    import zarr

    own = folder / f"{size}.zarr"
    group = zarr.open_group(own if own.is_dir() else folder, mode="r")
    names, end = (group["case_id"][:], "") if own.is_dir() else (group.attrs["case_id"], f"_{size}")
    image, mask = (group[f"{name}{end}"][:].astype("int16") for name in ("image", "mask"))
    return {str(name): (image[row], mask[row]) for row, name in enumerate(names)}


@pytest.mark.parametrize("size", SIZES_PX)
@pytest.mark.parametrize(("key", "levels"), [("a2", 0), ("a", 1)])
def test_the_naive_way_gives_our_masks_and_our_images_up_to_its_decoder(
    measured: Measured, size: int, key: str, levels: int
) -> None:
    other, own = _arrays(measured[key][1], size), _arrays(measured["d1"][1], size)
    assert other.keys() == own.keys()
    assert any(mask.any() for _, mask in own.values())
    for name, (image, mask) in own.items():
        assert abs(other[name][0] - image).max() <= levels
        assert (other[name][1] == mask).all()


def test_ours_takes_no_more_cpu_time_than_the_naive_way_and_more_than_decoding(measured: Measured) -> None:
    # CPU time hardly depends on what else the machine does. Measured: half of it here, less with more files.
    other, own, limit = (measured[key][0] for key in ("a", "d1", "e1"))
    assert own.images == other.images == limit.images == 23
    assert own.cpu_ms < other.cpu_ms
    assert own.cpu_ms > limit.cpu_ms


def test_a_way_whose_package_is_missing_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    keys, missing = choose("a,b,d1")
    assert (keys, missing) == (["a", "a2", "d1"], {"b": "monai", "b2": "monai"})
    ((_, _, rows),) = tables({"data": "", "rounds": 1, "missing": missing, "ways": {}, "compared": []})
    assert [row[-1] for row in rows] == ["left out: monai is not installed"] * 2


def test_ratios_are_taken_round_by_round_and_judged_by_their_median() -> None:
    rounds = [
        {key: Run(100, "", seconds, 0.2, 1.0, 300.0) for key, seconds in (("a", slow), ("d2", 1.0))}
        for slow in (5.0, 7.0, 9.0)
    ]
    ratio, peak = summarise(rounds)["compared"]
    assert (ratio["min"], ratio["median"], ratio["max"], ratio["reached"]) == (5.0, 7.0, 9.0, "yes")
    assert (peak["median"], peak["reached"]) == (300.0, "yes")


if __name__ == "__main__":
    main()
