"""Both parsers find the same values; every encoding of a data set is read; content that ends too early is rejected."""

from __future__ import annotations

import struct
import time
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from dicom_files import deflated_bomb
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread, uid
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from ptxdist.dicom import parsing, tags
from ptxdist.dicom.parsing import read_tags
from ptxdist.dicom.radiograph import read_header, read_radiograph
from ptxdist.dicom.spacing import Spacing
from ptxdist.errors import DicomError

IMAGE = np.add.outer(np.arange(40) * 3, np.arange(64)).astype(np.uint8)
ENCODINGS = (
    uid.ExplicitVRLittleEndian,
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
)


def walked(content: bytes, last: int) -> tags.Tags | None:
    syntax, start = parsing._file_meta(content)
    return parsing._walk(content, start, last, syntax)


def by_pydicom(content: bytes, last: int) -> tags.Tags:
    syntax, start = parsing._file_meta(content)
    return parsing._by_pydicom(content, start, last, syntax)


@given(
    st.dictionaries(
        st.sampled_from(["WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept", "NumberOfFrames"]),
        st.integers(-9999, 9999),
    ),
    st.dictionaries(
        st.sampled_from(["PatientAge", "PatientSex", "ViewPosition", "StudyDescription", "PatientComments"]),
        st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="\\"), max_size=15),
    ),
)
@settings(max_examples=60)
def test_both_parsers_find_the_same(file_of, numbers: dict[str, int], texts: dict[str, str]) -> None:  # type: ignore[no-untyped-def]
    for syntax in (uid.ExplicitVRLittleEndian, uid.JPEGBaseline8Bit):
        content = file_of(IMAGE, syntax, **numbers, **texts)
        for last in (tags.SIGNED, tags.PIXEL_DATA):
            quick, thorough = walked(content, last), by_pydicom(content, last)
            assert quick is not None
            assert quick.encapsulated == thorough.encapsulated
            # pydicom leaves the closing delimiter of fragments out
            ends = {tag: bytes(value).removesuffix(b"\xfe\xff\xdd\xe0\0\0\0\0") for tag, value in quick.values.items()}
            assert ends == thorough.values


def test_values_are_those_that_pydicom_shows(file_of) -> None:  # type: ignore[no-untyped-def]
    given_tags = {"WindowCenter": [40, 50], "WindowWidth": [400, 350], "PixelPaddingValue": 7, "PatientAge": "062Y"}
    for syntax in ENCODINGS:
        content = file_of(IMAGE.astype(np.uint16), syntax, bits=12, **given_tags)
        found, shown = read_tags(content, pixels=True), dcmread(BytesIO(content))
        assert found.whole(tags.ROWS, 0) == shown.Rows == 40
        assert found.whole(tags.PADDING, 0) == 7
        assert (found.decimal(tags.WINDOW_CENTER), found.decimal(tags.WINDOW_WIDTH)) == (40.0, 400.0)
        assert found.decimal(tags.SLOPE) is None
        assert found.text(tags.AGE) == shown.PatientAge
        assert found.text(tags.PATIENT_ID) == shown.PatientID


def test_all_encodings_of_a_file_give_the_same_header_and_image(file_of) -> None:  # type: ignore[no-untyped-def]
    results = [read_radiograph(file_of(IMAGE, syntax, PatientAge="9")) for syntax in ENCODINGS]
    assert len({result.header for result in results}) == 1
    assert all(np.array_equal(result.pixels, IMAGE) for result in results)


