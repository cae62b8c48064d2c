"""SIIM run-length text <-> mask.

Owns: the text format. A mask is pairs `gap length` separated by blanks: the gap counts px from the end of the former
run (the first one from px 0), px run down the columns of the image, and `-1` stands for the empty mask (rules page of
the SIIM-ACR Pneumothorax Segmentation challenge). Refuses: texts that are not such pairs, and runs past the image.
Called by: `tables`, `dialect`, `cache`, `phantoms.dataset`, and `train`, `report` and `predict` for truth and
predictions at the original resolution. Tables that write their runs in another way are turned into this format by
`dialect`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from ptxdist.errors import LabelError

EMPTY = "-1"
_PLAIN = "0123456789 "

Mask = npt.NDArray[np.uint8]
Runs = npt.NDArray[np.int64]
Spans = npt.NDArray[np.int64]
Starts = Literal["relative", "absolute"]


def parse(text: str) -> Runs:
    """Runs of a text as int64 (n, 2): gap and length in px; (0, 2) for the empty mask `-1`.

    Blanks around the text are ignored. Raises LabelError when the text is not `-1` or pairs of integers with gaps
    of at least 0 and lengths of at least 1.
    """
    if text.strip() == EMPTY:
        return np.zeros((0, 2), np.int64)
    numbers = _numbers(text)
    if len(numbers) == 0 or len(numbers) % 2:
        raise LabelError(f"run-length text must be '-1' or pairs of numbers, found {len(numbers)}: {_shorten(text)}")
    runs = numbers.reshape(-1, 2)
    if (runs[:, 0] < 0).any() or (runs[:, 1] < 1).any():
        raise LabelError(f"run-length text has a negative gap or a run without length: {_shorten(text)}")
    return runs


def _numbers(text: str) -> npt.NDArray[np.int64]:
    if text.strip() and not text.strip(_PLAIN):
        numbers = np.fromstring(text, np.int64, sep=" ")  # five times faster, but takes any text and caps its numbers
        if numbers.max() < 2**62:
            return numbers
    try:
        if "_" in text:  # an integer to numpy (1_000), but not in this format
            raise ValueError
        return np.array(text.split(), dtype=np.int64)
    except (ValueError, OverflowError):
        raise LabelError(f"run-length text holds something that is not an integer: {_shorten(text)}") from None


def read_spans(text: str, starts: Starts, height: int, width: int) -> Spans:
    """Begin and end of each run as int64 (n, 2), increasing, in px from 0 in the order of the text; (0, 2) for `-1`.

    With "relative" starts, the format of this module, a number is the gap from the end of the former run; with
    "absolute" ones it is the number of a px, the first being 1, as in most other tables. Raises LabelError as `parse`,
    for a run past the image, and for absolute starts that are 0 or do not increase.
    """
    if starts == "relative":
        return np.cumsum(_parse_inside(text, height, width).reshape(-1)).reshape(-1, 2)
    runs, size = parse(text), height * width
    if (runs > size).any() or (runs.sum(axis=1) - 1 > size).any():
        end = max(start - 1 + length for start, length in runs.tolist())  # Python's integers, which cannot overflow
        raise LabelError(f"a run ends at px {end}, past the {width}x{height} image ({size} px)")
    spans = np.column_stack((runs[:, 0], runs.sum(axis=1))) - 1
    if (spans[:, 0] < 0).any():
        raise LabelError("a run starts at px 0, but absolute starts count from 1")
    if (spans[1:, 0] < spans[:-1, 1]).any():
        raise LabelError("absolute starts do not increase, or runs overlap")
    return spans


def decode_columns(texts: Sequence[str], height: int, width: int, value: int = 1) -> Mask:
    """Union of the masks as uint8 (width, height), 0 or `value`: the transposed image, the order of the format.

    No texts, or only `-1`, give zeros. Raises LabelError when a run ends past the last px of the image.
    """
    mask = np.zeros(height * width, np.uint8)
    for text in texts:
        runs = _parse_inside(text, height, width)
        # np.repeat over alternating gaps and runs is several times faster than filling slices one by one.
        values = np.tile(np.array([0, value], np.uint8), len(runs))
        span = np.repeat(values, runs.reshape(-1))
        np.maximum(mask[: len(span)], span, out=mask[: len(span)])
    return mask.reshape(width, height)


def decode(texts: str | Sequence[str], height: int, width: int) -> Mask:
    """Union of the masks of one image as uint8 (height, width) of 0 and 1; errors as `decode_columns`."""
    return np.ascontiguousarray(decode_columns([texts] if isinstance(texts, str) else texts, height, width).T)


def encode(mask: npt.NDArray[np.generic]) -> str:
    """Run-length text of a mask (height, width), everything but 0 being inside; `-1` when nothing is."""
    flat = np.asarray(mask).T.reshape(-1) != 0
    return encode_spans(np.flatnonzero(np.diff(flat, prepend=False, append=False)).reshape(-1, 2))


def encode_spans(spans: Spans) -> str:
    """Text of the spans int64 (n, 2) of a mask: begin and end of each run in px down the columns; `-1` for none.

    Spans must increase and not overlap; those that touch become one run.
    """
    if len(spans) == 0:
        return EMPTY
    apart = spans[1:, 0] != spans[:-1, 1]
    begins, ends = spans[np.append(True, apart), 0], spans[np.append(apart, True), 1]
    return " ".join(map(str, np.diff(np.column_stack((begins, ends)).reshape(-1), prepend=0).tolist()))


def overlap(texts: Sequence[str], starts: Starts = "relative") -> bool:
    """Whether a px belongs to more than one of the masks, whatever the size of their image. Errors as `read_spans`."""
    spans = np.concatenate([np.zeros((0, 2), np.int64), *(read_spans(text, starts, 2**62, 1) for text in texts)])
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    return bool((spans[1:, 0] < np.maximum.accumulate(spans[:, 1])[:-1]).any())


def area_px(texts: Sequence[str], height: int, width: int) -> int:
    """Area of the union of the masks in px; overlapping masks count once. Errors as `decode_columns`."""
    if not texts:
        return 0
    if len(texts) == 1:
        return int(_parse_inside(texts[0], height, width)[:, 1].sum())
    return int(np.count_nonzero(decode_columns(texts, height, width)))


def _parse_inside(text: str, height: int, width: int) -> Runs:
    runs = parse(text)
    end, size = sum(runs.reshape(-1).tolist()), height * width  # Python's integers, which cannot overflow
    if end > size:
        raise LabelError(f"a run ends at px {end}, past the {width}x{height} image ({size} px)")
    return runs


def _shorten(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")
