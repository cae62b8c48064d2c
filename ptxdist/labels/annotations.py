"""JSON files of annotation tools, COCO and LabelMe -> masks.

COCO (cocodataset.org, "Data format"): `images` with their sizes, `annotations` of them with polygons, or run lengths in
numbers or compressed to a text as pycocotools does. LabelMe: one file an image, with `shapes`. The masks of an image
are united. An image without annotations, or a file without shapes, is negative: the file states it. Paths in these
files are never opened; the name of the image, without its suffix, is its id.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ptxdist.errors import LabelError, raise_limit
from ptxdist.files import open_at_once
from ptxdist.labels import rle
from ptxdist.labels.evidence import Size
from ptxdist.labels.found import FoundMask, about, bare_id, place_of, read_size, short
from ptxdist.labels.polygons import fill, fill_circle, read_corners
from ptxdist.labels.rle import Spans

MAX_MEMORY = 800_000_000  # bytes that a file takes when it is read: about 140 MB of outlines
_MOST_COUNTS = 2**22  # of one mask; an outline drawn by hand has some thousands
_MOST_WORK = 2**27  # the outlines of 100,000 lungs take half of it
_RUN, _PIXELS = 8, 32  # units of a run; pixels to a unit
_UNUSABLE = ("point", "points", "line", "linestrip")


def kind_of_json(content: object) -> Literal["COCO", "LabelMe", ""]:
    """The tool whose file this is; "" for any other JSON."""
    if not isinstance(content, dict):
        return ""
    if isinstance(content.get("images"), list) and isinstance(content.get("annotations"), list):
        return "COCO"
    return "LabelMe" if isinstance(content.get("shapes"), list) else ""


def load_json(folder: Path, path: Path) -> Any:
    """The content of a JSON file; LabelError when it cannot be read."""
    place = place_of(folder, path)
    try:
        with open(path, "rb", opener=open_at_once) as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(size) if 2 * size <= MAX_MEMORY else b""
        if (memory := max(2 * size, _memory_of(content))) > MAX_MEMORY:
            raise LabelError(
                f"{place} would take about {memory / 1e9:.2f} GB of memory; at most {MAX_MEMORY / 1e9:.2f} GB are "
                "taken. Split it into several files in one folder, each of some of the images"
            )
        return json.loads(content.decode("utf-8-sig"))
    except OSError as error:
        raise LabelError(f"{place} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise LabelError(f"{place} is damaged: it is not whole JSON in UTF-8") from None


def _memory_of(content: bytes) -> int:
    """About how many bytes a JSON text and its values take in Python."""
    # The text; numbers and their places, texts, lists, and objects.
    text = len(content) * (2 if content.isascii() else 5)
    return text + sum(content.count(sign) * size for sign, size in ((b",", 33), (b'"', 25), (b"[", 60), (b"{", 200)))


def read_annotations(folder: Path, path: Path) -> list[FoundMask]:
    """The masks of all images of a COCO file, or of the one of a LabelMe file: one for each class of an image.

    Other JSON in a folder says nothing. Raises LabelError with the image's id, or the number of the annotation, for
    what is missing, contradicts itself or cannot be an outline in its image.
    """
    place, content = place_of(folder, path), load_json(folder, path)
    kind = kind_of_json(content)
    if not kind and folder != path:
        return []
    if not kind:
        raise LabelError(f"{place} is JSON of neither COCO (images, annotations) nor LabelMe (shapes)")
    try:
        return _coco(content) if kind == "COCO" else _labelme(content, path.name)
    except LabelError as error:
        raise LabelError(f"{place}: {error}") from None


# --- COCO -----------------------------------------------------------------------------------------------------------


def _coco(content: dict[str, Any]) -> list[FoundMask]:
    names = {_id(item, "id"): _class(item.get("name")) for item in _dicts(content.get("categories"), "category")}
    images: dict[str, tuple[str, Size]] = {}
    drawn: dict[str, list[tuple[int, str, object]]] = {}  # by image: number, class and outline of its annotations
    ids = set[str]()
    for number, image in enumerate(_dicts(content["images"], "image")):
        key, where = _id(image, "id"), f"image {number + 1}"
        if not key or key in images:
            raise LabelError(f"{where} has no id of its own")
        with about(where):
            case_id = bare_id(_text(image.get("file_name"), "file_name"))
            images[key] = case_id, read_size(image.get("height"), image.get("width"))
        drawn[key] = []
        if case_id in ids:
            raise LabelError(f"two images are named {case_id}")
        ids.add(case_id)
    for number, item in enumerate(_dicts(content["annotations"], "annotation")):
        key, category = _id(item, "image_id"), _id(item, "category_id")
        if key not in images:
            raise LabelError(f"annotation {number + 1} is of an image that is not in the file ({short(key)})")
        with about(f"annotation {number + 1}, of {images[key][0]},"):
            if names and category not in names and (category or len(names) > 1):
                known = f"is of a category that is not in the file ({short(category)})"
                raise LabelError(known if category else "has no category, and the file has several")
        drawn[key].append((number, names.get(category) or _class(category), item.get("segmentation")))
    work, found = _Work(), list[FoundMask]()
    for key, (case_id, size) in images.items():  # whose spans take far more memory than their texts
        spans: dict[str, list[Spans]] = {}
        for number, name, outline in drawn[key]:
            with about(f"annotation {number + 1}, of {case_id},"):
                rle.add(spans.setdefault(name, []), _segmentation(outline, size, work))
        found += _by_class(spans, case_id, size, "COCO")
    return found


def _id(item: Mapping[str, object], name: str) -> str:
    """An id as text, since tools that write JSON make texts of numbers; "" for none."""
    value = item.get(name)
    return str(value).strip() if isinstance(value, int | str) else ""


def _segmentation(found: object, size: Size, work: _Work) -> Spans:
    if isinstance(found, list) and found:
        polygons = [found] if not isinstance(found[0], list) else found
        parts: list[Spans] = []
        for polygon in polygons:
            rle.add(parts, work.fill(read_corners(polygon, *size), size))
        return rle.unite(parts)
    if not isinstance(found, dict):
        raise LabelError("has no outline (a box is not enough)")
    if found.get("size") != list(size):
        raise LabelError(f"has run lengths for another size than its image's, {size[1]}x{size[0]} pixels")
    counts, area = found.get("counts"), size[0] * size[1]
    if isinstance(counts, str | list) and len(counts) > _MOST_COUNTS:
        raise LabelError(f"has run lengths of {len(counts):,} signs or numbers; at most {_MOST_COUNTS:,} are accepted")
    if isinstance(counts, str):
        numbers = _decompress(counts)
    elif isinstance(counts, list) and all(type(count) is int and 0 <= count <= area for count in counts):
        numbers = np.array(counts, np.int64)
    else:
        raise LabelError("has run lengths that are no list of numbers")
    ends = np.cumsum(numbers)
    if (numbers < 0).any() or (numbers > area).any() or len(ends) == 0 or ends[-1] != area:
        raise LabelError(f"has run lengths that do not add up to the {area:,} pixels of its image")
    work.take(_RUN * len(ends))
    edges = ends[: len(ends) // 2 * 2].reshape(-1, 2)  # outside and inside in turn
    return edges[edges[:, 0] < edges[:, 1]]


def _decompress(text: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Run lengths out of pycocotools' text: groups of five bits, the lowest first, in signs from '0'.

    The sixth bit says that a group follows, the highest bit of the last group is the sign. From the fourth number on,
    the difference to the number two before is stored.
    """
    signs = np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int64) - 48
    if len(signs) == 0 or (signs < 0).any() or (signs > 63).any() or signs[-1] & 32:
        raise LabelError("has compressed run lengths that are damaged")
    last = np.flatnonzero(signs & 32 == 0)
    first = np.concatenate(([0], last[:-1] + 1))
    if (last - first).max() > 7:  # 40 bits
        raise LabelError("has compressed run lengths that are damaged")
    place = np.arange(len(signs)) - np.repeat(first, last - first + 1)
    numbers = np.add.reduceat((signs & 31) << (5 * place), first)
    numbers -= np.where(signs[last] & 16, np.int64(1) << (5 * (last - first + 1)), 0)
    for start in (1, 2):
        numbers[start::2] = np.cumsum(numbers[start::2])
    return np.asarray(numbers, np.int64)


