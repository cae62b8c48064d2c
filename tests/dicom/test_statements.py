"""What a header says of its pixels is used and checked: a wrong statement is corrected with evidence, or refused."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from pydicom import dcmread, uid
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from ptxdist.dicom import luts
from ptxdist.dicom.decoding import decode
from ptxdist.dicom.parsing import read_tags
from ptxdist.dicom.radiograph import read_header, read_radiograph
from ptxdist.errors import DicomError, LabelError
from ptxdist.labels.pictures import read_picture

RAW = uid.ExplicitVRLittleEndian
RANDOM = np.random.default_rng(7)
# A smooth image with noise, of all 12 bits; and as signed values.
TWELVE = np.clip(np.add.outer(np.arange(40) * 60, np.arange(56) * 30) + RANDOM.integers(0, 60, (40, 56)), 0, 4095)
TWELVE = (TWELVE - TWELVE.min()).astype(np.uint16)
SIGNED = TWELVE.astype(np.int16) - 2048
FULL = {"WindowCenter": 2048, "WindowWidth": 4096}
SHOWN = np.rint(TWELVE / 4095 * 255)


def stored_values(content: bytes) -> npt.NDArray[np.generic]:
    header = read_header(content, b"")
    return decode(read_tags(content, pixels=True), header.rows, header.columns)


def grey(content: bytes) -> npt.NDArray[np.uint8]:
    return read_radiograph(content, name="x").pixels


def refused(content: bytes, reason: str) -> None:
    with pytest.raises(DicomError) as caught:
        read_radiograph(content, name="x")
    assert reason in str(caught.value)


def dataset(**tags: object) -> Dataset:
    result = Dataset()
    for name, value in tags.items():
        setattr(result, name, value)
    return result


def table(entries: npt.ArrayLike, first: int = 0, bits: int = 12, vr: str = "US", **given: object) -> Sequence:
    """A LUT sequence; `count`, `data` and `data_vr` replace what follows from the entries."""
    values = np.asarray(entries)
    item = Dataset()
    item.add_new(luts.DESCRIPTOR, vr, [given.get("count", len(values) % 65536), first, bits])
    item.add_new(luts.DATA, str(given.get("data_vr", "OW")), given.get("data", values.astype("<u2").tobytes()))
    return Sequence([item])


# --- High Bit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [RAW, uid.ExplicitVRBigEndian, uid.RLELossless])
@pytest.mark.parametrize("high", [11, 12, 15])
@pytest.mark.parametrize("pixels", [TWELVE, SIGNED], ids=["unsigned", "signed"])
def test_values_are_the_stored_bits_below_the_high_bit(  # type: ignore[no-untyped-def]
    file_of, syntax: str, high: int, pixels: npt.NDArray[np.generic]
) -> None:
    words = (pixels.astype(np.int32) << (high - 11)).astype(np.uint16)
    words |= RANDOM.integers(0, 2 ** (high - 11), words.shape).astype(np.uint16)  # bits below: overlays
    if high < 15:
        words ^= (RANDOM.integers(0, 2, words.shape) << 15).astype(np.uint16)  # and above
    content = file_of(words.view(pixels.dtype), syntax, BitsStored=12, HighBit=high)
    assert np.array_equal(stored_values(content), pixels)


def test_seven_bits_of_eight_are_read_too(file_of) -> None:  # type: ignore[no-untyped-def]
    seven = (TWELVE >> 5).astype(np.uint8)
    assert np.array_equal(stored_values(file_of(seven << 1, RAW, bits=7, HighBit=7)), seven)


@pytest.mark.parametrize("pixels", [TWELVE, SIGNED, SIGNED & 0xFFF], ids=["unsigned", "signed", "cut to 12 bits"])
def test_values_in_the_lower_bits_are_taken_from_there_whatever_the_high_bit(  # type: ignore[no-untyped-def]
    file_of, pixels: npt.NDArray[np.generic]
) -> None:
    expected = TWELVE if pixels is TWELVE else SIGNED
    assert np.array_equal(stored_values(file_of(pixels, RAW, bits=12, HighBit=15)), expected)


@pytest.mark.parametrize("high", [0, 10, 16])
def test_a_high_bit_that_cannot_be_is_refused(file_of, high: int) -> None:  # type: ignore[no-untyped-def]
    refused(file_of(TWELVE, RAW, bits=12, HighBit=high), f"12 bits stored of 16 with High Bit {high}")


@pytest.mark.parametrize(
    ("pixels", "bits", "says"),
    [
        (TWELVE.view(np.int16), 12, "signed values"),
        (SIGNED.view(np.uint16), 16, "unsigned values"),
        ((SIGNED * 16).view(np.uint16), 16, "unsigned values"),
        ((TWELVE >> 4).astype(np.uint8).view(np.int8), 8, "signed values"),
        (TWELVE, 10, "10 bits, its values have more"),
        (TWELVE >> 4, 7, "7 bits, its values have more"),
    ],
)
@pytest.mark.parametrize("syntax", [RAW, uid.RLELossless])
def test_a_sign_or_a_number_of_bits_that_folds_the_image_is_refused(  # type: ignore[no-untyped-def]
    file_of, pixels: npt.NDArray[np.generic], bits: int, says: str, syntax: str
) -> None:
    refused(file_of(pixels, syntax, BitsStored=bits, HighBit=bits - 1), f"contradicts itself: its header says {says}")


@pytest.mark.parametrize("syntax", [RAW, uid.JPEG2000Lossless])
def test_letters_that_are_burned_into_a_dark_image_are_no_fold(file_of, syntax: str) -> None:  # type: ignore[no-untyped-def]
    dark = np.tile(TWELVE >> 4, (5, 3))
    dark[20:80, 10:90][RANDOM.random((60, 80)) < 0.2] = 65535
    assert np.array_equal(stored_values(file_of(dark, syntax, bits=16)), dark)
    dark[dark == 65535] -= RANDOM.integers(0, 999, (dark == 65535).sum()).astype(np.uint16)  # as JPEG leaves them
    dark[34:] &= 0xFFF
    assert np.array_equal(stored_values(file_of(dark, syntax, bits=16)), dark)


# --- compressed images of another depth -----------------------------------------------------------------------------

DEEP = (uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEG2000Lossless)


@pytest.mark.parametrize("syntax", DEEP)
def test_a_deeper_compressed_image_keeps_high_bit_and_sign(file_of, syntax: str) -> None:  # type: ignore[no-untyped-def]
    stated = {"BitsStored": 12, "HighBit": 15}
    assert np.array_equal(stored_values(file_of(TWELVE << 4, syntax, bits=16, **stated)), TWELVE)
    assert np.array_equal(stored_values(file_of(SIGNED << 4, syntax, bits=16, **stated)), SIGNED)
    refused(
        file_of(TWELVE << 2, syntax, bits=14, **stated), "contradicts itself: its header says unsigned values of 12"
    )
    stated["HighBit"] = 11
    # Two's complement of 12 bits in a stream of 14 or 16 bits, which does not know of a sign; and of all bits.
    for bits in (14, 16):
        cut = (SIGNED & 0xFFF).astype(np.uint16)
        content = file_of(cut, syntax, bits=bits, PixelRepresentation=1, **stated)
        assert np.array_equal(stored_values(content), SIGNED)
        whole = file_of(SIGNED, syntax, bits=bits, **stated)
        assert np.array_equal(stored_values(whole), SIGNED)
    wide = (TWELVE * 3).astype(np.uint16)  # all 14 bits are in use: the header is wrong
    assert np.array_equal(stored_values(file_of(wide, syntax, bits=14, **stated)), wide)
    for rows in (slice(3, 6), slice(None)):  # letters, and everywhere
        overlay = TWELVE.copy()
        overlay[rows] |= (RANDOM.integers(0, 2, TWELVE[rows].shape) << 15).astype(np.uint16)
        content = file_of(overlay, syntax, bits=16, **stated)
        assert np.array_equal(stored_values(content), TWELVE)
    file = dcmread(BytesIO(content))
    file.add_new(0x60000102, "US", 15)  # Overlay Bit Position
    buffer = BytesIO()
    file.save_as(buffer)
    assert np.array_equal(stored_values(buffer.getvalue()), TWELVE)


def test_a_sign_that_only_one_of_header_and_stream_can_have_is_refused(file_of) -> None:  # type: ignore[no-untyped-def]
    for syntax in (uid.JPEGLosslessSV1, uid.JPEGLSLossless):
        shallow = file_of(TWELVE, syntax, bits=12, BitsStored=16, HighBit=15, PixelRepresentation=1)
        refused(
            shallow, "its header says signed values of 16 bits with High Bit 15, its compressed image has values of 12"
        )
        low = file_of(TWELVE // 2, syntax, bits=12, BitsStored=16, HighBit=15, PixelRepresentation=1)
        assert np.array_equal(stored_values(low), TWELVE // 2)
    signed = file_of(SIGNED, uid.JPEG2000Lossless, bits=16, BitsStored=12, HighBit=11, PixelRepresentation=0)
    refused(
        signed, "its header says unsigned values of 12 bits with High Bit 11, its compressed image has signed values"
    )
    for bits, pixels in ((12, SIGNED), (16, SIGNED * 16)):
        refused(file_of(pixels, uid.JPEG2000Lossless, bits=bits, PixelRepresentation=0), "has signed values of")
        turned = (pixels.view(np.uint16) ^ (2 ** (bits - 1))) & (
            2**bits - 1
        )  # unsigned words that are marked as signed
        marked = (turned.astype(np.int16) << (16 - bits)) >> (16 - bits)
        content = file_of(marked, uid.JPEG2000Lossless, bits=bits, PixelRepresentation=0)
        assert np.array_equal(stored_values(content), turned)
    high = TWELVE.astype(np.int16)  # above 2047, which 12 signed bits do not hold, but the stream has a sign of its own
    content = file_of(high, uid.JPEG2000Lossless, bits=16, BitsStored=12, HighBit=11)
    assert np.array_equal(stored_values(content), high)


# --- rescale and window ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", ["1", "0.001", "-0.0001", "5.94901e-08", "1e-300"])
@pytest.mark.parametrize("pixels", [TWELVE, (TWELVE // 1000).astype(np.uint16)], ids=["many", "few levels"])
def test_the_range_of_values_is_shown_whatever_their_unit(file_of, slope: str, pixels: npt.NDArray[np.uint16]) -> None:  # type: ignore[no-untyped-def]
    content = file_of(pixels, RAW, bits=12, RescaleSlope=slope, RescaleIntercept=0)
    expected = pixels / pixels.max() * 255
    assert np.abs(grey(content) - (255 - expected if slope[0] == "-" else expected)).max() <= 0.5 + 1e-6


def test_a_window_below_one_is_exact_where_it_spans_several_values(file_of) -> None:  # type: ignore[no-untyped-def]
    window = {"RescaleSlope": "0.0001", "RescaleIntercept": 0, "WindowCenter": "0.2047", "WindowWidth": "0.4095"}
    assert np.abs(grey(file_of(TWELVE, RAW, bits=12, **window)) - SHOWN).max() <= 1
    refused(file_of(TWELVE, RAW, bits=12, **{**window, "WindowWidth": "0.00015"}), "LINEAR needs at least 1")


def test_the_function_of_a_window_is_known_in_any_case_or_refused(file_of) -> None:  # type: ignore[no-untyped-def]
    expected = 255 / (1 + np.exp(-4 * (TWELVE - 2048.0) / 4096))
    assert np.abs(grey(file_of(TWELVE, RAW, bits=12, **FULL, VOILUTFunction="Sigmoid")) - expected).max() <= 1
    refused(file_of(TWELVE, RAW, bits=12, **FULL, VOILUTFunction="LOGARITHMIC"), "a window of an unknown function")
    several = file_of(TWELVE, RAW, bits=12, **FULL, VOILUTFunction=["SIGMOID", "LINEAR"])
    assert np.abs(grey(several) - expected).max() <= 1


def test_numbers_beyond_all_bounds_are_refused(file_of) -> None:  # type: ignore[no-untyped-def]
    narrow = {"WindowCenter": 100, "WindowWidth": 1}  # without a bound, it makes two levels of infinite values
    for pixels, given in (
        (TWELVE, {}),
        (SIGNED, {}),
        (SIGNED, narrow),
        (SIGNED, narrow | {"VOILUTFunction": "SIGMOID"}),
    ):
        for slope in ("1e306", "1e308", "-1e308"):
            tags = {"RescaleSlope": slope, "RescaleIntercept": 0, **given}
            refused(file_of(pixels, RAW, bits=12, **tags), "numbers are too large")


# --- look-up tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "bits", "shown"),
    [(1, 12, 1), (1, 14, 1), (1, 16, 1), (8, 16, 1), (16, 16, 1), (16, 12, 1), (4, 12, 1), (0.2, 12, 0.2)],
)
def test_voi_lut_has_the_bits_that_its_entries_show(file_of, factor: float, bits: int, shown: float) -> None:  # type: ignore[no-untyped-def]
    """Agfa CR states 16 bits for entries of 15. A table that fits what is stated, and not 16 bits, is believed."""
    sequence = table(np.arange(4096) * factor, bits=bits)
    assert np.abs(grey(file_of(TWELVE, RAW, bits=12, VOILUTSequence=sequence)) - SHOWN * shown).max() <= 1


def test_a_table_of_bytes_is_read_as_bytes_whatever_its_bits(file_of) -> None:  # type: ignore[no-untyped-def]
    data = (np.arange(4096) // 16).astype(np.uint8).tobytes()
    for bits in (8, 12, 16):
        content = file_of(TWELVE, RAW, bits=12, VOILUTSequence=table([], bits=bits, count=4096, data=data))
        assert np.array_equal(grey(content), TWELVE // 16)


def test_a_table_of_another_length_than_stated_is_refused(file_of) -> None:  # type: ignore[no-untyped-def]
    for count in (1024, 5000, 0):
        for name in ("VOILUTSequence", "ModalityLUTSequence"):
            content = file_of(TWELVE, RAW, bits=12, **{name: table(np.arange(4096), count=count)})
            refused(content, f"a look-up table of 4,096 entries, but its LUT Descriptor says {count or 65536:,}")
    padded = table(np.arange(4096), data=np.arange(4096).astype("<u2").tobytes() + bytes(2))
    assert np.array_equal(grey(file_of(TWELVE, RAW, bits=12, VOILUTSequence=padded)), SHOWN)


def test_signed_entries_are_refused(file_of) -> None:  # type: ignore[no-untyped-def]
    entries = (np.arange(4096) - 2048).astype(int).tolist()
    item = Dataset()
    item.add_new(luts.DESCRIPTOR, "US", [4096, 0, 16])
    item.add_new(luts.DATA, "SS", entries)
    refused(file_of(TWELVE, RAW, bits=12, ModalityLUTSequence=Sequence([item]), **FULL), "table of signed entries")


@pytest.mark.parametrize("syntax", [RAW, uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian])
def test_the_first_input_has_the_sign_that_brings_it_among_the_values(file_of, syntax: str) -> None:  # type: ignore[no-untyped-def]
    def voi(first: int, vr: str) -> Sequence:
        order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
        return table(np.arange(4096), first, vr=vr, data=np.arange(4096).astype(f"{order}u2").tobytes())

    below_zero = 0x10000 - 2048
    for tags in (
        {"VOILUTSequence": voi(below_zero, "US")},
        {"VOILUTSequence": voi(-2048, "SS")},
        {"ModalityLUTSequence": voi(below_zero, "US"), "VOILUTSequence": voi(0, "US")},
    ):
        assert np.array_equal(grey(file_of(SIGNED, syntax, bits=12, **tags)), SHOWN)
    # Unsigned values that a rescale brings below zero.
    moved = {"RescaleSlope": 1, "RescaleIntercept": -2048, "VOILUTSequence": voi(below_zero, "US")}
    assert np.array_equal(grey(file_of(TWELVE, syntax, bits=12, **moved)), SHOWN)
    # An unsigned first input that is written as a signed one.
    high = TWELVE + np.uint16(50000)
    assert np.array_equal(grey(file_of(high, syntax, VOILUTSequence=voi(50000 - 0x10000, "SS"))), SHOWN)


# --- functional groups ----------------------------------------------------------------------------------------------

ENHANCED = {"NumberOfFrames": 1, "PhotometricInterpretation": "MONOCHROME1"}
WHERE = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")


def groups(**macros: Dataset) -> Sequence:
    return Sequence([dataset(**{name: Sequence([item]) for name, item in macros.items()})])


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("syntax", [RAW, uid.ImplicitVRLittleEndian, uid.RLELossless, uid.JPEG2000Lossless])
def test_functional_groups_stand_for_the_values_at_the_top(file_of, where: str, syntax: str) -> None:  # type: ignore[no-untyped-def]
    turn = dataset(RescaleSlope=-1, RescaleIntercept=4095, RescaleType="US")
    for voi in (dataset(**FULL), dataset(VOILUTSequence=table(np.arange(4096)))):
        group = groups(PixelValueTransformationSequence=turn, FrameVOILUTSequence=voi)
        content = file_of(TWELVE, syntax, bits=12, **ENHANCED, **{where: group})
        assert np.array_equal(grey(content), SHOWN)


def test_both_kinds_of_groups_are_read_together_and_must_agree(file_of) -> None:  # type: ignore[no-untyped-def]
    turn = groups(PixelValueTransformationSequence=dataset(RescaleSlope=-1, RescaleIntercept=4095))
    window = groups(FrameVOILUTSequence=dataset(**FULL))
    both = dict(zip(WHERE, (turn, window), strict=True))
    assert np.array_equal(grey(file_of(TWELVE, RAW, bits=12, **ENHANCED, **both)), SHOWN)
    assert np.array_equal(grey(file_of(TWELVE, RAW, bits=12, **ENHANCED, **both, **FULL)), SHOWN)
    for other in ({**both, "WindowCenter": 9, "WindowWidth": 4096}, {WHERE[1]: Sequence([*window, *turn, *groups(
        FrameVOILUTSequence=dataset(WindowCenter=5, WindowWidth=9)
    )])}):  # fmt: skip
        refused(file_of(TWELVE, RAW, bits=12, **ENHANCED, **other), "(0028,1050) has several values in its functional")


# --- padding and blank images ---------------------------------------------------------------------------------------

FRAME = np.zeros(TWELVE.shape, bool)
FRAME[:, :9] = FRAME[-4:] = True
FRAME |= np.add.outer(np.arange(40), np.arange(56)[::-1]) < 15  # a corner, as of a turned image


@pytest.mark.parametrize("padding", [0, 4095])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    "given", [{}, FULL, {"VOILUTSequence": table(np.arange(4096))}], ids=["range", "window", "lut"]
)
def test_padding_around_the_image_is_black_and_the_rest_is_as_without(  # type: ignore[no-untyped-def]
    file_of, padding: int, photometric: str, given: dict[str, object]
) -> None:
    inside = np.clip(TWELVE, 1, 4094)
    inside[20:22, 30:33] = padding  # saturated, as letters of lead are
    padded = np.where(FRAME, padding, inside).astype(np.uint16)
    tags = {"PhotometricInterpretation": photometric, **given}
    pixels = grey(file_of(padded, RAW, bits=12, PixelPaddingValue=padding, **tags))
    assert not pixels[FRAME].any()
    low, high = (
        (0, 4095) if given else (inside[~FRAME & (inside != padding)].min(), inside[~FRAME & (inside != padding)].max())
    )
    expected = np.clip((inside.astype(float) - low) / (high - low), 0, 1) * 255
    expected = 255 - expected if photometric == "MONOCHROME1" else expected
    assert np.abs(pixels[~FRAME] - expected[~FRAME]).max() <= 0.5 + 1e-6


def test_a_range_of_padding_and_plain_8_bits_are_treated_alike(file_of) -> None:  # type: ignore[no-untyped-def]
    eight = np.where(FRAME, RANDOM.integers(250, 256, FRAME.shape), TWELVE // 20).astype(np.uint8)
    content = file_of(eight, RAW, PixelPaddingValue=250, PixelPaddingRangeLimit=255)
    assert np.array_equal(grey(content), np.where(FRAME, 0, eight))
    white = file_of(eight, RAW, PixelPaddingValue=0, PixelPaddingRangeLimit=255)  # all of it would be padding
    assert np.array_equal(grey(white), eight)


@pytest.mark.parametrize(
    "given",
    [
        {"WindowCenter": 0, "WindowWidth": 1},
        {"WindowCenter": 20000, "WindowWidth": 100},
        {"WindowCenter": 4, "WindowWidth": 1},  # one pixel is black
        {"VOILUTSequence": table(np.arange(4096), 40000)},
        {"VOILUTSequence": table(np.full(4096, 9))},
        {"ModalityLUTSequence": table(np.full(4096, 9))},
        {"RescaleSlope": "1e-30", "RescaleIntercept": 1000},
    ],
)
def test_an_image_that_its_header_makes_blank_is_refused(file_of, given: dict[str, object]) -> None:  # type: ignore[no-untyped-def]
    pixels = np.clip(TWELVE, 10, None)
    pixels[3, 3] = 2
    refused(file_of(pixels, RAW, bits=12, **given), "into a single grey level")
    constant = np.full(TWELVE.shape, 700, np.uint16)
    assert np.ptp(grey(file_of(constant, RAW, bits=12, **given))) == 0


# --- pixels that are not square -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tags",
    [
        {"PixelAspectRatio": [2, 1]},
        {"PixelAspectRatio": [100, 102]},
        {"PixelSpacing": [0.2, 0.1]},
        {"ImagerPixelSpacing": [0.1, 0.2]},
        {"NominalScannedPixelSpacing": [0.1, 0.2]},
        {"PixelSpacing": [0.1, 0.1], "PixelAspectRatio": [1, 2]},
    ],
)
def test_pixels_that_are_not_square_are_refused_by_the_header(file_of, tags: dict[str, object]) -> None:  # type: ignore[no-untyped-def]
    content = file_of(TWELVE, RAW, bits=12, **tags)
    refused(content, "has pixels that are not square")
    with pytest.raises(DicomError, match="resample the image, and its mask, to square pixels"):
        read_header(content, b"")


@pytest.mark.parametrize("where", WHERE)
def test_so_are_those_of_functional_groups(file_of, where: str) -> None:  # type: ignore[no-untyped-def]
    for group in (
        groups(PixelMeasuresSequence=dataset(PixelSpacing=[0.2, 0.1])),
        groups(FramePixelDataPropertiesSequence=dataset(ImagerPixelSpacing=[0.2, 0.1])),
    ):
        refused(file_of(TWELVE, RAW, bits=12, **{where: group}), "not square")


@pytest.mark.parametrize(
    "tags",
    [
        {"PixelAspectRatio": [1, 1]},
        {"PixelSpacing": [0.1, 0.1005]},
        {"PixelSpacing": [0, 0]},
        {"PixelSpacing": [0.1, 0]},
        {"PixelAspectRatio": [0, 0]},
    ],
)
def test_square_pixels_and_sizes_that_say_nothing_are_accepted(file_of, tags: dict[str, object]) -> None:  # type: ignore[no-untyped-def]
    assert np.array_equal(grey(file_of(TWELVE, RAW, bits=12, **FULL, **tags)), SHOWN)


def test_a_png_may_say_that_its_pixels_are_not_square() -> None:
    buffer = BytesIO()
    eight = (TWELVE // 16).astype(np.uint8)
    Image.fromarray(eight).save(buffer, "PNG")
    content = buffer.getvalue()

    def with_sizes(across: int, down: int) -> bytes:
        chunk = b"pHYs" + struct.pack(">LLB", across, down, 1)
        return content[:33] + struct.pack(">L", 9) + chunk + struct.pack(">L", zlib.crc32(chunk)) + content[33:]

    assert np.array_equal(grey(with_sizes(5000, 5000)), eight)
    refused(with_sizes(5000, 2500), "has pixels that are not square")


@pytest.mark.parametrize(("orientation", "is_turned"), [(1, False), (3, True), (6, True)])
def test_a_png_that_some_programs_turn_is_refused(orientation: int, is_turned: bool, tmp_path: Path) -> None:
    exif, buffer, eight = Image.Exif(), BytesIO(), (TWELVE // 16).astype(np.uint8)
    exif[0x0112] = orientation
    Image.fromarray(eight).save(buffer, "PNG", exif=exif)
    Image.fromarray(eight * (eight > 127)).convert("RGB").save(tmp_path / "a.png", exif=exif)
    if is_turned:
        refused(buffer.getvalue(), "is to be shown turned or mirrored")
        with pytest.raises(LabelError, match=r"a\.png is to be shown turned or mirrored"):
            read_picture(tmp_path, tmp_path / "a.png")
    else:
        assert np.array_equal(grey(buffer.getvalue()), eight)


def test_files_of_more_than_8_bits_name_the_reading(file_of) -> None:  # type: ignore[no-untyped-def]
    """So caches of a former reading are renewed, and those of 8-bit files are not."""
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert "reading" not in read_header(file_of(pixels, RAW), b"").decoder
    assert read_header(file_of(pixels.astype(np.uint16) * 16, RAW, bits=12), b"").decoder.endswith(", reading 2")
