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


def test_a_command_that_hangs_while_it_cleans_up_is_ended(tmp_path: Path) -> None:
    """And says so, also when stderr has been redirected to the log of Ray."""
    code, _, err = outcome(f"""
interrupts.GRACE_S = 0.2
os.dup2(os.open({str(tmp_path / "log")!r}, os.O_CREAT | os.O_WRONLY), 2)
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


@pytest.mark.parametrize("waits", ["time.sleep(30)", "with interrupts.deferred(): time.sleep(0.1)"])
def test_an_interruption_in_a_destructor_is_not_lost(waits: str) -> None:
    """Python would write it to stderr and go on; so it does in callbacks, as of the locks of imported modules."""
    code, out, err = outcome(f"""
class Ended:
    def __del__(self):
        os.kill(os.getpid(), 15)
        time.sleep(30)
try:
    Ended()
    {waits}
    print("goes on")
except KeyboardInterrupt as error:
    sys.exit(error.exit_code)
""")
    assert (code, out, err) == (143, "", "")


@pytest.mark.parametrize("native", [True, False])
def test_a_module_is_imported_to_the_end(native: bool, tmp_path: Path) -> None:
    """What native code calls may not raise: Triton's enums ended the process with -6. A module may catch what is."""
    (tmp_path / "library.py").write_text(
        "import os, time\ntry:\n    os.kill(os.getpid(), 15); time.sleep(0.05); print('imported')\nexcept: pass\n"
    )
    load = (
        "importlib._bootstrap_external._imp.exec_dynamic = lambda module: runpy.run_path(FILE)\n"
        "    importlib.machinery.ExtensionFileLoader('library', 'library.so').exec_module(None)"
    )
    code, out, err = outcome(f"""
import importlib.machinery, runpy
FILE = {str(tmp_path / "library.py")!r}
sys.path.insert(0, {str(tmp_path)!r})
try:
    {load if native else "import library"}
    time.sleep(30)
except KeyboardInterrupt as error:
    sys.exit(error.exit_code)
""")
    assert (code, out, err) == (143, "imported\n", "")


def test_other_errors_in_a_destructor_are_written_as_ever() -> None:
    _, _, err = outcome("""
class Ended:
    def __del__(self):
        raise ValueError("seen")
Ended()
""")
    assert "Exception ignored in: <function Ended.__del__" in err
    assert "ValueError: seen" in err


def test_what_a_terminal_sends_does_not_reach_processes_that_are_started_for_work() -> None:
    """SIGINT and SIGHUP, from their first moment on; SIGTERM, which ends them, does."""
    code, out, _ = outcome("""
import subprocess
blocked = "import signal; print(*sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))))"
try:
    with interrupts.only_here():
        os.kill(os.getpid(), 1)
        subprocess.run([sys.executable, "-c", blocked])
        print("held", flush=True)
    print("never")
except KeyboardInterrupt as error:
    sys.exit(error.exit_code)
""")
    assert (code, out) == (129, "1 2\nheld\n")


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
        if later_s is not None and _has("SigCgt", process.pid, number) and time.monotonic() - started > later_s:
            break
        time.sleep(0.01)
    process.send_signal(number)
    said, err = process.communicate(timeout=60)
    assert (process.returncode, said) == (128 + number, "")
    assert err.splitlines()[-1] in ((NOTHING_KEPT,) if later_s is None else (NOTHING_KEPT, SENTENCE))
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("*.dcm"))


