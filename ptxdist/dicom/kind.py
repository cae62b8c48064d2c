"""What a file is, by its first bytes, before it counts as an image.

Owns: the signs of DICOM (PS3.10 7.1, PS3.5 7.1) and PNG, and which SOP classes (PS3.6 annex A) are images.
"""

from __future__ import annotations

import re
from typing import Literal

from ptxdist.dicom.png import SIGNATURE

START_BYTES = 1024  # enough for the SOP class, which comes first
# Computed and Digital Radiography, Secondary Capture.
_RADIOGRAPHS = {f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("1", "1.1", "1.1.1", "7")}
_SEGMENTATIONS = "1.2.840.10008.5.1.4.1.1.66"  # and registrations; pydicom does not know all of them
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
    return "image" if found is None or is_image_class(found[1].decode()) else "object"


def is_image_class(sop_class: str) -> bool:
    """Whether objects of a SOP class are images of a modality, as those of an unknown one may be."""
    if not sop_class or sop_class in _RADIOGRAPHS:
        return True
    if sop_class.startswith(_SEGMENTATIONS):
        return False
    from pydicom.uid import UID_dictionary  # late: its import takes long

    return "Image" in UID_dictionary.get(sop_class, ("Image",))[0]
