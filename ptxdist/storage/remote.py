"""A folder in an object store (`s3://bucket/folder`): read, written and listed, with retries.

Owns: addresses, requests and their retries.

An object is complete or absent, and a conditional write succeeds for one of several writers. A request is retried for
at most `PTXDIST_STORAGE_PATIENCE_S` (120) seconds. Credentials, region and endpoint come from AWS_… variables or from
the machine's role, as obstore reads them. Messages never contain the answer of an object store, which may repeat
credentials.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ptxdist import files
from ptxdist.errors import StorageError
from ptxdist.executor import OnCount

if TYPE_CHECKING:
    from obstore.store import S3Store

_CONNECT_S, _SILENCE_S, _REQUEST_S = 5.0, 20.0, 120.0
_PATIENCE_S = 120.0
_THREADS, _TRIES = 8, 3
_CREDENTIALS = (
    "give some that may read and write there in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), "
    "or as the machine's role"
)
_PIECE_BYTES, _PART_BYTES = 32 * 2**20, 16 * 2**20  # of a request that reads, and of one that writes

Result = TypeVar("Result")


class ConflictError(Exception):
    """The object is not the version that a conditional write or a read expected."""


def is_remote(place: str | Path) -> bool:
    """Whether a place is an address (`s3://…`) and not a folder."""
    return "://" in str(place)


class Remote:
    """A folder of an object store; names are paths below it."""

    def __init__(self, url: str) -> None:
        scheme, _, rest = url.partition("://")
        bucket, _, prefix = rest.strip("/").partition("/")
        if scheme != "s3" or not bucket or not prefix or ".." in prefix.split("/"):
            raise StorageError(f"{url} cannot hold a cache or a run: give s3://BUCKET/FOLDER")
        self.url = f"s3://{bucket}/{prefix}"
        self._patience_s = float(os.environ.get("PTXDIST_STORAGE_PATIENCE_S") or _PATIENCE_S)
        self._store = _open(bucket, prefix, self._patience_s)

    def read(self, name: str) -> bytes | None:
        """Content of a small object; None when it does not exist."""
        return self.read_version(name)[0]

    def read_version(self, name: str) -> tuple[bytes | None, str]:
        """Content and version of a small object; (None, "") when it does not exist."""

        def get() -> tuple[bytes | None, str]:
            try:
                result = self._store.get(name)
                return bytes(result.bytes()), str(result.meta["e_tag"])
            except FileNotFoundError:
                return None, ""

        return self._insist(name, get)

    def write(self, name: str, content: bytes, *, version: str | None = None) -> str:
        """Write a small object and return its version.

        With a `version`, writes only over that version, with "" only when there is no object; else ConflictError. A
        write whose answer was lost is recognised by its content.
        """
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        mode: Any = "overwrite" if version is None else "create" if version == "" else {"e_tag": version}

        def put() -> str:
            try:
                return str(self._store.put(name, content, mode=mode, use_multipart=False)["e_tag"])
            except (AlreadyExistsError, PreconditionError):
                return ""

        written = self._insist(name, put)
        if not written:
            there, written = self.read_version(name)
            if there != content:
                raise ConflictError(name)
        return written

    def list(self) -> dict[str, tuple[int, str]]:
        """Size in bytes and version of every object below the folder, by name."""

        def names() -> dict[str, tuple[int, str]]:
            blocks = self._store.list()
            return {item["path"]: (item["size"], str(item["e_tag"])) for block in blocks for item in block}

        return self._insist("", names)

    def send(self, paths: Mapping[str, Path]) -> None:
        """Write files, several at a time, each atomically."""
        for _ in self.sending(paths):
            pass

    def sending(
        self, paths: Mapping[str, Path], on_sent: OnCount = lambda done, total: None
    ) -> Iterable[tuple[str, str]]:
        """As `send`; yields name and version of each written file. Files that no longer exist are skipped."""

        def put(name: str) -> tuple[str, str]:
            try:
                file = open(paths[name], "rb")  # noqa: SIM115  closed below
            except FileNotFoundError:
                return name, ""

            def whole() -> str:
                file.seek(0)
                return str(self._store.put(name, file, chunk_size=_PART_BYTES, max_concurrency=2)["e_tag"])

            with file:
                return name, self._insist(name, whole)

        return (result for result in _each(put, paths, on_sent) if result[1])

    def fetch(self, names: Iterable[str], folder: Path, on_fetched: OnCount = lambda done, total: None) -> None:
        """Read objects into files of the same names below `folder`, several at a time, each atomically.

        Objects that do not exist are skipped. A name that leads out of `folder` is a StorageError, before any is read.
        """
        paths = {name: files.below(folder, name, error=StorageError) for name in names}
        for _ in _each(lambda name: self._fetch(name, paths[name]), paths, on_fetched):
            pass

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; those that do not exist are ignored."""
        if listed := list(names):
            self._insist(listed[0], lambda: self._store.delete(listed))

    def _fetch(self, name: str, path: Path) -> None:
        def head() -> Any:
            with suppress(FileNotFoundError):
                return self._store.head(name)

        for _ in range(_TRIES):
            meta = self._insist(name, head)
            if meta is None:
                return
            with suppress(ConflictError), files.replacing(path, error=StorageError) as temporary:
                self._read_into(temporary, name, meta)
                return
        raise StorageError(f"{self.url}/{name} changes while it is read, {_TRIES} times in a row; try again later")

    def _read_into(self, path: Path, name: str, meta: Any) -> None:
        """Write one version of an object to a file; ConflictError when the object is replaced meanwhile."""
        from obstore.exceptions import PreconditionError

        def piece() -> Any:
            try:
                return self._store.get(name, options=options).bytes()
            except (PreconditionError, FileNotFoundError):
                raise ConflictError(name) from None

        with open(path, "wb") as file:
            while (start := file.tell()) < meta["size"]:  # in pieces, since a request is bounded in time
                options: Any = {"range": (start, start + _PIECE_BYTES), "if_match": meta["e_tag"]}
                file.write(self._insist(name, piece))

    def _insist(self, name: str, action: Callable[[], Result]) -> Result:
        """Retry until success or until patience ends; StorageError gives the reason."""
        from obstore.exceptions import BaseError, InvalidPathError, PermissionDeniedError, UnauthenticatedError

        place, end, pause = f"{self.url}/{name}".rstrip("/"), time.monotonic() + self._patience_s, 0.2
        while True:
            try:
                return action()
            except (PermissionDeniedError, UnauthenticatedError, FileNotFoundError, InvalidPathError) as error:
                raise StorageError(f"{place}: {_refusal(error)}") from None
            except BaseError as error:
                left = end - time.monotonic()
                if refusal := _refusal(error):
                    raise StorageError(f"{place}: {refusal}") from None
                if left <= 0:
                    raise StorageError(
                        f"{place}: {_fault(error)}, for {self._patience_s:.0f} s; check the network, "
                        "AWS_ENDPOINT_URL and AWS_REGION, and rerun the same command: finished work is kept"
                    ) from None
            time.sleep(min(left, pause * random.uniform(0.5, 1.0)))
            pause = min(10.0, pause * 2)


