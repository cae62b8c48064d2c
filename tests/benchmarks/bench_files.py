"""Memory and time of one large or hostile file of each format that ptxdist reads, and what is said about it.

    python tests/benchmarks/bench_files.py [PART OF A NAME ...] [--save files]

Each file is built here, as large as its format is accepted (64 megapixels), or as a known attack has it. It is read in
a process of its own by the functions that the commands call: `image` as `preprocess` reads a radiograph, `labels` as it
reads and judges labels, `patients` a patient map, `score` the masks of another tool; `predict` writes masks, overlays
and DICOM SEG with a small network, `viewer` answers with maps and with a DICOM SEG. The peak is that of the whole
process, which has 0.1 GB before the file is read, or 0.9 GB with torch and a model. Seconds are those of the processor.
"""

from __future__ import annotations

import argparse
import base64
import bz2
import gzip
import io
import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from textwrap import shorten
from typing import Any

from measuring import header, publish

SIDE = 8192  # 64 megapixels, the most that is accepted
MOST_BYTES, MOST_S = 6 * 2**30, 600  # of a process; more is reported as such
UID = "1.2.826.0.1.3680043.8.498.1"
EXPLICIT, DEFLATED, RLE = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5"
BASELINE, EXTENDED, LOSSLESS, JPEG_LS, JPEG_2000 = (f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 70, 80, 90))
RADIOGRAPH, SEGMENTATION = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.840.10008.5.1.4.1.1.66.4"
LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"


# --- files ----------------------------------------------------------------------------------------------------------


def element(tag: int, vr: str, value: bytes | str | int) -> bytes:
    """An explicit little endian element."""
    if isinstance(value, int):
        value = struct.pack("<H", value)
    content = value.encode() if isinstance(value, str) else value
    content += (b"\0" if vr in ("UI", "OB", "OW") else b" ") * (len(content) % 2)
    long = vr in ("OB", "OW", "SQ", "UN", "UT")
    length = struct.pack("<2xL" if long else "<H", len(content))
    return struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr.encode() + length + content


def sequence(tag: int, items: Iterable[bytes]) -> bytes:
    """A sequence of items of stated length."""
    return element(tag, "SQ", b"".join(b"\xfe\xff\0\xe0" + struct.pack("<L", len(item)) + item for item in items))


def fragments(parts: Iterable[bytes]) -> bytes:
    """Encapsulated pixel data with an empty offset table."""
    items = (b"\xfe\xff\0\xe0" + struct.pack("<L", len(part)) + part for part in (b"", *parts))
    return b"\xe0\x7f\x10\0OB\0\0\xff\xff\xff\xff" + b"".join(items) + b"\xfe\xff\xdd\xe0\0\0\0\0"


def dicom(
    pixels: bytes, *, syntax: str = EXPLICIT, bits: int = 16, stored: int = 0, rows: int = SIDE, columns: int = SIDE,
    sop_class: str = RADIOGRAPH, private: bytes = b"", more: bytes = b"", overlays: bytes = b"", frames: int = 1,
) -> bytes:  # fmt: skip
    """A DICOM file; `pixels` are the element of pixel data, or the bytes of uncompressed ones."""
    if not pixels.startswith(b"\xe0\x7f\x10\0"):
        pixels = element(0x7FE00010, "OW", pixels)
    stored = stored or bits
    meta = element(0x00020010, "UI", syntax)
    data = b"".join((
        element(0x00080016, "UI", sop_class), element(0x00080018, "UI", UID), element(0x00080060, "CS", "DX"), private,
        element(0x00100020, "LO", "P1"), element(0x0020000D, "UI", f"{UID}.1"), element(0x0020000E, "UI", f"{UID}.2"),
        element(0x00280002, "US", 1), element(0x00280004, "CS", "MONOCHROME2"), element(0x00280008, "IS", str(frames)),
        element(0x00280010, "US", rows), element(0x00280011, "US", columns), element(0x00280100, "US", bits),
        element(0x00280101, "US", stored), element(0x00280102, "US", stored - 1), element(0x00280103, "US", 0),
        more, overlays, pixels,
    ))  # fmt: skip
    if syntax == DEFLATED:
        deflate = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
        data = deflate.compress(data) + deflate.flush()
    return bytes(128) + b"DICM" + element(0x00020000, "UL", struct.pack("<L", len(meta))) + meta + data


def picture(bits: int = 16, side: int = SIDE, noise: int = 6) -> Any:
    """An image (side, side): smooth, with so many bits of noise, so that it is taken for a radiograph."""
    import numpy as np

    line = np.linspace(0, 2 ** (bits - 1), side)
    kind = np.uint8 if bits <= 8 else np.uint16
    image = ((line[:, None] + line[None]) / 2).astype(kind)
    image += np.random.default_rng(0).integers(0, 2**noise, image.shape, dtype=kind)
    return image


