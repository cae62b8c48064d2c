"""Near-duplicates: copies of an image that were encoded, brightened or resized anew are found, other images are not."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from ptxdist.cache.duplicates import SIDE_PX, near_duplicates, perceptual_hashes, thumbnail
from ptxdist.cache.render import fit_square, resize
from ptxdist.dicom.radiograph import read_bytes, read_radiograph
from ptxdist.phantoms.anatomy import pose
from ptxdist.phantoms.greys import draw_image

Pixels = npt.NDArray[np.uint8]
Change = Callable[[Pixels], Pixels]


def _encode_anew(image: Pixels) -> Pixels:
    content = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 40])[1]
    return np.asarray(cv2.imdecode(content, cv2.IMREAD_UNCHANGED), np.uint8)


def _gamma(image: Pixels, exponent: float) -> Pixels:
    return np.rint(255 * (image / 255.0) ** exponent).astype(np.uint8)


COPIES: dict[str, Change] = {
    "encoded anew": _encode_anew,
    "brightened": lambda image: _gamma(image, 1 / 1.2),
    "darkened": lambda image: _gamma(image, 1.2),
    "shrunk": lambda image: np.asarray(cv2.resize(image, (700, 700), interpolation=cv2.INTER_AREA), np.uint8),
    "less contrast": lambda image: (30 + image * 0.75).astype(np.uint8),
    "all of it": lambda image: _encode_anew(_gamma(cv2.resize(image, (512, 512)), 1.2)),
}


def thumbnails(images: list[Pixels], size_px: int = 256) -> npt.NDArray[np.float32]:
    return np.stack([thumbnail(resize(fit_square(image), size_px)) for image in images])


@pytest.fixture(scope="module")
def phantoms() -> list[Pixels]:
    """Sixteen phantoms without a pneumothorax, 1024 px."""
    found = []
    for number in range(16):
        rng = np.random.default_rng(number)
        found.append(draw_image(rng, pose(rng, "PA" if number % 3 else "AP"), np.zeros((1024, 1024), np.uint8)))
    return found


def test_phantoms_are_no_copies_of_each_other(phantoms: list[Pixels]) -> None:
    assert near_duplicates(thumbnails(phantoms)) == []


@pytest.mark.parametrize("change", COPIES)
@pytest.mark.parametrize("size_px", [64, 256])
def test_every_copy_is_found_and_nothing_else(phantoms: list[Pixels], change: str, size_px: int) -> None:
    copies = [COPIES[change](image) for image in phantoms[:6]]
    expected = [(number, len(phantoms) + number) for number in range(6)]
    assert sorted(near_duplicates(thumbnails([*phantoms, *copies], size_px))) == expected


def test_pairs_do_not_depend_on_where_they_stand(phantoms: list[Pixels], monkeypatch: pytest.MonkeyPatch) -> None:
    images = [*phantoms, *map(COPIES["encoded anew"], phantoms)]
    order = random.Random(0).sample(range(32), 32)
    place = {index: place for place, index in enumerate(order)}
    expected = sorted(tuple(sorted((place[number], place[number + 16]))) for number in range(16))
    small = thumbnails([images[index] for index in order])
    assert sorted(near_duplicates(small)) == expected
    monkeypatch.setattr("ptxdist.cache.duplicates._BLOCK", 5)
    assert sorted(near_duplicates(small)) == expected


def test_copies_of_copies_give_every_pair(phantoms: list[Pixels]) -> None:
    images = [phantoms[0], phantoms[1], COPIES["darkened"](phantoms[0]), COPIES["shrunk"](phantoms[0])]
    assert sorted(near_duplicates(thumbnails(images))) == [(0, 2), (0, 3), (2, 3)]


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_have_no_pairs(count: int) -> None:
    assert near_duplicates(np.ones((count, SIDE_PX, SIDE_PX), np.float32)) == []


def test_blank_images_are_not_taken_for_copies() -> None:
    """Rows of zeros stand for files that could not be read; they are no pairs, whatever their number."""
    assert near_duplicates(np.zeros((3, SIDE_PX, SIDE_PX), np.float32)) == []


def test_hash_has_256_bits_half_of_them_set(phantoms: list[Pixels]) -> None:
    hashes = perceptual_hashes(thumbnails(phantoms[:4]))
    assert hashes.shape == (4, 4)
    assert hashes.dtype == np.uint64
    assert [sum(int(word).bit_count() for word in row) for row in hashes] == [128] * 4


def test_real_images_are_told_apart_and_their_copies_found(real_data: Path) -> None:
    files = sorted((real_data / "siim-real" / "dicom-images").rglob("*.dcm"))[:150]
    images = [read_radiograph(read_bytes(path)).pixels for path in files]
    copies = [COPIES["all of it"](image) for image in images[::5]]
    expected = [(5 * number, len(images) + number) for number in range(len(copies))]
    assert sorted(near_duplicates(thumbnails([*images, *copies]))) == expected
