"""COCO and LabelMe files, and the pixels inside of polygons: compared with other implementations; bad files refused."""

from __future__ import annotations

import base64
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from ptxdist.errors import LabelError
from ptxdist.labels import annotations, polygons, rle
from ptxdist.labels.polygons import fill, fill_circle, read_corners
from ptxdist.labels.reader import read_any

# Made with pycocotools 2.0.11: an ellipse of 200x150 pixels with a round hole, and a pentagon in 100x90 pixels.
RING = (
    "cU4o0S5<E:G8I6J6J6K4K6K4L4M2M4L4M2N2M4M2N2N2N2N2N[MmMX1Q2fNUNX1j1fNZNX1e1gN_NX1_1hNcNX1\\1gNfNX1Y1hNiNX1V1gNlNX1S1"
    "iNmNX1R1gNPOX1P1hNPOX1o0hNSOX1l0hNTOX1l0hNTOX1l0gNVOX1j0hNVOX1j0hNVOX1j0hNVOX1j0hNVOX1j0hNVOX1j0hNVOX1j0iNTOX1l0hN"
    "TOX1l0hNTOX1m0hNQOX1P1hNPOX1P1iNnNX1S1gNmNX1T1iNjNX1W1hNgNX1Z1iNdNX1]1hNaNX1a1iN[NX1f1jNVNX1k1jNoMX1S2]12N2N2N2N2"
    "N3L3N2N3L4L3N3L4L5J5L5J6J6J7H9F;D[f9"
)
PENTAGON = [10.3, 12.7, 60.2, 8.1, 80.9, 55.5, 40.4, 90.6, 5.5, 50.2]
FILLED = (
    "Sd08d29H8G:G8O1O1O1N2O2N1O1O1O1O1O2N1O1N2O1O1O2N1O1O1O1O1O1O2M2O1O1O1O1O1O00O1O1O1O001O100O1O1O1O1O1O1O10O01O1O2N3"
    "M3M4M2M3M3M4L3M3M4M2M3M3M4L3M3M4M2M3M3M_j0"
)


def drawn(spans: npt.NDArray[np.int64], rows: int, columns: int) -> npt.NDArray[np.bool_]:
    return rle.decode(rle.encode_spans(spans), rows, columns) > 0