def _open(bucket: str, prefix: str, patience_s: float) -> S3Store:
    files.require_extra("s3", "an object store", "obstore", error=StorageError)
    from obstore.store import S3Store

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    silence = min(_SILENCE_S, patience_s)
    return S3Store(
        bucket,
        prefix=prefix,
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        client_options={
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=min(_CONNECT_S, patience_s)),
            "read_timeout": timedelta(seconds=silence),
            "timeout": timedelta(seconds=max(silence, min(_REQUEST_S, patience_s))),
        },
        retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=patience_s)},
    )


def _each(work: Callable[[str], Any], names: Iterable[str], on_done: OnCount) -> Iterable[Any]:
    """Call `work` for all names in a few threads and yield the results as they come; the first exception is raised."""
    pool, listed = ThreadPoolExecutor(_THREADS, "ptxdist-storage"), list(names)
    try:
        for done, future in enumerate(as_completed([pool.submit(work, name) for name in listed]), start=1):
            yield future.result()
            on_done(done, len(listed))
    finally:
        pool.shutdown(cancel_futures=True)


def _refusal(error: Exception) -> str:
    """Why a retry is useless, and what to do; "" for a fault. Other text of an answer may repeat credentials."""
    text, kind = str(error), type(error).__name__
    status = re.search(r"\b4(?!08|09|29)\d\d [A-Z]", text)
    if "169.254" in text:  # where a machine on AWS is asked for its role
        return f"no credentials were found; {_CREDENTIALS}"
    if isinstance(error, FileNotFoundError) or "NoSuchBucket" in text:
        return "there is no such bucket; create it or correct the address"
    if kind in ("PermissionDeniedError", "UnauthenticatedError"):
        return f"access is refused{_code(text)}; {_CREDENTIALS}"
    if kind == "InvalidPathError":
        return "the name of an object there, or the address itself, has an empty part, '.' or '..'; remove or rename it"
    if status:
        return f"the object store rejects the request{_code(text)}; check the address, AWS_ENDPOINT_URL and AWS_REGION"
    return ""


def _fault(error: Exception) -> str:
    text = str(error)
    if status := re.search(r"\b5\d\d [A-Z]\w+", text):
        return f"the object store answers {status[0]}{_code(text)}"
    if re.search(r"kind: Timeout|TimedOut|timed out", text):
        return "the object store does not answer in time"
    return "the object store cannot be reached, or the connection breaks"


def _code(text: str) -> str:
    """The S3 error code in an answer, such as " (AccessDenied)"."""
    found = re.search(r"<Code>(\w+)</Code>", text)
    return f" ({found[1]})" if found else ""