def test_a_signal_to_all_processes_of_a_command_is_said_once(tmp_path: Path) -> None:
    """As Ctrl-C in a terminal; worker processes get it while they start.

    Semaphores are freed slowly, as on a busy machine: the process must not end meanwhile, with one half freed.
    """
    program = (
        "import time; from multiprocessing import resource_tracker as tracker; from ptxdist.__main__ import main\n"
        "free = tracker.unregister; tracker.unregister = lambda *words: (time.sleep(0.05), free(*words)); main()"
    )
    words = ["phantom", str(tmp_path / "out"), "--cases", "2000", "--workers", "2"]
    command = [sys.executable, "-c", program, *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and len(children.read_text().split()) < 3:  # the third one tracks semaphores
        time.sleep(0.002)
    assert all(_has("SigBlk", int(child), signal.SIGHUP) for child in children.read_text().split())
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.splitlines()[1:]) == (130, [NOTHING_KEPT])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("closed", "seen"),
    [("<&-", ("out", "err")), (">&-", ("", "err")), ("2>&-", ("out", "")), ("<&- >&- 2>&-", ("", ""))],
)
def test_a_stream_that_is_closed_leads_nowhere(closed: str, seen: tuple[str, str], tmp_path: Path) -> None:
    """No file gets its number, else what is said would be written into that file."""
    code = (
        "import os, sys, ptxdist.cli, ptxdist.__main__\n"
        f"number = lambda: os.open({str(tmp_path / 'file')!r}, os.O_CREAT)\n"
        "ptxdist.cli.cli = lambda **_: (sys.stdout.write('out'), sys.stderr.write('err'), sys.exit(number()))\n"
        "ptxdist.__main__.main()\n"
    )
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == seen
    assert done.returncode >= 3


def test_a_result_that_cannot_be_written_is_an_error() -> None:
    """Also one that is written at the very end, since it is short."""
    code = "import ptxdist.cli, ptxdist.__main__; ptxdist.cli.cli = lambda **_: print('1'); ptxdist.__main__.main()"
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", code]
        later = {**os.environ, "PYTHONUNBUFFERED": ""}
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=later, check=False)
    assert (done.returncode, done.stderr) == (1, "error: output: No space left on device\n")


def _has(field: str, pid: int, number: int) -> bool:
    """Whether a process handles (SigCgt) or blocks (SigBlk) a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = next(line for line in status.splitlines() if line.startswith(field))
    return bool(int(found.split()[1], 16) & (1 << (number - 1)))


def test_a_closed_terminal_does_not_change_the_code(tmp_path: Path) -> None:
    """After SIGHUP nobody may read any more what is said."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ptxdist", "phantom", str(tmp_path / "out"), "--cases", "2000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=writer)
    os.close(writer)
    while process.poll() is None and not _has("SigCgt", process.pid, signal.SIGHUP):
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


def test_an_interruption_between_the_steps_of_click_is_said_too() -> None:
    code = (
        "import os, signal, click, ptxdist.cli, ptxdist.__main__\n"
        "def leave(self, *error, leave=click.Context.__exit__):\n"
        "    leave(self, *error)\n"
        "    if self.parent is None and self._depth == 0: os.kill(os.getpid(), signal.SIGTERM)\n"
        "click.Context.__exit__ = leave\n"
        "import sys; sys.argv = ['ptxdist', 'settings']\n"
        "ptxdist.__main__.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr.split("\n")[-2]) == (143, SENTENCE)
    assert "Aborted" not in done.stderr


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


def test_a_signal_after_the_end_of_a_command_changes_nothing() -> None:
    """Python shows tracebacks of handlers then, or calls none, and the signal would kill it."""
    code = (
        "import atexit, os, signal, time, ptxdist.cli, ptxdist.__main__\n"
        "class Late:\n"
        "    def __del__(self, kill=os.kill, me=os.getpid()): kill(me, 2); kill(me, 15)\n"
        "left = Late()\n"
        "atexit.register(lambda: (os.kill(os.getpid(), 2), time.sleep(0.01), print('ended')))\n"
        "ptxdist.cli.cli = lambda **_: None\n"
        "ptxdist.__main__.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")


def test_a_defect_keeps_its_traceback() -> None:
    code = (
        "import ptxdist.cli, ptxdist.__main__\nptxdist.cli.cli = lambda **_: {}['a defect']\nptxdist.__main__.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "KeyError: 'a defect'")


def test_what_an_interruption_causes_is_no_other_error() -> None:
    """As when worker processes got SIGTERM too, and ended before this one had heard of it."""
    code = (
        "import os, signal; from ptxdist import interrupts; from ptxdist.cli import _said\n"
        "from ptxdist.errors import StoreError\n"
        "interrupts.install()\n"
        "with _said():\n"
        "    try: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    finally: raise StoreError('a worker process was killed')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr.splitlines()) == (143, [SENTENCE])
