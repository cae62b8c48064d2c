"""What a file is, by its first bytes, before it counts as an image.

Owns: the signs of DICOM (PS3.10 7.1, PS3.5 7.1) and PNG, and which SOP classes (PS3.6 annex A) are images.
"""

from __future__ import annotations

import re
from typing import Literal

from ptxdist.dicom.png import SIGNATURE

START_BYTES = 1024  # enough for the SOP class, which comes first
_SOP_CLASS = re.compile(rb"(?:\x02\0\x02\0|\x08\0\x16\0).{4}([0-9.]{5,64})", re.DOTALL)


def kind_of(start: bytes) -> Literal["image", "object", "png", ""]:
    """Kind of a file from its first `START_BYTES` bytes or more; "" for anything but DICOM and PNG.

    An "object" is a DICOM file without an image of a modality, such as a DICOMDIR, a report or a presentation state. A
    DICOM file that names no SOP class, or a private one, is taken for an image.
    """
    if start.startswith(SIGNATURE):
        return "png"
    found = _SOP_CLASS.search(start[:START_BYTES])
    bare = found is not None and start.startswith((b"DICM", b"\2\0", b"\10\0"))
    if start[128:132] != b"DICM" and not bare:
        return ""
    if found is None:
        return "image"
    from pydicom.uid import UID_dictionary

    name = UID_dictionary.get(found[1].decode(), ("Image",))[0]
    return "image" if "Image" in name else "object"
