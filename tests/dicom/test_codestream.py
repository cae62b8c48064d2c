"""Size, depth and end of compressed images are read right, and JPEG Lossless accounts for each of its bits."""

from __future__ import annotations

import struct
import tracemalloc
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pydicom import uid

from ptxdist.dicom import codestream
from ptxdist.dicom.codestream import lossless_is_whole, read_jpeg, read_jpeg_2000, sequential_is_whole
from ptxdist.dicom.parsing import read_tags
from ptxdist.dicom.radiograph import read_radiograph
from ptxdist.errors import DicomError

NOISE = np.random.default_rng(0).integers(0, 9, (36, 41))
IMAGE = (np.add.outer(np.arange(36) * 3, np.arange(41)) + NOISE).astype(np.uint8)


@pytest.mark.parametrize("syntax", [uid.JPEGBaseline8Bit, uid.JPEGLosslessSV1, uid.JPEGLSLossless])
def test_size_and_depth_of_jpeg(file_of, syntax: str) -> None:  # type: ignore[no-untyped-def]
    frame = read_tags(file_of(IMAGE, syntax), pixels=True).frame()
    stream = read_jpeg(frame)
    assert (stream.rows, stream.columns, stream.components, stream.bits) == (36, 41, 1, 8)
    assert frame[stream.end : stream.end + 2] == b"\xff\xd9"
    filled = frame[:2] + b"\xff\xff\xff" + frame[2:]  # fill bytes before a marker are allowed
    assert read_jpeg(filled).columns == 41


@pytest.mark.parametrize("bits", [8, 12])
def test_size_and_depth_of_jpeg_2000_bare_and_in_a_file(file_of, bits: int) -> None:  # type: ignore[no-untyped-def]
    pixels = IMAGE if bits == 8 else IMAGE.astype(np.uint16) * 16
    frame = read_tags(file_of(pixels, uid.JPEG2000Lossless, bits=bits), pixels=True).frame()
    for one in (frame, b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(60) + frame):
        stream = read_jpeg_2000(one)
        assert (stream.rows, stream.columns, stream.components, stream.bits) == (36, 41, 1, bits)
        assert stream.tiles == 1


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: f[2:], "no JPEG stream"),
        (lambda f: f[:60], "its header cannot be read"),
        (lambda f: f[:-2], "end mark is missing"),
        (lambda f: f.replace(b"\xff\xc3", b"\xff\xe3"), "its size is missing"),
        (lambda f: f.replace(b"\xff\xc4", f[2 : f.index(b"\xff\xc4")] + b"\xff\xc4"), "its size more than once"),
        (lambda f: f.replace(b"\xff\xc4", b"\x00\xc4"), "its header cannot be read"),
        (lambda f: f[:2] + b"\xff" * 2**20 + f[2:], "its header cannot be read"),
        (lambda f: f[:2] + (b"\xff\xc4\xff\xff" + bytes(65533)) * 17 + f[2:], "its header cannot be read"),
        (lambda f: f[:-2] + b"\xff\xda" * 100 + f[-2:], "more than 100 scans"),
    ],
)
def test_damaged_markers_are_refused(jpeg_lossless, damage, reason: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DicomError, match=reason):
        read_jpeg(damage(jpeg_lossless(IMAGE, 8)))


def test_damaged_jpeg_2000_is_refused(file_of) -> None:  # type: ignore[no-untyped-def]
    frame = read_tags(file_of(IMAGE, uid.JPEG2000Lossless), pixels=True).frame()
    for damaged, reason in (
        (frame[2:], "no JPEG 2000 stream"),
        (frame[:40], "no JPEG 2000 stream"),
        (frame[:24] + bytes(8) + frame[32:], "its size is invalid"),
        (frame[:8] + bytes(4) + frame[12:], "its size is invalid"),
        (frame[:43] + b"\2" + frame[44:], "its size is invalid"),
    ):
        with pytest.raises(DicomError, match=reason):
            read_jpeg_2000(damaged)