def outline(numbers: list[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(numbers, np.float64).reshape(-1, 2)


def test_polygons_are_filled_as_opencv_tells_inside_from_outside() -> None:
    """Also polygons that cross themselves, and that leave the image. Points on an edge are not compared."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        corners = rng.integers(-8, 4 * 26, (rng.integers(3, 9), 2)) / 4 + 1 / 16
        found = drawn(fill(corners, 20, 23), 20, 23)
        contour = corners.astype(np.float32).reshape(-1, 1, 2)
        for row, column in np.ndindex(20, 23):
            side = cv2.pointPolygonTest(contour, (column + 0.5, row + 0.5), False)
            assert side == 0 or found[row, column] == (side > 0)


def test_polygons_differ_from_those_of_pycocotools_by_less_than_a_fifth_of_a_pixel() -> None:
    other = annotations._segmentation({"size": [100, 90], "counts": FILLED}, (100, 90), annotations._Work())
    differs = np.argwhere(drawn(other, 100, 90) != drawn(fill(outline(PENTAGON), 100, 90), 100, 90))
    contour = outline(PENTAGON).astype(np.float32).reshape(-1, 1, 2)
    far = [abs(cv2.pointPolygonTest(contour, (x + 0.5, y + 0.5), True)) for y, x in differs.tolist()]
    assert len(differs) < 30
    assert max(far) < 0.2


def test_polygons_along_the_edges_of_pixels_share_none() -> None:
    """And a centre on the left or upper edge is inside, one on the right or lower edge is not."""
    assert fill(outline([1, 2, 4, 2, 4, 5, 1, 5]), 6, 8).tolist() == [[8, 11], [14, 17], [20, 23]]
    assert fill(outline([0.5, 0.5, 2.5, 0.5, 2.5, 1.5, 0.5, 1.5]), 6, 8).tolist() == [[0, 1], [6, 7]]
    assert fill(outline([1, 1, 1.2, 1, 1.2, 1.2]), 6, 8).tolist() == []
    whole, (left, right) = fill(outline([0, 0, 8, 0, 8, 6, 0, 6]), 6, 8), (
        fill(outline(corners), 6, 8) for corners in ([0, 0, 5.5, 0, 2.5, 6, 0, 6], [5.5, 0, 8, 0, 8, 6, 2.5, 6])
    )  # fmt: skip
    assert rle.intersection_px(left, right) == 0
    assert (drawn(left, 6, 8) | drawn(right, 6, 8)).sum() == drawn(whole, 6, 8).sum() == 48


def test_a_circle_has_the_pixels_whose_centres_are_in_it() -> None:
    y, x = np.mgrid[:20, :30] + 0.5
    for centre, radius in (((10.2, 9.1), 6.3), ((1.0, 19.0), 8.0), ((15.0, 10.0), 0.3)):
        expected = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= radius**2
        assert np.array_equal(drawn(fill_circle(centre, radius, 20, 30), 20, 30), expected)


def test_run_lengths_of_pycocotools() -> None:
    y, x = np.mgrid[:200, :150]
    ring = ((y - 90) ** 2 / 70**2 + (x - 60) ** 2 / 40**2 < 1) & ~(((y - 70) ** 2 + (x - 60) ** 2) < 300)
    work = annotations._Work()
    found = annotations._segmentation({"size": [200, 150], "counts": RING}, (200, 150), work)
    assert np.array_equal(drawn(found, 200, 150), ring)
    assert annotations._segmentation({"size": [5, 4], "counts": "0d0"}, (5, 4), work).tolist() == [[0, 20]]
    assert annotations._segmentation({"size": [5, 4], "counts": "d0"}, (5, 4), work).tolist() == []


# --- files ------------------------------------------------------------------------------------------------------------


def coco(**changes: Any) -> dict[str, Any]:
    content = {
        "images": [
            {"id": 1, "file_name": "a.dcm", "height": 6, "width": 8},
            {"id": 2, "file_name": "set/b.png", "height": 6, "width": 8},
        ],
        "categories": [{"id": 7, "name": "Pneumothorax"}, {"id": 8, "name": "Lung"}],
        "annotations": [annotation(), annotation(segmentation=[[1, 1, 2, 1, 2, 3, 1, 3], [0, 0, 2, 0, 2, 2, 0, 2]])],
    }
    return {**content, **changes}


def annotation(**changes: Any) -> dict[str, Any]:
    return {"image_id": 1, "category_id": 7, "segmentation": [[4, 1, 6, 1, 6, 2, 4, 2]], **changes}


def segment(segmentation: Any) -> dict[str, Any]:
    return coco(annotations=[annotation(segmentation=segmentation)])


def labelme(*shapes: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"shapes": list(shapes), "imagePath": "a.png", "imageHeight": 6, "imageWidth": 8, **changes}


def shape(**changes: Any) -> dict[str, Any]:
    return {"label": "ptx", "points": [[4, 1], [6, 1], [6, 2], [4, 2]], "shape_type": "polygon", **changes}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_an_image_without_annotations_is_negative_and_masks_are_united(tmp_path: Path) -> None:
    found = read_any(write(tmp_path / "instances.json", coco()))
    assert found.masks == {"a": ("0 2 4 3 16 1 5 1",), "b": ()}
    assert (found.sizes, found.kind) == ({"a": (6, 8), "b": (6, 8)}, "COCO annotations of 'pneumothorax'")


def test_of_several_classes_the_finding_is_read(tmp_path: Path) -> None:
    lung = annotation(category_id=8, image_id=2)
    path = write(tmp_path / "instances.json", coco(annotations=[annotation(), lung, annotation(category_id=8)]))
    found = read_any(path, finding="pneumothorax")
    assert found.masks == {"a": ("25 1 5 1",), "b": ()}
    assert found.kind == "COCO annotations of 'pneumothorax', without other classes"
    assert read_any(path, finding="lung").masks == {"a": ("25 1 5 1",), "b": ("25 1 5 1",)}
    with pytest.raises(LabelError, match=r"several classes .*; keep the one to be found, or name it with --finding"):
        read_any(path, finding="nodule")
    alone = write(tmp_path / "lungs.json", coco(annotations=[lung]))
    assert read_any(alone, finding="lung").kind == "COCO annotations of 'lung'"
    with pytest.raises(LabelError, match=r"the masks are of the class 'lung'; give --finding 'lung'"):
        read_any(alone, finding="pneumothorax")


def test_ids_are_the_same_as_numbers_and_as_texts(tmp_path: Path) -> None:
    annotations = [annotation(image_id="1", category_id="7"), annotation(image_id=2, category_id="8")]
    path = write(tmp_path / "instances.json", coco(annotations=annotations))
    assert read_any(path, finding="pneumothorax").masks == {"a": ("25 1 5 1",), "b": ()}


def test_a_labelme_file_without_shapes_is_negative(tmp_path: Path) -> None:
    write(tmp_path / "x.json", labelme(shape(), shape(label="PTX", shape_type=None), imagePath="..\\images\\a.png"))
    write(tmp_path / "b.json", labelme(imagePath=None))
    write(tmp_path / "classes.json", ["ptx"])
    found = read_any(tmp_path)
    assert found.masks == {"a": ("25 1 5 1",), "b": ()}
    assert found.kind == "LabelMe annotations of 'ptx'"
    assert read_any(tmp_path / "x.json").masks == {"a": ("25 1 5 1",)}


BIG = [[0, 0, 5000, 0, 5000, 4000]]
ZIGZAG = [[8 * (number % 2), number % 6] for number in range(40_000)]
HUGE = {"id": 3, "file_name": "c.png", "height": 100_000, "width": 100_000}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged: it is not whole JSON in UTF-8"),
        ("[" * 100_000, "is damaged: it is not whole JSON"),
        ({"a": 1}, "is JSON of neither COCO (images, annotations) nor LabelMe (shapes)"),
        ([], "is JSON of neither COCO"),
        (coco(images=[], annotations=[]), "name no image"),
        (
            coco(annotations=[annotation(), annotation(category_id=8)]),
            "classes (a.json has 'pneumothorax', a.json has 'lung')",
        ),
        (coco(annotations=[annotation(image_id=9)]), "annotation 1 is of an image that is not in the file ('9')"),
        (coco(annotations=[annotation(category_id=9)]), "annotation 1, of a, is of a category that is not in the file"),
        (coco(annotations=[annotation(category_id=None)]), "annotation 1, of a, has no category, and the file has se"),
        (segment([]), "annotation 1, of a, has no outline (a box is not enough)"),
        (segment([[1, 2, 3, 4]]), "has an outline of 4 numbers; expected x and y"),
        (segment([[1, 2, 3, 4, 5, math.inf]]), "a number that is not finite"),
        (segment([["x"] * 6]), "has an outline that is no list of numbers"),
        (segment([[10**400] * 6]), "has an outline that is no list of numbers"),
        (segment(BIG), "leaves the image of 8x6 pixels, to (5000, 4000)"),
        (segment({"size": [8, 6], "counts": [48]}), "for another size than its image's"),
        (segment({"size": [6, 8], "counts": [40]}), "do not add up to the 48 pixels"),
        (segment({"size": [6, 8], "counts": [10**30]}), "that are no list of numbers"),
        (segment({"size": [6, 8], "counts": [-1, 49]}), "that are no list of numbers"),
        (segment({"size": [6, 8], "counts": []}), "do not add up"),
        (segment({"size": [6, 8], "counts": "~"}), "has compressed run lengths that are damaged"),
        (segment({"size": [6, 8], "counts": ""}), "has compressed run lengths that are damaged"),
        (segment({"size": [6, 8], "counts": "o" * 999}), "has compressed run lengths that are damaged"),
        (segment({"size": [6, 8], "counts": "oooooooo1"}), "has compressed run lengths that are damaged"),
        (coco(images=[HUGE]), "image 1 claims 100000x100000 pixels"),
        (coco(images=[{**HUGE, "height": -1}]), "image 1 does not say how many rows and columns"),
        (coco(images=[{**HUGE, "file_name": "../.."}]), "image 1 names an image '../..', which is no file name"),
        (coco(images=[{**HUGE, "file_name": "a\nb" * 99}]), "image 1 names an image 'a?ba?b"),
        (coco(images=[{**HUGE, "file_name": None}]), "image 1 has no file_name"),
        (coco(images=[{"file_name": "a"}]), "image 1 has no id of its own"),
        (
            coco(images=[*coco()["images"], {**HUGE, "file_name": "a", "height": 6, "width": 8}]),
            "two images are named",
        ),
        (coco(annotations=[7]), "annotation 1 is no object with names and values"),
        (labelme(shape(), shape(label="lung")), "several classes (a.json has 'ptx', a.json has 'lung')"),
        (labelme(shape(shape_type="linestrip")), "shape 1 is a linestrip, which has no area; draw a polygon"),
        (labelme(shape(shape_type="spline")), "shape 1 is of the unknown kind 'spline'"),
        (labelme(shape(shape_type="rectangle")), "shape 1 is a rectangle of 4 points; expected two"),
        (labelme(shape(points=None)), "shape 1 has an outline of 1 numbers"),
        (labelme(shape(shape_type="mask", points=[[0, 0], [1, 1]], mask="AAAA")), "has a mask that cannot be read"),
        (labelme(imageHeight=None), "does not say how many rows and columns its image has"),
    ],
)
def test_wrong_files_are_refused_with_a_sentence(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(LabelError) as caught:
        read_any(write(tmp_path / "a.json", content))
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 250 + len(str(tmp_path))


def test_files_that_contradict_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "1.json", labelme(shape()))
    write(tmp_path / "2.json", labelme(shape(label="lung"), imagePath="b.png"))
    with pytest.raises(LabelError, match=r"several classes \(1.json has 'ptx', 2.json has 'lung'\); keep the one"):
        read_any(tmp_path)
    write(tmp_path / "2.json", labelme())
    with pytest.raises(LabelError, match=r"a has two masks, in 1.json and in 2.json; keep one of them"):
        read_any(tmp_path)
    monkeypatch.setattr(annotations, "MAX_MEMORY", 1000)
    with pytest.raises(LabelError, match=r"1\.json would take about 0.00 GB of memory; at most .* Split it"):
        read_any(tmp_path)


def test_the_memory_of_a_json_file_is_known_before_it_is_read(tmp_path: Path) -> None:
    """450 MB of empty lists took 10 GB."""
    ring = ",".join(f"{number / 7:.2f}" for number in range(200))
    for content in ("[[]" + ",[]" * 20_000 + "]", f"[{f'[{ring}],' * 100}0]", '[{"a":1}' + ',{"b":2}' * 5000 + "]"):
        tracemalloc.start()
        found = json.loads(content)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        estimate = annotations._memory_of(content.encode()) - len(content)
        assert 0.9 * peak < estimate < 2 * peak, (content[:50], found is None)


def test_masks_that_take_minutes_to_draw_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outline of 4 kB takes a second, and a mask of one pixel took as long as its image."""
    dot = base64.b64encode(cv2.imencode(".png", np.full((1, 1), 255, np.uint8))[1]).decode()
    dots = [shape(points=[[2, 1], [2, 1]], shape_type="mask", mask=dot)] * 3
    zigzag = segment([[0, 1, 8, 2, 0, 3, 8, 4, 0, 5, 8, 6]])
    for content in (zigzag, segment({"size": [6, 8], "counts": [1] * 48}), labelme(*dots)):
        path = write(tmp_path / "a.json", content)
        assert annotations.read_annotations(path, path)
        with monkeypatch.context() as changed:
            changed.setattr(annotations, "_MOST_WORK", 40)
            changed.setattr(annotations, "_PIXELS", 0.25)
            with pytest.raises(LabelError, match="is one mask too many: drawing those of this file would take minutes"):
                annotations.read_annotations(path, path)


def test_an_outline_that_nobody_draws_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    corners = read_corners(ZIGZAG, 6, 8)
    assert len(fill(corners, 6, 8))
    monkeypatch.setattr(polygons, "_MOST_CROSSINGS", 1000)
    with pytest.raises(LabelError, match="40,000 points that crosses the image"):
        fill(corners, 6, 8)


def test_run_lengths_that_nobody_draws_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotations, "_MOST_COUNTS", 20)
    for counts in ([1] * 48, "0" * 48):
        path = write(tmp_path / "a.json", segment({"size": [6, 8], "counts": counts}))
        with pytest.raises(LabelError, match="run lengths of 48 signs or numbers; at most 20 are accepted"):
            annotations.read_annotations(path, path)
