"""mm² are computed only from a spacing whose plane is known."""

from __future__ import annotations

import numpy as np
import pydicom
import pytest
from pydicom.uid import ComputedRadiographyImageStorage, SecondaryCaptureImageStorage

from ptxdist.dicom.spacing import read_spacing, spacing_of


def header(**tags: object) -> pydicom.Dataset:
    result = pydicom.Dataset()
    result.SOPClassUID, result.Rows, result.Columns = ComputedRadiographyImageStorage, 2000, 2400
    for name, value in tags.items():
        setattr(result, name, value)
    return result


@pytest.mark.parametrize(
    ("tags", "plane", "area"),
    [
        ({"ImagerPixelSpacing": [0.2, 0.1]}, "detector", 2.0),
        ({"ImagerPixelSpacing": [0.2, 0.1], "PixelSpacing": [0.2, 0.1]}, "detector", 2.0),
        ({"ImagerPixelSpacing": [0.2, 0.2], "EstimatedRadiographicMagnificationFactor": 2}, "patient", 1.0),
        ({"PixelSpacing": [0.1, 0.2], "PixelSpacingCalibrationType": "GEOMETRY"}, "patient", 2.0),
    ],
)
def test_a_spacing_that_says_what_it_means_gives_an_area(tags: dict[str, object], plane: str, area: float) -> None:
    spacing = spacing_of(header(**tags))
    assert (spacing.plane, spacing.reason) == (plane, "")
    assert spacing.area_mm2(100) == pytest.approx(area)
    assert spacing.area_mm2(0) == 0


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"PixelSpacing": [0.2, 0.2]}, "without a calibration"),
        ({}, "no spacing"),
        ({"ImagerPixelSpacing": [0, 0]}, "no spacing"),
        ({"ImagerPixelSpacing": [0.2, 0.2], "PixelSpacing": [0.17, 0.17]}, "differ"),
        ({"ImagerPixelSpacing": [0.02, 0.02]}, "would show 48 x 40 mm"),
        ({"ImagerPixelSpacing": [0.2, 0.2], "SOPClassUID": SecondaryCaptureImageStorage}, "Secondary Capture"),
    ],
)
def test_any_other_has_a_reason(tags: dict[str, object], reason: str) -> None:
    spacing = spacing_of(header(**tags))
    assert reason in spacing.reason
    assert spacing.area_mm2(100) is None


def test_a_png_has_none() -> None:
    assert "PNG" in read_spacing(b"\x89PNG\r\n\x1a\n" + bytes(np.zeros(8, np.uint8))).reason