@pytest.mark.parametrize("in_tile", [False, True])
def test_code_blocks_of_jpeg_2000_are_bounded(file_of, in_tile: bool) -> None:  # type: ignore[no-untyped-def]
    """A kB of a stream of small precincts or code blocks made the decoder take 14 GB. Blocks of 8x8 are legal."""
    frame = read_tags(file_of(IMAGE, uid.JPEG2000Lossless), pixels=True).frame()
    frame = frame[:8] + struct.pack(">LLLLLL", 8000, 8000, 0, 0, 8000, 8000) + frame[32:]
    at = frame.index(b"\xff\x52")
    segment, rest = frame[at : at + 14], frame[at + 14 :]
    for levels, block, precincts, count in (
        (5, 4, b"", 21_000),
        (5, 1, b"", 1_000_000),
        (0, 0, b"", 4_000_000),
        (5, 0, b"", 4_000_000),
        (5, 4, b"\x11" * 6, 85_000_000),
        (5, 4, b"\x44" * 6, 1_333_333),
        (5, 4, b"\x33" * 6, 5_300_000),
        (0, 4, b"\0", 64_000_000),
    ):
        style = segment[:4] + bytes([bool(precincts)]) + segment[5:9] + bytes([levels, block, block]) + segment[12:]
        style = style[:2] + (12 + len(precincts)).to_bytes(2, "big") + style[4:] + precincts
        tile = rest.index(b"\xff\x90") + 12
        made = frame[:at] + (segment + rest[:tile] + style + rest[tile:] if in_tile else style + rest)
        styles, tiles = codestream._coding_styles(made, 2)
        assert tiles == 1
        assert len(styles) == 1 + in_tile
        assert codestream._code_blocks(8000, 8000, styles[-1]) == pytest.approx(count, rel=0.4)
        if count < codestream.MAX_BLOCKS:
            assert read_jpeg_2000(made).rows == 8000
        else:
            with pytest.raises(DicomError, match="more than 1,100,000 code blocks"):
                read_jpeg_2000(made)


def test_a_jpeg_2000_stream_without_all_of_its_tiles_is_refused() -> None:
    """The decoder left black what is not there."""
    file, pixels = BytesIO(), np.arange(40 * 48, dtype=np.uint16).reshape(40, 48)
    Image.fromarray(pixels).save(file, "JPEG2000", no_jp2=True, tile_size=(16, 16))
    whole = file.getvalue()
    assert read_jpeg_2000(whole).tiles == 9
    second = whole.index(b"\xff\x90", whole.index(b"\xff\x90") + 2)
    third = whole.index(b"\xff\x90", second + 2)
    with pytest.raises(DicomError, match=r"JPEG 2000 data that are cut off \(8 of 9 tiles\)"):
        read_jpeg_2000(whole[:second] + whole[third:])


def test_the_stream_that_was_checked_is_the_one_that_is_decoded(file_of) -> None:  # type: ignore[no-untyped-def]
    """Whatever is before it: a JP2 file may have another stream, or a palette of 255 channels."""
    first, second = (
        read_tags(file_of(pixels, uid.JPEG2000Lossless), pixels=True).frame() for pixels in (IMAGE, -IMAGE)
    )
    box = b"\0\0\0\x0cjP  \r\n\x87\n" + struct.pack(">L", 8 + len(first)) + b"free" + first
    boxed = box + struct.pack(">L", 8 + len(second)) + b"jp2c" + second
    assert np.array_equal(read_radiograph(file_of(IMAGE, uid.JPEG2000Lossless, frame=boxed)).pixels, IMAGE)


@given(
    arrays(np.uint16, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 4095)),
    st.integers(1, 7),
    st.integers(0, 3),
)
@settings(max_examples=150)
def test_every_sound_stream_is_whole(jpeg_lossless, pixels, predictor: int, restart_rows: int) -> None:  # type: ignore[no-untyped-def]
    frame = jpeg_lossless(pixels, 12, predictor=predictor, restart_rows=restart_rows)
    assert lossless_is_whole(frame, read_jpeg(frame), pixels)


