"""Hosts of their own on this machine, made of Linux namespaces: a network, a host name, processes, /tmp, /dev/shm.

A bridge connects them, and nothing else reaches it. Each host resolves its own name to 127.0.1.1, as Debian does. All
see the files of this machine, except /tmp, below which they share one folder. Ending the first process of a host ends
all of it at once, as a power cut does.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

NETWORK = "10.213.77"
PORT = 6379
_STARTED = "Ray runtime started."
_SPACES = ("--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
# $1 is the shared folder, $2 the name. /tmp is new, and has the shared folder at its old place.
_SETUP = """
set -e
hostname "$2"
mount --bind "$1" /mnt
mount -t tmpfs -o size=1g tmpfs /tmp
mount -t tmpfs -o size=300m tmpfs /dev/shm
mkdir -p "$1"
mount --bind /mnt "$1"
printf '127.0.0.1 localhost\\n127.0.1.1 %s\\n' "$2" > /tmp/hosts
mount --bind /tmp/hosts /etc/hosts
ip link set lo up
echo ready
exec cat  # until this program ends, however it does
"""


@dataclass(eq=False)
class Host:
    """One host; its programs are started with `run` and `start`."""

    name: str
    address: str
    shared: Path
    switch: int = 0  # process id of what has the bridge
    number: int = 0
    line: subprocess.Popen[bytes] | None = None  # what makes its line slow
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)

    def boot(self) -> None:
        """Start it, with a new /tmp, and plug its cable in."""
        self.first = subprocess.Popen(
            ["unshare", *_SPACES, "sh", "-c", _SETUP, "sh", str(self.shared), self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.first.stdout is not None
        with self.first.stdout as said:
            assert said.readline() == b"ready\n", f"{self.name} cannot be made"
        children = Path(f"/proc/{self.first.pid}/task/{self.first.pid}/children").read_text().split()
        self.pid = int(children[0])
        if self.switch:
            cable = f"cable{self.number}"
            with suppress(subprocess.CalledProcessError):  # of an earlier life
                _on(self.switch, "ip", "link", "del", cable)
            _ip("link", "add", cable, "netns", str(self.switch), "type", "veth", "peer", "name", "eth0",
                "netns", str(self.pid))  # fmt: skip
            _on(self.switch, "ip", "link", "set", cable, "master", "bridge0", "up")
            self.run("ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
            self.run("ip", "link", "set", "eth0", "up")

    def run(self, *words: object, timeout_s: float = 300, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program there and return what it printed."""
        done = subprocess.run(
            _there(self.pid, words), env=self._environment(), capture_output=True, text=True, check=False,
            timeout=timeout_s,
        )  # fmt: skip
        assert done.returncode == 0 or not check, f"{words} on {self.name}:\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *words: object, log: Path, variables: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a program there; what it prints is appended to `log`."""
        with open(log, "ab") as file:
            process = subprocess.Popen(
                _there(self.pid, words), env=self._environment() | dict(variables or {}), stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def cut(self) -> None:
        """Unplug its cable."""
        _on(self.switch, "ip", "link", "set", f"cable{self.number}", "down")

    def mend(self) -> None:
        """Plug it in again."""
        _on(self.switch, "ip", "link", "set", f"cable{self.number}", "up")

    def slow_down(self, delay_ms: float, lost: float) -> None:
        """Make its line slow and lossy: each frame takes longer, and a share is lost, in both directions."""
        behind = f"behind{self.number}"
        _on(self.switch, "ip", "link", "add", behind, "type", "bridge")
        _on(self.switch, "ip", "link", "set", behind, "up")
        _on(self.switch, "ip", "link", "set", f"cable{self.number}", "master", behind)
        words = [sys.executable, Path(__file__).with_name("slow_line.py"), "bridge0", behind, delay_ms, lost]
        inside = ["nsenter", f"--target={self.switch}", "--net", "--", *map(str, words)]
        self.line = line = subprocess.Popen(inside, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert line.stdout is not None
        assert line.stdout.readline() == b"ready\n", f"no slow line to {self.name}"

    def speed_up(self) -> None:
        """Make its line as it was, if it is slow."""
        if self.line is None:
            return
        self.line.communicate()  # closes its input, which ends it
        self.line = None
        _on(self.switch, "ip", "link", "set", f"cable{self.number}", "master", "bridge0")
        _on(self.switch, "ip", "link", "del", f"behind{self.number}")

    def kill(self) -> None:
        """End everything on it at once."""
        self.first.kill()  # unshare, whose child is killed with it, and all processes of its namespace
        self.first.wait()
        assert self.first.stdin is not None
        self.first.stdin.close()
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
        self.processes.clear()

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        bin_ = str(Path(sys.executable).parent)
        return {**kept, "PATH": f"{bin_}{os.pathsep}{kept.get('PATH', '')}", "RAY_AUTH_MODE": "disabled",
                "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", **self.variables}  # fmt: skip


@contextmanager
def hosts(shared: Path, names: tuple[str, ...]) -> Iterator[dict[str, Host]]:
    """Hosts of these names, connected, with the addresses NETWORK.1 and up; they share one folder."""
    switch = Host("switch", "", shared)
    made: dict[str, Host] = {}
    try:
        switch.boot()
        switch.run("ip", "link", "add", "bridge0", "type", "bridge")
        switch.run("ip", "link", "set", "bridge0", "up")
        for number, name in enumerate(names, start=1):
            made[name] = Host(name, f"{NETWORK}.{number}", shared, switch.pid, number)
            made[name].boot()
        yield made
    finally:
        for host in (*made.values(), switch):
            if hasattr(host, "first"):
                host.kill()


def start_ray(
    host: Host, log: Path, *, head: bool = False, dashboard: bool = False, variables: Mapping[str, str] | None = None
) -> None:
    """Start Ray on a host, and again whenever it ends, as systemd does with `Restart=always`.

    The head has no CPU for workers, every other host has one. Ray finds a dead host within some seconds. A `dashboard`
    on the head takes jobs from every host.
    """
    words = ["ray", "start", "--block", f"--node-ip-address={host.address}", "--object-store-memory=100000000"]
    if head:
        checks = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_timeout_ms": 2000,
                  "health_check_failure_threshold": 3}  # fmt: skip
        words += ["--head", f"--port={PORT}", "--num-cpus=0"]
        words += [f"--dashboard-host={host.address}"] if dashboard else ["--include-dashboard=false"]
        words.append(f"--system-config={json.dumps(checks, separators=(',', ':'))}")
    else:
        words += [f"--address={NETWORK}.1:{PORT}", "--num-cpus=1"]
    before = log.read_text().count(_STARTED) if log.exists() else 0
    host.start("sh", "-c", f"while :; do {shlex.join(words)}; sleep 0.5; done", log=log, variables=variables)
    wait_until(lambda: log.read_text().count(_STARTED) > before, 120, log.read_text)


def why_not(shared: Path) -> str:
    """Why such hosts cannot be made here; "" if they can."""
    if missing := [tool for tool in ("unshare", "nsenter", "ip", "mount") if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not found"
    if os.geteuid() != 0:
        return "namespaces of a network need root"
    try:
        with hosts(shared, ("one",)) as made:
            made["one"].run("ip", "link", "show", "eth0")
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        return f"namespaces cannot be made: {(str(error).splitlines() or [''])[-1]}"
    return ""


def wait_until(ready: Callable[[], bool], timeout_s: float, words: Callable[[], str] = str) -> float:
    """Wait until `ready()` and return the seconds; AssertionError with `words()` when it takes too long."""
    started = time.monotonic()
    while not ready():
        assert time.monotonic() - started < timeout_s, f"not within {timeout_s} s:\n{words()}"
        time.sleep(0.1)
    return time.monotonic() - started


def _there(pid: int, words: tuple[object, ...]) -> list[str]:
    here = f"--wd={os.getcwd()}"
    return ["nsenter", f"--target={pid}", "--net", "--uts", "--mount", "--pid", here, "--", *map(str, words)]


def _on(pid: int, *words: str) -> None:
    subprocess.run(_there(pid, words), check=True, capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
