"""Writers of DICOM files in every supported transfer syntax, with known pixel values."""

from __future__ import annotations

import base64
import struct
import warnings
import zlib
from collections.abc import Callable
from functools import lru_cache
from io import BytesIO

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from imagecodecs import jpeg2k_encode
from jpeg_ls import encode_jpeg_ls
from pydicom import uid
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filewriter import dcmwrite
from pydicom.pixels import get_encoder

Image = npt.NDArray[np.generic]
FileOf = Callable[..., bytes]
JpegLossless = Callable[..., bytes]

NATIVE = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian)
_CODE_LENGTHS = (2, 3, 3, 3, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14)  # of the categories 0 to 16
# np.add.outer(np.arange(16) * 7, np.arange(24) * 5) % 256, made with OpenJPH: no package of the tests writes HTJ2K.
_HTJ2K = base64.b64decode(
    "/0//UQApQAAAAAAYAAAAEAAAAAAAAAAAAAAAGAAAABAAAAAAAAAAAAABBwEB/1AACAACAAAAAv9SAAwAAgABAAUEBEAB/1wAEyBIUFBQUFBQ"
    "UFBQUFBQSEhI/2QAFwABT3BlbkpQSCBWZXIgMC4yNi4zLv+QAAoAAAAAAHQAAf+TwCXrAId0AMASgKoBB3QAwBJAEoD9J3MAfgAiNADAE0AT"
    "gCz7gAt0AL73ACR3VQDAE8AVQERE2KfCdQDe3d3gDPfJ7LcAwCrgFogAAADz8Kenp0J4AEySJEny/xAEnv2Se/ZJ7LwA/9k="
)


@pytest.fixture(scope="session")
def htj2k_image() -> Image:
    """The only image that `file_of` can write as HTJ2K."""
    return (np.add.outer(np.arange(16) * 7, np.arange(24) * 5) % 256).astype(np.uint8)


@pytest.fixture(scope="session")
def file_of(set_tags) -> FileOf:  # type: ignore[no-untyped-def]
    """Function: content of a file with these pixels in this transfer syntax, further tags by keyword.

    `bits` are the stored ones; `frame` replaces the compressed image of the pixels; a tag of None is left out.
    """

    def make(
        pixels: Image, syntax: str, *, bits: int | None = None, frame: bytes | None = None, **tags: object
    ) -> bytes:
        bits = bits or 8 * pixels.dtype.itemsize
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = uid.SecondaryCaptureImageStorage, "1.2.3.4"
        meta.TransferSyntaxUID = uid.UID(syntax)
        file = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        file.SOPClassUID, file.SOPInstanceUID, file.Modality = uid.SecondaryCaptureImageStorage, "1.2.3.4", "CR"
        file.PatientName, file.PatientID, file.PatientBirthDate = "Quagmire^Zebulon", "QX7-HOSPITAL-1", "19391207"
        file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
        file.Rows, file.Columns = pixels.shape
        file.BitsAllocated, file.BitsStored, file.HighBit = 8 * pixels.dtype.itemsize, bits, bits - 1
        file.PixelRepresentation = int(pixels.dtype.kind == "i")
        big_endian = syntax == uid.ExplicitVRBigEndian
        if frame is None and (big_endian or syntax in NATIVE):
            stored = pixels.astype(pixels.dtype.newbyteorder(">")) if big_endian else pixels
            data = stored.tobytes() + b"\0" * (pixels.nbytes % 2)
            # In big endian words, the bytes of 8-bit pixels change places in pairs.
            file.PixelData = np.frombuffer(data, "<u2").byteswap().tobytes() if big_endian and bits == 8 else data
            file["PixelData"].VR = "OW"
        else:
            file.PixelData = encapsulate([_compressed(pixels, syntax, bits) if frame is None else frame])
            file["PixelData"].VR = "OB"
        buffer = BytesIO()
        set_tags(file, tags)
        with warnings.catch_warnings(action="ignore"):
            file.set_original_encoding(syntax == uid.ImplicitVRLittleEndian, not big_endian)
            dcmwrite(buffer, file, enforce_file_format=True)
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def jpeg_lossless() -> JpegLossless:
    """Function: JPEG Lossless stream of an image by any predictor, with restart markers every so many rows."""
    return _jpeg_lossless


def _compressed(pixels: Image, syntax: str, bits: int) -> bytes:
    return _encoded(pixels.tobytes(), pixels.dtype, pixels.shape, syntax, bits)


