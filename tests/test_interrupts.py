"""SIGINT, SIGTERM and SIGHUP end a command with a sentence and 128 + their number, whenever they arrive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ptxdist.interrupts import NOTHING_KEPT, SENTENCE

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
START = "import os, signal, sys, time\nfrom ptxdist import interrupts\ninterrupts.install()\n"


def outcome(program: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a Python program that has installed the handlers."""
    done = subprocess.run([sys.executable, "-c", START + program], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_cleans_up_and_others_do_not_disturb(number: signal.Signals) -> None:
    code, out, err = outcome(f"""
try:
    try:
        os.kill(os.getpid(), {number:d})
        time.sleep(30)
    finally:
        for other in (1, 2, 15):
            os.kill(os.getpid(), other)
        time.sleep(0.05)
        print("clean")
except KeyboardInterrupt as error:
    sys.exit(error.exit_code)
""")
    assert (code, out, err) == (128 + number, "clean\n", "")


def test_a_command_that_hangs_while_it_cleans_up_is_ended() -> None:
    code, _, err = outcome("""
interrupts.GRACE_S = 0.2
try:
    os.kill(os.getpid(), 15)
finally:
    time.sleep(30)
""")
    assert (code, err) == (143, SENTENCE + "\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_what_must_not_stop_halfway_ends_first(number: signal.Signals) -> None:
    """A block that is deferred ends before its signal is handled; blocks after it, in the clean-up, change nothing."""
    code, out, err = outcome(f"""
try:
    try:
        with interrupts.deferred():
            os.kill(os.getpid(), {number:d})
            time.sleep(0.05)
            print("started")
        print("never")
    finally:
        with interrupts.deferred():
            os.kill(os.getpid(), 15)
            print("ended")
except KeyboardInterrupt as error:
    sys.exit(error.exit_code)
""")
    assert (code, out, err) == (128 + number, "started\nended\n", "")


def test_what_is_ignored_stays_ignored() -> None:
    """As by nohup; the program is started once more, since `install` looks at what it finds."""
    code, out, err = outcome("""
signal.signal(signal.SIGHUP, signal.SIG_IGN)
interrupts.install()
os.kill(os.getpid(), 1)
print("goes on")
""")
    assert (code, out, err) == (0, "goes on\n", "")


def test_a_block_without_signals_gets_them_afterwards_whoever_took_them_over() -> None:
    code, out, _ = outcome("""
try:
    with interrupts.held():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(15))
        os.kill(os.getpid(), 15)
        print("held")
    time.sleep(30)
except KeyboardInterrupt as error:
    sys.exit(error.exit_code)
""")
    assert (code, out) == (143, "held\n")


@pytest.mark.parametrize(("number", "later_s"), [(SIGNALS[0], 0.15), (SIGNALS[1], 0.3), *((n, None) for n in SIGNALS)])
def test_a_command_says_one_sentence(number: signal.Signals, later_s: float | None, tmp_path: Path) -> None:
    """While modules are imported, at any time, or when the work has begun."""
    out = tmp_path / "phantoms"
    command = [sys.executable, "-m", "ptxdist", "phantom", str(out), "--cases", "2000", "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started = time.monotonic()
    while time.monotonic() - started < 60 and process.poll() is None:
        if later_s is None and list(tmp_path.rglob("*.dcm")):
            break
        if later_s is not None and _handles(process.pid, number) and time.monotonic() - started > later_s:
            break
        time.sleep(0.01)
    process.send_signal(number)
    said, err = process.communicate(timeout=60)
    assert (process.returncode, said) == (128 + number, "")
    assert err.splitlines()[-1] in ((NOTHING_KEPT,) if later_s is None else (NOTHING_KEPT, SENTENCE))
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("*.dcm"))


def _handles(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) & (1 << (number - 1)))


def test_a_closed_terminal_does_not_change_the_code(tmp_path: Path) -> None:
    """After SIGHUP nobody may read any more what is said."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ptxdist", "phantom", str(tmp_path / "out"), "--cases", "2000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=writer)
    os.close(writer)
    while process.poll() is None and not _handles(process.pid, signal.SIGHUP):
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 129


def test_an_interruption_that_a_library_raises_again_keeps_its_number() -> None:
    """Ray's C++ core makes a KeyboardInterrupt without a number of it."""
    code = (
        "import os, signal; from ptxdist import interrupts; from ptxdist.cli import _said\n"
        "interrupts.install()\n"
        "with _said():\n"
        "    try: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except KeyboardInterrupt: raise KeyboardInterrupt from None\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr.splitlines()) == (143, [SENTENCE])


def test_an_interruption_while_an_error_is_said_is_said_too() -> None:
    code = (
        "import os, signal, click, ptxdist.cli; from ptxdist import interrupts\n"
        "interrupts.install()\n"
        "ptxdist.cli.advice = lambda *_: os.kill(os.getpid(), signal.SIGHUP)\n"
        "with ptxdist.cli._said(): raise click.UsageError('no')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr.splitlines()) == (129, [SENTENCE])


def test_a_crash_at_the_end_of_the_interpreter_does_not_change_the_code() -> None:
    """As in threads of a Ray that has just started; what has been registered for the end still runs."""
    code = (
        "import atexit, os, signal, ptxdist.cli, ptxdist.__main__\n"
        "class Crash:\n"
        "    def __del__(self, abort=os.abort): abort()\n"
        "left = Crash()\n"
        "atexit.register(print, 'ended')\n"
        "ptxdist.cli.cli = lambda **_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "ptxdist.__main__.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (143, "ended\n", [SENTENCE])
