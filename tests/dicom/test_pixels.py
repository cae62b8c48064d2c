"""Each transfer syntax gives back the known values through a named decoder; damage is rejected; the grey rule holds."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import numpy.typing as npt
import pytest
from pydicom import dcmread, uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.filebase import DicomBytesIO
from pydicom.pixels import apply_modality_lut, apply_voi_lut, get_decoder
from pydicom.sequence import Sequence

from ptxdist.dicom import luts
from ptxdist.dicom.decoding import decode
from ptxdist.dicom.parsing import read_tags
from ptxdist.dicom.radiograph import read_header, read_radiograph
from ptxdist.dicom.syntax import decoder_of
from ptxdist.errors import DicomError

RANDOM = np.random.default_rng(5)
# Smooth with noise, as radiographs are; odd numbers of rows and columns.
SMOOTH = np.add.outer(np.arange(45) * 3, np.arange(63)) + RANDOM.integers(0, 9, (45, 63))
RLE = b"\1\0\0\0\x40" + bytes(59)  # header of one segment
EIGHT, TWELVE = SMOOTH.astype(np.uint8), (SMOOTH * 19).astype(np.uint16)
BLOCKS = RANDOM.integers(0, 4096, (6, 9)).astype(np.uint16).repeat(8, 0).repeat(8, 1)
JPEG_FAMILY = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLosslessSV1, uid.JPEGLSLossless)
EXACT = [
    (uid.ImplicitVRLittleEndian, "pydicom"),
    (uid.ExplicitVRLittleEndian, "pydicom"),
    (uid.ExplicitVRBigEndian, "pydicom"),
    (uid.DeflatedExplicitVRLittleEndian, "pydicom"),
    (uid.RLELossless, "pydicom"),
    (uid.JPEGLossless, "imagecodecs"),
    (uid.JPEGLosslessSV1, "imagecodecs"),
    (uid.JPEGLSLossless, "imagecodecs"),
    (uid.JPEG2000Lossless, "imagecodecs"),
]
SYNTAXES = [*(syntax for syntax, _ in EXACT), uid.JPEGBaseline8Bit, uid.JPEGLSNearLossless, uid.JPEG2000]


def name_of(value: object) -> str:
    return str(uid.UID_dictionary.get(str(value), (str(value),))[0])


def stored_values(content: bytes) -> npt.NDArray[np.generic]:
    header = read_header(content, b"")
    return decode(read_tags(content, pixels=True), header.rows, header.columns)


def named(package: str) -> str:
    return f"{package} {version(package)}"


@pytest.mark.parametrize(("syntax", "package"), EXACT, ids=name_of)
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_lossless_syntaxes_give_back_the_stored_values(file_of, syntax: str, package: str, bits: int) -> None:  # type: ignore[no-untyped-def]
    pixels = EIGHT if bits == 8 else (SMOOTH * (2**bits - 1) // SMOOTH.max()).astype(np.uint16)
    content = file_of(pixels, syntax, bits=bits)
    values = stored_values(content)
    assert values.dtype == pixels.dtype
    assert np.array_equal(values, pixels)
    assert read_header(content, b"").decoder == named(package) + (", reading 2" if bits > 8 else "")


@pytest.mark.parametrize("syntax", [syntax for syntax, _ in EXACT], ids=name_of)
def test_signed_values_keep_their_sign_even_where_fewer_bits_are_stored(file_of, syntax: str) -> None:  # type: ignore[no-untyped-def]
    pixels = (SMOOTH.astype(np.int16) - 90) * 11  # -990 to 1,100
    content = file_of(pixels, syntax, bits=12)
    assert np.array_equal(stored_values(content), pixels)
    low, high = int(pixels.min()), int(pixels.max())
    expected = np.rint((pixels - float(low)) / (high - low) * 255)
    assert np.array_equal(read_radiograph(content).pixels, expected)


@pytest.mark.parametrize("predictor", range(1, 8))
@pytest.mark.parametrize("restart_rows", [0, 6])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_jpeg_lossless_is_read_with_every_selection_value(  # type: ignore[no-untyped-def]
    file_of, jpeg_lossless, predictor: int, restart_rows: int, bits: int
) -> None:
    pixels = EIGHT if bits == 8 else TWELVE.copy() if bits == 12 else (TWELVE * 12).astype(np.uint16)
    pixels[5, 5:8] = 0, 2 ** (bits - 1), 2**bits - 1  # the largest differences there are
    frame = jpeg_lossless(pixels, bits, predictor=predictor, restart_rows=restart_rows)
    assert np.array_equal(stored_values(file_of(pixels, uid.JPEGLossless, bits=bits, frame=frame)), pixels)


def test_jpeg_baseline_is_decoded_as_pillow_decodes_it(file_of) -> None:  # type: ignore[no-untyped-def]
    content = file_of(EIGHT, uid.JPEGBaseline8Bit)
    reference = get_decoder(uid.JPEGBaseline8Bit).as_array(dcmread(DicomBytesIO(content)), decoding_plugin="pillow")
    assert np.array_equal(stored_values(content), reference[0])
    assert np.abs(reference[0].astype(int) - EIGHT).max() <= 9
    assert read_header(content, b"").decoder == named("simplejpeg")


def test_jpeg_extended_of_12_bits_gives_back_blocks_of_one_value(file_of) -> None:  # type: ignore[no-untyped-def]
    content = file_of(BLOCKS, uid.JPEGExtended12Bit, bits=12)
    assert np.array_equal(stored_values(content), BLOCKS)
    assert read_header(content, b"").decoder == named("imagecodecs") + ", reading 2"


def test_high_throughput_jpeg_2000_gives_back_its_values(file_of, htj2k_image) -> None:  # type: ignore[no-untyped-def]
    for syntax in (uid.HTJ2K, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL):
        content = file_of(htj2k_image, syntax)
        assert np.array_equal(stored_values(content), htj2k_image)
        assert read_header(content, b"").decoder == named("imagecodecs")


def test_lossy_syntaxes_come_close(file_of) -> None:  # type: ignore[no-untyped-def]
    near = stored_values(file_of(TWELVE, uid.JPEGLSNearLossless, bits=12)).astype(int)
    assert 1 <= np.abs(near - TWELVE).max() <= 2
    lossy = stored_values(file_of(TWELVE, uid.JPEG2000, bits=12)).astype(int)
    assert 1 <= np.abs(lossy - TWELVE).max() <= 200


def test_8_bits_in_16_bits_of_room_are_read_in_every_compressed_syntax(file_of) -> None:  # type: ignore[no-untyped-def]
    for syntax in (uid.JPEGBaseline8Bit, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEG2000Lossless):
        values = stored_values(file_of(EIGHT, syntax, BitsAllocated=16))
        assert np.abs(values.astype(int) - EIGHT).max() <= (9 if syntax == uid.JPEGBaseline8Bit else 0)


def test_bits_beyond_the_stored_ones_do_not_count(file_of) -> None:  # type: ignore[no-untyped-def]
    overlay = TWELVE | np.where(TWELVE > 999, 0x8000, 0).astype(np.uint16)
    assert np.array_equal(stored_values(file_of(overlay, uid.ExplicitVRLittleEndian, bits=12)), TWELVE)


def test_a_fragmented_image_is_joined(file_of) -> None:  # type: ignore[no-untyped-def]
    content = file_of(EIGHT, uid.JPEGBaseline8Bit)
    frame = read_tags(content, pixels=True).frame()
    pieces = encapsulate([frame[:200] + frame[200:]], fragments_per_frame=3)
    split = file_of(EIGHT, uid.JPEGBaseline8Bit, PixelData=pieces)
    assert np.array_equal(stored_values(split), stored_values(content))


def _with_scan(frame: bytes, *parameters: int) -> bytes:
    """A JPEG stream of one component with other values for Ss, Se, Ah and Al in its scan header."""
    start = frame.rindex(b"\xff\xda") + 7
    return frame[:start] + bytes(parameters) + frame[start + 3 :]


@pytest.mark.parametrize("syntax", JPEG_FAMILY, ids=name_of)
def test_what_is_harmless_in_a_compressed_image_is_read(file_of, syntax: str) -> None:  # type: ignore[no-untyped-def]
    """Scan parameters without a meaning, zeros or fill bytes before the end mark, no offset table."""
    pixels, bits = (BLOCKS, 12) if syntax == uid.JPEGExtended12Bit else (EIGHT, 8)
    content = file_of(pixels, syntax, bits=bits)
    frame = read_tags(content, pixels=True).frame().rstrip(b"\0")
    sequential = syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit)
    frames = [frame[:-2] + more + b"\xff\xd9" for more in (b"\0", b"\0\0", bytes(40), b"\xff")]
    frames += [_with_scan(frame, *values) for values in ((0, 0, 0), (1, 63, 0), (0, 63, 1), (0, 63, 16)) if sequential]
    frames += [_with_scan(frame, 1, 63, 16)] * (syntax == uid.JPEGLosslessSV1)
    expected = stored_values(content)
    for changed in frames:
        assert np.array_equal(stored_values(file_of(pixels, syntax, bits=bits, frame=changed)), expected)
    bare = content.replace(b"\xfe\xff\0\xe0\4\0\0\0" + bytes(4), b"", 1)
    assert len(bare) == len(content) - 12
    assert np.array_equal(stored_values(bare), expected)


def test_padding_after_the_pixels_is_left_out(file_of) -> None:  # type: ignore[no-untyped-def]
    """PS3.5 8.1.1, note. What is as large as a second image, or no padding, means that the size is wrong."""
    for pixels in (EIGHT, TWELVE):
        data = pixels.tobytes() + bytes(pixels.nbytes % 2)
        for more in (bytes(2), bytes(512), b"\xff\x0f" * 700):
            content = file_of(pixels, uid.ExplicitVRLittleEndian, PixelData=data + more)
            assert np.array_equal(stored_values(content), pixels)
        for more in (bytes(range(256)), bytes(2 * pixels.nbytes)):
            with pytest.raises(DicomError, match=r"bytes of pixel data, but 63x45 pixels take"):
                stored_values(file_of(pixels, uid.ExplicitVRLittleEndian, PixelData=data + more))
    frame = read_tags(file_of(TWELVE, uid.RLELossless), pixels=True).frame()
    for more in (2, 64):
        assert np.array_equal(stored_values(file_of(TWELVE, uid.RLELossless, frame=frame + bytes(more))), TWELVE)


def test_what_a_decoder_cannot_read_is_not_called_damage(file_of) -> None:  # type: ignore[no-untyped-def]
    frame = read_tags(file_of(EIGHT, uid.JPEGBaseline8Bit), pixels=True).frame()
    size = frame.index(b"\xff\xc0") + 5
    without_rows = frame[:size] + bytes(2) + frame[size + 2 :]
    with pytest.raises(DicomError, match=r"the number of rows after the image \(DNL\), which is not supported"):
        stored_values(file_of(EIGHT, uid.JPEGBaseline8Bit, frame=without_rows))
    frame = read_tags(file_of(EIGHT, uid.JPEG2000Lossless), pixels=True).frame()
    with pytest.raises(DicomError) as caught:
        stored_values(file_of(EIGHT, uid.JPEG2000Lossless, frame=frame[:-200] + b"\xff\xd9"))
    assert str(caught.value).endswith(": they are damaged, or of a kind that imagecodecs does not read")
    assert len(str(caught.value)) < 400


def test_unread_syntaxes_are_refused_by_name() -> None:
    for syntax, name in ((uid.MPEG2MPML, "MPEG2"), ("1.2.840.10008.1.2.4.94", "JPIP"), ("1.2.3", "an unknown")):
        with pytest.raises(DicomError, match=f"is encoded as {name}.*, which is not supported"):
            decoder_of(syntax)


@pytest.mark.parametrize("syntax", [*SYNTAXES, uid.JPEGExtended12Bit], ids=name_of)
def test_a_file_cut_off_anywhere_is_refused_or_whole(file_of, syntax: str) -> None:  # type: ignore[no-untyped-def]
    pixels = BLOCKS if syntax == uid.JPEGExtended12Bit else EIGHT
    content = file_of(pixels, syntax, bits=12 if syntax == uid.JPEGExtended12Bit else 8)
    whole = read_radiograph(content).pixels
    for length in [*range(0, len(content) - 60, 97), *range(len(content) - 60, len(content))]:
        try:
            pixels = read_radiograph(content[:length]).pixels
        except DicomError as error:
            assert len(str(error)) > 10  # noqa: PT017  # which reason depends on where the file ends
        else:
            assert length > len(content) - 12  # the closing delimiter, or a byte of padding
            assert np.array_equal(pixels, whole)


@pytest.mark.parametrize("syntax", [*JPEG_FAMILY, uid.JPEG2000Lossless], ids=name_of)
@pytest.mark.parametrize("end_mark", [False, True])
def test_a_cut_image_in_a_whole_file_is_refused(file_of, syntax: str, end_mark: bool) -> None:  # type: ignore[no-untyped-def]
    """With an end mark: as a device that lost the rest may have written it."""
    pixels, bits = (BLOCKS, 12) if syntax == uid.JPEGExtended12Bit else (EIGHT, 8)
    frame = read_tags(file_of(pixels, syntax, bits=bits), pixels=True).frame().rstrip(b"\0")
    for length in range(len(frame) // 2, len(frame) - 4, max(1, len(frame) // 60)):
        cut = frame[:length].removesuffix(b"\xff") + (b"\xff\xd9" if end_mark else b"")
        with pytest.raises(DicomError):
            read_radiograph(file_of(pixels, syntax, bits=bits, frame=cut))


@pytest.mark.parametrize(
    ("syntax", "share"),
    # Share of single flipped bits that is found. A flip that gives another valid image cannot be found.
    [
        *((uid.JPEGBaseline8Bit, 0.2), (uid.JPEGExtended12Bit, 0.2)),
        *((uid.JPEGLosslessSV1, 0.25), (uid.JPEGLSLossless, 0.9)),
    ],
    ids=name_of,
)
def test_flipped_bits_are_found_as_often_as_can_be_expected(file_of, syntax: str, share: float) -> None:  # type: ignore[no-untyped-def]
    pixels, bits = (BLOCKS, 12) if syntax == uid.JPEGExtended12Bit else (EIGHT, 8)
    content = file_of(pixels, syntax, bits=bits)
    frame = read_tags(content, pixels=True).frame()
    random, refused = np.random.default_rng(1), 0
    start = frame.rindex(b"\xff\xda") + 10
    for _ in range(200):
        damaged = bytearray(frame)
        damaged[random.integers(start, len(frame) - 4)] ^= 1 << random.integers(8)
        try:
            read_radiograph(content.replace(frame, damaged))
        except DicomError:
            refused += 1
    assert refused >= share * 200


def test_flipped_bits_of_jpeg_lossless_never_spoil_the_image_unseen(file_of) -> None:  # type: ignore[no-untyped-def]
    """A flip that is not found changes one row; if it changes the first value of a row, also the rows below."""
    content = file_of(EIGHT, uid.JPEGLosslessSV1)
    frame = read_tags(content, pixels=True).frame()
    start = frame.rindex(b"\xff\xda") + 10
    random, unseen = np.random.default_rng(2), []
    for _ in range(200):
        damaged = bytearray(frame)
        damaged[random.integers(start, len(frame) - 4)] ^= 1 << random.integers(8)
        try:
            unseen.append(stored_values(content.replace(frame, damaged)) != EIGHT)
        except DicomError:
            continue
    rows = [int(changed.any(1).sum()) for changed in unseen]
    assert len(unseen) > 20
    assert sum(count > 1 for count in rows) <= 0.1 * len(unseen)


def test_no_decoder_writes_to_the_standard_streams(file_of, capfd, caplog) -> None:  # type: ignore[no-untyped-def]
    random = np.random.default_rng(3)
    for syntax in SYNTAXES:
        content = file_of(EIGHT, syntax)
        for _ in range(30):
            damaged = bytearray(content)
            damaged[random.integers(len(content) // 3, len(content))] ^= 1 << random.integers(8)
            try:
                read_radiograph(bytes(damaged))
            except DicomError:
                continue
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    os.write(2, b"captured\n")
    assert capfd.readouterr().err == "captured\n"


def _with_size(frame: bytes, syntax: str, rows: int, columns: int) -> bytes:
    """A compressed image that claims another size."""
    if syntax == uid.JPEG2000Lossless:
        start = frame.index(b"\xff\x51") + 6
        return frame[:start] + struct.pack(">LL", columns, rows) + frame[start + 8 :]
    marker = next(bytes([0xFF, code]) for code in (0xC0, 0xC1, 0xC3, 0xF7) if bytes([0xFF, code]) in frame[:400])
    start = frame.index(marker) + 5
    return frame[:start] + struct.pack(">HH", rows, columns) + frame[start + 4 :]


@pytest.mark.parametrize("syntax", [*JPEG_FAMILY, uid.JPEG2000Lossless], ids=name_of)
def test_a_bomb_behind_a_modest_header_is_not_decoded(file_of, syntax: str) -> None:  # type: ignore[no-untyped-def]
    pixels, bits = (BLOCKS, 12) if syntax == uid.JPEGExtended12Bit else (EIGHT, 8)
    frame = read_tags(file_of(pixels, syntax, bits=bits), pixels=True).frame()
    bomb = file_of(pixels, syntax, bits=bits, frame=_with_size(frame, syntax, 65000, 65001))
    tracemalloc.start()
    begin = time.process_time()
    with pytest.raises(DicomError, match="contains 65001x65000 pixels, but its header says"):
        read_radiograph(bomb)
    assert time.process_time() - begin < 0.5
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_what_contradicts_the_header_is_refused(file_of, jpeg_lossless) -> None:  # type: ignore[no-untyped-def]
    baseline = read_tags(file_of(EIGHT, uid.JPEGBaseline8Bit), pixels=True).frame()
    colour = baseline.replace(b"\xff\xc0\x00\x0b\x08", b"\xff\xc0\x00\x11\x08").replace(
        b"\x01\x01\x11\x00", b"\x03\x01\x11\x00\x02\x11\x00\x03\x11\x00", 1
    )
    native = file_of(EIGHT, uid.JPEGBaseline8Bit).replace(b"1.2.840.10008.1.2.4.50", b"1.2.840.10008.1.2.1\0\0\0")
    for content, reason in (
        (file_of(EIGHT, uid.JPEGBaseline8Bit, frame=colour), "is not grayscale (its compressed image has 3 samples"),
        (file_of(EIGHT, uid.JPEGBaseline8Bit, frame=jpeg_lossless(EIGHT, 8)), "has the transfer syntax JPEG Baseline"),
        (file_of(EIGHT, uid.JPEGLSLossless, frame=baseline), "has the transfer syntax JPEG-LS"),
        (file_of(EIGHT, uid.JPEG2000, frame=baseline), "no JPEG 2000 stream"),
        (file_of(EIGHT, uid.JPEGBaseline8Bit, frame=b"\0" * 90), "no JPEG stream"),
        (file_of(EIGHT, uid.JPEGLossless, frame=jpeg_lossless(TWELVE, 12)), "12 bits per pixel, but at most 8 are"),
        (file_of(EIGHT, uid.RLELossless, frame=b"\1\0\0\0\x40" + b"\x81\0" * 9000), "more run-length data than"),
        (file_of(EIGHT, uid.RLELossless, frame=RLE + b"\x81\0" * 2000), "more run-length data than"),
        (file_of(EIGHT, uid.RLELossless, frame=RLE + b"\x80" * 1900), "cannot be decoded"),
        (file_of(EIGHT, uid.ExplicitVRLittleEndian, Rows=44), "has 2,836 bytes of pixel data, but 63x44 pixels take"),
        (file_of(EIGHT, uid.ExplicitVRLittleEndian, Rows=46), "is cut off: it has 2,836 of 2,898 bytes"),
        (native, "pixel data are compressed, its transfer"),
        (file_of(EIGHT, uid.JPEGBaseline8Bit, PixelData=b"\xfe\xff\0\xe0" + b"\0" * 4), "has no pixel data"),
        (file_of(EIGHT, uid.JPEGBaseline8Bit, PixelData=encapsulate([baseline, baseline])), "has several frames"),
        (
            file_of(EIGHT, uid.JPEGBaseline8Bit, PixelData=encapsulate([baseline, baseline], has_bot=False)),
            "has several frames",
        ),
    ):
        with pytest.raises(DicomError) as caught:
            read_radiograph(content)
        assert reason in str(caught.value)


def _lut(entries: npt.NDArray[np.generic], first: int, bits: int, vr: str = "US") -> Dataset:
    table = Dataset()
    table.add_new(luts.DESCRIPTOR, vr, [len(entries) % 65536, first, bits])
    table.add_new(luts.DATA, "OW", entries.astype("<u2").tobytes())
    return table


def test_voi_lut_is_scaled_by_its_bits_and_not_by_what_occurs(file_of) -> None:  # type: ignore[no-untyped-def]
    # By hand: 0 and 4095 are the ends of 12 bits; inputs below 10 take the first entry, those above 13 the last one.
    pixels = np.array([[0, 10, 11, 12, 13, 99]], np.uint16)
    table = _lut(np.array([819, 1638, 2457, 4095]), 10, 12)
    content = file_of(pixels, uid.ExplicitVRLittleEndian, bits=12, VOILUTSequence=Sequence([table]))
    assert read_radiograph(content).pixels.tolist() == [[51, 51, 102, 153, 255, 255]]
    dim = _lut(np.array([0, 1000]), 0, 12)  # never reaches white
    content = file_of(pixels, uid.ExplicitVRLittleEndian, bits=12, VOILUTSequence=Sequence([dim]))
    assert read_radiograph(content).pixels.max() == round(1000 / 4095 * 255)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian], ids=name_of)
def test_look_up_tables_agree_with_pydicom(file_of, syntax: str) -> None:  # type: ignore[no-untyped-def]
    modality = Sequence([_lut((np.arange(4096) // 2 + 7), 0, 16)])
    voi = Sequence([_lut((np.arange(2000) ** 2 // 1000), 30, 12)])
    for given in ({"VOILUTSequence": voi}, {"ModalityLUTSequence": modality, "VOILUTSequence": voi}):
        content = file_of(TWELVE, syntax, bits=12, **given)
        explicit = dcmread(DicomBytesIO(file_of(TWELVE, uid.ExplicitVRLittleEndian, bits=12, **given)))
        expected = apply_voi_lut(apply_modality_lut(TWELVE, explicit), explicit) / 4095 * 255
        assert np.array_equal(read_radiograph(content).pixels, np.rint(expected))


def test_look_up_table_may_begin_below_zero(file_of) -> None:  # type: ignore[no-untyped-def]
    pixels = np.array([[-3, -2, -1, 0, 1]], np.int16)
    table = _lut(np.array([0, 51, 102, 153]), -2, 8, vr="SS")
    for syntax in (uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian):
        content = file_of(pixels, syntax, VOILUTSequence=Sequence([table]))
        assert read_radiograph(content).pixels.tolist() == [[0, 0, 51, 102, 153]]


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_windows_agree_with_pydicom(file_of, function: str) -> None:  # type: ignore[no-untyped-def]
    window = {"WindowCenter": 1000, "WindowWidth": 700, "RescaleSlope": "1.5", "RescaleIntercept": "-200"}
    content = file_of(TWELVE, uid.ExplicitVRLittleEndian, bits=12, VOILUTFunction=function, **window)
    file = dcmread(DicomBytesIO(content))
    expected = apply_voi_lut(apply_modality_lut(TWELVE, file), file)  # over the range of 12 bits after the rescale
    low, high = -200.0, 4095 * 1.5 - 200
    pixels = read_radiograph(content).pixels
    assert np.abs(pixels - (expected - low) / (high - low) * 255).max() <= 0.5 + 1e-9
    assert np.ptp(pixels) > 200


def test_narrowest_window_is_a_threshold(file_of) -> None:  # type: ignore[no-untyped-def]
    pixels = np.array([[9, 10, 11]], np.uint16)
    content = file_of(pixels, uid.ExplicitVRLittleEndian, WindowCenter="10.5", WindowWidth="1")
    assert read_radiograph(content).pixels.tolist() == [[0, 0, 255]]


def test_padding_does_not_stretch_the_range(file_of) -> None:  # type: ignore[no-untyped-def]
    pixels = np.array([[100, 150, 200, 4000, 4050, 0]], np.uint16)

    def grey(**padding: int) -> object:
        return read_radiograph(file_of(pixels, uid.ExplicitVRLittleEndian, bits=12, **padding)).pixels.tolist()

    limits = {"PixelPaddingValue": 4000, "PixelPaddingRangeLimit": 4095}
    assert grey(**limits) == [[round(v / 200 * 255) for v in (100, 150, 200)] + [255, 255, 0]]
    assert grey(PixelPaddingValue=0) == [[round((v - 100) / 3950 * 255) for v in (100, 150, 200, 4000, 4050)] + [0]]
    alone = file_of(np.full((2, 2), 7, np.uint16), uid.ExplicitVRLittleEndian, bits=12, PixelPaddingValue=7)
    assert not read_radiograph(alone).pixels.any()


def test_signed_padding_is_understood(file_of) -> None:  # type: ignore[no-untyped-def]
    pixels = np.array([[-2000, -100, 0, 100]], np.int16)
    content = file_of(pixels, uid.ExplicitVRLittleEndian, bits=12, PixelPaddingValue=-2000)
    assert read_radiograph(content).pixels.tolist() == [[0, 0, 128, 255]]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"WindowCenter": 5}, None),  # a center alone is no window
        ({"WindowWidth": 5}, "window without a center"),
        ({"WindowCenter": 5, "WindowWidth": 0}, "without a width"),
        ({"WindowCenter": 5, "WindowWidth": "0.5"}, "has a window of width 0.5, but its function LINEAR needs"),
        ({"RescaleSlope": 0, "RescaleIntercept": 0}, "rescale slope of 0"),
        ({"VOILUTSequence": Sequence([_lut(np.arange(4), 0, 33)])}, "look-up table that cannot be applied"),
    ],
)
def test_senseless_windows_and_tables_are_refused(file_of, given: dict[str, object], reason: str | None) -> None:  # type: ignore[no-untyped-def]
    content = file_of(TWELVE, uid.ExplicitVRLittleEndian, bits=12, **given)
    if reason is None:
        assert np.ptp(read_radiograph(content).pixels) == 255
    else:
        with pytest.raises(DicomError, match=reason):
            read_radiograph(content)


def test_grey_levels_take_little_memory(file_of) -> None:  # type: ignore[no-untyped-def]
    """The rule is computed per value, not per pixel: an image of 12 bits takes its bytes and those of the result."""
    image = np.tile(TWELVE, (50, 40))
    content = file_of(image, uid.ExplicitVRLittleEndian, bits=12, WindowCenter=1000, WindowWidth=500)
    file = replace(read_tags(content, pixels=True))
    tracemalloc.start()
    decode(file, *image.shape)
    values = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tracemalloc.start()
    read_radiograph(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < values + image.size + 12_000_000
