"""One DICOM file: stored values become grey levels by the stated rule; everything else is rejected."""

from __future__ import annotations

import os
import re
import socket
import time
import warnings
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_windowing
from pydicom.sequence import Sequence

from ptxdist.dicom.radiograph import MAX_BYTES, read_bytes, read_header, read_radiograph
from ptxdist.errors import DicomError

SMOOTH = np.add.outer(np.arange(48) * 3, np.arange(64)).astype(np.uint8)  # 48 x 64, 0..204
DEEP = np.add.outer(np.arange(48, dtype=np.uint16) * 60, np.arange(64, dtype=np.uint16) * 10)  # 0..3450


@pytest.fixture
def written(tmp_path: Path, write_dicom):  # type: ignore[no-untyped-def]
    """Function: content of a file with these pixels and tags."""

    def content(pixels: npt.NDArray[np.generic] = SMOOTH, **given: object) -> bytes:
        return bytes(write_dicom(tmp_path / "one.dcm", pixels, "1.2.3.4", **given).read_bytes())

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
    assert np.array_equal(read_radiograph(content).pixels, np.rint(expected / 65535 * 255))


def test_look_up_table_sequence_without_a_table_leaves_the_window_in_force(written) -> None:  # type: ignore[no-untyped-def]
    window = {"WindowCenter": 1000, "WindowWidth": 400}
    expected = read_radiograph(written(DEEP, **window)).pixels
    empty = Dataset()
    empty.add_new("LUTDescriptor", "US", None)
    empty.add_new("LUTData", "US", None)
    for name in ("VOILUTSequence", "ModalityLUTSequence"):
        for items in ([], [Dataset()], [empty]):
            assert np.array_equal(read_radiograph(written(DEEP, **{name: Sequence(items)}, **window)).pixels, expected)
    table = Dataset()
    table.add_new("LUTDescriptor", "US", [256, 0, 16])
    refused(written(DEEP, VOILUTSequence=Sequence([table])), "cannot be applied: its descriptor does not fit its data")


def test_constant_image_is_black_and_not_an_error(written) -> None:  # type: ignore[no-untyped-def]
    assert not read_radiograph(written(np.full((8, 8), 700, np.uint16))).pixels.any()


@pytest.mark.parametrize(
    ("age", "years"),
    [
        ("062Y", 62),
        ("62", 62),
        ("018M", 1),
        ("010D", 0),
        ("", None),
        ("old", None),
        ("413", None),
        ("Y", None),
        ("9" * 5000, None),
    ],
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
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "is not grayscale (3 samples per pixel, RGB)"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "is not grayscale"),
        ({"PhotometricInterpretation": "YBR_FULL"}, "is not grayscale (1 samples per pixel, YBR_FULL)"),
        ({"PhotometricInterpretation": "Quagmire^Zebulon"}, "is not grayscale (1 samples per pixel, unknown"),
        ({"BitsAllocated": 32, "BitsStored": 32}, "has 32 bits per pixel; only images of 8 or 16"),
        ({"BitsAllocated": 1, "BitsStored": 1}, "has 1 bits per pixel; only images of 8 or 16"),
        ({"BitsStored": 9}, "contradicts itself (9 of 8 bits"),
        ({"PixelData": None}, "has no pixel data"),
        ({"Rows": None}, "contains no image"),
        ({"SOPInstanceUID": None}, "has no SOPInstanceUID"),
        ({"SOPInstanceUID": "../../etc"}, "has an invalid SOPInstanceUID"),
        ({"SOPInstanceUID": "1." * 40}, "has an invalid SOPInstanceUID"),
        ({"Rows": 65535, "Columns": 65535}, "claims 65535x65535 pixels; at most"),
        (
            {"Rows": 1, "Columns": 60_000},
            "claims 60000x1 pixels; at most 67,108,864 are accepted, and 10,000 on a side",
        ),
        ({"Rows": 47}, "contains 64x48 pixels, but its header says 64x47"),
        ({"WindowWidth": 100}, "has a window without a center"),
    ],
)
def test_what_is_no_single_radiograph_is_refused_with_a_reason(written, tags: dict[str, object], reason: str) -> None:  # type: ignore[no-untyped-def]
    refused(written(**tags), reason)


def test_empty_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.dcm").touch()
    with pytest.raises(DicomError, match="is empty"):
        read_bytes(tmp_path / "empty.dcm")
    with pytest.raises(DicomError, match="cannot be read: No such file"):
        read_bytes(tmp_path / "nowhere.dcm")
    (tmp_path / "loop.dcm").symlink_to(tmp_path / "loop.dcm")
    with pytest.raises(DicomError, match="cannot be read: Too many levels of symbolic links"):
        read_bytes(tmp_path / "loop.dcm")