def compressed(frame: bytes, syntax: str, bits: int = 16, stored: int = 0, side: int = SIDE) -> bytes:
    """A DICOM file of a compressed image."""
    pixels = fragments([frame + bytes(len(frame) % 2)])
    return dicom(pixels, syntax=syntax, bits=bits, stored=stored, rows=side, columns=side)


def rle(segments: list[bytes]) -> bytes:
    """RLE data of these segments."""
    starts = [64 + sum(map(len, segments[:number])) for number in range(len(segments))]
    return struct.pack("<16L", len(segments), *starts, *[0] * (15 - len(segments))) + b"".join(segments)


def literal_runs(values: bytes) -> bytes:
    """An RLE segment without a repeated byte."""
    return b"".join(b"\x7f" + values[start : start + 128] for start in range(0, len(values), 128))


@lru_cache(maxsize=4)
def jpeg_2000(block: int = 64, tile: int = 0, precinct: int = 0, bits: int = 16, side: int = SIDE) -> bytes:
    """A JPEG 2000 stream with code blocks, tiles and precincts of these sides."""
    from PIL import Image

    options: dict[str, Any] = {"tile_size": (tile, tile)} if tile else {}
    options |= {"precinct_size": (precinct, precinct)} if precinct else {}
    file = io.BytesIO()
    image = Image.fromarray(picture(bits, side, 2))
    image.save(file, "JPEG2000", codeblock_size=(block, block), no_jp2=True, **options)
    return file.getvalue()


def with_blocks_of_4(stream: bytes) -> bytes:
    """The stream with a header that says code blocks of 4x4."""
    place = stream.index(b"\xff\x52") + 10
    return stream[:place] + b"\0\0" + stream[place + 2 :]


def with_tiles(stream: bytes, side: int) -> bytes:
    """The stream with a header that says tiles of this side."""
    return stream[:24] + struct.pack(">LL", side, side) + stream[32:]


def with_layers(stream: bytes, layers: int) -> bytes:
    """The stream with another number of quality layers than it has."""
    place = stream.index(b"\xff\x52") + 6
    return stream[:place] + struct.pack(">H", layers) + stream[place + 2 :]


def progressive(scans: int) -> bytes:
    """A progressive JPEG with so many scans of the whole image."""
    from PIL import Image

    content = saved(Image.fromarray(picture(8, noise=1)), "JPEG", quality=10, progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * (scans - content.count(b"\xff\xda")) + b"\xff\xd9"


def png(**options: Any) -> bytes:
    """A PNG of an array as cv2 writes it, fast."""
    import cv2

    return bytes(cv2.imencode(".png", options["pixels"], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1])


def saved(image: Any, kind: str, **options: Any) -> bytes:
    """A picture as Pillow writes it."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def disc(side: int = SIDE) -> Any:
    """A mask uint8 (side, side), a disc of 255."""
    import cv2
    import numpy as np

    return cv2.circle(np.zeros((side, side), np.uint8), (side // 3, side // 3), side // 5, 255, -1)


def colours(mode: str) -> Any:
    """A picture of a disc in a mode of Pillow's."""
    from PIL import Image

    grey = Image.fromarray(disc())
    if mode == "RGB":
        empty = Image.new("L", grey.size)
        return Image.merge("RGB", (grey, empty, empty))
    return grey.point(lambda value: value // 255, "L").convert(mode) if mode in ("I", "F") else grey.convert(mode)


def tiff_of_offsets(count: int) -> bytes:
    """A TIFF whose list of strips has so many entries."""
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, count, 200),
            (277, 3, 1, 1), (278, 3, 1, 8), (279, 4, count, 200)]  # fmt: skip
    entries = b"".join(struct.pack("<HHLL", *tag) for tag in tags)
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    return head.ljust(200, b"\0") + struct.pack("<L", 8) * count


def nifti(values: Any, extension: int = 0, kind: int = 2) -> bytes:
    """A NIfTI-1 file of an array (columns, rows), with an extension of so many zero bytes."""
    head = bytearray(352)
    struct.pack_into("<L", head, 0, 348)
    struct.pack_into("<8H", head, 40, 2, *values.shape, 1, 1, 1, 1, 1)
    struct.pack_into("<HH", head, 70, kind, 8 * values.dtype.itemsize)
    struct.pack_into("<8f", head, 76, *[1.0] * 8)
    struct.pack_into("<ff", head, 108, 352 + extension, 1.0)
    head[344:352] = b"n+1\0" + bytes([bool(extension), 0, 0, 0])
    more = struct.pack("<LL", extension, 6) + bytes(extension - 8) if extension else b""
    return bytes(head) + more + values.T.tobytes()


