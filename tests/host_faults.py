"""What may happen to hosts (tests/hosts.py) while a training uses them, and what has to come of it.

For the tests of integration/test_lost_hosts.py and for benchmarks/bench_hosts.py. The hosts are a head without CPUs,
two of one worker each, which share a folder, and one outside of the cluster with an S3 server.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hosts import NETWORK, PORT, Host, hosts, start_ray, wait_until
from object_store import BUCKET, KEY, SECRET

from ptxdist.rundir import read_result

PTXDIST = (sys.executable, "-m", "ptxdist")
ADDRESS = f"{NETWORK}.1:{PORT}"
STORE = f"http://{NETWORK}.4:5000"
_FILLED = "/tmp/filled"
_MOTO = Path(__file__).parents[1] / ".venv-s3" / "bin" / "moto_server"
_VARIABLES = {
    "RAY_ADDRESS": ADDRESS, "AWS_ENDPOINT_URL": STORE, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_REGION": "us-east-1",
}  # fmt: skip


@dataclass(eq=False)
class Scene:
    """The hosts, their folder, which has a cache, and a training that goes on."""

    at: dict[str, Host]
    work: Path
    log: Path
    training: subprocess.Popen[bytes] | None = None
    heard: int = 0

    @property
    def words(self) -> str:
        """What the training has said so far."""
        return self.log.read_text() if self.log.exists() else ""

    @property
    def news(self) -> str:
        """What it has said since `listen`."""
        return self.words[self.heard :]

    def listen(self) -> None:
        """From now on, `news` is what the training says."""
        self.heard = len(self.words)

    def goes_on(self) -> bool:
        """Whether the training has not ended."""
        return self.training is not None and self.training.poll() is None

    def weights(self, place: Path | str) -> list[str]:
        """The sha256 of the weights of each stage of a finished run, here or in the object store."""
        if isinstance(place, Path):
            return [stage.weights_sha256 for stage in read_result(place).stages]
        shown = self.at["head"].run(*PTXDIST, "inspect", place, "--json").stdout
        return re.findall(r'"weights_sha256": "(\w+)"', shown)


Fault = Callable[[Scene], None]


@dataclass(frozen=True)
class Case:
    """A fault, and how the training ends: with an exit code, which is 0 after the bits of a sound run, and words.

    `remote`: cache and run are in the object store. `submitted`: the command is given on the host outside. `settings`
    are further ones. `after` makes whole what would disturb the next training.
    """

    fault: Fault
    remote: bool = False
    submitted: bool = False
    settings: tuple[str, ...] = ()
    code: int = 0
    says: str = ""
    after: Fault = lambda scene: None


def nothing(scene: Scene) -> None:
    """No fault."""


def host_dies(scene: Scene) -> None:
    """Power cut; the host starts again at once, and Ray with it."""
    scene.at["two"].kill()
    host_returns(scene)


def host_returns(scene: Scene) -> None:
    """It starts again, and Ray with it."""
    scene.at["two"].boot()
    start_ray(scene.at["two"], scene.work / "ray-two.log")


def host_stays_away(scene: Scene) -> None:
    """Power cut, and it does not start again while the training goes on."""
    scene.at["two"].kill()


def short_cut(scene: Scene) -> None:
    """Cable out for two seconds."""
    scene.at["two"].cut()
    time.sleep(2)
    scene.at["two"].mend()


def cable_is_cut(scene: Scene) -> None:
    """Cable out until the training waits for a node, then in again; Ray is started again there when it has ended."""
    scene.at["two"].cut()
    wait_until(lambda: "waiting for a node" in scene.news, 200, lambda: scene.words)
    scene.at["two"].mend()


def line_is_slow(scene: Scene) -> None:
    """From now on a packet to or from a host takes 50 ms longer, and 2 % of them are lost in each direction."""
    scene.at["two"].slow_down(50, 0.02)


def line_is_fast(scene: Scene) -> None:
    """The line is as before."""
    scene.at["two"].speed_up()


def disk_is_full(scene: Scene) -> None:
    """The local disk of a host, with Ray's files and /tmp, is filled to the last byte."""
    scene.at["two"].run("sh", "-c", f"cat /dev/zero > {_FILLED}", check=False)


def disk_is_free(scene: Scene) -> None:
    """The disk is as before."""
    scene.at["two"].run("rm", _FILLED)


def store_is_cut_off(scene: Scene, seconds: float) -> None:
    """The object store with cache and run is cut off for some time."""
    scene.at["outside"].cut()
    time.sleep(seconds)
    scene.at["outside"].mend()


def thread_hangs(scene: Scene) -> None:
    """The training thread of its worker stops, while the rest of the process answers."""
    threading.Thread(target=_stop_training_thread, args=(scene,), daemon=True).start()


def _stop_training_thread(scene: Scene) -> None:
    trace, stopped, before = ctypes.CDLL(None).ptrace, list[int](), dict[int, float]()
    while scene.goes_on():
        time.sleep(0.2)
        now = _thread_seconds(scene.at["two"])
        grown = {thread: seconds - before.get(thread, seconds) for thread, seconds in now.items()}
        busiest, before = max(grown, key=lambda thread: grown[thread], default=0), now
        works = grown.get(busiest, 0) > 0.03
        if works and not stopped and trace(16, busiest, None, None) == 0:  # PTRACE_ATTACH, to one thread
            stopped.append(busiest)
        for thread in stopped:
            with suppress(ChildProcessError):
                os.waitpid(thread, os.WNOHANG | 0x40000000)  # __WALL: a killed process ends when its thread is reaped