def test_only_regular_files_are_opened_and_nothing_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.dcm")
    (tmp_path / "folder.dcm").mkdir()
    (tmp_path / "device.dcm").symlink_to("/dev/zero")
    (tmp_path / "terminal.dcm").symlink_to("/dev/tty")
    monkeypatch.chdir(tmp_path)  # the path of a socket may have no more than about 100 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.dcm")
        for name in ("pipe", "folder", "device", "terminal", "socket"):
            with pytest.raises(DicomError, match="is not a regular file"):
                read_bytes(tmp_path / f"{name}.dcm")
    (tmp_path / "real").write_bytes(b"content")
    (tmp_path / "link.dcm").symlink_to("real")
    assert read_bytes(tmp_path / "link.dcm") == b"content"


def test_a_file_beyond_all_bounds_is_not_loaded(tmp_path: Path) -> None:
    with open(tmp_path / "huge.dcm", "wb") as file:
        file.truncate(MAX_BYTES + 1)  # takes no room on the disk
    with pytest.raises(DicomError, match="has 167,772,161 bytes; at most"):
        read_bytes(tmp_path / "huge.dcm")


@pytest.mark.parametrize("raw", [True, False])
def test_file_cut_off_anywhere_is_refused_or_whole(written, raw: bool) -> None:  # type: ignore[no-untyped-def]
    content = written(raw=raw)
    whole = read_radiograph(content).pixels
    accepted = []
    for length in [*range(0, len(content) - 60, 41), *range(len(content) - 60, len(content))]:
        try:
            with warnings.catch_warnings(action="ignore"):
                pixels = read_radiograph(content[:length]).pixels
        except DicomError as error:
            assert len(str(error)) > 10  # noqa: PT017  # which reason depends on where the file ends
        else:
            assert np.array_equal(pixels, whole)
            accepted.append(length)
    assert all(length > len(content) - 10 for length in accepted)  # at most the closing delimiter is missing
    with pytest.raises(DicomError, match="cut off"):
        read_radiograph(content[: len(content) - 100])


SYNTAXES = (
    *(uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.RLELossless),
    *(uid.DeflatedExplicitVRLittleEndian, uid.JPEGBaseline8Bit, uid.JPEGLosslessSV1, uid.JPEGLossless),
    *(uid.JPEGLSLossless, uid.JPEGLSNearLossless, uid.JPEG2000Lossless, uid.JPEG2000),
)


@pytest.fixture(scope="module")
def sound_files(file_of) -> dict[tuple[str, bool], bytes]:  # type: ignore[no-untyped-def]
    """Content of a file in each syntax, of 8 bits, and where it can be of 12 bits with a window and a rescale."""
    tags = {"WindowCenter": 900, "WindowWidth": 1500, "RescaleSlope": 2, "RescaleIntercept": -9}
    plain = {syntax: file_of(SMOOTH[:40, :40], syntax) for syntax in SYNTAXES}
    return {(syntax, deep): content for syntax, content in plain.items() for deep in (False, True)} | {
        (syntax, True): file_of(DEEP[:40, :40], syntax, bits=12, **tags)
        for syntax in SYNTAXES
        if syntax != uid.JPEGBaseline8Bit
    }


@given(st.sampled_from(SYNTAXES), st.booleans(), st.data())
@settings(max_examples=400, derandomize=True)
def test_damaged_bytes_never_raise_anything_else(
    sound_files: dict[tuple[str, bool], bytes], syntax: str, deep: bool, data: st.DataObject
) -> None:
    """Bytes changed, put in and taken out; the decoders are C, so a crash of this test is a finding as well."""
    content = bytearray(sound_files[syntax, deep])
    frame = max(content.rfind(b"\xfe\xff\x00\xe0"), 0)
    for _ in range(data.draw(st.integers(1, 4))):
        first = data.draw(st.sampled_from([0, 132, frame]))
        position = data.draw(
            st.integers(first, min(first + 200, len(content) - 1)) | st.integers(first, len(content) - 1)
        )
        piece = data.draw(st.binary(max_size=3))
        content[position : position + data.draw(st.integers(0, 3))] = piece
    if data.draw(st.integers(0, 9)) == 0:
        del content[data.draw(st.integers(0, len(content))) :]
    begin = time.process_time()
    with warnings.catch_warnings(action="error"):
        try:
            radiograph = read_radiograph(bytes(content))
        except DicomError as error:
            assert str(error)  # noqa: PT017
            assert "Quagmire" not in str(error)  # noqa: PT017
        else:
            assert radiograph.pixels.shape == (radiograph.header.rows, radiograph.header.columns)
            assert radiograph.pixels.dtype == np.uint8
    assert time.process_time() - begin < 2