@lru_cache(maxsize=256)  # the same few images are encoded hundreds of times
def _encoded(content: bytes, dtype: np.dtype[np.generic], shape: tuple[int, ...], syntax: str, bits: int) -> bytes:
    pixels = np.frombuffer(content, dtype).reshape(shape)
    match syntax:
        case uid.JPEGBaseline8Bit:
            return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels[..., None]), quality=95, colorspace="GRAY"))
        case uid.JPEGExtended12Bit:
            return _jpeg_of_blocks(pixels)
        case uid.JPEGLossless | uid.JPEGLosslessSV1:
            return _jpeg_lossless(pixels, bits)
        case uid.HTJ2K | uid.HTJ2KLossless | uid.HTJ2KLosslessRPCL:
            return _HTJ2K
        case uid.JPEGLSLossless | uid.JPEGLSNearLossless:
            near = 2 * (syntax == uid.JPEGLSNearLossless)
            return encode_jpeg_ls((pixels.astype(int) % 2**bits).tolist(), bits, near)
        case uid.JPEG2000Lossless:
            return bytes(jpeg2k_encode(pixels, codecformat="J2K", bitspersample=bits, reversible=True))
        case uid.JPEG2000:
            return bytes(jpeg2k_encode(pixels, 50, codecformat="J2K", bitspersample=bits))
    rows, columns = pixels.shape
    encoded = get_encoder(syntax).encode(
        pixels,
        encoding_plugin="pydicom",
        rows=rows,
        columns=columns,
        samples_per_pixel=1,
        number_of_frames=1,
        bits_allocated=8 * pixels.dtype.itemsize,
        bits_stored=bits,
        pixel_representation=int(pixels.dtype.kind == "i"),
        photometric_interpretation="MONOCHROME2",
    )
    return bytes(encoded)


def deflated_bomb(size: int) -> bytes:
    """A short DICOM file whose deflated data set inflates to at least `size` zeros."""
    deflate = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    block = deflate.compress(bytes(2**20)) + deflate.flush(zlib.Z_FULL_FLUSH)  # independent of what is before it
    meta = b"\2\0\x10\0UI\x16\x00" + b"1.2.840.10008.1.2.1.99"
    return bytes(128) + b"DICM" + meta + block * (size // 2**20 + 1) + deflate.flush()


def _jpeg_lossless(pixels: Image, bits: int, *, predictor: int = 1, restart_rows: int = 0) -> bytes:
    """T.81 annex H, written step by step as described there, and slow."""
    rows, columns = pixels.shape
    values = (pixels.astype(int) % 2**bits).tolist()
    parts: list[str] = []
    text = ""
    for y in range(rows):
        first = y % restart_rows == 0 if restart_rows else y == 0
        if first and y:
            parts, text = [*parts, text], ""
        for x in range(columns):
            left, above, corner = values[y][x - 1], values[y - 1][x], values[y - 1][x - 1]
            if first:
                expected = left if x else 2 ** (bits - 1)
            elif x == 0:
                expected = above
            else:
                expected = (
                    *(left, above, corner, left + above - corner),
                    *(left + ((above - corner) >> 1), above + ((left - corner) >> 1), (left + above) >> 1),
                )[predictor - 1]
            text += _code((values[y][x] - expected + 2**15) % 2**16 - 2**15)
    interval = _segment(0xDD, struct.pack(">H", restart_rows * columns)) if restart_rows else b""
    return _jpeg(0xC3, rows, columns, bits, [*parts, text], bytes([predictor, 0, 0]), interval)


def _jpeg_of_blocks(pixels: Image) -> bytes:
    """JPEG Extended of 12 bits for an image of 8x8 pixel blocks of one value each: there is no rounding."""
    blocks = pixels[::8, ::8].astype(int)
    assert np.array_equal(blocks.repeat(8, 0).repeat(8, 1), pixels)
    steps = np.diff((blocks.reshape(-1) - 2048) * 8, prepend=0).tolist()
    end_of_block = _segment(0xC4, b"\x10" + bytes([1, *[0] * 15]) + b"\0")  # one code, 0
    quantization = _segment(0xDB, b"\0" + b"\1" * 64)
    scan = "".join(_code(step) + "0" for step in steps)
    rows, columns = pixels.shape
    return _jpeg(0xC1, rows, columns, 12, [scan], bytes([0, 63, 0]), end_of_block + quantization)


def _jpeg(marker: int, rows: int, columns: int, bits: int, parts: list[str], end: bytes, extra: bytes) -> bytes:
    lengths = _CODE_LENGTHS[: 17 if marker == 0xC3 else 16]
    counts = bytes(lengths.count(length) for length in range(1, 17))
    padded = [text + "1" * (-len(text) % 8) for text in parts]
    scans = [int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0") for text in padded]
    scan = b"".join(part + bytes([0xFF, 0xD0 + number % 8]) for number, part in enumerate(scans))[:-2]
    return (
        b"\xff\xd8"
        + _segment(marker, struct.pack(">BHHB", bits, rows, columns, 1) + b"\1\x11\0")
        + _segment(0xC4, b"\0" + counts + bytes(range(len(lengths))))
        + extra
        + _segment(0xDA, b"\1\1\0" + end)
        + scan
        + b"\xff\xd9"
    )


def _segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def _code(difference: int) -> str:
    """Huffman code of a difference's category, and the bits that tell it from the others (-32768 stands for 32768)."""
    category = abs(difference).bit_length()
    code = sum(2 ** (_CODE_LENGTHS[category] - length) for length in _CODE_LENGTHS[:category])
    text = f"{code:0{_CODE_LENGTHS[category]}b}"
    if category in (0, 16):
        return text
    return text + f"{difference if difference > 0 else difference + 2**category - 1:0{category}b}"
