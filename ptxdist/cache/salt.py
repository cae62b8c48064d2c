"""The secret key of a cache, by which patients are hashed.

Owns: the file `salt`, which only its owner can read. Refuses: short keys, and another key than the cache was made with
(CatalogError).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from ptxdist import files
from ptxdist.errors import BusyError, CatalogError

SALT = "salt"
_LEAST_KEY = 16  # bytes


def read_salt(cache: Path) -> bytes:
    """The key of a cache's hashes of patients; b"" when it has none yet."""
    return (cache / SALT).read_bytes() if (cache / SALT).is_file() else b""


def read_key(path: Path, out: Path) -> bytes:
    """The salt that a file gives; CatalogError for a short one, and for a cache that was made with another."""
    try:
        content = path.read_bytes().strip()
    except OSError as error:
        raise CatalogError(
            f"{path} cannot be read: {error.strerror}; --patient-key names a file with a secret"
        ) from error
    if len(content) < _LEAST_KEY:
        raise CatalogError(
            f"{path} has {len(content)} bytes; a key has at least {_LEAST_KEY} that cannot be guessed, for example of "
            "`head -c 32 /dev/urandom`"
        )
    salt = hashlib.blake2b(content).digest()[:32]
    if read_salt(out) not in (b"", salt):
        raise CatalogError(f"{out} was made without this --patient-key; make a new cache with --out")
    return salt


def keep_salt(path: Path, salt: bytes) -> None:
    """Write the salt of a new cache; BusyError when another run has written one meanwhile."""
    former = read_salt(path.parent)
    if former and former != salt:
        raise BusyError(f"another `ptxdist preprocess` has just made {path.parent}; rerun the command")
    if former:
        return
    files.write_whole(path, salt, mode=0o600, error=None)
