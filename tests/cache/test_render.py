"""From files to samples: the transform, what decides a shard's bytes, and one shard written and compared."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from ptxdist.cache import render
from ptxdist.cache.build import build_catalog
from ptxdist.cache.catalog import REMOVED, Case, Catalog
from ptxdist.cache.render import Shard, differing_cases, fit_square, resize, shard_fingerprint, write_shard
from ptxdist.cache.scan import digest_of
from ptxdist.cache.store import ARRAYS, damaged_rows, map_shard, pending, shard_path, store_path
from ptxdist.labels import rle

SIZES = (32, 64)


def block_mean(pixels: npt.NDArray[Any], size: int) -> npt.NDArray[np.float64]:
    """Means of the blocks of a square image whose side is a multiple of `size`."""
    step = len(pixels) // size
    return np.asarray(pixels.reshape(size, step, size, step).mean(axis=(1, 3)))


# --- the transform --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(3, 8), (8, 3), (5, 8), (4, 4)])
def test_square_is_padded_with_black_around_the_middle(height: int, width: int) -> None:
    square = fit_square(np.full((height, width), 9, np.uint8))
    assert square.shape == (max(height, width),) * 2
    assert square.sum() == 9 * height * width
    rows, columns = np.nonzero(square.any(axis=1))[0], np.nonzero(square.any(axis=0))[0]
    assert (rows[0], columns[0]) == ((len(square) - height) // 2, (len(square) - width) // 2)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_shrinking_takes_the_mean_of_each_block(size: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256), dtype=np.uint8)
    assert np.abs(resize(pixels, size) - block_mean(pixels, size)).max() <= 0.5


def test_growing_is_bilinear() -> None:
    grown = resize(np.array([[0, 100], [0, 100]], np.uint8), 4)
    assert grown[0].tolist() == [0, 25, 75, 100]


# --- what decides a shard's bytes -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(small_dataset) -> tuple[Catalog, dict[str, str]]:  # type: ignore[no-untyped-def]
    return build_catalog(small_dataset.dicom, small_dataset.labels, salt=b"s")


@pytest.fixture(scope="module")
def small_catalog(built: tuple[Catalog, dict[str, str]]) -> Catalog:
    return built[0]


@pytest.mark.parametrize(
    "change",
    [{"case_id": "other"}, {"digest": "0"}, {"decoder": "other 2.0"}, {"masks": ("0 64",)}, {"masks": ()}],
    ids=str,
)
def test_fingerprint_changes_with_whatever_changes_the_bytes(small_catalog: Catalog, change: dict[str, Any]) -> None:
    cases = list(small_catalog.labelled[:4])
    assert cases[3].masks not in ((), ("0 64",))
    changed = [*cases[:3], replace(cases[3], **change)]
    assert shard_fingerprint(changed, 32) != shard_fingerprint(cases, 32)


@pytest.mark.parametrize("change", [{"group": "g"}, {"fold": 3, "split": "train"}, {"age": 7}], ids=str)
def test_fingerprint_does_not_change_with_what_leaves_the_bytes_alone(
    small_catalog: Catalog, change: dict[str, Any]
) -> None:
    cases = small_catalog.labelled[:4]
    assert shard_fingerprint([replace(case, **change) for case in cases], 32) == shard_fingerprint(cases, 32)


def test_fingerprint_depends_on_the_order_the_size_and_the_code(
    small_catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = small_catalog.labelled[:4]
    found = {shard_fingerprint(cases, 32), shard_fingerprint(cases[::-1], 32), shard_fingerprint(cases, 64)}
    monkeypatch.setattr(render, "TRANSFORM", render.TRANSFORM + 1)
    found.add(shard_fingerprint(cases, 32))
    assert render.version_of_cv2() == cv2.__version__
    monkeypatch.setattr(render, "version_of_cv2", lambda: "99")
    found.add(shard_fingerprint(cases, 32))
    assert len(found) == 5


def test_a_change_of_the_transform_has_a_number(file_of, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Whoever changes what comes out of a file raises TRANSFORM and puts the new sums here: old shards would be kept.

    A plain image, a wide one that is signed, rescaled, windowed and inverted, and a high one through a look-up table.
    """
    plain = np.add.outer(np.arange(64) * 3, np.arange(64)).astype(np.uint8)
    wide = np.add.outer(np.arange(96) * 9, np.arange(128) * 13).astype(np.int16) - 900
    table = Dataset()
    table.add_new("LUTDescriptor", "US", [1024, 40, 12])
    table.add_new("LUTData", "OW", (np.arange(1024) ** 2 // 256).astype("<u2").tobytes())
    window = {"RescaleSlope": 2, "RescaleIntercept": -50, "WindowCenter": 300, "WindowWidth": 1500}
    files = {
        "1": (plain, file_of(plain, uid.ExplicitVRLittleEndian)),
        "2": (wide, file_of(wide, uid.RLELossless, PhotometricInterpretation="MONOCHROME1", **window)),
        "3": (wide, file_of(wide.T.astype(np.uint16) % 1000, uid.JPEG2000Lossless, VOILUTSequence=Sequence([table]))),
    }
    cases = []
    for name, (pixels, content) in files.items():
        (tmp_path / name).write_bytes(content)
        rows, columns = pixels.shape if name != "3" else pixels.T.shape
        masks = () if name == "1" else ("200 31 40 60", "250 20")
        cases.append(Case(name, digest_of(content), "any", rows, columns, "", masks))
    _, records = write_shard(Shard(0, cases, list(files), tmp_path), tmp_path / "out", (32,))
    assert records[32].rejects == ()
    found = (records[32].image_crc32c, records[32].mask_crc32c)
    assert {render.TRANSFORM: found} == {
        2: ("b2469381741df08c03fb73a9", "eeaede7c5a0ebad9d97c66e4"),
    }


# --- one shard ------------------------------------------------------------------------------------------------------


@pytest.fixture
def shard(built: tuple[Catalog, dict[str, str]], small_dataset) -> Shard:  # type: ignore[no-untyped-def]
    """The labelled cases of `small_dataset`, with a removed one in row 2."""
    catalog, paths = built
    cases = [*catalog.labelled[:2], REMOVED, *catalog.labelled[2:]]
    return Shard(0, cases, [paths.get(case.case_id, "") for case in cases], small_dataset.dicom)


def samples(out: Path, size: int, cases: int, array: str) -> npt.NDArray[np.uint8]:
    return map_shard(pending(shard_path(store_path(out, size), array, 0)), cases, size)[0]


def test_a_shard_holds_the_samples_of_its_files_and_masks(shard: Shard, small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    number, records = write_shard(shard, tmp_path, SIZES)
    assert (number, set(records)) == (0, set(SIZES))
    for size, record in records.items():
        assert record.fingerprint == shard_fingerprint(shard.cases, size)
        assert record.rejects == ()
        images, masks = (samples(tmp_path, size, len(shard.cases), array) for array in ARRAYS)
        for image, mask, case in zip(images, masks, shard.cases, strict=True):
            if case is REMOVED:
                assert not image.any()
                assert not mask.any()
                continue
            original, truth = small_dataset.images[case.case_id], small_dataset.masks[case.case_id]
            assert np.abs(image.astype(int) - resize(fit_square(original), size)).mean() < 2  # JPEG
            expected = cv2.resize(
                fit_square(truth * 255).astype(np.float64), (size, size), interpolation=cv2.INTER_AREA
            )
            assert np.abs(mask - expected).max() <= 1
        for array, sums in zip(ARRAYS, (record.image_crc32c, record.mask_crc32c), strict=True):
            assert damaged_rows(pending(shard_path(store_path(tmp_path, size), array, 0)), size, sums) == {}


def test_geometry_maps_a_mask_back_to_its_image(shard: Shard, small_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """By the rule in the store's attribute, as the example in docs/cache.md has it."""
    text = (Path(__file__).parents[2] / "docs" / "cache.md").read_text()
    example = text.split("```python\n")[1].split("```")[0]
    write_shard(shard, tmp_path, (224,))
    masks = samples(tmp_path, 224, len(shard.cases), "mask")
    found = 0
    for mask, case in zip(masks, shard.cases, strict=True):
        if (case.rows, case.columns) != (160, 224) or not case.masks:
            continue
        names: dict[str, Any] = {"cv2": cv2, "mask": mask, "rows": case.rows, "columns": case.columns}
        exec(example, names)  # what stands in the documentation is what is tested
        assert np.array_equal(names["image_mask"], small_dataset.masks[case.case_id])
        assert np.array_equal(names["image_mask"], rle.decode(case.masks, case.rows, case.columns))
        found += 1
    assert found >= 1


@pytest.mark.parametrize("what", ["truncated", "gone", "changed"])
def test_file_that_cannot_be_used_is_a_row_of_zeros_with_a_reason(shard: Shard, tmp_path: Path, what: str) -> None:
    content = (shard.root / shard.paths[0]).read_bytes()
    path = tmp_path / "files" / "a.dcm"
    path.parent.mkdir()
    if what != "gone":
        path.write_bytes(content[: len(content) // 2] if what == "truncated" else content + b"\0")
    case = shard.cases[0]
    if what == "truncated":
        case = replace(case, digest=digest_of(path.read_bytes()))
    bad = replace(shard, cases=[case, *shard.cases[1:]], paths=[os.path.relpath(path, shard.root), *shard.paths[1:]])
    _, records = write_shard(bad, tmp_path, SIZES)
    for size, record in records.items():
        assert [case_id for case_id, _ in record.rejects] == [case.case_id]
        # What is wrong with the file itself stays so; what came between may be over at the next run, which tries again.
        assert (record.fingerprint == "") == (what != "truncated")
        images = samples(tmp_path, size, len(shard.cases), "image")
        assert not images[0].any()
        assert images[1].any()
    [(_, reason)] = records[32].rejects
    assert {"gone": "cannot be read: No such file", "changed": "was changed while"}.get(what, "") in reason
    assert str(tmp_path) not in reason


def test_source_that_gives_the_same_samples_differs_in_nothing(shard: Shard, tmp_path: Path) -> None:
    _, records = write_shard(shard, tmp_path, SIZES)
    assert differing_cases(shard, records) == (0, {})


def test_source_that_differs_is_named_by_its_case(shard: Shard, tmp_path: Path) -> None:
    """A changed file has another digest, so a shard record that does not fit its file means a damaged cache or code."""
    _, records = write_shard(shard, tmp_path, SIZES)
    record, row = records[64], 4
    wrong = record.image_crc32c[: 8 * row] + "00000000" + record.image_crc32c[8 * row + 8 :]
    number, found = differing_cases(shard, {**records, 64: replace(record, image_crc32c=wrong)})
    assert (number, found) == (0, {shard.cases[row].case_id: "its file gives another image of 64 px"})
    gone = replace(shard, paths=["nowhere" if row == 5 else path for row, path in enumerate(shard.paths)])
    assert differing_cases(gone, records)[1] == {shard.cases[5].case_id: "cannot be read: No such file or directory"}
