"""NIfTI files as nnU-Net writes them. Needs the extra `nifti`.

The first axis of a NIfTI file is x, the columns of the image, and the second is y, its rows: SimpleITK returns an array
(y, x) of it (nnunetv2/imageio/simpleitk_reader_writer.py), and NibabelIO transposes to the same
(nibabel_reader_writer.py). A third axis has to be of length 1. Orientation and spacing of the file are not used, as in
nnU-Net's own evaluation.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ptxdist.dicom.png import check_size
from ptxdist.errors import DicomError, LabelError
from ptxdist.labels.evidence import Size
from ptxdist.labels.found import CLASSES, FoundMask, place_of

SUFFIXES = (".nii.gz", ".nii")
_MANY_VALUES = 16


def read_nifti(folder: Path, path: Path) -> list[FoundMask]:
    """The mask of one file below `folder`, whose name says which image it belongs to.

    Raises LabelError when it cannot be read, and for any values but 0 and one other.
    """
    values, _ = read_values(folder, path, pixels=True)
    distinct = np.unique(values).tolist()
    place = place_of(folder, path)
    if len(distinct) > _MANY_VALUES or any(value != value for value in distinct):
        raise LabelError(f"{place} has {len(distinct):,} values; a mask has 0 outside and one other value inside")
    listed = ", ".join(f"{value:g}" for value in distinct)
    if len(distinct) > 2:
        raise LabelError(f"{place} has the values {listed}; {CLASSES.replace('255', '1')}")
    if 0 not in distinct:
        raise LabelError(f"{place} has no pixel of 0 (its values are {listed}); a mask has 0 outside")
    return [FoundMask.of((values != 0).T, f"{max(distinct, key=abs):g}")]


def read_values(folder: Path, path: Path, *, pixels: bool = False) -> tuple[npt.NDArray[Any], Size]:
    """Values (columns, rows), none unless asked for with `pixels`, and the size (rows, columns)."""
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    place = place_of(folder, path)
    try:
        image = nibabel.load(path)
        shape = image.shape
        if len(shape) < 2 or any(length != 1 for length in shape[2:]):
            raise LabelError(
                f"{place} has the shape {'x'.join(map(str, shape))}; only single 2-D images are read, (x, y) or "
                "(x, y, 1)"
            )
        check_size(shape[1], shape[0])
        values = np.asarray(image.dataobj) if pixels else np.zeros((0, 0))
        if values.dtype.kind not in "biuf":
            raise LabelError(f"{place} has colours or complex numbers; a mask has one number for each pixel")
    except DicomError as error:
        raise LabelError(f"{place} {error}") from None
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError) as error:
        reason = getattr(error, "strerror", None) or str(error).replace(str(path), path.name)
        raise LabelError(f"{place} cannot be read as NIfTI: {reason}") from None
    return values.reshape(shape[:2]) if pixels else values, (shape[1], shape[0])