def test_unusual_data_sets_are_left_to_pydicom(file_of) -> None:  # type: ignore[no-untyped-def]
    item = Dataset()
    item.CodeValue = "1"
    content = file_of(IMAGE, uid.ExplicitVRLittleEndian, ViewCodeSequence=Sequence([item]))
    assert walked(content, tags.PIXEL_DATA) is not None  # a sequence of known length is stepped over
    element = content.index(b"\x54\x00\x20\x02SQ")
    length = struct.unpack_from("<L", content, element + 8)[0]
    undefined = (
        content[: element + 8]
        + b"\xff\xff\xff\xff"
        + content[element + 12 : element + 12 + length]
        + b"\xfe\xff\xdd\xe0\0\0\0\0"
        + content[element + 12 + length :]
    )
    assert walked(undefined, tags.PIXEL_DATA) is None
    assert np.array_equal(read_radiograph(undefined).pixels, IMAGE)
    rows = content.index(b"\x28\x00\x10\x00US")
    swapped = content[:rows] + content[rows + 10 : rows + 20] + content[rows : rows + 10] + content[rows + 20 :]
    assert walked(swapped, tags.PIXEL_DATA) is None  # Columns before Rows
    assert np.array_equal(read_radiograph(swapped).pixels, IMAGE)
    implicit = file_of(IMAGE, uid.ImplicitVRLittleEndian)
    start = parsing._file_meta(implicit)[1]
    liar = file_of(IMAGE, uid.ExplicitVRLittleEndian)
    liar = liar[: parsing._file_meta(liar)[1]] + implicit[start:]
    assert walked(liar, tags.PIXEL_DATA) is None  # says explicit and is implicit, as some devices write it
    assert np.array_equal(read_radiograph(liar).pixels, IMAGE)


@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian])
def test_a_data_set_without_a_file_header_is_read_when_it_has_its_uids(file_of, syntax: str) -> None:  # type: ignore[no-untyped-def]
    content = file_of(IMAGE, syntax)
    bare = content[parsing._file_meta(content)[1] :]
    assert np.array_equal(read_radiograph(bare).pixels, IMAGE)
    assert read_header(bare, b"") == read_header(content, b"")
    nameless = file_of(IMAGE, syntax, SOPInstanceUID=None)
    with pytest.raises(DicomError, match="is not a DICOM file"):
        read_header(nameless[parsing._file_meta(nameless)[1] :], b"")
    with pytest.raises(DicomError, match="is not a DICOM file"):
        read_header(b"\x08\0\x05\0" + bytes(range(256)) * 4, b"")


@pytest.mark.parametrize("syntax", [*ENCODINGS, uid.JPEGBaseline8Bit])
def test_file_meta_information_is_read_without_its_preamble(file_of, syntax: str) -> None:  # type: ignore[no-untyped-def]
    content = file_of(IMAGE, syntax, ImagerPixelSpacing=[5, 5])
    whole = read_radiograph(content)
    for start in (128, 132):  # DICM at the start, and nothing before the group 0002
        found = read_radiograph(content[start:])
        assert found.header == whole.header
        assert np.array_equal(found.pixels, whole.pixels)
        assert found.spacing == whole.spacing != Spacing(reason="no spacing")


@pytest.mark.parametrize("name", ["Rows", "Columns", "BitsAllocated", "PatientID", "SOPInstanceUID"])
def test_elements_out_of_order_are_read(file_of, name: str) -> None:  # type: ignore[no-untyped-def]
    """(0040,0254) before a tag that is wanted."""
    window = {"WindowCenter": 90, "WindowWidth": 60}
    for syntax in (uid.ExplicitVRLittleEndian, uid.JPEGBaseline8Bit):
        content = file_of(IMAGE, syntax, **window)
        tag = struct.pack("<HH", *divmod(int(tag_for_keyword(name) or 0), 0x10000))
        place = content.index(tag, parsing._file_meta(content)[1])
        moved = content[:place] + b"\x40\0\x54\2LO\6\0CHEST " + content[place:]
        assert read_header(moved, b"") == read_header(content, b"")
        assert np.array_equal(read_radiograph(moved).pixels, read_radiograph(content).pixels)