BUNDLED = Path(str(resources.files("pydicom"))) / "data" / "test_files"
READ = (
    *("693_J2KI.dcm", "CT_small.dcm", "J2K_pixelrep_mismatch.dcm", "JPEG2000.dcm", "JPEGLSNearLossless_08.dcm"),
    *(
        "JPEGLSNearLossless_16.dcm",
        "JPEG-lossy.dcm",
        "JPGExtended.dcm",
        "MR_small.dcm",
        "MR_small_RLE.dcm",
        "MR_small_bigendian.dcm",
    ),
    *("MR_small_expb.dcm", "MR_small_implicit.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm"),
    *("MR_small_padded.dcm", "examples_overlay.dcm", "image_dfl.dcm"),
)
REFUSED = {
    "MR_truncated.dcm": "is cut off",
    "JPEG2000-embedded-sequence-delimiter.dcm": "contains ",
    "badVR.dcm": "is no image by its SOP class",
    "examples_palette.dcm": "is not grayscale (1 samples per pixel, PALETTE COLOR)",
    "examples_ybr_color.dcm": "has 30 frames",
    "liver_1frame.dcm": "is no image by its SOP class",
    "meta_missing_tsyntax.dcm": "does not say how it is encoded",
    "rtdose_1frame.dcm": "is no image by its SOP class",
    "rtplan.dcm": "contains no image",
    "README.txt": "is not a DICOM file",
    "SC_rgb_jpeg_gdcm.dcm": "is not grayscale (3 samples per pixel, RGB)",
    "test-SR.dcm": "contains no image",
    "zipMR.gz": "is not a DICOM file",
}


def test_all_files_of_pydicom_are_read_right_or_refused_with_a_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    files = sorted(path for path in BUNDLED.rglob("*") if path.is_file())
    assert len(files) > 150
    read, refusals = set(), {}
    for path in files:
        begin = time.process_time()
        with warnings.catch_warnings(action="error"):
            try:
                radiograph = read_radiograph(read_bytes(path), name=path.name)
            except DicomError as error:
                assert re.match(r"(is|has|contains|does|claims|inflates|contradicts) \w", str(error)), error  # noqa: PT017
                refusals[path.name] = str(error)
                continue
            finally:
                assert time.process_time() - begin < 1
        read.add(path.name)
        if path.name in ("JPEG-lossy.dcm", "JPGExtended.dcm"):  # no plugin of pydicom here reads 12 bits: see test_zoo
            continue
        with warnings.catch_warnings(action="ignore"):
            file = pydicom.dcmread(path)
            stored = file.pixel_array.astype(float)
        sign = -1 if file.PhotometricInterpretation == "MONOCHROME1" else 1
        shown = np.asarray(apply_windowing(apply_modality_lut(stored, file), file), float)
        if np.ptp(shown):
            assert np.corrcoef(shown.reshape(-1), radiograph.pixels.reshape(-1))[0, 1] * sign > 0.99, path.name
    assert set(READ) <= read
    wrong = {name: refusals.get(name) for name, why in REFUSED.items() if not refusals.get(name, "").startswith(why)}
    assert wrong == {}
    assert not any(name.startswith(("SC_", "reportsi", "DICOMDIR", "IM0000")) for name in read)
    assert capfd.readouterr() == ("", "")


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
        with warnings.catch_warnings(action="ignore"):
            file = pydicom.dcmread(path, force=True)
            if "TransferSyntaxUID" not in file.file_meta:
                file.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
            stored = file.pixel_array.astype(float)
        sign = -1 if file.PhotometricInterpretation == "MONOCHROME1" else 1
        assert np.corrcoef(stored.reshape(-1), pixels.reshape(-1))[0, 1] * sign > 0.99, path.name
        assert pixels.std() > 25, path.name
        assert np.ptp(pixels) > 200, path.name
    assert refusals == {}


def test_a_file_without_part_10_header_is_the_same_image_as_with_one(real_data: Path) -> None:
    bare = read_radiograph((real_data / "messy-dicom" / "CR-MONO1-10-chest_noPart10.dcm").read_bytes())
    whole = read_radiograph((real_data / "messy-dicom" / "gdcm-CR-MONO1-10-chest.dcm").read_bytes())
    assert np.array_equal(bare.pixels, whole.pixels)


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
    assert read_header(path.read_bytes(), b"").case_id == path.stem


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [(["L", "F"], "LF"), (["RA", "FP"], "RF"), (["A", "FR"], "AF"), ("L", ""), (["", ""], ""), (["L", "X"], "")],
)
def test_the_patients_directions_are_known_where_both_are_given(  # type: ignore[no-untyped-def]
    written, orientation: object, expected: str
) -> None:
    assert read_header(written(PatientOrientation=orientation), b"").orientation == expected
