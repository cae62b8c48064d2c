"""The only writer of a folder in an object store: its lease object, and when a lease expires."""

from __future__ import annotations

import json
import secrets
import threading
import time
from contextlib import suppress
from typing import Any

from ptxdist import files
from ptxdist.errors import BusyError, StorageError
from ptxdist.storage.remote import ConflictError, Remote

LEASE = ".lease.json"
_LEASE_S = 30.0  # a lease that was not renewed for so long has expired


class Lease:
    """The only writer of a remote folder while the block runs, by an object that is rewritten every `_LEASE_S / 4`.

    Another writer may take over when the object was not rewritten for `_LEASE_S`; `check` raises BusyError then. An
    object store that ignores conditional writes cannot keep apart two writers that start at the same moment.
    """

    def __init__(self, remote: Remote, token: str = "") -> None:
        self._remote, self.token = remote, token or secrets.token_hex(8)
        self.former, self._count, self._version = "", 0, ""
        self._lost, self._ended = False, threading.Event()
        self._thread = threading.Thread(target=self._renew, name="ptxdist-lease", daemon=True)

    def __enter__(self) -> Lease:
        content, version = self._remote.read_version(LEASE)
        there = _parse(content) if content else {}
        self.former = str(there.get("token", ""))
        if there and there.get("released") is not True and self.former != self.token:
            time.sleep(_LEASE_S)
            if self._remote.read_version(LEASE)[1] != version:
                raise self._busy()
        try:
            self._version = self._remote.write(LEASE, self._content(), version=version)
        except ConflictError:
            raise self._busy() from None
        self._thread.start()
        return self

    def check(self) -> None:
        """BusyError when another writer has taken over."""
        if self._lost:
            raise self._busy()

    def __exit__(self, *raised: object) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(ConflictError, StorageError):
            if not self._lost:
                self._remote.write(LEASE, self._content(released=True), version=self._version)

    def _content(self, released: bool = False) -> bytes:
        self._count += 1
        return json.dumps({"token": self.token, "count": self._count, "released": released}).encode()

    def _renew(self) -> None:
        while not self._ended.wait(_LEASE_S / 4):
            try:
                self._version = self._remote.write(LEASE, self._content(), version=self._version)
            except ConflictError:
                self._lost = True
                return
            except StorageError:
                pass  # nobody else can take over while the object store fails

    def _busy(self) -> BusyError:
        return BusyError(f"another ptxdist is writing to {self._remote.url}; wait for it or stop it")


def _parse(content: bytes) -> dict[str, Any]:
    """The content of a lease; of a damaged one {"released": False}, so that it expires like that of a dead writer."""
    with suppress(ValueError):
        found = files.parse_json(content)
        if isinstance(found, dict):
            return found
    return {"released": False}