def segmentation(
    pixels: bytes, frames: int, *, bits: int = 1, side: int = SIDE, kind: str = "BINARY", segments: int = 1,
    syntax: str = EXPLICIT, extra: bytes = b"", own: bool = False,
) -> bytes:  # fmt: skip
    """A DICOM SEG; frame n is of segment n mod `segments` + 1; with `own` each is of an instance of its own."""

    def group(number: int) -> bytes:
        instance = f"{UID}.{number}" if own else UID
        source = sequence(0x00082112, [element(0x00081155, "UI", instance)])
        segment = sequence(0x0062000A, [element(0x0062000B, "US", number % segments + 1)])
        return sequence(0x00089124, [source]) + segment

    numbers = (element(0x00620004, "US", number & 0xFFFF) for number in range(1, segments + 1))
    described = (number + element(0x00620005, "LO", "x") for number in numbers)
    more = element(0x00620001, "CS", kind) + sequence(0x00620002, described)
    more += element(0x0062000E, "US", 255) if kind == "FRACTIONAL" else b""
    groups = sequence(0x52009230, map(group, range(frames)))
    sop_class = LABEL_MAP if kind == "LABELMAP" else SEGMENTATION
    return dicom(
        pixels, bits=bits, rows=side, columns=side, sop_class=sop_class, more=more + groups, frames=frames,
        syntax=syntax, private=extra,
    )  # fmt: skip


def chequered(side: int, frames: int) -> bytes:
    """Frames of bits, every other pixel of a column inside."""
    import numpy as np

    frame = np.zeros((side, side), np.uint8)
    frame[::2] = 1
    return bytes(np.packbits(frame.reshape(-1), bitorder="little").tobytes()) * frames


def coco(annotations: Iterable[str], images: int = 1) -> bytes:
    """A COCO file with these annotations."""
    listed = ",".join(
        f'{{"id":{number},"file_name":"{number}.png","height":{SIDE},"width":{SIDE}}}' for number in range(images)
    )
    return f'{{"images":[{listed}],"categories":[],"annotations":[{",".join(annotations)}]}}'.encode()


def polygons(count: int, points: int, images: int = 1) -> Iterable[str]:
    """Annotations: circles of so many points."""
    from math import cos, pi, sin

    ring = ",".join(f"{4000 + 900 * f(2 * pi * number / points):.2f}" for number in range(points) for f in (cos, sin))
    return (f'{{"image_id":{number % images},"segmentation":[[{ring}]]}}' for number in range(count))


def zigzags(count: int) -> Iterable[str]:
    """Annotations: outlines that cross the whole image 500 times."""
    points = ",".join(f"{SIDE * (number % 2)},{number}" for number in range(500))
    return (f'{{"image_id":0,"segmentation":[[{points}]]}}' for _ in range(count))


def counted(images: int) -> Iterable[str]:
    """Annotations: compressed run lengths of chequered masks, two million runs for each image."""
    runs = 2**22 - 8
    text = "111" + "0" * (runs - 3) + _rle_number(SIDE * SIDE - runs - 1)  # differences from the fourth number on
    size = f'"size":[{SIDE},{SIDE}]'
    return (f'{{"image_id":{n},"segmentation":{{{size},"counts":"{text}"}}}}' for n in range(images))


def _rle_number(value: int) -> str:
    text = ""
    while True:
        group, value = value & 31, value >> 5
        more = not (value == 0 and not group & 16)
        text += chr(48 + (group | 32 * more))
        if not more:
            return text


def labelme(shapes: int) -> bytes:
    """A LabelMe file with masks of one pixel."""
    import numpy as np

    dot = base64.b64encode(png(pixels=np.full((1, 1), 255, np.uint8))).decode()
    one = f'{{"label":"x","shape_type":"mask","points":[[5,5],[5,5]],"mask":"{dot}"}}'
    return f'{{"imageHeight":{SIDE},"imageWidth":{SIDE},"shapes":[{",".join([one] * shapes)}]}}'.encode()


def table(rows: Iterable[str], head: str = "ImageId,EncodedPixels") -> bytes:
    """A CSV file."""
    return "\n".join((head, *rows)).encode()


