"""A run in an object store, and its copy on the local disk of this node.

    STAGING/run-<address>/exp4/     where a run is written, on the node of rank 0 and on that of the driver
    STAGING/read-<address>/exp4/    a copy to read

Owns: which files of a run are sent, and in which order.

A run is sent in parts, each of which one process writes: rank 0 a stage's folder and the evaluation, the driver the
rest. New files are sent first, then the files that say that something is finished; then removed files are deleted. So
a reader finds what a killed run on a local disk would have left.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from ptxdist import files, locks
from ptxdist.config import DataSettings
from ptxdist.errors import BusyError, RunError, StorageError
from ptxdist.rundir import CHECKPOINTS, EVALUATION, LOCK, RAY_LOG, RESULT, SETTINGS, stage_folder
from ptxdist.storage.caches import alone, key_of, use
from ptxdist.storage.lease import Lease
from ptxdist.storage.remote import Remote, is_remote

EVALUATION_PART = f"{EVALUATION}/"
REST = ""  # the part of the driver: everything that is in no other part
_EVERY_S = 2.0
_LAST = (RESULT, "state.json")
_NODE = ("ray", RAY_LOG, LOCK)  # of this node only
_OWN = ("stages/", EVALUATION_PART)

# By name: size, modification time and remote version of files that are equal on both sides.
Known = dict[str, list[int | str]]


class Mirror:
    """A run folder and its remote folder; for a run on a local disk, every method does nothing."""

    def __init__(
        self, place: str | Path, *, data: DataSettings | None = None, kind: str = "run", without: str = ""
    ) -> None:
        self._without = without
        self.remote = Remote(str(place)) if is_remote(place) else None
        if self.remote is None:
            self.folder = Path(place).absolute()
            return
        self.base = use(f"{kind}-{key_of(self.remote.url)}", data)
        self.folder = self.base / self.remote.url.rpartition("/")[2]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self.check: Callable[[], None] = lambda: None  # raises BusyError when another process has taken over

    def pull(self, *parts: str) -> None:
        """Make these parts of the folder equal to the object store."""
        if self.remote is None:
            return
        with alone(self.base):
            listed = {name: found for name, found in self.remote.list().items() if not name.startswith(".")}
            for part in parts:
                known, there = self._known(part), self._local(part)
                mine = {name: found for name, found in listed.items() if self._is_in(name, part)}
                for name in there.keys() - mine.keys():
                    (self.folder / name).unlink()
                    with suppress(OSError):  # leaves no empty folder of a checkpoint
                        (self.folder / name).parent.rmdir()
                self.remote.fetch(
                    [name for name, (_, version) in mine.items() if known.get(name) != [*there.get(name, ()), version]],
                    self.folder,
                )
                now = self._local(part)
                self._remember(part, {name: [*now[name], mine[name][1]] for name in now if name in mine})

    def push(self, *parts: str) -> None:
        """Make these parts of the object store equal to the folder."""
        if self.remote is None:
            return
        with self._lock:
            self.check()
            for part in parts:
                known, there = self._known(part), self._local(part)
                new = [name for name, found in there.items() if known.get(name, [])[:2] != found]
                for last in (False, True):
                    paths = {name: self.folder / name for name in new if name.endswith(_LAST) is last}
                    for name, version in self.remote.sending(paths):
                        known[name] = [*there[name], version]
                        self._remember(part, known)
                gone = known.keys() - there.keys()
                for last in (True, False):
                    self.remote.delete(name for name in gone if name.endswith(_LAST) is last)
                self._remember(part, {name: known[name] for name in known if name in there})

    @contextmanager
    def sending(self, part: str) -> Iterator[None]:
        """Push a part repeatedly while the block runs, and once at its end; StorageError if that last push fails."""
        if self.remote is None:
            yield
            return
        ended = threading.Event()

        def send() -> None:
            while not ended.wait(_EVERY_S):
                # A failed push is repeated; the last one raises its error.
                with suppress(StorageError, BusyError, OSError):
                    self.push(part)

        thread = threading.Thread(target=send, name="ptxdist-mirror", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            ended.set()
            with suppress(StorageError, BusyError, OSError):
                self.push(part)
            raise
        finally:
            ended.set()
            thread.join()
        self.push(part)

    def token(self) -> str:
        """The token of this folder in the lease of its remote folder; drawn at random at first."""
        path = self.base / "token"
        if not path.is_file():
            files.write_whole(path, secrets.token_hex(8), error=None)
        return path.read_text()

    def _local(self, part: str) -> dict[str, list[int | str]]:
        """Size and modification time of each file of a part that is to be sent, by name."""
        found: dict[str, list[int | str]] = {}
        for folder, _, names in os.walk(self.folder):  # ignores folders that are removed meanwhile
            for path in (Path(folder, name) for name in names):
                name = path.relative_to(self.folder).as_posix()
                is_draft = any(
                    word.startswith(".") or word.endswith((".tmp", ".part")) or word in _NODE
                    for word in name.split("/")
                )
                if self._is_in(name, part) and not is_draft:
                    with suppress(FileNotFoundError):
                        status = os.stat(path)
                        found[name] = [status.st_size, status.st_mtime_ns]
        return found

    def _is_in(self, name: str, part: str) -> bool:
        inside = name.startswith(part) if part else not name.startswith(_OWN)
        return inside and not (self._without and self._without in name)

    def _known(self, part: str) -> Known:
        with suppress(FileNotFoundError, ValueError, TypeError):
            return dict(files.parse_json(self._journal(part).read_bytes()))
        return {}

    def _remember(self, part: str, known: Known) -> None:
        files.write_whole(self._journal(part), json.dumps(known), sync=False, error=None)

    def _journal(self, part: str) -> Path:
        return self.base / f"sent-{part.strip('/').replace('/', '-')}.json"


def stage_part(stage: int, size_px: int) -> str:
    """The part of a stage."""
    return stage_folder(Path(), stage, size_px).as_posix() + "/"


@contextmanager
def working_run(place: str | Path, sizes_px: Sequence[int], data: DataSettings | None = None) -> Iterator[Mirror]:
    """A run to write, with stages of these sizes; one in an object store is fetched, and sent while it is written.

    Raises BusyError when another training writes there, StorageError when the object store fails.
    """
    mirror = Mirror(place, data=data)
    if mirror.remote is None:
        yield mirror
        return
    parts = [*(stage_part(number, size) for number, size in enumerate(sizes_px, start=1)), EVALUATION_PART, REST]
    with _only_driver(mirror.base), Lease(mirror.remote, mirror.token()) as lease:
        mirror.check = lease.check
        if lease.former == lease.token:
            mirror.push(*parts)  # left by an interrupted run
        else:
            mirror.pull(*parts)
        with mirror.sending(REST):
            yield mirror


def local_run(place: str | Path) -> Path:
    """The folder of a run; of one in an object store, a copy to read without its checkpoints."""
    if not is_remote(place):
        return Path(place)
    mirror = Mirror(place, kind="read", without=f"/{CHECKPOINTS}/")
    assert mirror.remote is not None
    listed = mirror.remote.list()
    if SETTINGS not in listed:
        raise RunError(f"{mirror.remote.url} is not a run (no {SETTINGS}); `ptxdist train --run …` makes one")
    stages = {"/".join(name.split("/")[:2]) + "/" for name in listed if name.startswith("stages/")}
    mirror.pull(*sorted(stages), EVALUATION_PART, REST)
    return mirror.folder


def is_run(url: str) -> bool:
    """Whether there is a run at this address."""
    return Remote(url).read(SETTINGS) is not None


def _only_driver(base: Path) -> AbstractContextManager[bool]:
    """Lock a run against a second training on this node; across nodes, the lease does."""
    return locks.only(base / "driver", "another ptxdist trains this run on this machine; wait for it or stop it")
