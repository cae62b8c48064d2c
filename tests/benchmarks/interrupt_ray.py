"""Interrupt `ptxdist train` with Ray at random moments: is there a sentence, the right code, and no process left?

    python tests/benchmarks/interrupt_ray.py CACHE [TIMES] [MOST_S]

CACHE has the sizes of the smoke pipeline. Each of SIGINT, SIGTERM and SIGHUP is sent TIMES times (default 20), each at
a moment of a random command's first MOST_S seconds (default 20). Prints one line for each, and exits with 1 if one of
them was not as it has to be. The run resumes each time.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ptxdist.interrupts import SENTENCE

SMALL_NETWORK = Path(__file__).parents[1] / "small_network"


def left(mark: str) -> list[str]:
    """Command lines of processes that have this entry in their environment, which all children of a command inherit."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:80])
        except OSError:
            continue
    return found


def interrupt(words: list[str], number: signal.Signals, moment_s: float, mark: str) -> bool:
    """Start a command and send it a signal; prints how it ended, and returns whether that was right."""
    path = f"{SMALL_NETWORK}:{os.environ.get('PYTHONPATH', '')}"
    process = subprocess.Popen(
        [sys.executable, "-m", "ptxdist", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "INTERRUPTED": mark, "SLOW_S": "3", "PYTHONPATH": path},
    )  # fmt: skip
    time.sleep(moment_s)
    if process.poll() is not None:
        sys.exit(f"ended by itself: {process.communicate()[1][-500:]}")
    process.send_signal(number)
    sent = time.monotonic()
    said = process.communicate()[1]
    took, deadline = time.monotonic() - sent, time.monotonic() + 10
    while (remaining := left(f"INTERRUPTED={mark}")) and time.monotonic() < deadline:
        time.sleep(0.1)
    gone = time.monotonic() - sent - took
    last = (said.splitlines() or [""])[-1]
    right = process.returncode == 128 + number and last == SENTENCE and "Traceback" not in said and not remaining
    print(f"{number.name} after {moment_s:.1f} s: ended after {took:.1f} s, the rest {gone:.1f} s later", flush=True)
    if not right:
        print("WRONG", process.returncode, repr(said[-600:]), remaining, flush=True)
    return right


def main() -> None:
    cache, times, most_s = sys.argv[1], int((sys.argv[2:] or ["20"])[0]), float((sys.argv[3:] or ["20"])[0])
    chosen, wrong = random.Random(0), 0
    for number in (signal.SIGINT, signal.SIGHUP):  # a background job ignores the one, nohup the other
        signal.signal(number, signal.SIG_DFL)
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", "--pipeline", "smoke", "--workers", "2", "--data", cache, "--run", f"{folder}/run"]
        words += ["--set", "model.encoder=small", "--set", "train.checkpoint_every_images=20"]
        for turn in range(3 * times):
            number = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[turn % 3]
            wrong += not interrupt(words, number, chosen.uniform(0.1, most_s), f"{os.getpid()}-{turn}")
    print(f"{wrong} of {3 * times} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
