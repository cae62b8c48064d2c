"""Faults on several hosts: what a training says and does, how long it takes, and whether its weights stay the same.

    python tests/benchmarks/bench_hosts.py [CASE ...] > hosts.json

The hosts are network namespaces (tests/hosts.py): a head without a CPU and two hosts with one each, which share a
folder, and a fourth one for what is outside. Needs root. `noticed_s` is the time from the fault to the first words
about it, `again_s` to the first progress after it, `total_s` that of the whole command.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from hosts import NETWORK, PORT, Host, hosts, start_ray, wait_until
from object_store import BUCKET, KEY, SECRET

from ptxdist.rundir import read_result

PTXDIST = (sys.executable, "-m", "ptxdist")
ROOT = Path(__file__).parents[2]
STORE = f"http://{NETWORK}.4:5000"
ADDRESS = {"RAY_ADDRESS": f"{NETWORK}.1:{PORT}"}
CREDENTIALS = {
    "AWS_ENDPOINT_URL": STORE, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1",
}  # fmt: skip
WORDS = ("--pipeline", "smoke", "--set", "stages.1.epochs=4", "--workers", 2, "--set", "train.worker_timeout_s=10",
         "--set", "train.checkpoint_every_s=1")  # fmt: skip


@dataclass(eq=False)
class Scene:
    """The hosts, their folder, and a training that goes on."""

    at: dict[str, Host]
    work: Path
    log: Path
    training: subprocess.Popen[bytes] | None = None

    @property
    def words(self) -> str:
        """What the training has said so far."""
        return self.log.read_text() if self.log.exists() else ""


Fault = Callable[[Scene], None]


def nothing(scene: Scene) -> None:
    """No fault."""


def host_dies(scene: Scene) -> None:
    """Power cut; the host starts again at once, and Ray with it."""
    two = scene.at["two"]
    two.kill()
    two.boot()
    start_ray(two, scene.work / "ray-two.log")


def cable_is_cut(scene: Scene) -> None:
    """Cable out until the training waits for a node, then in again; Ray is started again there when it has ended."""
    scene.at["two"].cut()
    wait_until(lambda: "waiting for a node" in scene.words, 200, lambda: scene.words)
    scene.at["two"].mend()


def short_cut(scene: Scene) -> None:
    """Cable out for two seconds."""
    scene.at["two"].cut()
    time.sleep(2)
    scene.at["two"].mend()


def disk_is_full(scene: Scene) -> None:
    """The local disk of a host, with Ray's files and /tmp, is filled to the last byte."""
    scene.at["two"].run("sh", "-c", f"cat /dev/zero > {FILLED}", check=False)


def store_goes(scene: Scene) -> None:
    """The object store with cache and run is cut off for a minute."""
    scene.at["outside"].cut()
    time.sleep(60)
    scene.at["outside"].mend()


def line_is_slow(scene: Scene) -> None:
    """From now on a packet to or from a host takes 50 ms longer, and 2 % of them are lost in each direction."""
    scene.at["two"].slow_down(50, 0.02)


def host_stays_away(scene: Scene) -> None:
    """Power cut, and it does not start again while the training goes on."""
    scene.at["two"].kill()


def thread_hangs(scene: Scene) -> None:
    """The training thread of its worker stops, and so in each new worker, while the rest of the process answers."""
    threading.Thread(target=_stop_training_threads, args=(scene,), daemon=True).start()


def _stop_training_threads(scene: Scene) -> None:
    trace, stopped, tries = ctypes.CDLL(None).ptrace, list[int](), 0
    while scene.training is not None and scene.training.poll() is None:
        if scene.words.count("resumes after") >= tries:
            before = _thread_seconds(scene.at["two"])
            time.sleep(1)
            grown = {thread: now - before.get(thread, now) for thread, now in _thread_seconds(scene.at["two"]).items()}
            busiest = max(grown, key=lambda thread: grown[thread], default=0)
            if grown.get(busiest, 0) > 0.2 and trace(16, busiest, None, None) == 0:  # PTRACE_ATTACH, to one thread
                stopped.append(busiest)
                tries += 1
        for thread in stopped:
            with suppress(ChildProcessError):
                os.waitpid(thread, os.WNOHANG | 0x40000000)  # __WALL: a killed process ends when its thread is reaped
        time.sleep(0.2)


