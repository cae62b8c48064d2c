"""The same phantoms with labels in every format give the same store, to the byte; wrong labels of each get a
sentence."""

from __future__ import annotations

import base64
import csv
import json
import warnings
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import highdicom as hd
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813  the name that its documentation uses
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import JPEGLSLossless, RLELossless

from ptxdist.cache.preprocess import PreprocessResult, preprocess
from ptxdist.errors import CatalogError, LabelError
from ptxdist.labels import rle, segments
from ptxdist.labels.reader import read_any
from ptxdist.phantoms import anatomy, greys

Mask = npt.NDArray[np.uint8]
Write = Callable[[Path, "Phantoms"], Path]
IDS = tuple(f"1.2.826.{number}" for number in range(1, 7))
PATIENT = "Quagmire^Zebulon"
SHAPE = (120, 128)  # oblong, so that no transposed mask fits


class Phantoms:
    """Six phantoms as DICOM files; four show a pneumothorax."""

    def __init__(self, folder: Path, write_dicom: Any) -> None:
        self.folder, self.masks, self.images = folder, dict[str, Mask](), dict[str, Mask]()
        for number, case_id in enumerate(IDS):
            rng = np.random.default_rng((5, number))
            chest = anatomy.pose(rng, "PA")
            drawn = anatomy.draw_masks(rng, chest) if number % 3 else []
            mask = np.maximum.reduce(drawn) if drawn else np.zeros((1024, 1024), np.uint8)
            image = cv2.resize(greys.draw_image(rng, chest, mask), (128, 128), interpolation=cv2.INTER_AREA)
            self.images[case_id] = np.ascontiguousarray(image[:120])
            self.masks[case_id] = np.ascontiguousarray(mask[::8, ::8][:120])
            ids = {"StudyInstanceUID": f"1.2.826.8.{number}", "SeriesInstanceUID": f"1.2.826.9.{number}"}
            needed = dict.fromkeys(
                ("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"), ""
            )
            write_dicom(folder / f"file-{number}.dcm", self.images[case_id], case_id, raw=True, **ids, **needed)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory, write_dicom: Any) -> Phantoms:
    return Phantoms(tmp_path_factory.mktemp("phantoms") / PATIENT, write_dicom)


def build(images: Path, labels: Path, out: Path, **options: Any) -> PreprocessResult:
    return preprocess(images, labels, out, sizes_px=(32,), folds=2, **options)