def test_a_window_after_the_pixels_counts_and_padding_there_does_not(file_of) -> None:  # type: ignore[no-untyped-def]
    window = {"WindowCenter": 90, "WindowWidth": 60}
    for syntax in (uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.JPEGBaseline8Bit):
        content, plain = file_of(IMAGE, syntax, **window), file_of(IMAGE, syntax)
        start = content.index(b"\x28\0\x50\x10")
        end = content.index(b"\x28\0\x51\x10") + 12
        after = content[:start] + content[end:] + content[start:end]
        assert np.array_equal(read_radiograph(after).pixels, read_radiograph(content).pixels)
        for padding in (bytes(2), bytes(512), b"\xfc\xff\xfc\xffOB\0\0\2\0\0\0\0\0"):
            assert np.array_equal(read_radiograph(plain + padding).pixels, read_radiograph(plain).pixels)


def test_what_is_no_dicom_file_is_refused(file_of) -> None:  # type: ignore[no-untyped-def]
    for content in (b"x", b"\0" * 500, b"ImageId,EncodedPixels\n" * 20, b"%PDF-1.7 " * 50, bytes(128) + b"DICO" * 90):
        with pytest.raises(DicomError, match="is not a DICOM file"):
            read_tags(content, pixels=True)
    with pytest.raises(DicomError, match="no Transfer Syntax UID"):
        read_tags(bytes(128) + b"DICM", pixels=True)
    whole = file_of(IMAGE, uid.ExplicitVRLittleEndian)
    with pytest.raises(DicomError, match="file meta information cannot be read"):
        read_tags(whole[:136] + b"??" + whole[138:], pixels=True)


@pytest.mark.parametrize("syntax", [*ENCODINGS, uid.JPEGBaseline8Bit])
def test_a_file_that_ends_within_a_value_is_reported_as_cut_off(file_of, syntax: str) -> None:  # type: ignore[no-untyped-def]
    content = file_of(IMAGE, syntax)
    with pytest.raises(DicomError, match="cut off"):
        read_radiograph(content[:-90])
    start = parsing._file_meta(content)[1]
    with pytest.raises(DicomError, match=r"cut off|contains no image"):  # the latter where it is a value of no interest
        read_header(content[: start + 60], b"")
    with pytest.raises(DicomError, match=r"cut off|no Transfer Syntax UID"):
        read_header(content[: start - 5], b"")


def test_a_deflated_bomb_is_not_inflated() -> None:
    bomb = deflated_bomb(tags.MAX_INFLATED)
    begin = time.process_time()
    with pytest.raises(DicomError, match="inflates to more than the limit of 167,772,160 bytes"):
        read_header(bomb, b"")
    assert time.process_time() - begin < 2
    with pytest.raises(DicomError, match="cannot be inflated"):
        read_header(deflated_bomb(0)[:162] + b"\xff" * 99, b"")


def test_sequences_in_sequences_without_end_are_refused(file_of) -> None:  # type: ignore[no-untyped-def]
    content = file_of(IMAGE, uid.ExplicitVRLittleEndian)
    start = content.index(b"\x10\x00\x10\x00PN")
    nest = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 5000
    with pytest.raises(DicomError):
        read_header(content[:start] + nest, b"")


def element(tag: int, vr: bytes, value: bytes, explicit: bool = True) -> bytes:
    long = vr in (b"SQ", b"UN", b"OB")
    head = struct.pack("<HH", *divmod(tag, 0x10000))
    if not explicit:
        return head + struct.pack("<L", len(value)) + value
    return head + vr + (struct.pack("<HL", 0, len(value)) if long else struct.pack("<H", len(value))) + value


