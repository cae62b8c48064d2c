"""Files written in one step, and the checksum of a file.

Refuses: what cannot be written (RunError); what was there before is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptxdist.errors import RunError
from ptxdist.records import Record


def file_sha256(path: Path) -> str:
    """sha256 of a file in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Mapping[str, Any] | Record) -> None:
    """Write JSON in one step: the file is there whole, or the former one stays; RunError when it cannot be written."""
    plain = content.model_dump(mode="json") if isinstance(content, Record) else content
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(plain, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}; what was saved before is kept") from error


def copy_file(source: Path, target: Path) -> None:
    """Copy a file in one step: `target` is there whole, or as it was; RunError when it cannot be written."""
    temporary = target.with_name(target.name + ".tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, temporary)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{target} cannot be written: {error.strerror}; what was saved before is kept") from error
