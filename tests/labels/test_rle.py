"""The run-length format: round trips, unions and areas for any mask; any other text is rejected."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptxdist.errors import LabelError
from ptxdist.labels import rle

Mask = npt.NDArray[np.uint8]


@st.composite
def masks(draw: st.DrawFn, count: int = 1) -> list[Mask]:
    """Masks of one random shape, from empty to full, with runs of all lengths."""
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    density = draw(st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return [(random.random((height, width)) < density).astype(np.uint8) for _ in range(count)]


def slow_decode(text: str, height: int, width: int) -> Mask:
    """The format as the rules page words it, pixel by pixel."""
    mask, position = np.zeros((height, width), np.uint8), 0
    words = [int(word) for word in text.split()]
    for gap, length in zip(words[0::2], words[1::2], strict=True) if words != [-1] else ():
        position += gap
        for px in range(position, position + length):
            mask[px % height, px // height] = 1
        position += length
    return mask


@given(masks())
def test_round_trip_and_area(example: list[Mask]) -> None:
    mask = example[0]
    height, width = mask.shape
    text = rle.encode(mask)
    assert np.array_equal(rle.decode(text, height, width), mask)
    assert np.array_equal(rle.decode_columns([text], height, width, value=255), mask.T * 255)
    assert np.array_equal(slow_decode(text, *mask.shape), mask)
    assert rle.area_px([text], *mask.shape) == mask.sum()
    assert (text == rle.EMPTY) == (not mask.any())


@given(masks(count=3))
def test_several_masks_unite_and_overlap_counts_once(example: list[Mask]) -> None:
    texts, union = [rle.encode(mask) for mask in example], np.maximum.reduce(example)
    assert np.array_equal(rle.decode(texts, *union.shape), union)
    assert rle.area_px(texts, *union.shape) == union.sum()
    assert rle.overlap(texts) == bool((np.sum(example, axis=0) > 1).any())


@given(masks(), st.integers(1, 2**62))
def test_run_past_the_image_is_refused(example: list[Mask], excess: int) -> None:
    height, width = example[0].shape
    text = f"0 {height * width + excess}"
    for use in (rle.decode, lambda text, *size: rle.area_px([text], *size)):
        with pytest.raises(
            LabelError, match=f"ends at pixel {height * width + excess}, past the {width}x{height} image"
        ):
            use(text, height, width)


def test_last_px_is_inside_the_image_and_the_next_one_outside() -> None:
    assert rle.decode("11 1", 3, 4)[2, 3] == 1
    with pytest.raises(LabelError, match="pixel 13"):
        rle.decode("12 1", 3, 4)


def test_pixels_run_down_columns_and_gaps_count_from_the_former_run() -> None:
    assert rle.decode("1 2 2 1", 3, 2).tolist() == [[0, 0], [1, 0], [1, 1]]


def test_sums_that_overflow_64_bits_are_refused() -> None:
    with pytest.raises(LabelError, match="past the"):
        rle.decode("9223372036854775807 9223372036854775807", 10, 10)


def test_overlap_of_absolute_runs_is_found_without_a_size() -> None:
    assert not rle.overlap(["2 3 9 1", "5 4"], "absolute")
    assert rle.overlap(["2 3 9 1", "5 5"], "absolute")
    assert rle.overlap(["2 3 100 1", "9 1", "2 1"], "absolute")


@given(masks())
def test_spans_of_a_text_are_its_runs_and_give_the_text_again(example: list[Mask]) -> None:
    mask = example[0]
    spans = rle.read_spans(rle.encode(mask), "relative", *mask.shape)
    flat = np.zeros(mask.size, np.uint8)
    for begin, end in spans.tolist():
        flat[begin:end] = 1
    assert np.array_equal(flat.reshape(mask.shape, order="F"), mask)
    assert rle.encode_spans(spans) == rle.encode(mask)
    absolute = " ".join(f"{begin + 1} {end - begin}" for begin, end in spans.tolist()) or "-1"
    assert np.array_equal(rle.read_spans(absolute, "absolute", *mask.shape), spans)


def test_spans_that_touch_become_one_run() -> None:
    assert rle.encode_spans(np.array([[2, 4], [4, 5], [5, 9], [11, 12]])) == "2 7 2 1"


def test_plain_and_padded_numbers_are_read_alike() -> None:
    for text in ("12 3 4 5", "  12 3 4 5 ", "12\t3\n4 5", "12   3 4 5", "+12 3 4 5", "0012 3 4 5"):
        assert rle.parse(text).tolist() == [[12, 3], [4, 5]]
    assert rle.parse("4611686018427387904 1").tolist() == [[2**62, 1]]


def test_no_masks_are_an_empty_mask() -> None:
    assert rle.decode([], 3, 4).tolist() == np.zeros((3, 4)).tolist()
    assert rle.area_px([], 3, 4) == 0
    assert not rle.overlap([])
    assert rle.parse(" -1 ").shape == (0, 2)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "pairs of numbers, found 0"),
        ("  ", "pairs of numbers, found 0"),
        ("1 2 nan", "not an integer"),
        ("99999999999999999999 1", "not an integer"),
        ("1 2 3", "pairs of numbers, found 3"),
        ("-1 -1", "negative gap"),
        ("-2", "found 1"),
        ("-5 3", "negative gap"),
        ("5 0", "of length 0"),
        ("1.0 2", "not an integer"),
        ("1_0 2", "not an integer"),
        ("one two", "not an integer"),
        ("1 99999999999999999999", "not an integer"),
    ],
)
def test_malformed_text_is_refused_with_the_text(text: str, reason: str) -> None:
    with pytest.raises(LabelError, match=reason) as caught:
        rle.parse(text)
    assert repr(text) in str(caught.value)
    assert caught.value.exit_code == 4


def test_long_text_is_shortened_in_the_message() -> None:
    with pytest.raises(LabelError) as caught:
        rle.parse("7 " * 1001)
    assert len(str(caught.value)) < 200


@given(masks(count=2))
def test_union_and_intersection_of_runs_are_those_of_pixels(example: list[Mask]) -> None:
    spans = [rle.spans_of(mask) for mask in example]
    assert rle.intersection_px(*spans) == int(np.count_nonzero(example[0] & example[1]))
    assert rle.encode_spans(rle.unite(spans)) == rle.encode(example[0] | example[1])
    assert rle.unite([]).shape == (0, 2)