MANY = 9000
PRIVATE = [element(0x00091000 + number, b"LO", b"") for number in range(MANY)]
EMPTY_ITEM = b"\xfe\xff\x00\xe0\0\0\0\0"
PATIENT, PIXELS, END = b"\x10\0\x20\0LO", b"\xe0\x7f\x10\0", b"\xfe\xff\xdd\xe0"
# What is inserted, before what, and the reason.
ATTACKS = {
    "elements": (b"".join(PRIVATE), PATIENT, "has more than 100,000 elements"),
    "elements in no order": (b"".join(PRIVATE[::-1]), PATIENT, "has more than 100,000 elements"),
    "items": (b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff" + EMPTY_ITEM * MANY, PATIENT, "has more than 100,000 elements"),
    "tables": (element(tags.VOI_LUTS, b"SQ", EMPTY_ITEM * MANY), PIXELS, "has more than 100,000 elements"),
    "groups": (element(tags.SHARED_GROUPS, b"SQ", EMPTY_ITEM * MANY), PIXELS, "has more than 100,000 elements"),
    "fragments": (EMPTY_ITEM * MANY, END, "or more than 100,000 fragments"),
    "a long value": (element(0x00091000, b"UN", bytes(300_000)), PATIENT, "has more than 33,554,432 bytes before"),
    "meta information": (element(0x00020001, b"OB", b"") * MANY, b"\2\0\x10\0UI", "file meta information has no end"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_header_that_would_take_minutes_is_refused(  # type: ignore[no-untyped-def]
    file_of, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    """With smaller limits than those in use, for a quick test."""
    for name, limit in {"ELEMENTS": MANY // 3 - 1, "FRAGMENTS": MANY - 1, "HEADER": 2**18, "VALUE": 2**12}.items():
        monkeypatch.setattr(parsing, f"MAX_{name}", limit)
        monkeypatch.setattr(tags, f"MAX_{name}", limit)
    inserted, before, reason = ATTACKS[attack]
    content = file_of(IMAGE, uid.JPEGBaseline8Bit)
    place = content.index(before)
    with pytest.raises(DicomError, match=reason):
        read_radiograph(content[:place] + inserted + content[place:])
    below = inserted[: len(inserted) // 20 // 12 * 12]
    if attack in ("elements", "fragments"):
        assert np.array_equal(read_radiograph(content[:place] + below + content[place:]).pixels.shape, IMAGE.shape)


@pytest.mark.parametrize("name", ["PatientID", "BodyPartExamined", "SOPInstanceUID", "PixelSpacing", "WindowCenter"])
def test_a_value_beyond_all_measure_is_refused(file_of, name: str) -> None:  # type: ignore[no-untyped-def]
    content = file_of(IMAGE, uid.ImplicitVRLittleEndian, **{name: "12"})
    place = content.index(tag := struct.pack("<HH", *divmod(int(tag_for_keyword(name) or 0), 0x10000)), 300)
    attacked = content[:place] + tag + struct.pack("<L", 80_000) + b"1\\" * 40_000 + content[place + 10 :]
    with pytest.raises(DicomError, match=r"has a value of 80,000 bytes in \("):
        read_radiograph(attacked)


def test_damaged_numbers_are_refused_without_showing_them(file_of) -> None:  # type: ignore[no-untyped-def]
    content = file_of(IMAGE, uid.ExplicitVRLittleEndian, WindowCenter=10, WindowWidth="4321")
    with pytest.raises(DicomError, match=r"has an invalid number in \(0028,1051\)"):
        read_radiograph(content.replace(b"4321", b"Quag"))
    content = file_of(IMAGE, uid.ExplicitVRLittleEndian, NumberOfFrames="7654")
    with pytest.raises(DicomError, match=r"has an invalid number in \(0028,0008\)"):
        read_radiograph(content.replace(b"7654", b"Quag"))
    content = file_of(IMAGE, uid.ExplicitVRLittleEndian).replace(
        b"\x28\0\x10\0US\2\0\x28\0", b"\x28\0\x10\0LO\6\0Quag12"
    )
    with pytest.raises(DicomError, match=r"has an invalid number in \(0028,0010\)"):
        read_radiograph(content)


def test_both_parsers_agree_on_the_real_files(real_data: Path) -> None:
    files = [*sorted((real_data / "siim-real").rglob("*.dcm"))[::40], *sorted((real_data / "messy-dicom").iterdir())]
    quick = 0
    for path in files:
        content = path.read_bytes()
        with warnings.catch_warnings(action="ignore"):
            found = walked(content, tags.SIGNED) if content[128:132] == b"DICM" else None
        if found is not None:
            quick += 1
            assert found.values == by_pydicom(content, tags.SIGNED).values
    assert quick >= 20
