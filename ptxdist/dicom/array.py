"""A radiograph from an array of grey levels, for callers that have read the image themselves.

Owns: the rule from the values of an array to uint8. Refuses: what is not one image of finite numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ptxdist.dicom.pixels import to_uint8
from ptxdist.dicom.png import check_size
from ptxdist.dicom.radiograph import Header, Radiograph
from ptxdist.dicom.spacing import Spacing
from ptxdist.dicom.tags import Tags
from ptxdist.errors import DicomError

_SPACING = Spacing(reason="an array does not say how large its pixels are")


def radiograph_of(grey: npt.NDArray[Any]) -> Radiograph:
    """Radiograph of an array (rows, columns), air dark; its case id is "".

    uint8 stays as it is. Of other integers and of floats, the range of the values becomes 0..255, as in a PNG of 16
    bits. An image with bright air, as MONOCHROME1 stores it, must be inverted before. Raises DicomError for other
    shapes and types, for values that are not finite, and as `png.check_size`.
    """
    if grey.ndim != 2 or 0 in grey.shape:
        raise DicomError(f"is an array of shape {grey.shape}; give one image as (rows, columns)")
    if grey.dtype.kind not in "uif":
        raise DicomError(f"is an array of {grey.dtype}; give grey levels as integers or floats")
    rows, columns = grey.shape
    check_size(rows, columns)
    stored = grey.astype(grey.dtype.newbyteorder("="), order="C", copy=False)
    if stored.dtype.kind == "f" or stored.dtype.itemsize > 2:
        if not np.isfinite(stored).all():
            raise DicomError("is an array with values that are not finite; replace them")
        values = stored.astype(np.float64)
        low, high = values.min(), values.max()
        unit = (values / 2 - low / 2) / ((high / 2 - low / 2) or 1.0)  # halves: the range may exceed that of float64
        stored = np.rint(unit * 65535).astype(np.uint16)
    return Radiograph(Header("", "", rows, columns, "", "", None, ""), to_uint8(stored, Tags("")), _SPACING)