def _thread_seconds(host: Host) -> dict[int, float]:
    """CPU time of each thread of the training workers on a host."""
    found = dict[int, float]()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # that it has ended
            network = os.readlink(f"/proc/{host.pid}/ns/net")
            if b"RayTrainWorker" in (process / "cmdline").read_bytes() and os.readlink(process / "ns/net") == network:
                for thread in (process / "task").iterdir():
                    user, kernel = (thread / "stat").read_text().rpartition(")")[2].split()[11:13]
                    found[int(thread.name)] = (int(user) + int(kernel)) / os.sysconf("SC_CLK_TCK")
    return found


UNDISTURBED = "nothing"
CASES = {
    UNDISTURBED: Case(nothing),
    "nothing, submitted from another host": Case(nothing, submitted=True),
    "nothing, cache and run in an object store": Case(nothing, remote=True),
    "a host loses power and starts again": Case(
        host_dies,
        says=rf"(to the one on {NETWORK}\.3, which died|a worker on {NETWORK}\.3 (was lost|died|cannot be reached)).*; "
        "stage 1 resumes",
    ),
    "a host never comes back": Case(
        host_stays_away, settings=("train.capacity_timeout_s=10",), code=11, after=host_returns,
        says=r"1 of 2 workers has room, and no node came within 10 s \(train\.capacity_timeout_s\)",
    ),
    "a cable is cut for two seconds": Case(short_cut),
    "a cable is cut, and mended when the training waits": Case(
        cable_is_cut, says=r"1 of 2 workers has room; waiting for a node; one that was cut off has to start Ray again"
    ),
    "a slow and lossy line to a host": Case(line_is_slow, says="epoch . of .: train: ", after=line_is_fast),
    "the local disk of a host is full": Case(
        disk_is_full, code=11, after=disk_is_free,
        says=rf"times a worker's process ended as it started, on {NETWORK}\.3; is the disk",
    ),
    "a training thread hangs": Case(
        thread_hangs, settings=("train.collective_timeout_s=15",),
        says=r"a collective did not end within train\.collective_timeout_s.*; stage 1 resumes",
    ),
    "the object store is cut off for 15 seconds": Case(partial(store_is_cut_off, seconds=15), remote=True),
    "the object store is cut off for a minute": Case(partial(store_is_cut_off, seconds=60), remote=True),
}  # fmt: skip


@contextmanager
def cluster_of_hosts(work: Path, variables: dict[str, str] | None = None) -> Iterator[Scene]:
    """The hosts with Ray, with a dashboard for jobs, and with an object store; `work` has phantoms `ph` and `cache`."""
    with hosts(work, ("head", "one", "two", "outside")) as at:
        for host in at.values():
            host.variables = {**_VARIABLES, **(variables or {})}
        _serve_objects(at["outside"], work)
        preprocess = ("preprocess", "--dicom", work / "ph/dicom-images", "--labels", work / "ph/train-rle.csv",
                      "--patients", work / "ph/patients.csv", "--out", f"s3://{BUCKET}/cache", "--size", 64, "--size",
                      96)  # fmt: skip
        at["head"].run(*PTXDIST, *preprocess)
        for name in ("head", "one", "two"):
            start_ray(at[name], work / f"ray-{name}.log", head=name == "head", dashboard=True)
        yield Scene(at, work, work / "none.log")


def _serve_objects(outside: Host, work: Path) -> None:
    log = work / "s3.log"
    outside.start(_MOTO, "-H", "0.0.0.0", "-p", "5000", log=log)
    put = ("curl", "-s", "-f", "-X", "PUT", f"{STORE}/{BUCKET}")
    wait_until(lambda: outside.run(*put, check=False).returncode == 0, 120, log.read_text)


def start(scene: Scene, name: str, case: Case, words: Sequence[object]) -> Path | str:
    """Start the training of a case with further words; returns where its run will be. Its log is WORK/NAME.log."""
    key = re.sub(r"\W+", "-", name)
    place: Path | str = f"s3://{BUCKET}/{key}/run" if case.remote else scene.work / key / "run"
    cache = f"s3://{BUCKET}/cache" if case.remote else scene.work / "cache"
    settings = (word for setting in case.settings for word in ("--set", setting))
    command = ["train", "--data", cache, "--run", place, *words, *settings]
    scene.log, scene.heard = scene.work / f"{key}.log", 0
    if case.submitted:
        submit = ("submit", "--address", f"http://{NETWORK}.1:8265", "--")
        scene.training = scene.at["outside"].start(*PTXDIST, *submit, *command, log=scene.log)
    else:
        scene.training = scene.at["head"].start(*PTXDIST, *command, log=scene.log)
    return place


def make_other(folder: Path, *, version: str = "", clock_s: float = 0) -> dict[str, str]:
    """Variables with which Ray on a host finds another version of ptxdist, or a clock that is so many seconds off."""
    folder.mkdir(parents=True)
    if version:
        (folder / f"ptxdist-{version}.dist-info").mkdir()
        text = f"Metadata-Version: 2.1\nName: ptxdist\nVersion: {version}\n"
        (folder / f"ptxdist-{version}.dist-info" / "METADATA").write_text(text)
    if clock_s:
        text = f"import time\nright = time.time\ntime.time = lambda: right() + {clock_s}\n"
        (folder / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", "")))}


def restart_ray(scene: Scene, variables: dict[str, str]) -> None:
    """Start a host again, and Ray on it with these variables."""
    scene.at["two"].kill()
    scene.at["two"].boot()
    start_ray(scene.at["two"], scene.work / "ray-two.log", variables=variables)
