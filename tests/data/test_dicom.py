"""One DICOM file: stored values become grey levels by the stated rule; what is no radiograph is refused."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from ptxdist.data import dicom
from ptxdist.data.dicom import read_bytes, read_header, read_radiograph
from ptxdist.errors import DicomError

SMOOTH = np.add.outer(np.arange(48) * 3, np.arange(64)).astype(np.uint8)  # 48 x 64, 0..204
DEEP = np.add.outer(np.arange(48, dtype=np.uint16) * 60, np.arange(64, dtype=np.uint16) * 10)  # 0..3450


@pytest.fixture
def written(tmp_path: Path, write_dicom):  # type: ignore[no-untyped-def]
    """Function: content of a file with these pixels and tags."""

    def content(pixels: npt.NDArray[np.generic] = SMOOTH, **given: object) -> bytes:
        return write_dicom(tmp_path / "one.dcm", pixels, "1.2.3.4", **given).read_bytes()

    return content


def refused(content: bytes, reason: str) -> None:
    with pytest.raises(DicomError) as caught:
        read_radiograph(content)
    assert reason in str(caught.value)
    assert caught.value.exit_code == 5


def test_plain_8_bit_values_are_taken_as_they_are(written) -> None:  # type: ignore[no-untyped-def]
    assert np.array_equal(read_radiograph(written(raw=True)).pixels, SMOOTH)
    from_jpeg = read_radiograph(written()).pixels
    assert from_jpeg.dtype == np.uint8
    assert np.abs(from_jpeg.astype(int) - SMOOTH).max() <= 6


@pytest.mark.parametrize("raw", [True, False])
def test_monochrome1_is_inverted_once(written, raw: bool) -> None:  # type: ignore[no-untyped-def]
    plain = read_radiograph(written(raw=raw)).pixels
    for tags in (
        {"PhotometricInterpretation": "MONOCHROME1"},
        {"PresentationLUTShape": "INVERSE"},
        {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"},
    ):
        assert np.array_equal(read_radiograph(written(raw=raw, **tags)).pixels, 255 - plain)


def test_16_bit_without_window_spans_the_range_of_its_values(written) -> None:  # type: ignore[no-untyped-def]
    pixels = read_radiograph(written(DEEP)).pixels
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert np.array_equal(pixels, np.rint(DEEP / DEEP.max() * 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("LINEAR", lambda x: np.clip((x - 999.5) / 399 + 0.5, 0, 1)),
        ("LINEAR_EXACT", lambda x: np.clip((x - 1000) / 400 + 0.5, 0, 1)),
        ("SIGMOID", lambda x: 1 / (1 + np.exp(-4 * (x - 1000) / 400))),
    ],
)
def test_window_functions_are_those_of_the_standard(written, function: str, expected) -> None:  # type: ignore[no-untyped-def]
    content = written(DEEP, WindowCenter=1000, WindowWidth=400, VOILUTFunction=function)
    assert np.array_equal(read_radiograph(content).pixels, np.rint(expected(DEEP.astype(float)) * 255))


def test_first_of_several_windows_counts_after_the_rescale(written) -> None:  # type: ignore[no-untyped-def]
    content = written(
        DEEP.astype(np.int16), RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=[500, 9], WindowWidth=[1001, 9]
    )
    expected = np.clip((DEEP * 2.0 - 1000 - 499.5) / 1000 + 0.5, 0, 1)
    assert np.array_equal(read_radiograph(content).pixels, np.rint(expected * 255))


def test_look_up_table_comes_before_the_window(written) -> None:  # type: ignore[no-untyped-def]
    table = Dataset()
    table.LUTDescriptor = [256, 0, 16]
    table["LUTDescriptor"].VR = "US"
    table.LUTData = (np.arange(256) ** 2).astype("<u2").tobytes()
    content = written(SMOOTH, raw=True, VOILUTSequence=Sequence([table]), WindowCenter=10, WindowWidth=5)
    expected = SMOOTH.astype(float) ** 2
    assert np.array_equal(read_radiograph(content).pixels, np.rint(expected / expected.max() * 255))


def test_empty_look_up_table_sequence_leaves_the_window_in_force(written) -> None:  # type: ignore[no-untyped-def]
    window = {"WindowCenter": 1000, "WindowWidth": 400}
    with_sequence = read_radiograph(written(DEEP, VOILUTSequence=Sequence([]), **window)).pixels
    assert np.array_equal(with_sequence, read_radiograph(written(DEEP, **window)).pixels)


def test_constant_image_is_black_and_not_an_error(written) -> None:  # type: ignore[no-untyped-def]
    assert not read_radiograph(written(np.full((8, 8), 700, np.uint16))).pixels.any()


@pytest.mark.parametrize(
    ("age", "years"),
    [("062Y", 62), ("62", 62), ("018M", 1), ("010D", 0), ("", None), ("old", None), ("413", None), ("Y", None)],
)
def test_age_is_read_as_the_standard_and_as_the_challenge_write_it(written, age: str, years: int | None) -> None:  # type: ignore[no-untyped-def]
    assert read_header(written(PatientAge=age), b"").age == years


def test_header_keeps_no_identifier(written) -> None:  # type: ignore[no-untyped-def]
    content = written(ViewPosition="Zebulon Quagmire")
    header = read_header(content, b"salt")
    assert (header.rows, header.columns, header.view, header.sex) == (48, 64, "", "F")
    assert not any(secret in str(asdict(header)) for secret in ("Quagmire", "QX7", "1939"))
    assert header.patient == read_header(content, b"salt").patient != read_header(content, b"pepper").patient
    assert read_header(written(PatientID=None), b"salt").patient == ""


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"NumberOfFrames": 2}, "has 2 frames"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "is not grayscale (3 samples per px, RGB)"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "is not grayscale"),
        ({"PixelData": None}, "has no pixel data"),
        ({"Rows": None}, "holds no image"),
        ({"SOPInstanceUID": None}, "has no SOPInstanceUID"),
        ({"Rows": 65535, "Columns": 65535}, "claims 65535x65535 px, more than"),
        ({"Rows": 47}, "decodes to (48, 64), but its header says (47, 64)"),
        ({"WindowWidth": 100}, "has a window, rescale or look-up table that cannot be applied"),
        ({"VOILUTSequence": Sequence([Dataset()])}, "look-up table that cannot be applied"),
    ],
)
def test_what_is_no_single_radiograph_is_refused_with_a_reason(written, tags: dict[str, object], reason: str) -> None:  # type: ignore[no-untyped-def]
    refused(written(**tags), reason)


def test_not_dicom_empty_and_missing_files_are_refused(tmp_path: Path) -> None:
    refused(b"ImageId,EncodedPixels\n" * 20, "is not a DICOM file")
    refused(b"x", "is not a DICOM file")
    (tmp_path / "empty.dcm").touch()
    with pytest.raises(DicomError, match="is empty"):
        read_bytes(tmp_path / "empty.dcm")
    with pytest.raises(DicomError, match="cannot be read: No such file"):
        read_bytes(tmp_path / "nowhere.dcm")
    (tmp_path / "loop.dcm").symlink_to(tmp_path / "loop.dcm")
    with pytest.raises(DicomError, match="cannot be read: Too many levels of symbolic links"):
        read_bytes(tmp_path / "loop.dcm")


@pytest.mark.parametrize("raw", [True, False])
def test_file_cut_off_anywhere_is_refused_or_whole(written, raw: bool) -> None:  # type: ignore[no-untyped-def]
    content = written(raw=raw)
    whole = read_radiograph(content).pixels
    accepted = []
    for length in [*range(0, len(content) - 60, 41), *range(len(content) - 60, len(content))]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pixels = read_radiograph(content[:length]).pixels
        except DicomError as error:
            assert len(str(error)) > 10  # noqa: PT017  # which reason depends on where the file ends
        else:
            assert np.array_equal(pixels, whole)
            accepted.append(length)
    assert all(length > len(content) - 10 for length in accepted)  # at most the closing delimiter is missing
    with pytest.raises(DicomError, match="less than expected" if raw else "cut off"):
        read_radiograph(content[: len(content) - 100])


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_never_raise_anything_else(small_dataset, data: st.DataObject) -> None:  # type: ignore[no-untyped-def]
    content = bytearray(min(small_dataset.dicom.rglob("*.dcm")).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 1500))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            radiograph = read_radiograph(bytes(content))
        except DicomError as error:
            assert str(error)  # noqa: PT017
        else:
            assert radiograph.pixels.shape == (radiograph.header.rows, radiograph.header.columns)


def test_every_messy_file_is_read_the_right_way_round_or_refused(real_data: Path) -> None:
    """The right way round: the radiograph of a MONOCHROME1 file is the negative of its stored values."""
    refusals = {}
    for path in sorted((real_data / "messy-dicom").iterdir()):
        content = path.read_bytes()
        try:
            pixels = read_radiograph(content).pixels
        except DicomError as error:
            refusals[path.name] = str(error)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = pydicom.dcmread(path)
        stored = file.pixel_array.astype(float)
        sign = -1 if file.PhotometricInterpretation == "MONOCHROME1" else 1
        assert np.corrcoef(stored.reshape(-1), pixels.reshape(-1))[0, 1] * sign > 0.99, path.name
        assert pixels.std() > 25, path.name
        assert np.ptp(pixels) > 200, path.name
    assert refusals == {"CR-MONO1-10-chest_noPart10.dcm": "is not a DICOM file (no DICM prefix)"}


def test_altered_copy_declared_monochrome1_is_the_negative_of_its_original(real_data: Path) -> None:
    copy = read_radiograph((real_data / "messy-dicom" / "SIIM6904_as_MONOCHROME1_fake.dcm").read_bytes())
    original = next((real_data / "siim-real" / "dicom-images").rglob(f"{copy.header.case_id}.dcm"))
    difference = copy.pixels.astype(int) - (255 - read_radiograph(original.read_bytes()).pixels.astype(int))
    assert np.abs(difference).max() <= 2


def test_real_files_decode_like_the_reference_decoder(real_data: Path) -> None:
    for path in sorted((real_data / "siim-real" / "dicom-images").rglob("*.dcm"))[:150:50]:
        pixels = read_radiograph(path.read_bytes()).pixels
        file = pydicom.dcmread(path)
        file.pixel_array_options(decoding_plugin="pillow")
        assert np.array_equal(pixels, file.pixel_array)


def test_stage_2_file_with_an_invalid_uid_is_read(real_data: Path) -> None:
    path = sorted((real_data / "siim-real" / "stage_2_images").glob("*.dcm"))[0]
    assert dicom.read_header(path.read_bytes(), b"").case_id == path.stem