def _thread_seconds(host: Host) -> dict[int, float]:
    """CPU time of each thread of the training workers on a host."""
    network, found = os.readlink(f"/proc/{host.pid}/ns/net"), {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"RayTrainWorker" in (process / "cmdline").read_bytes() and os.readlink(process / "ns/net") == network:
                for thread in (process / "task").iterdir():
                    user, kernel = (thread / "stat").read_text().rpartition(")")[2].split()[11:13]
                    found[int(thread.name)] = (int(user) + int(kernel)) / os.sysconf("SC_CLK_TCK")
    return found


@dataclass(frozen=True)
class Case:
    """A fault, whether cache and run are in the object store, and further settings."""

    fault: Fault
    remote: bool = False
    settings: tuple[str, ...] = ()


FILLED = "/tmp/filled"
SUBMITTED = "nothing, submitted from another host"
AWAY = "a host never comes back"
CASES = {
    "nothing": Case(nothing),
    "a host loses power and starts again": Case(host_dies),
    SUBMITTED: Case(nothing),
    "a slow and lossy line to a host": Case(line_is_slow),
    "a cable is cut for two seconds": Case(short_cut),
    "a cable is cut, and mended when the training waits": Case(cable_is_cut),
    "the local disk of a host is full": Case(disk_is_full),
    "a training thread hangs in every try": Case(
        thread_hangs, settings=("train.collective_timeout_s=15", "train.max_worker_failures=1")
    ),
    AWAY: Case(host_stays_away, settings=("train.capacity_timeout_s=10",)),
    "nothing, cache and run in an object store": Case(nothing, remote=True),
    "the object store is cut off for a minute": Case(store_goes, remote=True),
}
REFUSED = ("another version", "no shared folder", "a clock 60 s off (doctor)")


def measure(name: str, scene: Scene) -> dict[str, object]:
    """Train with one fault in the third epoch of the first stage."""
    fault, remote, settings = CASES[name].fault, CASES[name].remote, CASES[name].settings
    key = re.sub(r"\W+", "-", name)
    scene.log, run = scene.work / f"{key}.log", scene.work / key / "run"
    place = f"s3://{BUCKET}/{key}" if remote else run
    cache = f"s3://{BUCKET}/cache" if remote else scene.work / "cache"
    started = time.monotonic()
    words = ["train", "--data", cache, "--run", place, *WORDS, *(word for item in settings for word in ("--set", item))]
    if name == SUBMITTED:
        submit = [*PTXDIST, "submit", "--address", f"http://{NETWORK}.1:8265", "--", *words]
        scene.training = scene.at["outside"].start(*submit, log=scene.log)
    else:
        scene.training = scene.at["head"].start(*PTXDIST, *words, log=scene.log)
    wait_until(lambda: "epoch 2/4" in scene.words, 600, lambda: scene.words)
    seen, hit = len(scene.words), time.monotonic()
    fault(scene)
    found: dict[str, float] = {}
    while scene.training.poll() is None:
        new = scene.words[seen:]
        for key_, pattern in (("noticed_s", "worker|collective|waiting"), ("again_s", "resumes after")):
            if key_ not in found and re.search(pattern, new):
                found[key_] = round(time.monotonic() - hit, 1)
        time.sleep(0.1)
    two = scene.at["two"]
    if name == AWAY:
        two.boot()
        start_ray(two, scene.work / "ray-two.log")
    two.speed_up()
    two.run("rm", "-f", FILLED)
    row: dict[str, object] = {"case": name, "code": scene.training.returncode, **found,
                              "total_s": round(time.monotonic() - started, 1)}  # fmt: skip
    row["said"] = [line for line in scene.words[seen:].splitlines() if "epoch" not in line.split(":")[0]][-12:]
    if scene.training.returncode == 0:
        shown = scene.at["head"].run(*PTXDIST, "inspect", place, "--json", check=False).stdout if remote else ""
        row["weights"] = (
            re.findall(r'"weights_sha256": "(\w+)"', shown)
            if remote
            else [stage.weights_sha256 for stage in read_result(run).stages]
        )
    return row


def refused(name: str, scene: Scene) -> dict[str, object]:
    """A command that ends before anything is trained, and what it says."""
    two, head = scene.at["two"], scene.at["head"]
    train = (*PTXDIST, "train", "--data", scene.work / "cache", "--run", scene.work / "refused" / "run", *WORDS)
    started = time.monotonic()
    if name == "no shared folder":
        two.run("mount", "-t", "tmpfs", "tmpfs", scene.work)
        done = head.run(*train, check=False)
        two.run("umount", scene.work)
    else:
        two.kill()
        two.boot()
        other = scene.work / "other"
        (other / "ptxdist-9.9.9.dist-info").mkdir(parents=True, exist_ok=True)
        if name == "another version":
            text = "Metadata-Version: 2.1\nName: ptxdist\nVersion: 9.9.9\n"
            (other / "ptxdist-9.9.9.dist-info" / "METADATA").write_text(text)
        else:
            shutil.rmtree(other / "ptxdist-9.9.9.dist-info")
            (other / "sitecustomize.py").write_text(
                "import time\nright = time.time\ntime.time = lambda: right() + 60\n"
            )
        path = os.pathsep.join((str(other), os.environ.get("PYTHONPATH", "")))
        start_ray(two, scene.work / "ray-two.log", variables={"PYTHONPATH": path})
        started = time.monotonic()
        doctor = (*PTXDIST, "doctor", "--address", ADDRESS["RAY_ADDRESS"], "--run", scene.work / "refused")
        done = head.run(*(train if name == "another version" else doctor), check=False)
        two.kill()
        two.boot()
        start_ray(two, scene.work / "ray-two.log")
    said = [line for line in (done.stdout + done.stderr).splitlines() if f"{NETWORK}.3" in line or "error" in line]
    return {"case": name, "code": done.returncode, "total_s": round(time.monotonic() - started, 1), "said": said[-6:]}


def serve_objects(outside: Host, work: Path) -> None:
    """An S3 server on a host, with an empty bucket."""
    log = work / "s3.log"
    outside.start(ROOT / ".venv-s3" / "bin" / "moto_server", "-H", "0.0.0.0", "-p", "5000", log=log)
    put = ("curl", "-s", "-f", "-X", "PUT", f"{STORE}/{BUCKET}")
    wait_until(lambda: outside.run(*put, check=False).returncode == 0, 120, log.read_text)


def main(names: list[str]) -> None:
    """Measure the cases of these names, all without any; "nothing" always comes first."""
    with tempfile.TemporaryDirectory(prefix="ptxdist-hosts-") as name:
        work = Path(name)
        for words in (
            ["phantom", "ph", "--cases", "40", "--positive-share", "0.5"],
            ["preprocess", "--dicom", "ph/dicom-images", "--labels", "ph/train-rle.csv", "--patients",
             "ph/patients.csv", "--out", "cache", "--size", "64", "--size", "96"],
        ):  # fmt: skip
            subprocess.run([*PTXDIST, *words], check=True, cwd=work, capture_output=True)
        chosen = names or [*CASES, *REFUSED]
        rows: list[dict[str, object]] = []
        with hosts(work, ("head", "one", "two", "outside")) as at:
            for host in at.values():
                host.variables = {**ADDRESS, **CREDENTIALS}
            if any(case in CASES and CASES[case].remote for case in chosen):
                serve_objects(at["outside"], work)
                preprocess = ("preprocess", "--dicom", work / "ph/dicom-images", "--labels", work / "ph/train-rle.csv",
                              "--patients", work / "ph/patients.csv", "--out", f"s3://{BUCKET}/cache", "--size", 64,
                              "--size", 96)  # fmt: skip
                at["head"].run(*PTXDIST, *preprocess)
            for host in ("head", "one", "two"):
                jobs = SUBMITTED in chosen
                start_ray(at[host], work / f"ray-{host}.log", head=host == "head", dashboard=jobs)
            scene = Scene(at, work, work / "none.log")
            for case in dict.fromkeys(["nothing", *chosen]):
                try:
                    row = measure(case, scene) if case in CASES else refused(case, scene)
                    if "weights" in row:
                        row["same_bits"] = row["weights"] == rows[0]["weights"] if rows else True
                except Exception as error:
                    row = {"case": case, "failed": str(error)[-3000:]}
                rows.append(row)
                print(json.dumps(row, indent=2), file=sys.stderr, flush=True)
        versions = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
        print(json.dumps({"versions": versions, "rows": rows}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
