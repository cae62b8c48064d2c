"""A PNG of the mirror is read as it is; colour, transparency, damage and bombs are rejected."""

from __future__ import annotations

import os
import struct
import time
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL
import pydicom
import pytest
from PIL import Image

from ptxdist.dicom import png
from ptxdist.dicom.radiograph import Header, read_bytes, read_header, read_radiograph
from ptxdist.errors import DicomError

IMAGE = np.add.outer(np.arange(48) * 3, np.arange(64)).astype(np.uint8)
DEEP = np.add.outer(np.arange(48) * 60, np.arange(64) * 10).astype(np.uint16) + 500


def png_of(pixels: npt.NDArray[np.generic], mode: str | None = None) -> bytes:
    image, buffer = Image.fromarray(pixels), BytesIO()
    (image.convert(mode) if mode else image).save(buffer, "PNG")
    return buffer.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">L", len(content)) + name + content + struct.pack(">L", zlib.crc32(name + content))


def with_size(content: bytes, columns: int, rows: int) -> bytes:
    return content[:8] + chunk(b"IHDR", struct.pack(">LL", columns, rows) + content[24:29]) + content[33:]


def refused(content: bytes, reason: str) -> None:
    with pytest.raises(DicomError) as caught:
        read_radiograph(content, name="one.png")
    assert reason in str(caught.value)


def test_grayscale_is_read_and_the_header_needs_no_pixels() -> None:
    content = png_of(IMAGE)
    radiograph = read_radiograph(content, name="1.2.276.0.7230010.png")
    assert np.array_equal(radiograph.pixels, IMAGE)
    expected = Header("1.2.276.0.7230010", "", 48, 64, "", "", None, f"pillow {PIL.__version__}")
    assert radiograph.header == expected
    assert read_header(content[:40], b"salt", name="1.2.276.0.7230010.png") == expected


def test_a_name_that_cannot_be_an_image_id_is_refused() -> None:
    content = png_of(IMAGE)
    for name in ("1.2.3.png", "Bild 1 ö.png", "a,b.png", "x" * 200 + ".png"):
        assert read_header(content, b"", name=name).case_id == name.removesuffix(".png")
    for name in (os.fsdecode(b"r\xf6ntgen.png"), "a\nb.png", " a.png", "a\\b.png", "ö" * 101 + ".png"):
        with pytest.raises(DicomError, match="is a PNG whose name cannot be an image id: rename it"):
            read_header(content, b"", name=name)


def test_16_bits_span_the_range_of_their_values() -> None:
    pixels = read_radiograph(png_of(DEEP), name="one.png").pixels
    assert np.array_equal(pixels, np.rint((DEEP - 500.0) / (DEEP.max() - 500) * 255))


def test_three_equal_channels_are_grayscale_and_others_are_not() -> None:
    assert np.array_equal(read_radiograph(png_of(IMAGE, "RGB"), name="one.png").pixels, IMAGE)
    coloured = np.stack([IMAGE, IMAGE, IMAGE], -1)
    coloured[5, 5, 1] += 1
    refused(png_of(coloured), "is a colour PNG")


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "1"])
def test_transparency_palettes_and_single_bits_are_refused(mode: str) -> None:
    refused(png_of(IMAGE, mode), "bits per sample" if mode == "1" else "palette or transparency")
    with pytest.raises(DicomError):
        read_header(png_of(IMAGE, mode), b"", name="one.png")


def test_hidden_transparency_and_animation_are_refused() -> None:
    content = png_of(IMAGE)
    refused(content[:33] + chunk(b"tRNS", b"\0\0") + content[33:], "is a PNG with transparency")
    refused(content[:33] + chunk(b"acTL", b"\0\0\0\2\0\0\0\0") + content[33:], "is an animated PNG")


def test_a_text_too_long_for_the_decoder_is_no_damage() -> None:
    content = png_of(IMAGE)
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2_000_000)))
    assert np.array_equal(read_radiograph(content[:33] + text + content[33:], name="one.png").pixels, IMAGE)


def test_every_damaged_byte_is_found() -> None:
    content = png_of(IMAGE)
    for position in range(8, len(content) - 12, 3):
        damaged = bytearray(content)
        damaged[position] ^= 4
        refused(bytes(damaged), "PNG" if position < 33 else "is a damaged PNG")


def test_every_cut_is_found() -> None:
    content = png_of(IMAGE)
    for length in range(8, len(content), 5):
        refused(content[:length], "is a damaged PNG")


def test_sound_checksums_around_damaged_data_are_not_enough(capfd: pytest.CaptureFixture[str]) -> None:
    content = png_of(IMAGE)
    head, tail = content[:33], chunk(b"IEND", b"")
    lines = b"".join(b"\0" + row.tobytes() for row in IMAGE)
    for data in (zlib.compress(lines[:2000]), zlib.compress(lines)[:-30], b"no zlib at all", b""):
        refused(head + chunk(b"IDAT", data) + tail, "is a damaged PNG")
    assert capfd.readouterr() == ("", "")


def test_bombs_are_refused_by_their_first_chunk() -> None:
    content = png_of(IMAGE)
    begin = time.process_time()
    refused(with_size(content, 65000, 65000), "claims 65000x65000 pixels; at most 67,108,864 are")
    for columns, rows in ((2**31 - 1, 1), (1, 32_000), (10_001, 1)):  # thin ones, which are padded to a square
        refused(
            with_size(content, columns, rows), f"claims {columns}x{rows} pixels; at most 67,108,864 are accepted, and"
        )
    refused(with_size(content, 0, 5), "it has no size")
    refused(content[:33] + chunk(b"abCd", b"") * png.MAX_CHUNKS + content[33:], "is a PNG of more than 100,000 chunks")
    assert time.process_time() - begin < 0.5


def test_a_png_without_a_name_is_refused() -> None:
    with pytest.raises(DicomError, match="its file name is not known"):
        read_header(png_of(IMAGE), b"")


def test_the_mirror_shows_the_images_of_the_dicom_files(real_data: Path) -> None:
    files = sorted((real_data / "siim-png" / "images").glob("*.png"))
    dicoms = {path.stem: path for path in (real_data / "siim-real" / "dicom-images").rglob("*.dcm")}
    assert len(files) == 24
    shared = 0
    for path in files:
        radiograph = read_radiograph(read_bytes(path), name=path.name)
        assert radiograph.header.case_id == path.stem
        assert radiograph.pixels.shape == (1024, 1024)
        if path.stem in dicoms:
            shared += 1
            original = pydicom.dcmread(dicoms[path.stem]).pixel_array.astype(int)
            assert np.abs(radiograph.pixels - original).mean() < 2
    print(f"{shared} of {len(files)} also there as DICOM; decoder {png.DECODER}")
