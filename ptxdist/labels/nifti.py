"""NIfTI files as nnU-Net writes them. Needs the extra `nifti`.

The first axis of a NIfTI file is x, the columns of the image, and the second is y, its rows: SimpleITK returns an array
(y, x) of it (nnunetv2/imageio/simpleitk_reader_writer.py), and NibabelIO transposes to the same
(nibabel_reader_writer.py). A third axis has to be of length 1. Orientation and spacing of the file are not used, as in
nnU-Net's own evaluation.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ptxdist.dicom.png import check_size
from ptxdist.errors import DicomError, LabelError
from ptxdist.labels.evidence import Size
from ptxdist.labels.found import CLASSES, FoundMask, about, place_of

SUFFIXES = (".nii.gz", ".nii")
_MANY_VALUES = 16
_BLOCK_PX = 2**22
_MAX_HEADER = 2**24  # bytes; extensions of the header are read whole
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL + 1)  # a file that cannot be read is a sentence of ours


def read_nifti(folder: Path, path: Path) -> list[FoundMask]:
    """The mask of one file below `folder`, whose name says which image it belongs to.

    Raises LabelError when it cannot be read, and for any values but 0 and one other.
    """
    place, parts, distinct = place_of(folder, path), [], list[Any]()
    for values in read_blocks(folder, path):
        distinct = np.unique([*distinct, *np.unique(values).tolist()]).tolist()
        if len(distinct) > _MANY_VALUES or any(value != value for value in distinct):
            shown = f"more than {_MANY_VALUES}" if len(distinct) > _MANY_VALUES else len(distinct)
            raise LabelError(f"{place} has {shown} values; a mask has 0 outside and one other value inside")
        parts.append((values != 0).T)
    listed = ", ".join(f"{value:g}" for value in distinct)
    if len(distinct) > 2:
        raise LabelError(f"{place} has the values {listed}; {CLASSES.replace('255', '1')}")
    if 0 not in distinct:
        raise LabelError(f"{place} has no pixel of 0 (its values are {listed}); a mask has 0 outside")
    with about(place):
        return [FoundMask.of(np.concatenate(parts), f"{max(distinct, key=abs):g}")]


def read_shape(folder: Path, path: Path) -> Size:
    """Rows and columns; LabelError when the file cannot be read, or holds more than one image."""
    with _open(place_of(folder, path), path) as image:
        return int(image.shape[1]), int(image.shape[0])


def read_blocks(folder: Path, path: Path) -> Iterator[npt.NDArray[Any]]:
    """Values (columns, some rows) in the order of the rows, of whole images that would take a gigabyte in float64.

    Raises LabelError as `read_shape`, and for colours and complex numbers.
    """
    place = place_of(folder, path)
    with _open(place, path) as image:
        columns, rows = image.shape[:2]
        step = max(1, _BLOCK_PX // columns)
        for first in range(0, rows, step):
            values = np.asarray(image.dataobj[:, first : first + step])
            if values.dtype.kind not in "biuf":
                raise LabelError(f"{place} has colours or complex numbers; a mask has one number for each pixel")
            yield values.reshape(columns, -1)


@contextmanager
def _open(place: str, path: Path) -> Iterator[Any]:
    """The image of a file, whose values are not read yet, and sentences for what reading them may raise."""
    import nibabel

    try:
        _refuse_long_header(path)
        image = nibabel.load(path, keep_file_open=True)  # else each block is unpacked from the start of the file
        shape = image.shape
        if len(shape) < 2 or 0 in shape or any(length != 1 for length in shape[2:]):
            raise LabelError(
                f"{place} has the shape {'x'.join(map(str, shape))}; only single 2-D images are read, (x, y) or "
                "(x, y, 1)"
            )
        check_size(shape[1], shape[0])
        yield image
    except DicomError as error:
        raise LabelError(f"{place} {error}") from None
    except _errors() as error:
        reason = getattr(error, "strerror", None) or str(error).replace(str(path), path.name)
        raise LabelError(f"{place} cannot be read as NIfTI: {reason}") from None


def _errors() -> tuple[type[Exception], ...]:
    """What nibabel raises for a file that it cannot read."""
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError, HeaderTypeError
    from nibabel.wrapstruct import WrapStructError

    own = ImageFileError, HeaderDataError, HeaderTypeError, WrapStructError
    return OSError, EOFError, ValueError, zlib.error, *own


def _refuse_long_header(path: Path) -> None:
    """Raise ValueError for extensions that would take gigabytes, packed or not."""
    import nibabel
    from nibabel.openers import ImageOpener

    if not path.stat().st_size:  # a pipe, which nobody may write to
        return
    with ImageOpener(str(path)) as file:
        start = file.read(nibabel.Nifti2Header.sizeof_hdr)
    for kind in (nibabel.Nifti1Header, nibabel.Nifti2Header):
        if kind.may_contain_header(start):
            data = kind(start[: kind.sizeof_hdr], check=False)["vox_offset"]
            if not data <= _MAX_HEADER:
                raise ValueError(f"its header has more than {_MAX_HEADER:,} bytes")