# --- LabelMe --------------------------------------------------------------------------------------------------------


def _labelme(content: dict[str, Any], name: str) -> list[FoundMask]:
    size = read_size(content.get("imageHeight"), content.get("imageWidth"))
    case_id = bare_id(_text(content.get("imagePath") or name, "imagePath"))
    spans: dict[str, list[Spans]] = {}
    work = _Work()
    for number, shape in enumerate(_dicts(content["shapes"], "shape")):
        with about(f"shape {number + 1}"):
            rle.add(spans.setdefault(_class(shape.get("label")), []), _shape(shape, size, work))
    return _by_class(spans, case_id, size, "LabelMe")


def _shape(shape: dict[str, Any], size: Size, work: _Work) -> Spans:
    kind, points = shape.get("shape_type") or "polygon", shape.get("points")
    if kind in _UNUSABLE:
        raise LabelError(f"is a {kind}, which has no area; draw a polygon, or delete it")
    if kind in ("rectangle", "circle", "mask"):
        corners = read_corners([*points, points[-1]] if isinstance(points, list) and points else points, *size)[:2]
        if len(points or ()) != 2:
            raise LabelError(f"is a {kind} of {len(points or ())} points; expected two")
        (x, y), (right, bottom) = corners.tolist()
        if kind == "circle":
            return fill_circle((x, y), math.hypot(right - x, bottom - y), *size)
        if kind == "mask":
            return _mask(shape.get("mask"), round(x), round(y), size, work)
        return work.fill(np.array([(x, y), (right, y), (right, bottom), (x, bottom)]), size)
    if kind not in ("polygon", "oriented_rectangle"):
        raise LabelError(f"is of the unknown kind {short(kind)}; draw a polygon")
    return work.fill(read_corners(points, *size), size)


