"""Names of mask files -> names of their images, by a pattern: `--match`, or one of the usual ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ptxdist.errors import LabelError, SettingsError
from ptxdist.labels.found import bare_id, stem_of

# PTX-498 has N.1.img.png, N.2.mask.png, N.3.merge.png, and the first two as NIfTI too; Shenzhen has x.png and
# x_mask.png.
_PTX_498 = "*.2.mask.png=*.1.img.png"
_WORDS = ("mask", "seg", "segmentation", "label")


@dataclass(frozen=True)
class Names:
    """A pattern: a file `mask` is the mask of the image `image`, where each * stands for a part that both share.

    A pattern without a suffix fits any. Folders are compared as far as it names some, and become a part of the id, as
    in `*/*_mask=*/*`, whose ids are like SiteA_1.
    """

    mask: str
    image: str

    @property
    def folders(self) -> int:
        """How many of the folders above an image belong to its id."""
        return self.image.count("/")

    def id_of(self, path: Path) -> str | None:
        """The id of the image that a file is the mask of; None when it is no mask by this pattern."""
        shared = _parts(self.mask, path)
        if shared is None:
            return None
        image = self.image
        for part in shared:
            image = image.replace("*", part, 1)
        return name_of(image, self.folders)

    def is_image(self, path: Path) -> bool:
        """Whether a file is an image by this pattern, and not a mask."""
        return _parts(self.mask, path) is None and _parts(self.image, path) is not None


def _parts(pattern: str, path: Path) -> tuple[str, ...] | None:
    """What the stars of a pattern stand for in a path; None when the path does not fit."""
    above = path.parts[-1 - pattern.count("/") : -1]
    name = path.name if stem_of(pattern) != pattern else stem_of(path.name)
    found = re.fullmatch("([^/]+)".join(map(re.escape, pattern.split("*"))), "/".join((*above, name)), re.IGNORECASE)
    return found.groups() if found else None


def name_of(path: str, folders: int = 0) -> str:
    """The id that a file's path gives: its name without suffix, after the names of this many folders above it."""
    *above, name = path.split("/")
    return "_".join((*above[len(above) - folders :], bare_id(name)))


def parse_match(text: str) -> Names:
    """The pattern of --match, MASK or MASK=IMAGE; SettingsError for anything else."""
    mask, equals, image = text.partition("=")
    image = image if equals else "/".join("*" * mask.count("*"))
    stars = mask.count("*")
    if not stars or image.count("*") != stars or "**" in mask or mask.startswith("/") or "=" in image:
        raise SettingsError(
            f"--match {text!r} is no pattern; give the name of a mask file with * for the id of its image, as in "
            "'*_mask.png', or both names, as in '*.2.mask.png=*.1.img.png'"
        )
    return Names(mask, image)


def usual_names(paths: Sequence[Path]) -> Names | None:
    """The usual pattern that fits mask files beside their images, or all of the files; None when none fits any.

    Raises LabelError when a pattern fits only some, and the others are not the images of these.
    """
    for pattern in (_PTX_498, *(f"*{sign}{word}" for word in _WORDS for sign in "_-.")):
        names = parse_match(pattern)
        ids = {names.id_of(path) for path in paths} - {None}
        others = {stem_of(path.name) for path in paths if names.id_of(path) is None}
        if ids and others and not ids & others:
            raise LabelError(
                f"{len(ids)} files are named {pattern}, and {len(others)} in another way ({min(others)}); say with "
                "--match which are the masks, or give a folder with masks only"
            )
        if ids:
            return names
    return None