def store_of(cache: Path, below: str = "") -> dict[str, bytes]:
    """Content of the files of the store."""
    folder = cache / "32.zarr" / below
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def expected(phantoms: Phantoms, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("expected")
    result = build(phantoms.folder, write_table(folder, phantoms), folder / "cache")
    assert [case.area_px for case in sorted(result.catalog.cases, key=lambda case: case.case_id)] == [
        int(phantoms.masks[case_id].sum()) for case_id in IDS
    ]
    return store_of(folder / "cache")


# --- writers --------------------------------------------------------------------------------------------------------


def write_table(folder: Path, phantoms: Phantoms, header: tuple[str, str] = ("ImageId", " EncodedPixels")) -> Path:
    path = folder / "train-rle.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("filename", *header, "Report"))
        for case_id, mask in phantoms.masks.items():
            writer.writerow(("P1_a", case_id, f" {rle.encode(mask)}", "No acute\nfinding."))
    return path


def write_zip(folder: Path, phantoms: Phantoms) -> Path:
    with zipfile.ZipFile(folder / "train-rle.csv.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(write_table(folder, phantoms), "train-rle.csv")
    return folder / "train-rle.csv.zip"


def runs_of(mask: Mask) -> list[tuple[float, float, float, float]]:
    """Left, top, right and bottom of each run down a column."""
    return [
        (column, first, column + 1, first + length)
        for start, end in rle.spans_of(mask).tolist()
        for column, first in [divmod(start, len(mask))]
        for length in [end - start]
    ]


def polygons_of(mask: Mask) -> list[list[float]]:
    """Polygons along the edges of pixels; no run of these masks reaches the next column."""
    return [[left, top, right, top, right, bottom, left, bottom] for left, top, right, bottom in runs_of(mask)]


def counts_of(mask: Mask) -> list[int]:
    edges = rle.spans_of(mask).reshape(-1).tolist()
    return np.diff([0, *edges, mask.size]).tolist()


def compress(counts: list[int]) -> str:
    """As pycocotools: groups of five bits, differences from the fourth number on."""
    text = ""
    for place, count in enumerate(counts):
        number, more = count - (counts[place - 2] if place > 2 else 0), True
        while more:
            bits, number = number & 31, number >> 5
            more = number != (-1 if bits & 16 else 0)
            text += chr(48 + bits + 32 * more)
    return text


def coco(phantoms: Phantoms, segmentation: Callable[[Mask], object]) -> dict[str, Any]:
    rows, columns = SHAPE
    return {
        "images": [
            {"id": number, "file_name": f"C:\\{PATIENT}\\{case_id}.dcm", "height": rows, "width": columns}
            for number, case_id in enumerate(IDS)
        ],
        "categories": [{"id": 1, "name": "Pneumothorax"}, {"id": 2, "name": "lung"}],
        "annotations": [
            {"id": 9, "image_id": number, "category_id": 1, "segmentation": segmentation(phantoms.masks[case_id])}
            for number, case_id in enumerate(IDS)
            if phantoms.masks[case_id].any()
        ],
    }


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_coco(segmentation: Callable[[Mask], object]) -> Write:
    return lambda folder, phantoms: write_json(folder / "instances.json", coco(phantoms, segmentation))


def labelme(mask: Mask, case_id: str, shapes: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"..\\{case_id}.dcm", "imageData": None,
        "imageHeight": mask.shape[0], "imageWidth": mask.shape[1],
    }  # fmt: skip


def outlines(mask: Mask) -> list[dict[str, Any]]:
    return [
        {"label": "Pneumothorax ", "points": np.reshape(corners, (-1, 2)).tolist(), "shape_type": "polygon"}
        if number % 2
        else {"label": "pneumothorax", "points": [corners[:2], corners[4:6]], "shape_type": "rectangle"}
        for number, corners in enumerate(polygons_of(mask))
    ]


def drawn(mask: Mask) -> list[dict[str, Any]]:
    if not mask.any():
        return []
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    file = BytesIO()
    Image.fromarray(box > 0).save(file, "PNG")
    points = [[float(columns[0]), float(rows[0])], [float(columns[-1]), float(rows[-1])]]
    text = base64.b64encode(file.getvalue()).decode()
    return [{"label": "pneumothorax", "points": points, "shape_type": "mask", "mask": text}]


def write_labelme(shapes: Callable[[Mask], list[dict[str, Any]]]) -> Write:
    def write(folder: Path, phantoms: Phantoms) -> Path:
        for case_id, mask in phantoms.masks.items():
            write_json(folder / "m" / f"{case_id}.json", labelme(mask, case_id, shapes(mask)))
            Image.fromarray(phantoms.images[case_id]).save(folder / "m" / f"{case_id}.png")  # what was drawn on
        write_json(folder / "m" / "classes.json", ["pneumothorax"])
        return folder / "m"

    return write


def segmentation(phantoms: Phantoms, number: int, kind: str, name: str = "Pneumothorax") -> hd.seg.Segmentation:
    source = pydicom.dcmread(phantoms.folder / f"file-{number}.dcm")
    segment = hd.seg.SegmentDescription(
        1, name, codes.SCT.MorphologicallyAbnormalStructure, Code("36118008", "SCT", name), "MANUAL"
    )
    mask = phantoms.masks[IDS[number]]
    with warnings.catch_warnings(action="ignore"):  # an empty mask
        return hd.seg.Segmentation(
            source_images=[source], pixel_array=(mask * 0.8 if kind == "FRACTIONAL" else mask)[None],
            segmentation_type=kind, segment_descriptions=[segment], series_instance_uid=hd.UID(), series_number=1,
            sop_instance_uid=hd.UID(), instance_number=1, manufacturer="a", manufacturer_model_name="b",
            software_versions="c", device_serial_number="d",
        )  # fmt: skip


def write_seg(kind: str) -> Write:
    def write(folder: Path, phantoms: Phantoms) -> Path:
        (folder / "m").mkdir()
        for number in range(len(IDS)):
            segmentation(phantoms, number, kind).save_as(folder / "m" / f"seg-{number}")
        return folder / "m"

    return write


def write_nifti(folder: Path, phantoms: Phantoms) -> Path:
    (folder / "m").mkdir()
    for case_id, mask in phantoms.masks.items():
        sitk.WriteImage(sitk.GetImageFromArray(mask), str(folder / "m" / f"{case_id}.nii.gz"))
    write_json(folder / "m" / "dataset.json", {"labels": {"background": 0, "pneumothorax": 1}})
    return folder / "m"


def palette(mask: Mask) -> Image.Image:
    image = Image.fromarray(mask * np.uint8(4)).convert("P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255, 128, 0, 0])
    return image


def write_pictures(name: str, draw: Callable[[Mask], Image.Image]) -> Write:
    def write(folder: Path, phantoms: Phantoms) -> Path:
        (folder / "m").mkdir()
        for case_id, mask in phantoms.masks.items():
            draw(mask).save(folder / "m" / name.format(case_id))
        return folder / "m"

    return write


def write_sides(folder: Path, phantoms: Phantoms) -> Path:
    """As in the data set of Montgomery County, and in JSRT's: a left and a right lung, each in its folder."""
    for case_id, mask in phantoms.masks.items():
        for side, part in (("left", slice(None, 60)), ("right", slice(60, None))):
            half = np.zeros_like(mask)
            half[:, part] = mask[:, part]
            (folder / "ManualMask" / f"{side}Mask").mkdir(parents=True, exist_ok=True)
            Image.fromarray(half > 0).save(folder / "ManualMask" / f"{side}Mask" / f"{case_id}.gif")
    return folder / "ManualMask"


def by_255(mask: Mask) -> Image.Image:
    return Image.fromarray(mask * np.uint8(255))


FORMATS: dict[str, tuple[Write, str]] = {
    "zip": (write_zip, "relative-columns"),
    "candid": (lambda *to: write_table(*to, header=("SOPInstanceUID", "EncodedPixels")), "relative-columns"),
    "coco-polygons": (write_coco(polygons_of), "COCO annotations of 'pneumothorax'"),
    "coco-counts": (
        write_coco(lambda mask: {"size": list(SHAPE), "counts": counts_of(mask)}),
        "COCO annotations of 'pneumothorax'",
    ),
    "coco-compressed": (
        write_coco(lambda mask: {"size": list(SHAPE), "counts": compress(counts_of(mask))}),
        "COCO annotations of 'pneumothorax'",
    ),
    "labelme": (write_labelme(outlines), "LabelMe annotations of 'pneumothorax'"),
    "labelme-masks": (write_labelme(drawn), "LabelMe annotations of 'pneumothorax'"),
    "seg": (write_seg("BINARY"), "DICOM SEG objects of 'pneumothorax'"),
    "seg-fractional": (write_seg("FRACTIONAL"), "DICOM SEG objects of 'pneumothorax'"),
    "seg-label-map": (write_seg("LABELMAP"), "DICOM SEG objects of 'pneumothorax'"),
    "nifti": (write_nifti, "NIfTI masks"),
    "png-1": (write_pictures("{}.png", Image.fromarray), "mask images"),
    "png-255": (write_pictures("{}.png", by_255), "mask images"),
    "png-palette": (write_pictures("{}.png", palette), "mask images"),
    "png-rgb": (write_pictures("{}_mask.PNG", lambda mask: palette(mask).convert("RGB")), "mask images named *_mask"),
    "png-rgba": (write_pictures("{}-seg.png", lambda mask: palette(mask).convert("RGBA")), "mask images named *-seg"),
    "tiff-1": (write_pictures("{}.tif", Image.fromarray), "mask images"),
    "tiff-bit": (write_pictures("{}.tiff", lambda mask: Image.fromarray(mask > 0)), "mask images"),
    "tiff-float": (write_pictures("{}.tif", lambda mask: Image.fromarray(mask.astype(np.float32))), "mask images"),
    "sides": (write_sides, "mask images"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_store(
    phantoms: Phantoms, expected: Mapping[str, bytes], tmp_path: Path, name: str
) -> None:
    write, words = FORMATS[name]
    result = build(phantoms.folder, write(tmp_path, phantoms), tmp_path / "cache")
    assert store_of(tmp_path / "cache") == expected
    assert result.catalog.dialect == words
    assert result.catalog.reconciliation.unlabelled == 0
    for path in (tmp_path / "cache").rglob("*"):
        assert not path.is_file() or b"Quagmire" not in path.read_bytes()


# --- masks beside their images ----------------------------------------------------------------------------------------


def write_ptx_498(folder: Path, phantoms: Phantoms, sites: int = 1) -> Path:
    """As PTX-498: image, mask and both in colours, and the first two as NIfTI; numbers start anew at each site."""
    for place, (case_id, mask) in enumerate(phantoms.masks.items()):
        site, number = divmod(place, len(IDS) // sites)
        start = folder / "PTX-498" / f"Site{'ABC'[site]}" / str(number + 1)
        start.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(phantoms.images[case_id])
        image.save(f"{start}.1.img.png")
        by_255(mask).save(f"{start}.2.mask.png")
        Image.merge("RGB", (image, image, by_255(mask))).save(f"{start}.3.merge.png")
        for part, array in (("4.img", phantoms.images[case_id]), ("5.mask", mask)):
            sitk.WriteImage(sitk.GetImageFromArray(array), f"{start}.{part}.nii.gz")
    return folder / "PTX-498"


def write_pairs(folder: Path, phantoms: Phantoms) -> Path:
    """As the Shenzhen set: images and masks with other names, in folders of one folder."""
    for case_id, mask in phantoms.masks.items():
        for name, image in ((f"CXR_png/{case_id}", phantoms.images[case_id]), (f"mask/{case_id}_mask", mask > 0)):
            (folder / "pairs" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / "pairs" / f"{name}.png")
    return folder / "pairs"


@pytest.mark.parametrize(
    ("write", "match", "ids"),
    [
        (write_ptx_498, None, [f"{number}.1.img" for number in range(1, 7)]),
        (
            lambda *to: write_ptx_498(*to, sites=3),
            "*/*.2.mask.png=*/*.1.img.png",
            [f"Site{site}_{number}.1.img" for site in "ABC" for number in (1, 2)],
        ),
        (write_pairs, None, list(IDS)),
        (write_pairs, "mask/*_mask.png", list(IDS)),
    ],
    ids=["ptx-498", "ptx-498-sites", "shenzhen", "shenzhen-match"],
)
def test_masks_beside_their_images(
    phantoms: Phantoms, expected: Mapping[str, bytes], tmp_path: Path, write: Write, match: str | None, ids: list[str]
) -> None:
    folder = write(tmp_path, phantoms)
    result = build(folder, folder, tmp_path / "cache", match=match)
    cases = sorted(result.catalog.cases, key=lambda case: case.case_id)
    assert [case.case_id for case in cases] == ids
    assert [case.area_px for case in cases] == [int(mask.sum()) for mask in phantoms.masks.values()]
    assert not result.catalog.rejects
    assert "mask images named " in result.catalog.dialect
    if ids == list(IDS):
        assert {name: store_of(tmp_path / "cache", name) for name in ("image", "mask")} == {
            name: {key.removeprefix(f"{name}/"): value for key, value in expected.items() if key.startswith(f"{name}/")}
            for name in ("image", "mask")
        }


def test_files_are_found_by_name_where_labels_know_no_dicom(phantoms: Phantoms, tmp_path: Path) -> None:
    """`file-N` is the name of a DICOM file, and not its SOPInstanceUID."""
    (tmp_path / "m").mkdir()
    for number, mask in enumerate(phantoms.masks.values()):
        by_255(mask).save(tmp_path / "m" / f"file-{number}.png")
    named = build(phantoms.folder, tmp_path / "m", tmp_path / "cache")
    assert {case.case_id: case.area_px for case in named.catalog.cases} == {
        case_id: int(mask.sum()) for case_id, mask in phantoms.masks.items()
    }


# --- wrong labels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zip", "coco-compressed", "labelme", "seg", "nifti", "png-255", "tiff-1", "sides"])
def test_labels_of_other_images_are_refused_with_three_ids_of_each(
    phantoms: Phantoms, tmp_path: Path, write_dicom: Any, name: str
) -> None:
    labels = FORMATS[name][0](tmp_path, phantoms)
    for number, case_id in enumerate(IDS):
        write_dicom(tmp_path / "others" / f"{number}.dcm", phantoms.images[case_id], f"9.{number}", raw=True)
        write_dicom(tmp_path / "smaller" / f"{number}.dcm", phantoms.images[case_id][:80], case_id, raw=True)
    with pytest.raises(CatalogError, match=r"ids of images: 9\.0, 9\.1, 9\.2; of labels: 1.*\.1, 1.*\.2, 1.*\.3\)"):
        build(tmp_path / "others", labels, tmp_path / "cache")
    with pytest.raises(LabelError, match=r"must be of one size|fits no mask encoding|does not fit its image"):
        build(tmp_path / "smaller", labels, tmp_path / "cache")
    for path in [labels] if labels.is_file() else sorted(labels.rglob("*")):
        if path.is_file() and path.name not in ("classes.json", "dataset.json"):
            content = path.read_bytes()
            for wrong in (content[: len(content) * 2 // 3], b""):
                path.write_bytes(wrong)
                with pytest.raises(LabelError) as caught:
                    read_any(labels)
                assert PATIENT not in str(caught.value)
            path.write_bytes(content)
            break


Edit = Callable[[Any], object]


def run_lengths(*runs: bytes) -> Edit:
    """Makes a fractional object of one compressed frame, 120 x 128 pixels."""

    def edit(seg: Any) -> None:
        header = b"".join(number.to_bytes(4, "little") for number in (1, 64, *[0] * 14))
        seg.file_meta.TransferSyntaxUID, seg.SegmentationType = RLELossless, "FRACTIONAL"
        seg.BitsAllocated, seg.BitsStored, seg.HighBit = 8, 8, 7
        seg.PixelData = encapsulate([header + b"".join(runs)])
        seg["PixelData"].VR = "OB"

    return edit


def unreferenced(seg: Any) -> None:
    del seg.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence
    source = pydicom.Dataset()
    source.ReferencedSOPInstanceUID = "1.2"
    seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence.append(source)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda seg: setattr(seg, "NumberOfFrames", 9), "has 9 frames, and says of 1 what they are"),
        (lambda seg: setattr(seg, "NumberOfFrames", 5000), "has 5,000 frames of 128x120 pixels, which are too many"),
        (lambda seg: setattr(seg, "Rows", 0), "does not say how many rows and columns its image has"),
        (lambda seg: (setattr(seg, "Rows", 60_000), setattr(seg, "Columns", 60_000)), "claims 60000x60000 pixels"),
        (
            lambda seg: setattr(seg, "PixelData", seg.PixelData[:90]),
            "is a damaged DICOM SEG: its frames cannot be read",
        ),
        (lambda seg: setattr(seg.file_meta, "TransferSyntaxUID", JPEGLSLossless), "is compressed as JPEG-LS Lossless"),
        (
            lambda seg: setattr(seg.SegmentSequence[0], "SegmentNumber", 2),
            "has a frame of segment 1, which it does not",
        ),
        (run_lengths(b"\x81\xff" * 121), "has more run-length data than its size allows"),  # 64 times its length
        (run_lengths(b"\x81\xff" * 20_000), "has more run-length data than its size allows"),
        (run_lengths(b"\x81\xff" * 119), "is a damaged DICOM SEG"),
        (unreferenced, "has a frame that does not say which image it is of (Source Image Sequence)"),
    ],
)
def test_wrong_segmentations_are_refused(phantoms: Phantoms, tmp_path: Path, edit: Edit, message: str) -> None:
    seg = segmentation(phantoms, 1, "BINARY")
    if "compressed" in message:
        seg.PixelData = encapsulate([seg.PixelData])
    edit(seg)
    with pytest.raises(LabelError) as caught:
        read_any(saved(seg, tmp_path / "seg.dcm").parent)
    assert str(caught.value).startswith(f"{tmp_path}: seg.dcm {message}")


def test_run_lengths_of_a_segmentation_are_read(phantoms: Phantoms, tmp_path: Path) -> None:
    seg = segmentation(phantoms, 1, "BINARY")
    run_lengths(b"\x81\xff", b"\x81\x00" * 119)(seg)
    assert read_any(saved(seg, tmp_path / "seg.dcm")).masks == {IDS[1]: (" ".join(["0 1", *["119 1"] * 127]),)}


def test_the_elements_of_a_segmentation_are_bounded(
    phantoms: Phantoms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five million items took minutes and gigabytes."""
    path = saved(segmentation(phantoms, 1, "BINARY"), tmp_path / "seg.dcm")
    for reads in range(0, 400, 40):
        monkeypatch.setattr(segments, "_MOST_READS", reads)
        with suppress(LabelError):
            assert read_any(path).masks
            break
        with pytest.raises(LabelError, match=r"seg\.dcm has more than 100,000 elements"):
            read_any(path)
    assert 100 < reads < 400


def test_a_label_map_is_read_in_one_pass() -> None:
    """Each number took a pass of its own: an hour for 60,000 segments."""
    values = np.random.default_rng(0).integers(0, 6, (40, 50)).astype(np.uint16) * 9000
    found = segments._label_spans(values)
    assert [number for number, _ in found] == [9000, 18_000, 27_000, 36_000, 45_000]
    for number, spans in found:
        assert np.array_equal(spans, rle.spans_of(values == number))
    assert segments._label_spans(np.zeros((4, 5), np.uint8)) == []


def test_segmentations_of_several_classes_are_refused(phantoms: Phantoms, tmp_path: Path) -> None:
    seg, second = segmentation(phantoms, 1, "BINARY"), segmentation(phantoms, 2, "BINARY", "Lungenödem")
    saved(second, tmp_path / "2.dcm")
    saved(seg, tmp_path / "1.dcm")
    with pytest.raises(LabelError, match=r"several classes \(1.dcm has 'pneumothorax', 2.dcm has 'lungenödem'\)"):
        read_any(tmp_path)
    second.SegmentSequence[0].SegmentNumber = 2
    seg.SegmentSequence.append(second.SegmentSequence[0])
    assert list(read_any(saved(seg, tmp_path / "1.dcm")).masks) == [IDS[1]]  # nothing is in the second segment
    other, identity = second.PerFrameFunctionalGroupsSequence[0], pydicom.Dataset()
    identity.ReferencedSegmentNumber = 2
    other.SegmentIdentificationSequence = pydicom.Sequence([identity])
    seg.PerFrameFunctionalGroupsSequence.append(other)
    seg.NumberOfFrames, seg.PixelData = 2, seg.PixelData + second.PixelData
    with pytest.raises(LabelError, match=r"several classes \(1.dcm has 'pneumothorax', 1.dcm has 'lungenödem'\)"):
        read_any(saved(seg, tmp_path / "1.dcm"))
    assert list(read_any(tmp_path / "1.dcm", finding="pneumothorax").masks) == [IDS[1]]
    assert list(read_any(tmp_path / "1.dcm", finding="lungenödem").masks) == [IDS[2]]


def saved(seg: Any, path: Path) -> Path:
    with warnings.catch_warnings(action="ignore"):
        pydicom.dcmwrite(path, seg)
    return path
