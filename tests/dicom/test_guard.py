"""What goes wrong with a file becomes its reason, without what it says; what ends the process passes."""

from __future__ import annotations

import gc
import sys

import numpy as np
import pytest
from pydicom.uid import ExplicitVRLittleEndian

from ptxdist.dicom.guard import PassingError, bare, guarded
from ptxdist.dicom.radiograph import read_header, read_radiograph
from ptxdist.errors import DicomError, StoreError


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, StoreError, DicomError])
def test_what_ends_a_command_and_own_errors_pass(error: type[BaseException]) -> None:
    with pytest.raises(error) as caught, guarded():
        raise error("as it is")
    assert type(caught.value) is error


def test_the_place_is_the_last_one_in_ptxdist() -> None:
    with pytest.raises(PassingError) as caught, guarded():
        read_header(None, b"")  # type: ignore[arg-type]
    assert "because of a defect in ptxdist (AttributeError in radiograph.py, line " in str(caught.value)
    with (
        pytest.raises(PassingError, match=r"needs more memory than there is \(MemoryError in test_guard.py, line"),
        guarded(),
    ):
        raise MemoryError("Quagmire")


def test_a_refusal_does_not_keep_the_content_of_its_file(file_of) -> None:  # type: ignore[no-untyped-def]
    """Neither in a cycle that waits for the garbage collector, nor where refusals are collected."""
    whole = file_of(np.zeros((16, 16), np.uint8), ExplicitVRLittleEndian)
    contents = [bytes(1000), b"\10\0\0\0" + bytes(1000), b"\xff\xd8\xff", whole[:-9], whole[:200], b"\x89PNG\r\n\x1a\n"]
    kept = []
    gc.disable()
    try:
        for content in contents:
            before = sys.getrefcount(content)
            with pytest.raises(DicomError) as caught:
                read_radiograph(content, name="a.png")
            kept.append(bare(caught.value))
            assert str(kept[-1]) == str(caught.value)
            del caught
            assert sys.getrefcount(content) == before
    finally:
        gc.enable()
