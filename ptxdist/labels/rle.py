"""Conversion between masks and the run-length text of the SIIM-ACR challenge.

Owns: the text format. A mask is pairs `gap length` separated by blanks. The gap counts pixels from the end of the
previous run (the first one from pixel 0), pixels are numbered down the columns of the image, and `-1` is the empty
mask (rules page of the SIIM-ACR Pneumothorax Segmentation challenge). Refuses: text that is not such pairs, and runs
past the image. `dialect` converts tables in other encodings to this format.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from ptxdist.errors import LabelError

EMPTY = "-1"
MAX_TEXT = 2**25  # characters of one mask
MOST_RUNS = 2**21  # of one mask; one drawn by hand has some thousands
_MOST_KEPT = 2**14  # characters of a text whose runs are kept; the challenge's longest has 7,800
_PLAIN = b"0123456789 "
_WITHOUT_BLANKS = dict.fromkeys(map(ord, string.whitespace))

Mask = npt.NDArray[np.uint8]
Runs = npt.NDArray[np.int64]
Spans = npt.NDArray[np.int64]
Starts = Literal["relative", "absolute"]


def parse(text: str) -> Runs:
    """Runs of a text as read-only int64 (n, 2): gap and length in pixels; (0, 2) for the empty mask `-1`.

    Blanks around the text are ignored. Raises LabelError when the text is not `-1` or pairs of integers with gaps
    of at least 0 and lengths of at least 1, and for millions of runs.
    """
    return _parse_kept(text) if len(text) <= _MOST_KEPT else _parse(text)


def _parse(text: str) -> Runs:
    if text.strip() == EMPTY:
        return np.zeros((0, 2), np.int64)
    numbers = _numbers(text)
    if len(numbers) == 0 or len(numbers) % 2:
        raise LabelError(f"run-length text must be '-1' or pairs of numbers, found {len(numbers)}: {_shorten(text)}")
    runs = numbers.reshape(-1, 2)
    if runs[:, 0].min() < 0 or runs[:, 1].min() < 1:
        raise LabelError(f"run-length text has a negative gap or a run of length 0: {_shorten(text)}")
    runs.flags.writeable = False
    return runs


# The masks of a table are needed several times: to check, to find their encoding, to count.
_parse_kept = lru_cache(maxsize=4096)(_parse)


def _numbers(text: str) -> npt.NDArray[np.int64]:
    if len(text) > 4 * MOST_RUNS and len(text) - len(text.translate(_WITHOUT_BLANKS)) > 2 * MOST_RUNS:
        raise LabelError(f"run-length text has more than {MOST_RUNS:,} runs: {_shorten(text)}")
    if text.isascii() and text.strip() and not text.encode().translate(None, _PLAIN):
        numbers = np.fromstring(text, np.int64, sep=" ")  # five times faster, but accepts any text and clips
        if numbers.max() < 2**62:
            return numbers
    try:
        if "_" in text:  # numpy accepts 1_000; this format does not
            raise ValueError
        return np.array(text.split(), dtype=np.int64)
    except (ValueError, OverflowError):
        raise LabelError(f"run-length text contains something that is not an integer: {_shorten(text)}") from None


def read_spans(text: str, starts: Starts, height: int, width: int) -> Spans:
    """Start and end of each run as int64 (n, 2), increasing, in pixels from 0 in the order of the text.

    (0, 2) for `-1`. A "relative" start is the gap from the end of the previous run, the format of this module; an
    "absolute" start is the number of a pixel, counted from 1, as in most other tables. Raises LabelError as `parse`,
    for a run past the image, and for absolute starts that are 0 or do not increase.
    """
    if starts == "relative":
        return np.cumsum(_parse_inside(text, height, width).reshape(-1)).reshape(-1, 2)
    runs, size = parse(text), height * width
    if (runs > size).any() or (runs.sum(axis=1) - 1 > size).any():
        end = max(start - 1 + length for start, length in runs.tolist())  # Python's integers cannot overflow
        raise LabelError(f"a run ends at pixel {end}, past the {width}x{height} image ({size} pixels)")
    spans = np.column_stack((runs[:, 0], runs.sum(axis=1))) - 1
    if (spans[:, 0] < 0).any():
        raise LabelError("a run starts at pixel 0, but absolute starts count from 1")
    if (spans[1:, 0] < spans[:-1, 1]).any():
        raise LabelError("absolute starts do not increase, or runs overlap")
    return spans


def decode_columns(texts: Sequence[str], height: int, width: int, value: int = 1) -> Mask:
    """Union of the masks as uint8 (width, height), 0 or `value`: transposed, as in the format.

    No texts, or only `-1`, give zeros. Raises LabelError as `parse`, and when a run ends past the last pixel.
    """
    mask = np.zeros(height * width, np.uint8)
    edges = unite([read_spans(text, "relative", height, width) for text in texts]).reshape(-1)
    if len(edges):
        # np.repeat over alternating gaps and runs is several times faster than filling slices one by one.
        values = np.tile(np.array([0, value], np.uint8), len(edges) // 2)
        mask[: edges[-1]] = np.repeat(values, np.diff(edges, prepend=0))
    return mask.reshape(width, height)


def decode(texts: str | Sequence[str], height: int, width: int) -> Mask:
    """Union of the masks of one image as uint8 (height, width), 0 or 1. Empty case and errors as `decode_columns`."""
    return np.ascontiguousarray(decode_columns([texts] if isinstance(texts, str) else texts, height, width).T)


def encode(mask: npt.NDArray[np.generic]) -> str:
    """Run-length text of a mask (height, width) of any dtype; all values but 0 are inside. `-1` for an empty mask."""
    return encode_spans(spans_of(mask))


def spans_of(mask: npt.NDArray[np.generic]) -> Spans:
    """Spans int64 (n, 2) down the columns of a mask as in `encode`; (0, 2) for an empty mask.

    Raises LabelError, a sentence without a subject, for millions of spans, which would take gigabytes.
    """
    edges = np.diff(np.asarray(mask).T.reshape(-1) != 0, prepend=False, append=False)
    refuse_many_runs(int(np.count_nonzero(edges)) // 2)
    return np.flatnonzero(edges).reshape(-1, 2)


def refuse_many_runs(count: int) -> None:
    """Raise LabelError, a sentence without a subject, for so many runs that no mask has them."""
    if count > MOST_RUNS:
        raise LabelError(f"has a mask of {count:,} pieces of columns; at most {MOST_RUNS:,} are accepted")


def encode_spans(spans: Spans) -> str:
    """Run-length text of the spans int64 (n, 2) of a mask: start and end of each run in pixels down the columns.

    `-1` for no spans. Spans must increase and not overlap; adjacent ones become one run.
    """
    if len(spans) == 0:
        return EMPTY
    apart = spans[1:, 0] != spans[:-1, 1]
    begins, ends = spans[np.append(True, apart), 0], spans[np.append(apart, True), 1]
    return " ".join(map(str, np.diff(np.column_stack((begins, ends)).reshape(-1), prepend=0).tolist()))


def unite(masks: Sequence[Spans]) -> Spans:
    """Spans of the union of masks, int64 (n, 2), each mask as `read_spans` returns it; (0, 2) for no masks."""
    if len(masks) == 1:
        return masks[0]
    spans = np.concatenate([np.zeros((0, 2), np.int64), *masks])
    if len(spans) == 0:
        return spans
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    ends = np.maximum.accumulate(spans[:, 1])
    apart = spans[1:, 0] > ends[:-1]
    return np.column_stack((spans[np.r_[True, apart], 0], ends[np.r_[apart, True]]))


def add(masks: list[Spans], mask: Spans) -> None:
    """Append a mask to those to be united, in the memory of the union: it is united at once with any of its size."""
    masks.append(mask)
    while len(masks) > 1 and len(masks[-2]) <= 2 * len(masks[-1]):
        masks[-2:] = [unite(masks[-2:])]


def intersection_px(first: Spans, second: Spans) -> int:
    """Number of pixels in both masks, from the spans of each, in time of the runs; 0 when one is empty."""
    if len(first) == 0 or len(second) == 0:
        return 0
    starts, ends = second.T
    before = np.concatenate(([0], np.cumsum(ends - starts)))  # pixels in the first k runs of the second mask
    place = np.searchsorted(starts, first, side="right")
    passed = before[place] - np.where(place > 0, np.maximum(ends[place - 1] - first, 0), 0)
    return int((passed[:, 1] - passed[:, 0]).sum())


def overlap(texts: Sequence[str], starts: Starts = "relative") -> bool:
    """Whether any pixel belongs to more than one of the masks; no size is needed. Errors as `read_spans`."""
    spans = np.concatenate([np.zeros((0, 2), np.int64), *(read_spans(text, starts, 2**62, 1) for text in texts)])
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    return bool((spans[1:, 0] < np.maximum.accumulate(spans[:, 1])[:-1]).any())


def area_px(texts: Sequence[str], height: int, width: int) -> int:
    """Area of the union of the masks in pixels; 0 for no texts. Errors as `read_spans`."""
    if not texts:
        return 0
    if len(texts) == 1:
        return int(_parse_inside(texts[0], height, width)[:, 1].sum())
    return int(np.diff(unite([read_spans(text, "relative", height, width) for text in texts])).sum())


def _parse_inside(text: str, height: int, width: int) -> Runs:
    runs = parse(text)
    end, size = sum(runs.reshape(-1).tolist()), height * width  # Python's integers cannot overflow
    if end > size:
        raise LabelError(f"a run ends at pixel {end}, past the {width}x{height} image ({size} pixels)")
    return runs


def _shorten(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")