def _mask(text: object, left: int, top: int, size: Size, work: _Work) -> Spans:
    """A mask that is drawn pixel by pixel: a PNG in base64 of its box."""
    from PIL import Image  # late: few annotations have one

    try:
        with Image.open(BytesIO(base64.b64decode(str(text), validate=True)), formats=("PNG",)) as image:
            read_size(image.height, image.width)
            work.take(int(size[0] * image.width / _PIXELS))
            box = np.asarray(image.convert("L")) != 0
    except LabelError:
        raise
    except Exception as error:  # Pillow raises almost anything on damaged files
        raise_limit(error)
        raise LabelError("has a mask that cannot be read") from error
    if left < 0 or top < 0 or left + box.shape[1] > size[1] or top + box.shape[0] > size[0]:
        raise LabelError(f"has a mask that leaves the image of {size[1]}x{size[0]} pixels")
    columns = np.zeros((size[0], box.shape[1]), bool)
    columns[top : top + box.shape[0]] = box
    return rle.spans_of(columns) + left * size[0]


class _Work:
    """How much drawing the masks of one file may take: a minute. Its unit is an edge's passage through a column."""

    def __init__(self) -> None:
        self._left = _MOST_WORK

    def take(self, units: int) -> None:
        """Raise LabelError, a sentence without a subject, when all is taken."""
        self._left -= units
        if self._left < 0:
            raise LabelError(
                "is one mask too many: drawing those of this file would take minutes. Split it into several files in "
                "one folder, each of some of the images"
            )

    def fill(self, corners: npt.NDArray[np.float64], size: Size) -> Spans:
        """As `polygons.fill`."""
        self.take(int(np.abs(np.diff(corners[:, 0], append=corners[:1, 0])).sum()))
        return fill(corners, *size)


# --- both -----------------------------------------------------------------------------------------------------------


def _dicts(items: object, what: str) -> Iterator[dict[str, Any]]:
    for number, item in enumerate(items if isinstance(items, list) else ()):
        if not isinstance(item, dict):
            raise LabelError(f"{what} {number + 1} is no object with names and values")
        yield item


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise LabelError(f"has no {name}")
    return value


def _class(name: object) -> str:
    return " ".join(str("" if name is None else name).split()).casefold()


def _by_class(spans: Mapping[str, Sequence[Spans]], case_id: str, size: Size, tool: str) -> list[FoundMask]:
    """A record for each class of an image; one of an empty mask when there is none."""
    return [
        FoundMask.of_spans(rle.unite(masks), size, name, case_id, tool) for name, masks in (spans or {"": []}).items()
    ]
