"""Interrupt each command at many moments: a sentence, the right code, no process and nothing half written left?

    python tests/benchmarks/interrupt_commands.py FOLDER [--times 20] [COMMAND…]

FOLDER gets what the commands need, from `ptxdist demo`, once. Each of SIGINT, SIGTERM and SIGHUP is sent TIMES times to
each command: a quarter of them in its first 80 ms, a quarter in the 50 ms after its first result on stdout, the others
at any time; once, twice in succession, or to all of its processes, as a terminal does. Every fourth time the command
is run again, and what it writes is compared with that of an undisturbed command. Prints a line for each fault, and for
each command how many of how many were right. A signal that arrives before ptxdist handles signals is counted by itself
(there need be no sentence), one that arrives after the command has ended not at all.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ptxdist.files import sha256
from ptxdist.interrupts import NOTHING_KEPT, SENTENCE
from ptxdist.resolve import find

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SMALL_NETWORK = Path(__file__).parents[1] / "small_network"
DATA = "--dicom {demo}/phantoms/dicom-images --labels {demo}/phantoms/train-rle.csv "
DATA += "--patients {demo}/phantoms/patients.csv"
TRAIN = "--data {demo}/cache --run {out} --set model.encoder=small --set train.checkpoint_every_images=20 "
SERVES = "the viewer has ended; nothing was stored"  # the end of a viewer that serves; its exit code is 0
CHANGING = ("environment.json", "index.html")  # they name the machine's load and the commit
FAULTY = re.compile("Traceback|Exception ignored|Warning|terminate called|Fatal")


@dataclass(frozen=True)
class Use:
    """A command; `copied` is put where it writes first, `most_s` is when it is interrupted at the latest."""

    words: str
    copied: str = ""
    small: bool = False  # with the network of tests/small_network
    ray: bool = False
    most_s: float | None = None


USES = {
    "phantom": Use("phantom {out} --cases 40 --workers 2"),
    "preprocess": Use(f"preprocess {DATA} --out {{out}} --size 64 --workers 1"),
    "preprocess-2": Use(f"preprocess {DATA} --out {{out}} --size 64 --size 256 --workers 2"),
    "verify": Use("verify {demo}/cache"),
    "repair": Use("verify {out} --source {demo}/phantoms/dicom-images --repair --workers 2", "damaged"),
    "inspect": Use("inspect {out}", "small"),
    "evaluate": Use("evaluate {out}", "run"),
    "elsewhere": Use("evaluate {demo}/run --data {demo}/cache --out {out} --sensitivity 0.9"),
    "score": Use("score {demo}/predictions --truth {demo}/phantoms/train-rle.csv --subset"),
    "compare": Use("compare {demo}/run {demo}/elsewhere"),
    "report": Use("report {out}", "run"),
    "predict": Use("predict {demo}/run {demo}/few --out {out}"),
    "predict-2": Use("predict {demo}/run {demo}/few --out {out} --workers 2"),
    "bundle": Use("export {demo}/run --out {out}/model.ptxdist"),
    "onnx": Use("export {demo}/run --out {out}/model.onnx"),
    "pt2": Use("export {demo}/run --out {out}/model.pt2"),
    "plan": Use("plan {demo}/cache --out {out}/plan.toml"),
    "serve": Use("serve {demo}/run --port 0", most_s=12),
    "doctor": Use("doctor"),
    "train": Use(f"train --pipeline smoke {TRAIN} --set stages.2.size_px=128 --without-ray", small=True),
    "train-ray": Use(f"train --pipeline {{demo}}/one.toml {TRAIN} --workers 2", small=True, ray=True),
    "demo": Use("demo --out {out}", ray=True),
}


def main() -> None:
    """Measure the commands that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("commands", nargs="*", help=f"[default: all] {' '.join(USES)}")
    given = parser.parse_intermixed_args()
    for number in (signal.SIGINT, signal.SIGHUP):  # a background job ignores the one, nohup the other
        signal.signal(number, signal.SIG_DFL)
    demo = given.folder.absolute() / "demo"
    prepare(demo)
    wrong = 0
    for name in given.commands or USES:
        counts = Interruptions(USES[name], demo, random.Random(given.seed)).all(given.times)
        wrong += counts["wrong"]
        print(f"{name}: {counts['right']} of {counts['right'] + counts['wrong']} right;", dict(counts), flush=True)
    sys.exit(bool(wrong))