@pytest.mark.parametrize("restart_rows", [0, 4])
def test_a_stream_of_another_length_is_not_whole(jpeg_lossless, restart_rows: int) -> None:  # type: ignore[no-untyped-def]
    frame = jpeg_lossless(IMAGE, 8, predictor=4, restart_rows=restart_rows)
    stream = read_jpeg(frame)
    assert lossless_is_whole(frame, stream, IMAGE)
    for damaged in (
        frame[:-4] + frame[-2:],
        frame[: stream.scan] + frame[stream.scan + 1 :],
        frame[:-2] + b"\x55" + frame[-2:],
        frame[:-9] + b"\xff\xd9" + frame[-9:],
        frame[:-9] + b"\xff\xd0" + frame[-9:],
    ):
        assert not lossless_is_whole(damaged, read_jpeg(damaged), IMAGE)
    marked = frame[:-2] + b"\xff\xd0" * 10**6 + frame[-2:]
    tracemalloc.start()
    assert not lossless_is_whole(marked, read_jpeg(marked), IMAGE)
    assert not sequential_is_whole(marked, read_jpeg(marked))
    assert tracemalloc.get_traced_memory()[1] < 6 * len(marked), "they are not collected"
    tracemalloc.stop()
    other = IMAGE.copy()
    other[7, 7] ^= 128
    assert not lossless_is_whole(frame, stream, other)
    padded = frame[:-2] + b"\xff\xff" + frame[-2:]  # fill bytes before the end mark
    assert lossless_is_whole(padded, read_jpeg(padded), IMAGE)


def test_images_of_several_blocks_of_rows_are_whole(jpeg_lossless, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    frame = jpeg_lossless(IMAGE, 8, predictor=6, restart_rows=9)
    monkeypatch.setattr(codestream, "_BLOCK_ROWS", 7)
    assert lossless_is_whole(frame, read_jpeg(frame), IMAGE)


def baseline(pixels: np.ndarray, quality: int = 90, restart_blocks: int = 0) -> bytes:
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_RST_INTERVAL, restart_blocks]
    return bytes(cv2.imencode(".jpg", pixels, options)[1].tobytes())


@given(
    arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.integers(0, 255)),
    st.integers(1, 100),
    st.integers(0, 3),
)
@settings(max_examples=100)
def test_every_sound_sequential_stream_is_whole(pixels, quality: int, restart_blocks: int) -> None:  # type: ignore[no-untyped-def]
    frame = baseline(pixels, quality, restart_blocks)
    assert sequential_is_whole(frame, read_jpeg(frame))


@pytest.mark.parametrize("restart_blocks", [0, 7])
def test_a_sequential_stream_with_too_few_or_too_many_blocks_is_not_whole(restart_blocks: int) -> None:
    frame = baseline(IMAGE, 95, restart_blocks)
    stream = read_jpeg(frame)
    assert sequential_is_whole(frame, stream)
    for damaged in (
        frame[: stream.scan + 90] + frame[stream.end :],
        frame[: stream.scan + 100] + frame[stream.scan + 300 :],
        frame[: stream.end] + b"\x55\xaa" + frame[stream.end :],
        frame[: stream.end - 9] + b"\xff\xd9" + frame[stream.end - 9 :],
    ):
        assert not sequential_is_whole(damaged, read_jpeg(damaged))


def test_sequential_streams_are_judged_as_the_strict_decoder_judges_them() -> None:
    frame = baseline(np.tile(IMAGE, (2, 2)))
    stream, random, refused = read_jpeg(frame), np.random.default_rng(7), 0
    for _ in range(200):
        damaged = bytearray(frame)
        damaged[random.integers(stream.scan, stream.end)] ^= 1 << random.integers(8)
        whole = sequential_is_whole(bytes(damaged), read_jpeg(bytes(damaged)))
        try:
            simplejpeg.decode_jpeg(bytes(damaged), colorspace="GRAY", strict=True)
        except ValueError:
            refused += 1
            assert not whole
    assert refused > 40


def test_real_streams_are_whole(real_data: Path) -> None:
    for path in sorted((real_data / "siim-real" / "dicom-images").rglob("*.dcm"))[::200]:
        frame = read_tags(path.read_bytes(), pixels=True).frame()
        assert sequential_is_whole(frame, read_jpeg(frame))