def stored_zip(members: Iterable[tuple[str, bytes]], method: int = zipfile.ZIP_STORED, level: int = 1) -> bytes:
    """A zip file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method, compresslevel=level) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue()


def bz2_bomb(name: str, size: int) -> bytes:
    """A zip file whose member says 1,000 bytes and unpacks to `size`, by bzip2."""
    content = bytes(1000)
    packed = bz2.compress(bytes(size))
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 46, 0, 12, 0, 33, zlib.crc32(content), len(packed), 1000, len(name), 0)
    central = struct.pack("<4s6H3L5H2L", b"PK\1\2", 46, 46, 0, 12, 0, 33, zlib.crc32(content), len(packed), 1000,
                          len(name), 0, 0, 0, 0, 0, 0)  # fmt: skip
    body = local + name.encode() + packed
    directory = central + name.encode()
    return body + directory + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(directory), len(body), 0)


def many_members(count: int, content: bytes = b"") -> bytes:
    """A zip file with so many members, all at the same place."""
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 33, zlib.crc32(content), len(content), len(content), 5, 0)
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 33, zlib.crc32(content), len(content), len(content),
                        5, 0, 0, 0, 0, 0, 0)  # fmt: skip
    body = local + b"a.dcm" + content
    directory = (entry + b"a.dcm") * count
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), len(body))
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(body) + len(directory), 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return body + directory + end64 + locator + end


def private(count: int, size: int = 2) -> bytes:
    """Private elements in increasing order."""
    return b"".join(
        element((0x0009 + 2 * (number // 0xEF00)) << 16 | 0x1000 + number % 0xEF00, "LO", b"x" * size)
        for number in range(count)
    )


def nested(depth: int) -> bytes:
    """Sequences within each other."""
    return b"\x09\0\x10\x10SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff" * depth


def lut(tag: int) -> bytes:
    """A look-up table of 65,536 entries."""
    import numpy as np

    entries = np.arange(65536, dtype="<u2").tobytes()
    return sequence(tag, [element(0x00283002, "US", struct.pack("<3H", 0, 0, 16)) + element(0x00283006, "OW", entries)])


def native(**options: Any) -> bytes:
    """An uncompressed image of 16 bits and of the largest size."""
    return dicom(picture().tobytes(), **options)


def encoded(name: str, *arguments: Any, bits: int = 16, noise: int = 6, **options: Any) -> bytes:
    """An image through an encoder of imagecodecs."""
    import imagecodecs

    return bytes(getattr(imagecodecs, name)(picture(bits, noise=noise), *arguments, **options))


# --- the table ------------------------------------------------------------------------------------------------------

Build = Callable[[], bytes]
# name: way, name of the file, its content; a name that starts with ! is of a hostile file
FILES: dict[str, tuple[str, str, Build]] = {
    "DICOM uncompressed": ("image", "a.dcm", native),
    "DICOM uncompressed, 12 bits, padding": (
        "image", "a.dcm",
        lambda: dicom(picture(12).tobytes(), stored=12, more=element(0x00280120, "US", 0)),
    ),
    "DICOM deflated": ("image", "a.dcm", lambda: native(syntax=DEFLATED)),
    "! DICOM deflated, 200 MB of zeros": (
        "image", "a.dcm", lambda: dicom(bytes(200 * 2**20), syntax=DEFLATED),
    ),
    "DICOM RLE of noise": (
        "image", "a.dcm",
        lambda: compressed(
            rle([literal_runs((picture() >> s).astype("u1").tobytes()) for s in (8, 0)]), RLE
        ),
    ),
    "DICOM RLE of runs of two": (
        "image", "a.dcm",
        lambda: compressed(
            rle([b"".join(bytes([255, x]) for x in (*range(64), *range(64, 0, -1))) * (SIDE * SIDE // 256)] * 2), RLE
        ),
    ),
    "! DICOM RLE of 130 MB without a value": ("image", "a.dcm", lambda: compressed(rle([b"\x80" * 2**26] * 2), RLE)),
    "! DICOM RLE of runs of two, one byte short": (
        "image", "a.dcm", lambda: compressed(rle([b"\xff\0" * (SIDE * SIDE // 2 - 1)] * 2), RLE),
    ),
    "DICOM JPEG": ("image", "a.dcm", lambda: compressed(encoded("jpeg8_encode", 95, bits=8), BASELINE, 8)),
    "! DICOM JPEG progressive, 100 scans": ("image", "a.dcm", lambda: compressed(progressive(100), BASELINE, 8)),
    "DICOM JPEG of 12 bits": (
        "image", "a.dcm",
        lambda: compressed(encoded("jpeg8_encode", 100, bits=12, bitspersample=12, noise=11), EXTENDED, 16, 12),
    ),
    "! DICOM JPEG of 12 bits, cut, with zeros": (
        "image", "a.dcm",
        lambda: compressed(
            encoded("jpeg8_encode", 100, bits=12, bitspersample=12, noise=11)[:-300] + b"\0\0\0\0\xff\xd9",
            EXTENDED, 16, 12,
        ),
    ),
    "DICOM JPEG Lossless": (
        "image", "a.dcm", lambda: compressed(encoded("ljpeg_encode", bitspersample=16), LOSSLESS),
    ),
    "DICOM JPEG-LS": ("image", "a.dcm", lambda: compressed(encoded("jpegls_encode"), JPEG_LS)),
    "DICOM JPEG 2000, blocks of 64x64": ("image", "a.dcm", lambda: compressed(jpeg_2000(), JPEG_2000)),
    "DICOM JPEG 2000, blocks of 32x32": ("image", "a.dcm", lambda: compressed(jpeg_2000(32), JPEG_2000)),
    "DICOM JPEG 2000, blocks of 16x16": ("image", "a.dcm", lambda: compressed(jpeg_2000(16), JPEG_2000)),
    "DICOM JPEG 2000, blocks of 8x8": ("image", "a.dcm", lambda: compressed(jpeg_2000(8), JPEG_2000)),
    "! DICOM JPEG 2000, blocks of 4x4": (
        "image", "a.dcm", lambda: compressed(with_blocks_of_4(jpeg_2000()), JPEG_2000),
    ),
    "DICOM JPEG 2000, 16 MP, blocks of 4x4": (
        "image", "a.dcm", lambda: compressed(jpeg_2000(4, side=4096), JPEG_2000, side=4096),
    ),
    "DICOM JPEG 2000, tiles of 1024": ("image", "a.dcm", lambda: compressed(jpeg_2000(tile=1024), JPEG_2000)),
    "DICOM JPEG 2000, 16 MP, tiles of 1024, blocks of 4x4": (
        "image", "a.dcm", lambda: compressed(jpeg_2000(4, tile=1024, side=4096), JPEG_2000, side=4096),
    ),
    "DICOM JPEG 2000, tiles of 128": ("image", "a.dcm", lambda: compressed(jpeg_2000(tile=128), JPEG_2000)),
    "DICOM JPEG 2000, tiles of 64": ("image", "a.dcm", lambda: compressed(jpeg_2000(tile=64), JPEG_2000)),
    "! DICOM JPEG 2000, 61,504 tiles": ("image", "a.dcm", lambda: compressed(with_tiles(jpeg_2000(), 33), JPEG_2000)),
    "DICOM JPEG 2000, precincts of 64": ("image", "a.dcm", lambda: compressed(jpeg_2000(precinct=64), JPEG_2000)),
    "! DICOM JPEG 2000, 65,535 layers": (
        "image", "a.dcm", lambda: compressed(with_layers(jpeg_2000(), 65535), JPEG_2000),
    ),
    "! DICOM JPEG 2000, precincts and layers": (
        "image", "a.dcm",
        lambda: compressed(with_layers(jpeg_2000(precinct=64), 65535)[:-2] + bytes(2**26) + b"\xff\xd9", JPEG_2000),
    ),
    "DICOM JPEG 2000 in 90,000 fragments": (
        "image", "a.dcm",
        lambda: dicom(fragments(_parts(jpeg_2000(), 90_000)), syntax=JPEG_2000),
    ),
    "! DICOM in 5 million fragments": (
        "image", "a.dcm", lambda: dicom(fragments([b"ab"] * 5_000_000), syntax=JPEG_2000),
    ),
    "DICOM, 99,000 private elements": ("image", "a.dcm", lambda: native(private=private(99_000))),
    "DICOM, 30 MB of private elements": ("image", "a.dcm", lambda: native(private=private(1000, 30_000))),
    "! DICOM, two million private elements": ("image", "a.dcm", lambda: native(private=private(2_000_000))),
    "! DICOM, sequences 100,000 deep": ("image", "a.dcm", lambda: native(private=nested(100_000))),
    "! DICOM, a sequence of two million items": (
        "image", "a.dcm", lambda: native(private=sequence(0x00091010, [b""] * 2_000_000)),
    ),
    "DICOM, look-up tables": ("image", "a.dcm", lambda: native(more=lut(0x00283000) + lut(0x00283010))),
    "DICOM, three overlays": (
        "image", "a.dcm",
        lambda: native(overlays=b"".join(element(0x60003000 + (n << 17), "OW", bytes(2**23)) for n in range(3))),
    ),
    "PNG of 16 bits": ("image", "a.png", lambda: png(pixels=picture())),
    "PNG in three equal colours": (
        "image", "a.png", lambda: saved(_three(picture(8, noise=2)), "PNG", compress_level=1),
    ),
    "! PNG of 142 bytes, 1 x 32,000": ("image", "a.png", lambda: saved(_blank(32000, 1), "PNG")),
    "! PNG in 90,000 chunks of text": (
        "image", "a.png", lambda: _chunks(png(pixels=picture(8, noise=2)), 90_000, b"tEXta\0" + bytes(1000)),
    ),
    "mask PNG": ("labels", "a.png", lambda: png(pixels=disc())),
    "mask PNG in colours": ("labels", "a.png", lambda: saved(colours("RGB"), "PNG", compress_level=1)),
    "mask PNG with a palette": ("labels", "a.png", lambda: saved(colours("P"), "PNG", compress_level=1)),
    "mask PNG with transparency": ("labels", "a.png", lambda: saved(colours("RGBA"), "PNG", compress_level=1)),
    "mask TIFF in colours": ("labels", "a.tif", lambda: saved(colours("RGB"), "TIFF", compression="tiff_lzw")),
    "mask TIFF with transparency": ("labels", "a.tif", lambda: saved(colours("RGBA"), "TIFF", compression="tiff_lzw")),
    "mask TIFF of floats": ("labels", "a.tif", lambda: saved(colours("F"), "TIFF", compression="tiff_lzw")),
    "mask GIF": ("labels", "a.gif", lambda: saved(colours("L"), "GIF")),
    "mask BMP": ("labels", "a.bmp", lambda: saved(colours("L"), "BMP")),
    "! mask TIFF with a list of 20 million strips": ("labels", "a.tif", lambda: tiff_of_offsets(20_000_000)),
    "! mask PNG, chequered": ("labels", "a.png", lambda: png(pixels=_chequer())),
    "mask NIfTI of float64, gzip": ("labels", "a.nii.gz", lambda: gzip.compress(nifti(_float_disc(), kind=64), 1)),
    "! mask NIfTI, gzip, an extension of 2 GB": (
        "labels", "a.nii.gz", lambda: gzip.compress(nifti(disc(64), extension=2**31 - 2**20), 1),
    ),
    "COCO, 200,000 outlines of 50 points": ("labels", "a.json", lambda: coco(polygons(200_000, 50, 100_000), 100_000)),
    "! COCO, 450 MB of empty lists": ("labels", "a.json", lambda: coco(["[]," * 150_000_000 + "[]"])),
    "! COCO, 20,000 outlines that cross the image": ("labels", "a.json", lambda: coco(zigzags(20_000))),
    "! COCO, 64 chequered masks": ("labels", "a.json", lambda: coco(counted(64), 64)),
    "! LabelMe, 20,000 masks of a pixel": ("labels", "a.json", lambda: labelme(20_000)),
    "DICOM SEG, 16 segments": ("labels", "a.dcm", lambda: segmentation(_disc_bits() * 16, 16, segments=16)),
    "DICOM SEG, fractional": (
        "labels", "a.dcm", lambda: segmentation(disc().tobytes() * 2, 2, bits=8, kind="FRACTIONAL", segments=2),
    ),
    "DICOM SEG, 4,096 frames of 512x512": (
        "labels", "a.dcm", lambda: segmentation(_disc_bits(512) * 4096, 4096, side=512, segments=4),
    ),
    "DICOM SEG, label map of 16 bits": (
        "labels", "a.dcm",
        lambda: segmentation((disc() // 255).astype("<u2").tobytes(), 1, bits=16, kind="LABELMAP"),
    ),
    "DICOM SEG, RLE": (
        "labels", "a.dcm",
        lambda: segmentation(
            fragments([rle([literal_runs(disc(2048).tobytes())])] * 16), 16, bits=8, side=2048, kind="FRACTIONAL",
            segments=16, syntax=RLE,
        ),
    ),
    "! DICOM SEG, 4,096 chequered frames": (
        "labels", "a.dcm", lambda: segmentation(chequered(512, 4096), 4096, side=512),
    ),
    "! DICOM SEG, label map of 60,000 segments": (
        "labels", "a.dcm",
        lambda: segmentation(_numbered(), 1, bits=16, kind="LABELMAP", segments=60_000),
    ),
    "! DICOM SEG, ten million items": (
        "labels", "a.dcm",
        lambda: segmentation(_disc_bits(64), 1, side=64, extra=sequence(0x00091010, [b""] * 10_000_000)),
    ),
    "! DICOM SEG, five million segments": (
        "labels", "a.dcm", lambda: segmentation(_disc_bits(64), 1, side=64, segments=5_000_000),
    ),
    "table of 100,000 masks": (
        "labels", "a.csv", lambda: table(f"{number},{_runs(128)}" for number in range(100_000)),
    ),
    "! table, a mask of 60 MB": ("labels", "a.csv", lambda: table(["0," + "1 1 " * 15_000_000])),
    "! table, a mask of 60 MB with tabs": ("labels", "a.csv", lambda: table(["0," + "1\t1\t" * 15_000_000])),
    "! table, 500 masks of 400 kB": (
        "labels", "a.csv", lambda: table(f"{number}," + "1 1 " * 100_000 for number in range(500)),
    ),
    "! table, 20,000 masks of an image": (
        "labels", "a.csv", lambda: table(f"0,{SIDE * SIDE - 2 * number - 2} 1" for number in range(20_000)),
    ),
    "! table, five million rows": ("labels", "a.csv", lambda: table(f"{number},-1" for number in range(5_000_000))),
    "! table, zip of bzip2, 4 GB": ("labels", "a.csv.zip", lambda: bz2_bomb("a.csv", 2**32 - 2**20)),
    "! table, gzip of 1 GB": (
        "labels", "a.csv.gz", lambda: gzip.compress(table(["0,-1"] + ["x" * 2**20] * 1000), 1),
    ),
    "! table, zip with 1.4 million members": ("labels", "a.csv.zip", lambda: many_members(1_400_000)),
    "Excel workbook": ("labels", "a.xlsx", lambda: stored_zip([("[Content_Types].xml", b"<a/>")])),
    "Parquet": ("labels", "a.parquet", lambda: b"PAR1" + bytes(1000) + b"PAR1"),
    "patients of 650,000 images": (
        "patients", "a.csv", lambda: table((f"{UID}.{n},P{n // 3:08}" for n in range(650_000)), "ImageId,PatientID"),
    ),
    "! patients, five million rows": (
        "patients", "a.csv", lambda: table((f"{n},P{n}" for n in range(5_000_000)), "ImageId,PatientID"),
    ),
    "score: PNG of 16 bits": ("score", "a.png", lambda: png(pixels=picture())),
    "score: NIfTI of float64": ("score", "a.nii.gz", lambda: gzip.compress(nifti(_float_disc(), kind=64), 1)),
    "score: table of 100,000 masks": (
        "score", "a.csv", lambda: table(f"{number},{_runs(128)}" for number in range(100_000)),
    ),
    "predict: DICOM of 64 MP, with DICOM SEG": ("predict", "a.dcm", native),
    "predict: DICOM of 10,000 x 6,700": (
        "predict", "a.dcm", lambda: dicom(picture(side=10_000)[:6700].tobytes(), rows=6700, columns=10_000),
    ),
    "predict: JPEG 2000 of 64 MP": ("predict", "a.dcm", lambda: compressed(jpeg_2000(), JPEG_2000)),
    "predict: zip of eight images of 64 MP": (
        "predict", "a.zip",
        lambda: stored_zip(
            (f"{n}.dcm", content.replace(UID.encode(), f"{UID[:-1]}{n}".encode()))
            for content in [native()]
            for n in range(8)
        ),
    ),
    "! predict: zip of bzip2, 4 GB": ("predict", "a.zip", lambda: bz2_bomb("a.dcm", 2**32 - 2**20)),
    "! predict: zip with 1.4 million members": ("predict", "a.zip", lambda: many_members(1_400_000)),
    "! predict: zip whose 1,000 members overlap": (
        "predict", "a.zip", lambda: many_members(1000, dicom(picture(side=512).tobytes(), rows=512, columns=512)),
    ),
    "! predict: zip in a zip, encrypted, .., twice": ("predict", "a.zip", lambda: _odd_zip()),
    "viewer: DICOM of 64 MP": ("viewer", "a.dcm", native),
    "viewer: DICOM of 10,000 x 6,700": (
        "viewer", "a.dcm", lambda: dicom(picture(side=10_000)[:6700].tobytes(), rows=6700, columns=10_000),
    ),
}  # fmt: skip


def _parts(content: bytes, count: int) -> list[bytes]:
    step = -(-len(content) // count // 2) * 2
    return [content[start : start + step].ljust(step, b"\0") for start in range(0, len(content), step)]


def _three(grey: Any) -> Any:
    from PIL import Image

    channel = Image.fromarray(grey)
    return Image.merge("RGB", (channel, channel, channel))


def _blank(width: int, height: int) -> Any:
    from PIL import Image

    return Image.new("L", (width, height))


def _chunks(content: bytes, count: int, chunk: bytes) -> bytes:
    one = struct.pack(">L", len(chunk) - 4) + chunk + struct.pack(">L", zlib.crc32(chunk))
    return content[:33] + one * count + content[33:]


def _chequer() -> Any:
    mask = disc() * 0
    mask[::2] = 255
    return mask


def _float_disc() -> Any:
    import numpy as np

    return (disc() // 255).T.astype(np.float64)


def _disc_bits(side: int = SIDE) -> bytes:
    import numpy as np

    return bytes(np.packbits(disc(side).reshape(-1) // 255, bitorder="little").tobytes())


def _numbered() -> bytes:
    import numpy as np

    values = np.zeros((SIDE, SIDE), "<u2")
    values[::200, ::50] = (np.arange(41 * 164) * 8 % 60_000 + 1).reshape(41, 164)
    return values.tobytes()


def _runs(count: int) -> str:
    return "400000 20" + f" {SIDE - 20} 20" * (count - 1)


def _odd_zip() -> bytes:
    small = dicom(picture(side=512).tobytes(), rows=512, columns=512)
    members = [("../../a.dcm", small), ("b.dcm", small), ("c.dcm", b"x"), ("d.zip", stored_zip([("e.dcm", small)]))]
    content = bytearray(stored_zip([*members, ("encrypted.dcm", small)]))
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.rindex(mark) + place] |= 1
    return bytes(content)


# --- reading --------------------------------------------------------------------------------------------------------


def read_image(path: Path) -> str:
    """As `preprocess` reads a radiograph."""
    from ptxdist.cache.render import fit_square, resize
    from ptxdist.dicom.guard import guarded
    from ptxdist.dicom.radiograph import read_bytes, read_header, read_radiograph

    with guarded():
        read_header(read_bytes(path), b"", path.name)
    with guarded():
        square = fit_square(read_radiograph(read_bytes(path), name=path.name).pixels)
        assert [resize(square, size).shape for size in (256, 512)]
    return "read"


def read_masks(path: Path) -> str:
    """As `preprocess` reads and judges labels, and draws the first mask."""
    from ptxdist.cache.render import fit_square, resize
    from ptxdist.finding import load_finding
    from ptxdist.labels import rle as texts
    from ptxdist.labels.dialect import check_mask_files, detect_dialect
    from ptxdist.labels.reader import read_any

    labels = read_any(path)
    sizes = labels.sizes or dict.fromkeys(list(labels.masks)[:1000], (SIDE, SIDE))
    _, limits = load_finding("pneumothorax")
    if labels.sizes is None:
        detect_dialect(labels.masks, sizes, limits=limits)
    else:
        check_mask_files(labels.masks, sizes, path, labels.kind, limits)
    for case_id, size in list(sizes.items())[:10]:
        texts.area_px(labels.masks[case_id], *size)
        mask = fit_square(texts.decode_columns(labels.masks[case_id], *size, value=255))
        assert resize(mask, 256).shape
    return f"{len(labels.masks):,} images"


def read_map(path: Path) -> str:
    """As `preprocess` reads patients."""
    from ptxdist.labels.patients import read_patients

    return f"{len(read_patients(path)):,} images"


def read_scored(path: Path) -> str:
    """As `score` reads masks."""
    from ptxdist.labels.masks import open_predictions

    masks = open_predictions(path if path.suffix == ".csv" else path.parent)
    sizes = dict(masks.sizes) or dict.fromkeys(list(masks.ids), (SIDE, SIDE))
    masks.prepare(sizes, lambda done, total: None)
    for case_id, size in sizes.items():
        masks.spans(case_id, size)
    return masks.describe()[0]


def predict(path: Path) -> str:
    """As `predict --write seg`."""
    from bench_predict import make_predictor

    from ptxdist.predict.folder import REJECTS, predict_files

    out = path.parent / "out"
    predictor = make_predictor(256)
    result = predict_files([path], out, predictor, [], outputs=("masks", "overlays", "seg"))
    reasons = sorted({line.rpartition(",")[2] for line in (out / REJECTS).read_text().splitlines()[1:]})
    said = [json.loads(found.read_text())["seg_reason"] for found in sorted((out / "findings").iterdir())[:1]]
    return "; ".join([f"{result.predicted} predicted, {result.rejected} rejected", *said, *reasons])


def view(path: Path) -> str:
    """As the viewer answers a file."""
    from bench_predict import make_predictor

    from ptxdist.predict.worker import reply_to

    predictor = make_predictor(256)
    replies = [reply_to(path.read_bytes(), wanted, predictor) for wanted in ("maps", "seg")]
    return ", ".join(
        f"{reply.status} {'' if reply.status == 200 else reply.body.decode()}".strip() for reply in replies
    )


WAYS = {
    "image": read_image, "labels": read_masks, "patients": read_map, "score": read_scored, "predict": predict,
    "viewer": view,
}  # fmt: skip


def read(way: str, path: Path) -> None:
    """Read one file in this process and print what it took."""
    resource.setrlimit(resource.RLIMIT_AS, (2 * MOST_BYTES, 2 * MOST_BYTES))
    from ptxdist.errors import PtxdistError

    started = time.process_time()  # the machine may have other work
    try:
        said = WAYS[way](path)
    except PtxdistError as error:
        said = str(error).replace(str(path.parent), "…")
    except MemoryError:
        said = "MemoryError"
    except Exception as error:
        said = f"TRACEBACK {type(error).__name__}: {error}"
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(
        json.dumps(
            {
                "s": round(time.process_time() - started, 1),
                "gb": round(int(peak.split()[1]) * 1024 / 1e9, 2),
                "said": said,
            }
        )
    )


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Build a file, read it in another process, and say what that took."""
    way, file_name, build = FILES[name]
    path = folder / file_name
    path.write_bytes(build())
    row: dict[str, Any] = {"name": name, "way": way, "mb": round(path.stat().st_size / 1e6, 3)}
    command = [sys.executable, __file__, "--read", way, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MOST_S)
        lines = done.stdout.splitlines()
        row |= json.loads(lines[-1]) if lines else {"said": f"ended with {done.returncode}: {done.stderr[-300:]}"}
    except subprocess.TimeoutExpired:
        row |= {"s": MOST_S, "said": f"not done after {MOST_S} s"}
    return row


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of the names of files; all without one")
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--save", help="name of the files in tests/benchmarks/results, without date and ending")
    options = parser.parse_args()
    if options.read:
        read(options.read[0], Path(options.read[1]))
        return
    rows = []
    for name in FILES:
        if not options.names or any(part in name for part in options.names):
            with tempfile.TemporaryDirectory(prefix="ptxdist-files-") as folder:
                rows.append(measure(name, Path(folder)))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    show(rows, options.save)


def show(rows: list[dict[str, Any]], save: str | None) -> None:
    """Print the table of these rows; with a name, keep it."""
    text = "\n".join(
        ["| file | MB | read as | peak, GB | seconds | what is said |", "|---|---|---|---|---|---|"]
        + [
            f"| {row['name'].removeprefix('! ')}{' (hostile)' * row['name'].startswith('!')} | {row['mb']:,.3g} "
            f"| {row['way']} | {row.get('gb', float('nan')):.2f} | {row.get('s', float('nan')):.1f} "
            f"| {shorten(row['said'], 200)} |"
            for row in rows
        ]
    )
    packages = ("ptxdist", "numpy", "pydicom", "imagecodecs", "pillow", "nibabel", "highdicom", "torch")
    report = header("Memory and time of one file", packages, side_px=SIDE)
    publish({**report, "rows": rows}, text, save)


if __name__ == "__main__":
    main()