def prepare(demo: Path) -> None:
    """What the commands read."""

    def run(words: str) -> None:
        subprocess.run([sys.executable, "-m", "ptxdist", *words.format(demo=demo).split()], check=True)

    if (demo / "ready").exists():
        return
    run("demo --out {demo}")
    run(f"preprocess {DATA} --out {{demo}}/small --size 64")
    shutil.copytree(demo / "small", demo / "damaged")
    (demo / "damaged" / "64.zarr" / "image" / "c" / "0" / "0" / "0").write_bytes(b"")
    (demo / "few").mkdir()
    for path in sorted((demo / "phantoms").rglob("*.dcm"))[:60]:
        shutil.copy(path, demo / "few")
    smoke = find("pipelines", "smoke").read_text()
    (demo / "one.toml").write_text("[[stages]]".join(smoke.split("[[stages]]")[:2]))
    run("predict {demo}/run {demo}/few --out {demo}/predictions")
    run("evaluate {demo}/run --data {demo}/cache --split val --out {demo}/elsewhere")
    (demo / "ready").touch()


class Interruptions:
    """Interruptions of one command."""

    def __init__(self, use: Use, demo: Path, chosen: random.Random) -> None:
        self.use, self.demo, self.chosen = use, demo, chosen
        self.place = demo.parent / f"work-{os.getpid()}"
        self.counts: Counter[str] = Counter()
        self.usual: set[str] = set()

    def all(self, times: int) -> Counter[str]:
        """Interrupt it so many times by each signal."""
        if self.use.most_s is None:
            self.expected, self.took_s = self.undisturbed()
            again, took_s = self.undisturbed()
            self.took_s = min(took_s, self.took_s)
            self.expected = {name: sum_ if again.get(name) == sum_ else "" for name, sum_ in self.expected.items()}
        else:
            self.expected, self.took_s = {}, self.use.most_s
        self.counts["took_ms"] = round(1000 * self.took_s)
        for number in SIGNALS:
            for turn in range(times):
                if not any(self.once(number, turn, times) for _ in range(5)):  # it may end before that
                    self.counts["not reached"] += 1
        return self.counts

    def undisturbed(self) -> tuple[dict[str, str], float]:
        """What it writes, and how long it takes."""
        self.clear()
        begin = time.monotonic()
        self.finish()
        took_s = time.monotonic() - begin
        self.usual = {path.name for path in (self.place / "tmp").iterdir()}  # what libraries leave
        return self.written(), took_s

    def clear(self) -> None:
        """Start anew."""
        shutil.rmtree(self.place, ignore_errors=True)
        (self.place / "tmp").mkdir(parents=True)
        out = self.place / "out" / "it"
        out.parent.mkdir()
        if self.use.copied:
            shutil.copytree(self.demo / self.use.copied, out)

    def written(self) -> dict[str, str]:
        """sha256 of the files by their names; locks and logs, which may stay, are left out."""
        files = [path for path in (self.place / "out").rglob("*") if path.is_file()]
        return {
            str(path.relative_to(self.place)): "" if path.name in CHANGING else sha256(path)
            for path in files
            if "lock" not in path.name and path.suffix != ".log" and "tensorboard" not in path.parts
        }

    def start(self, mark: str = "") -> subprocess.Popen[bytes]:
        """The command, in a session of its own."""
        words = self.use.words.format(demo=self.demo, out=self.place / "out" / "it").split()
        more = {"INTERRUPTED": mark, "OMP_NUM_THREADS": "1"}
        if not self.use.ray:  # Ray's own folders are too long for its sockets there, and stay
            more["TMPDIR"] = str(self.place / "tmp")
        if self.use.small:
            more |= {"PYTHONPATH": f"{SMALL_NETWORK}:{os.environ.get('PYTHONPATH', '')}", "SLOW_S": "0.3"}
        return subprocess.Popen(
            [sys.executable, "-m", "ptxdist", *words], env={**os.environ, **more}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def finish(self) -> None:
        """Run it to its end."""
        process = self.start()
        said = process.communicate()[1]
        if process.returncode:
            raise RuntimeError(said.decode())

    def once(self, number: signal.Signals, turn: int, times: int) -> bool:
        """Interrupt it once; False when it ended before."""
        self.clear()
        mark = f"{os.getpid()}-{time.monotonic_ns()}"
        process = self.start(mark)
        assert process.stdout is not None
        early, late = turn < times / 4, turn >= times - times / 4
        moment_s = self.chosen.uniform(0, 0.08 if early else self.took_s)
        if late and self.use.most_s is None:
            select.select([process.stdout], [], [], self.took_s * 3)
            time.sleep(self.chosen.uniform(0, 0.05))
            moment_s = self.took_s
        else:
            time.sleep(moment_s)
        if process.poll() is not None:
            process.communicate()
            return False
        handled = caught(process.pid, "SigCgt", signal.SIGHUP) or caught(process.pid, "SigIgn", signal.SIGHUP)
        way = ("once", "twice", "group")[turn % 3]
        send = os.killpg if way == "group" else os.kill
        send(process.pid, number)
        numbers = [number]
        if way == "twice":
            time.sleep(self.chosen.uniform(0, 0.1))
            if process.poll() is None:
                numbers.append(self.chosen.choice(SIGNALS))  # Python may handle it first
                process.send_signal(numbers[-1])
        begin = time.monotonic()
        try:
            said = process.communicate(timeout=60)[1].decode(errors="replace")
        except subprocess.TimeoutExpired:
            process.kill()
            said = process.communicate()[1].decode(errors="replace") + "\nit did not end"
        ended_s, deadline = time.monotonic() - begin, time.monotonic() + (10 if self.use.ray else 1)
        while (remaining := left(f"INTERRUPTED={mark}")) and time.monotonic() < deadline:
            time.sleep(0.05)
        faults = [f"process left: {words}" for words in remaining]
        if handled:
            faults += self.faults(process.returncode, said, numbers)
        elif {-process.returncode, process.returncode - 128}.isdisjoint(numbers) and "KeyboardInterrupt" not in said:
            faults.append("code")  # in the interpreter's own start
        if not self.use.ray and (drafts := self.drafts()):
            faults += drafts
        if turn % 4 == 3 and not faults and process.returncode and self.use.most_s is None:
            faults += self.again()
        self.counts["wrong" if faults else "right" if handled else "before"] += 1
        self.counts["slowest_ms"] = max(self.counts["slowest_ms"], round(1000 * ended_s))
        if faults:
            moment = f"{number.name} {way} at {moment_s:.2f} s of {self.took_s:.2f}"
            ended = f"ended after {ended_s:.1f} s with {process.returncode}"
            print(f"WRONG {self.use.words.split()[0]} {moment}: {ended}: {faults}\n{said[-1500:]}", flush=True)
        return True

    def faults(self, code: int, said: str, numbers: list[signal.Signals]) -> list[str]:
        """What is wrong with the end of a command that handles signals."""
        lines = said.splitlines()
        faults = ["it says more"] if FAULTY.search(said) else []
        sentences = [line for line in lines if line in (SENTENCE, NOTHING_KEPT, SERVES)]
        if code == 0 and sentences == [SERVES]:
            return faults
        if code == 0 and not sentences:  # it had ended
            return faults + self.other()
        if code - 128 not in numbers:
            faults.append("code")
        if len(sentences) != 1 or lines[-1] not in sentences or SERVES in sentences:
            faults.append("sentence")
        return faults

    def other(self) -> list[str]:
        """The files that are missing, too many, or other than those of an undisturbed command."""
        found = self.written()
        same = [name for name, sum_ in self.expected.items() if name in found and sum_ in ("", found[name])]
        return sorted({*found, *self.expected}.difference(same))

    def drafts(self) -> list[str]:
        """Temporary files and folders that are left."""
        found = (*(self.place / "out").rglob("*.ptxdist-*.tmp"), *(self.place / "tmp").iterdir())
        return [f"left: {path.name}" for path in found if path.name not in {*self.usual, "torchinductor_root"}]

    def again(self) -> list[str]:
        """What is wrong after a rerun."""
        if not self.other():
            return []
        try:
            self.finish()
        except RuntimeError as error:
            return [f"rerun: {error}"]
        return [f"rerun: {name}" for name in self.other()]


def caught(pid: int, field: str, number: int) -> bool:
    """Whether a process handles (SigCgt) or ignores (SigIgn) a signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    line = next((line for line in status.splitlines() if line.startswith(field)), "x 0")
    return bool(int(line.split()[1], 16) & (1 << (number - 1)))


def left(mark: str) -> list[str]:
    """Command lines of processes that have this entry in their environment, which all children of a command inherit."""
    found: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:80])
        except OSError:
            continue
    return found


if __name__ == "__main__":
    main()
