"""Zip files that others made, read in bounded memory.

Refuses: lists of members that would take gigabytes; members that share bytes, as those of zip bombs do; and members in
bzip2 and LZMA, of which zipfile unpacks all that it reads, however small the member says it is.
"""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path
from typing import IO

MAX_LIST = 32 * 1024 * 1024  # bytes; 100,000 members with long names have that, and 700,000 with short ones


class ArchiveError(zipfile.BadZipFile):
    """A zip file that is refused; a sentence without a subject."""


class _Start(io.FileIO):
    most = MAX_LIST

    def read(self, size: int | None = -1, /) -> bytes | None:  # type: ignore[override]
        if size is not None and size > self.most:
            raise ArchiveError(f"has a list of its members of {size:,} bytes; at most {self.most:,} are accepted")
        return super().read(size)


class Archive(zipfile.ZipFile):
    """A zip file to read; ArchiveError as at the top of this module, any other BadZipFile for a damaged one."""

    def __init__(self, path: Path) -> None:
        self._start = _Start(path)
        super().__init__(self._start)
        self._start.most = sys.maxsize
        if sum(member.compress_size for member in self.filelist) > path.stat().st_size:
            raise ArchiveError("has members that share bytes, as those of a zip bomb do")

    def close(self) -> None:
        """Close the file, too."""
        super().close()
        if start := vars(self).get("_start"):  # none when it could not be opened
            start.close()

    def unpacked(self, member: zipfile.ZipInfo) -> IO[bytes]:
        """As `open`; NotImplementedError for other compressions than Deflate, too."""
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise NotImplementedError
        return self.open(member)
