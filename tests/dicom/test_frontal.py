"""What the viewer accepts as a frontal chest radiograph, and the message for everything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from ptxdist.dicom.frontal import refuse_other_than_chest
from ptxdist.dicom.radiograph import read_radiograph
from ptxdist.errors import DicomError

GREY = np.full((64, 48), 90, np.uint8)
Write = Callable[..., Path]


def judge(content: bytes) -> None:
    """As the viewer does it."""
    read_radiograph(content, check=refuse_other_than_chest)


@pytest.mark.parametrize(
    "tags",
    [
        {},
        {"BodyPartExamined": "CHEST", "ViewPosition": "AP"},
        {"BodyPartExamined": "Thorax", "Modality": "DX"},
        {"BodyPartExamined": "CHEST ABDOMEN", "ViewPosition": None},
        {"BodyPartExamined": "BRUSTKORB", "ViewPosition": ""},
        {"BodyPartExamined": "", "Modality": "RG", "ViewPosition": "LLD"},
    ],
    ids=str,
)
def test_a_chest_passes_however_it_is_called(tmp_path: Path, write_dicom: Write, tags: dict[str, str]) -> None:
    judge(write_dicom(tmp_path / "a.dcm", GREY, "1.2.3", **tags).read_bytes())


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"Modality": "CT"}, "is of modality CT; a chest radiograph is one of CR, DX, RG"),
        ({"Modality": None}, "does not name a known modality"),
        ({"Modality": "QUAGMIRE"}, "does not name a known modality"),
        ({"BodyPartExamined": "HAND"}, r"another body part than the chest \(HAND\)"),
        ({"BodyPartExamined": "L-SPINE"}, r"\(LSPINE\)"),
        ({"BodyPartExamined": "Quagmire's left Knee"}, r"\(KNEE\)"),
        ({"ViewPosition": "LL"}, r"is a lateral or oblique view \(LL\)"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "is not grayscale"),
        ({"NumberOfFrames": "3"}, "has 3 frames"),
        ({"Rows": 60000, "Columns": 60000}, "claims 60000x60000 pixels"),
    ],
    ids=str,
)
def test_what_says_that_it_is_something_else_is_refused(
    tmp_path: Path, write_dicom: Write, tags: dict[str, object], reason: str
) -> None:
    content = write_dicom(tmp_path / "a.dcm", GREY, "1.2.3", raw=True, **tags).read_bytes()
    with pytest.raises(DicomError, match=reason) as caught:
        judge(content)
    assert "quagmire" not in str(caught.value).lower()


def test_a_png_passes_since_it_has_no_header() -> None:
    read_radiograph(cv2.imencode(".png", GREY)[1].tobytes(), name="a.png", check=refuse_other_than_chest)


def test_what_is_no_dicom_is_refused() -> None:
    for content, reason in (
        (b"", r"is empty \(0 bytes\)"),
        (b"Dear colleague, " * 40, "is not a DICOM file"),
        (cv2.imencode(".jpg", GREY)[1].tobytes(), "is a JPEG image; convert it to PNG"),
    ):
        with pytest.raises(DicomError, match=reason):
            judge(content)
