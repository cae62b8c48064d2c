"""What goes wrong with a file becomes its reason, without what it says; what ends the process passes."""

from __future__ import annotations

import pytest

from ptxdist.dicom.guard import PassingError, guarded
from ptxdist.dicom.radiograph import read_header
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
