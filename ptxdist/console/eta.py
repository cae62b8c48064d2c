"""The ETA of a training, estimated from the epochs that are finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ptxdist.records import EpochMetrics

_LAST = 3  # epochs in the mean


class TimeLeft:
    """The seconds left in the running stage and in all stages.

    An epoch of the running stage takes the mean of its last three epochs. An epoch of a stage without a finished one
    takes as long as one of the nearest earlier stage, times the ratio of the pixels of an image. SWA, evaluation and
    the start of workers are left out, since they are short compared with the epochs.
    """

    def __init__(
        self, sizes_px: Sequence[int], epochs: Sequence[int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sizes, self._epochs, self._clock = sizes_px, epochs, clock
        self._seconds: dict[int, list[float]] = {}  # of each finished epoch, by stage
        self._since: float | None = None  # when the running epoch began

    def start(self, stage: int, finished: Sequence[EpochMetrics]) -> None:
        """A stage starts, or resumes after these epochs. Times of later stages, of another fold, are dropped."""
        self._seconds = {number: seconds for number, seconds in self._seconds.items() if number < stage}
        self._seconds[stage] = [item.train_seconds + item.val_seconds for item in finished if not item.averaged]
        self._since = self._clock()

    def add(self, item: EpochMetrics) -> None:
        """An epoch is finished."""
        if not item.averaged:
            self._seconds.setdefault(item.stage, []).append(item.train_seconds + item.val_seconds)
        self._since = self._clock()

    def seconds(self, stage: int) -> tuple[float, float] | None:
        """Seconds left in the stage, and in it and all later ones; None before one epoch is finished."""
        pace, lefts = None, []
        for number, (size, epochs) in enumerate(zip(self._sizes, self._epochs, strict=True), start=1):
            done = self._seconds.get(number, [])
            if done:
                last = done[-_LAST:]
                pace = sum(last) / len(last) / size**2  # seconds of an epoch for each pixel of an image
            if number < stage:
                continue
            if pace is None:
                return None
            epoch_s, left = pace * size**2, max(0, epochs - len(done))
            gone = self._clock() - self._since if number == stage and left and self._since is not None else 0.0
            lefts.append(max(0.0, epoch_s * left - min(gone, epoch_s)))
        return (lefts[0], sum(lefts)) if lefts else None


def in_words(seconds: float) -> str:
    """45 s, 12 min, 3 h 05 min, 2 d 3 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
