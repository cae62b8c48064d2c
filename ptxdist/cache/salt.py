"""The secret key of a cache, by which patients are hashed: the file `salt`, which only its owner can read."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

from ptxdist import files
from ptxdist.cache.manifest import read_manifest
from ptxdist.errors import BusyError, CatalogError, system_says

SALT = "salt"
_LEAST_KEY = 16  # bytes


def read_salt(cache: Path) -> bytes:
    """The key of a cache's hashes of patients; b"" when it has none yet."""
    return (cache / SALT).read_bytes() if (cache / SALT).is_file() else b""


def choose_salt(out: Path, key: Path | None, *, anew: bool) -> bytes:
    """The salt for a cache: that of the file `key`, else its own, else one at random.

    CatalogError for a short key, for a key other than the cache was made with, and where the cache's own salt is
    missing or damaged, unless the key gives it again or `anew`: another one changes all hashes of patients.
    """
    own, given = read_salt(out), _read_key(key) if key else b""
    if given and _is_recorded(out, given):
        return given
    is_whole = _is_recorded(out, own) is not False
    if not is_whole and not anew:
        raise CatalogError(
            f"{out / SALT} is missing or damaged; with another one, all hashes of patients change, and no run on this "
            "cache knows them any more: put it back from a copy, give its --patient-key, or go on with --replace"
        )
    if is_whole and given and own not in (b"", given):
        raise CatalogError(f"{out} was made without this --patient-key; make a new cache with --out")
    return given or (own if is_whole else b"") or secrets.token_bytes(32)


def _is_recorded(out: Path, salt: bytes) -> bool | None:
    """Whether a salt is the one that the manifest of a cache records; None if it records none."""
    recorded = read_manifest(out).files.get(SALT)
    return None if recorded is None else recorded == files.sha256(salt)


def _read_key(path: Path) -> bytes:
    try:
        content = path.read_bytes().strip()
    except OSError as error:
        raise CatalogError(
            f"{path} cannot be read: {system_says(error, '--patient-key names a file with a secret')}"
        ) from error
    if len(content) < _LEAST_KEY:
        raise CatalogError(
            f"{path} has {len(content)} bytes; a key has at least {_LEAST_KEY} that cannot be guessed, for example of "
            "`head -c 32 /dev/urandom`"
        )
    return hashlib.blake2b(content).digest()[:32]


def keep_salt(path: Path, salt: bytes) -> None:
    """Write the salt of a new cache, or over a damaged one; BusyError when another run has written one meanwhile."""
    former = read_salt(path.parent)
    if former and former != salt and _is_recorded(path.parent, former) is not False:
        raise BusyError(f"another `ptxdist preprocess` has just made {path.parent}; rerun the command")
    if former != salt:
        files.write_whole(path, salt, mode=0o600, error=None)
