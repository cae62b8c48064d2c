"""Transfer syntaxes (PS3.5 annex A, PS3.6 annex A) and the package that decodes each.

Nothing but the standard library is imported here, since every `preprocess` needs these names, and most decode nothing.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

from ptxdist.errors import DicomError

IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN = (f"1.2.840.10008.1.2{end}" for end in ("", ".1", ".1.99", ".2"))
NATIVE = (IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN)
RLE = "1.2.840.10008.1.2.5"
_COMPRESSED = "1.2.840.10008.1.2.4."
BASELINE, EXTENDED, LOSSLESS, LOSSLESS_SV1 = (f"{_COMPRESSED}{number}" for number in (50, 51, 57, 70))
JPEG_LS = tuple(f"{_COMPRESSED}{number}" for number in (80, 81))
JPEG_2000 = tuple(f"{_COMPRESSED}{number}" for number in (90, 91, 201, 202, 203))  # the last three are HTJ2K

DECODERS = {
    **dict.fromkeys((*NATIVE, RLE), "pydicom"),
    BASELINE: "simplejpeg",
    **dict.fromkeys((EXTENDED, LOSSLESS, LOSSLESS_SV1, *JPEG_LS, *JPEG_2000), "imagecodecs"),
}


@cache
def decoder_of(syntax: str) -> str:
    """Name and version of the package that decodes a transfer syntax. Raises DicomError when none does."""
    if syntax not in DECODERS:
        raise DicomError(f"is encoded as {name_of(syntax)}, which is not supported")
    package = DECODERS[syntax]
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        raise DicomError(f"is encoded as {name_of(syntax)}, which needs the package {package}: install it") from None


def name_of(syntax: str) -> str:
    """Name of a transfer syntax, for a message."""
    from pydicom.uid import UID_dictionary

    return str(UID_dictionary[syntax][0]) if syntax in UID_dictionary else "an unknown transfer syntax"
