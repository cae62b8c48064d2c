"""mm² are computed only from a spacing whose plane is known."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    SecondaryCaptureImageStorage,
)

from ptxdist.dicom.parsing import read_tags
from ptxdist.dicom.radiograph import read_radiograph
from ptxdist.dicom.spacing import Spacing, spacing_of

SMALL = np.zeros((2, 3), np.uint8)


def spacings(file_of, tags: dict[str, object]) -> Spacing:  # type: ignore[no-untyped-def]
    """The spacing of a file of 2000 x 2400 pixels, the same by both parsers."""
    given = {"SOPClassUID": ComputedRadiographyImageStorage, "Rows": 2000, "Columns": 2400, **tags}
    one, other = (
        spacing_of(read_tags(file_of(SMALL, syntax, **given), pixels=True))
        for syntax in (JPEGBaseline8Bit, ImplicitVRLittleEndian)
    )
    assert one == other
    return one


@pytest.mark.parametrize(
    ("tags", "plane", "area"),
    [
        ({"ImagerPixelSpacing": [0.2, 0.1]}, "detector", 2.0),
        ({"ImagerPixelSpacing": [0.2, 0.1], "PixelSpacing": [0.2, 0.1]}, "detector", 2.0),
        ({"ImagerPixelSpacing": [0.2, 0.2], "EstimatedRadiographicMagnificationFactor": 2}, "patient", 1.0),
        ({"PixelSpacing": [0.1, 0.2], "PixelSpacingCalibrationType": "GEOMETRY"}, "patient", 2.0),
    ],
)
def test_a_spacing_that_says_what_it_means_gives_an_area(  # type: ignore[no-untyped-def]
    file_of, tags: dict[str, object], plane: str, area: float
) -> None:
    spacing = spacings(file_of, tags)
    assert (spacing.plane, spacing.reason) == (plane, "")
    assert spacing.area_mm2(100) == pytest.approx(area)
    assert spacing.area_mm2(0) == 0


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"PixelSpacing": [0.2, 0.2]}, "without a calibration"),
        ({}, "no spacing"),
        ({"ImagerPixelSpacing": [0, 0]}, "no spacing"),
        ({"ImagerPixelSpacing": "0.2"}, "no spacing"),
        ({"ImagerPixelSpacing": [0.2, 0.2], "PixelSpacing": [0.17, 0.17]}, "differ"),
        ({"ImagerPixelSpacing": [0.02, 0.02]}, "would show 48 x 40 mm"),
        ({"ImagerPixelSpacing": [0.2, 0.2], "SOPClassUID": SecondaryCaptureImageStorage}, "Secondary Capture"),
    ],
)
def test_any_other_has_a_reason(file_of, tags: dict[str, object], reason: str) -> None:  # type: ignore[no-untyped-def]
    spacing = spacings(file_of, tags)
    assert reason in spacing.reason
    assert spacing.area_mm2(100) is None


def test_a_png_has_none() -> None:
    content = cv2.imencode(".png", SMALL)[1].tobytes()
    assert "PNG" in read_radiograph(content, name="a.png").spacing.reason
