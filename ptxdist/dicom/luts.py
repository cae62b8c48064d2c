"""Windows, and look-up tables of a DICOM data set, checked against their descriptors.

Owns: the rule for a table whose LUT Descriptor (0028,3002) does not fit its LUT Data (0028,3006) (PS3.3 C.11.1.1 and
C.11.2.1.1). What the data prove is corrected: a first input that only the other signedness brings among the values of
the image; and the bits of a VOI LUT, where 16 are stated, its storage size (Agfa CR; Horos, Cornerstone and DCMTK
correct it alike), or fewer than its entries have, or where the largest entry is 255, 511, … Refuses: a table of another
length than stated.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ptxdist.errors import DicomError

if TYPE_CHECKING:
    from pydicom import Dataset

DESCRIPTOR, DATA = 0x00283002, 0x00283006
_FULL = frozenset(2**bits - 1 for bits in range(8, 17))


@dataclass(frozen=True)
class Lut:
    """A look-up table (PS3.3 C.11.1.1.1): `entries`, uint16, for the inputs `first`, `first` + 1, …; `bits` wide."""

    first: int
    bits: int
    entries: npt.NDArray[np.uint16]


def has_table(item: Dataset) -> bool:
    """Whether an item has a look-up table; some programs write an empty one for "none"."""
    elements = (item.get_item(tag) for tag in (DESCRIPTOR, DATA) if tag in item)
    return any(element is not None and element.value for element in elements)


def read_lut(item: Dataset, inputs: tuple[float, float], *, signed: bool, little: bool) -> Lut:
    """The table of an item of a LUT sequence, for input values from `inputs[0]` to `inputs[1]`.

    `signed` says whether the first input is signed where its VR does not. `bits` is what the entries show where the
    descriptor cannot be right. Raises DicomError when the length differs, entries are signed, or anything is missing.
    """
    try:
        descriptor, data = item.get_item(DESCRIPTOR), item.get_item(DATA)
        order = "<" if little else ">"
        count, first, bits = struct.unpack(f"{order}3H", descriptor.value)
        if not 8 <= bits <= 16:
            raise ValueError("width of the table")
        content = bytes(data.value)
    except Exception as error:
        raise DicomError("has a look-up table that cannot be applied: its descriptor does not fit its data") from error
    count = count or 0x10000
    packed = little and count <= len(content) <= count + 1 and len(content) < 2 * count  # two entries to a word
    if not packed and (len(content) < 2 * count or any(content[2 * count :])):
        raise DicomError(
            f"has a look-up table of {len(content) // 2:,} entries, but its LUT Descriptor says {count:,}; "
            "correct or remove the table"
        )
    entries = np.frombuffer(content, "u1" if packed else f"{order}u2", count).astype(np.uint16)
    largest = int(entries.max())
    if data.VR == "SS" and largest >= 0x8000:
        raise DicomError("has a look-up table of signed entries, which the standard does not define; remove the table")
    if packed:
        bits = 8
    elif bits == 16 or largest >= 2**bits or largest in _FULL:  # one of _FULL: the entries end where their bits do
        bits = max(largest.bit_length(), 1)
    if first >= 0x8000:
        negative = descriptor.VR == "SS" or (descriptor.VR != "US" and signed)
        likely, other = (first - 0x10000, first) if negative else (first, first - 0x10000)
        first = other if _covers(other, count, inputs) and not _covers(likely, count, inputs) else likely
    return Lut(first, bits, entries)


def _covers(first: int, count: int, inputs: tuple[float, float]) -> bool:
    return first <= inputs[1] and first + count > inputs[0]


def window_of(
    x: npt.NDArray[np.float64], center: float | None, width: float, function: str, slope: float
) -> npt.NDArray[np.float64]:
    """Values through a window; those inside become 0..1 (PS3.3 C.11.2.1.2 and C.11.2.1.3).

    LINEAR, the default, is defined for integers and widths of at least 1. A window below 1 that spans several rescaled
    values, which are `slope` apart, can only be meant as LINEAR_EXACT. Raises DicomError for any other window.
    """
    function = function.partition("\\")[0].strip().upper() or "LINEAR"  # some write one for each window
    if center is None or width <= 0:
        raise DicomError("has a window without a center or without a width")
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise DicomError("has a window of an unknown function (VOI LUT Function); correct or remove it")
    if function == "LINEAR" and width < 1:
        if width < 2 * slope:
            raise DicomError(f"has a window of width {width:g}, but its function LINEAR needs at least 1; correct it")
        function = "LINEAR_EXACT"
    if function == "SIGMOID":
        return np.asarray(1.0 / (1.0 + np.exp(np.clip(-4.0 * (x - center) / width, -700.0, 700.0))))
    if function == "LINEAR_EXACT":
        return np.asarray((x - center) / width + 0.5)
    if width == 1:
        return np.where(x <= center - 0.5, 0.0, 1.0)
    return np.asarray((x - (center - 0.5)) / (width - 1.0) + 0.5)
