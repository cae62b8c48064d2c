"""Radiographs from arrays: the same grey levels as from files, and refusals."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from ptxdist.dicom.array import radiograph_of
from ptxdist.dicom.radiograph import read_radiograph
from ptxdist.errors import DicomError

RAMP = np.linspace(300, 61_000, 40 * 30).reshape(40, 30).round()


def png(values: np.ndarray) -> np.ndarray:
    file = BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return read_radiograph(file.getvalue(), name="a.png").pixels


@pytest.mark.parametrize(
    "grey",
    [
        RAMP.astype(np.uint16),
        RAMP.astype(">u2"),
        (RAMP - 30_000).astype(np.int16),
        RAMP.astype(np.int64),
        RAMP.astype(np.float32),
        RAMP / 61_000,
        np.asfortranarray(RAMP),
        RAMP * 1e300,
        np.repeat(RAMP, 2, axis=1)[:, ::2],
    ],
)
def test_the_range_of_values_becomes_grey_levels_as_in_a_png_of_16_bits(grey: np.ndarray) -> None:
    found = radiograph_of(grey)
    assert (found.pixels.dtype, found.pixels.flags.c_contiguous) == (np.uint8, True)
    assert (found.header.rows, found.header.columns) == (40, 30)
    difference = found.pixels.astype(int) - png(RAMP.astype(np.uint16))
    assert np.abs(difference).max() <= (0 if grey.dtype.kind == "u" else 1)


def test_bytes_stay_as_they_are() -> None:
    grey = np.arange(60, 160, dtype=np.uint8).reshape(10, 10)
    assert np.array_equal(radiograph_of(grey).pixels, grey)
    assert np.array_equal(radiograph_of(grey[::-1, ::2]).pixels, grey[::-1, ::2])
    assert not radiograph_of(np.full((9, 9), 7.5)).pixels.any(), "a single value has no range"
    assert "how large its pixels are" in radiograph_of(grey).spacing.reason


@pytest.mark.parametrize(
    ("grey", "words"),
    [
        (np.zeros((3, 4, 5), np.uint8), r"shape \(3, 4, 5\); give one image as \(rows, columns\)"),
        (np.zeros((0, 4)), "shape"),
        (np.zeros((4, 4), bool), "array of bool"),
        (np.zeros((4, 4), complex), "array of complex128"),
        (np.array([[0.0, np.nan]]), "not finite"),
        (np.zeros((1, 10_001), np.uint8), "at most"),
    ],
)
def test_other_arrays_are_refused(grey: np.ndarray, words: str) -> None:
    with pytest.raises(DicomError, match=words):
        radiograph_of(grey)
