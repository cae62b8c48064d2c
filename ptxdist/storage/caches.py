"""A cache in an object store, and its cached copy on the local disk of this node.

    STAGING/cache-<address>-<manifest>/     one version of a remote cache, mapped by readers; never changed
    STAGING/work-<address>/                 written by `preprocess`, then sent
    STAGING/….use, ….lock                   locked while a folder is in use, and while it is being filled

Owns: these folders, the order in which a cache is copied and sent, and which copies are deleted to free space.

A copy is compared with the checksums of its manifest. The checksum of the manifest is in the folder's name, so a
renewed cache gets another folder. A cache is sent in the order in which it is written: first a manifest that lists only
what stays true, then shards and tables, and last the manifest that says that the stores are complete.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ptxdist import files, locks
from ptxdist.cache.manifest import MANIFEST, Manifest, manifest_text, parse_manifest, read_manifest
from ptxdist.cache.preprocess import TABLES
from ptxdist.cache.store import ARRAYS, shard_path, store_path
from ptxdist.cache.verify import verify
from ptxdist.errors import BusyError, StoreError, system_says
from ptxdist.executor import OnProgress
from ptxdist.storage.lease import Lease
from ptxdist.storage.remote import ConflictError, Remote, is_remote

_GB = 10**9
_TRIES = 3
_REPORT_S = 2.0  # between two manifests that list the shards sent so far
_SENT = ".sent"
_CHECKED = ".checked.json"

if TYPE_CHECKING:
    from ptxdist.config import DataSettings

_held: dict[Path, ExitStack] = {}  # locks of the folders that this process uses, until it ends


def local_cache(
    place: str | Path,
    sizes_px: Iterable[int] | None = None,
    *,
    data: DataSettings | None = None,
    token: str = "",
    on_progress: OnProgress = lambda step, done, total: None,
) -> Path:
    """The folder of a cache; of one in an object store, a verified copy on this node with these sizes or all.

    One process of a node copies while the others wait; the copy is in use until this process ends. A copy that was
    verified under the same `token` is not verified again. Raises StoreError for a remote cache that is not finished or
    damaged or that does not fit the disk, StorageError when the object store fails.
    """
    if not is_remote(place):
        return Path(place)
    remote = Remote(str(place))
    content = remote.read(MANIFEST)
    if content is None:
        raise StoreError(
            f"{remote.url} is not a ptxdist cache (no {MANIFEST}); make one with `ptxdist preprocess --out`"
        )
    manifest = parse_manifest(content, f"{remote.url}/{MANIFEST}")
    sizes = sorted(manifest.sizes) if sizes_px is None else sorted(set(sizes_px))
    for size in sizes:
        if not manifest.store(size).complete:
            raise StoreError(
                f"{remote.url} has no finished store of {size} px; make it with `ptxdist preprocess … --size {size}`"
            )
    folder = use(f"cache-{key_of(remote.url)}-{files.sha256(content)[:12]}", data)
    with alone(folder) as is_locked:
        if is_locked:
            files.remove_leftovers(folder)
        files.write_whole(folder / MANIFEST, content, sync=False, error=StoreError)
        if not token or not _was_checked(folder, token, sizes):
            _fill(remote, folder, manifest, sizes, data, on_progress)
            checked = json.dumps({"token": token, "sizes": sizes})
            files.write_whole(folder / _CHECKED, checked, sync=False, error=StoreError)
    return folder


def remote_digest(url: str) -> str:
    """The sha256 of the manifest of a remote cache; StoreError when it has none or no finished store."""
    remote = Remote(url)
    content = remote.read(MANIFEST)
    if content is None or not any(entry.complete for entry in parse_manifest(content, url).sizes.values()):
        raise StoreError(f"{remote.url} is not a finished ptxdist cache")
    return files.sha256(content)


def _fill(
    remote: Remote,
    folder: Path,
    manifest: Manifest,
    sizes: Sequence[int],
    data: DataSettings | None,
    on_progress: OnProgress,
) -> None:
    """Fetch missing and damaged files."""
    fetched = Counter[str]()
    while damages := verify(folder, sizes_px=sizes, on_progress=on_progress):
        if not fetched:
            _free_space(folder, sum(2 * manifest.sizes[size].cases * size**2 for size in sizes), data)
        for damage in damages:
            if fetched[damage.path] == _TRIES:
                raise StoreError(
                    f"{remote.url}/{damage.path} {damage.reason}; if nobody is writing there, remove that object "
                    f"and rerun `ptxdist preprocess --out {remote.url}`"
                )
        names = [damage.path for damage in damages]
        fetched.update(names)
        remote.fetch(names, folder, lambda done, total: on_progress("copies of shards", done, total))


def _was_checked(folder: Path, token: str, sizes: Sequence[int]) -> bool:
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = files.parse_json((folder / _CHECKED).read_bytes())
        return bool(found["token"] == token and set(sizes) <= set(found["sizes"]))
    return False


@contextmanager
def working_cache(place: str | Path, on_progress: OnProgress = lambda step, done, total: None) -> Iterator[Path]:
    """The folder in which to build a cache; for one in an object store a local folder, sent when the block ends.

    A remote cache that was last written elsewhere is fetched first. Raises BusyError when another process writes there,
    StorageError when the object store fails; finished work is kept, and a rerun sends the rest.
    """
    if not is_remote(place):
        yield Path(place)
        return
    remote = Remote(str(place))
    folder = use(f"work-{key_of(remote.url)}")
    with alone(folder), Lease(remote) as lease:
        content, version = remote.read_version(MANIFEST)
        if content is not None and not _is_known(folder, content):
            shutil.rmtree(folder, ignore_errors=True)
            names = remote.list()
            _free_space(folder, sum(size for size, _ in names.values()))
            wanted = [name for name in names if not name.startswith(".")]
            remote.fetch(wanted, folder, lambda done, total: on_progress("copies", done, total))
            _note(folder, content)
        yield folder
        lease.check()
        _send(remote, folder, version, lease, on_progress)


def _send(remote: Remote, folder: Path, version: str, lease: Lease, on_progress: OnProgress) -> None:
    """Send the files of a folder that differ from the remote cache, the manifest last."""
    mine, listed = read_manifest(folder), remote.list()
    content, there = remote.read_version(MANIFEST)
    if there != version:
        raise _overtaken(remote)
    theirs = parse_manifest(content, remote.url) if content is not None else Manifest()
    shards = _shards(mine)

    def is_there(name: str) -> bool:
        place, there = shards[name], listed.get(name, (-1, ""))
        return theirs.shard(*place) == mine.shard(*place) and there[0] == (folder / name).stat().st_size

    changed = {name: place for name, place in shards.items() if not is_there(name)}
    small = [name for name, sum_ in mine.files.items() if theirs.files.get(name) != sum_ or name not in listed]
    final = (folder / MANIFEST).read_bytes()
    if not changed and not small and content == final:
        return

    def write(manifest: bytes) -> None:
        nonlocal version
        lease.check()
        _note(folder, manifest)
        try:
            version = remote.write(MANIFEST, manifest, version=version)
        except ConflictError:
            raise _overtaken(remote) from None

    for size, entry in mine.sizes.items():  # what is about to change is no longer complete
        before = theirs.store(size)
        if before != entry or any(place[0] == size for place in changed.values()):
            numbers, again = range(len(entry.shards)), set(changed.values())
            known = tuple(None if (size, number) in again else theirs.shard(size, number) for number in numbers)
            theirs.sizes[size] = replace(before, complete=False, pending=known)
    for name in TABLES:
        theirs.files.pop(name, None)
    write(manifest_text(theirs).encode())
    reported, left = time.monotonic(), Counter(changed.values())
    paths = {name: folder / name for name in changed}
    for name, _ in remote.sending(paths, lambda done, total: on_progress("shards sent", done, total)):
        size, number = changed[name]
        left[size, number] -= 1
        if not left[size, number]:  # so a rerun after a kill sends only the rest
            pending = list(theirs.sizes[size].pending)
            pending[number] = mine.sizes[size].shards[number]
            theirs.sizes[size] = replace(theirs.sizes[size], pending=tuple(pending))
        if time.monotonic() - reported > _REPORT_S:
            write(manifest_text(theirs).encode())
            reported = time.monotonic()
    remote.send({name: folder / name for name in small})
    write(final)
    remote.delete(name for name in listed if ".zarr/" in name and name not in shards and name not in mine.files)


def _overtaken(remote: Remote) -> BusyError:
    return BusyError(f"another ptxdist has written {remote.url} meanwhile; rerun the command")


def _shards(manifest: Manifest) -> dict[str, tuple[int, int]]:
    """Size and number of the shard of every shard file, by the name of the file."""
    return {
        shard_path(store_path(Path(), size), array, number).as_posix(): (size, number)
        for size, entry in manifest.sizes.items()
        for number in range(len(entry.shards))
        for array in ARRAYS
    }


def _note(folder: Path, manifest: bytes) -> None:
    """Record that the folder is at least as new as a remote manifest."""
    with open(folder / _SENT, "a") as file:
        file.write(files.sha256(manifest) + "\n")


def _is_known(folder: Path, manifest: bytes) -> bool:
    with suppress(FileNotFoundError, ValueError):
        return files.sha256(manifest) in (folder / _SENT).read_text().split()
    return False


def use(name: str, data: DataSettings | None = None) -> Path:
    """The folder of this name for cached copies; no process deletes it until this one ends."""
    root = _root((data and data.staging) or os.environ.get("PTXDIST_STAGING"))
    lock = _beside(root / name, "use")
    if lock not in _held:
        with ExitStack() as held:
            held.enter_context(locks.shared(lock, error=StoreError))
            _held[lock] = held.pop_all()
    os.utime(lock)
    return root / name


def _root(given: str | None) -> Path:
    """The folder for copies: the given one; in the temporary folder, and wherever everybody may write, one of our own.

    Raises StoreError when that is a link, or when another user has made it or may write to it: it could hold anything.
    """
    root = Path(given or tempfile.gettempdir()).absolute()
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if given and not root.stat().st_mode & stat.S_IWOTH:
            return root
        root /= f"ptxdist-{os.getuid()}"
        with suppress(FileExistsError):
            root.mkdir(mode=0o700)
        found = root.lstat()
    except OSError as error:
        says = system_says(error)
        raise StoreError(f"{root} cannot be used: {says}; or set PTXDIST_STAGING to another folder") from error
    is_open = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or is_open:
        raise StoreError(
            f"{root} is a link, or another user has made it or may write to it; remove it, or set PTXDIST_STAGING to a "
            "folder of your own"
        )
    return root


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f"{folder.name}.{kind}")


def alone(folder: Path) -> AbstractContextManager[bool]:
    """Lock a folder in order to fill it; other processes of this node wait."""
    return locks.only(_beside(folder, "lock"), error=StoreError)


def _free_space(folder: Path, needed: int, data: DataSettings | None = None) -> None:
    """Delete unused copies, the least recently used first, until `needed` bytes fit the limit; StoreError if full."""
    there = {path.with_suffix(""): _bytes(path.with_suffix("")) for path in folder.parent.glob("*.use")}
    missing = needed - there.pop(folder, 0)
    from ptxdist.config import DataSettings

    total = sum(there.values()) + needed - (data or DataSettings()).staging_gb * _GB
    for path in sorted(there, key=lambda path: _beside(path, "use").stat().st_mtime):
        if total > 0:
            lock = locks.only(_beside(path, "use"), "in use", error=StoreError)
            with suppress(BusyError, StoreError), lock as is_locked:
                if is_locked:  # else the copy may be in use
                    shutil.rmtree(path, ignore_errors=True)
                    total -= there[path]
    if missing > (free := shutil.disk_usage(folder.parent).free):
        raise StoreError(
            f"{folder.parent} has {free / _GB:.1f} GB free and a copy needs {missing / _GB:.1f}; "
            "set PTXDIST_STAGING to a folder on a larger disk"
        )


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def key_of(url: str) -> str:
    """Hash of an address, for the name of a folder."""
    return files.sha256(url.encode())[:12]
