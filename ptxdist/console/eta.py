"""The ETA of a training, estimated from its first steps, and then from the epochs that are finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ptxdist.events import Progress
from ptxdist.records import EpochMetrics

_LAST = 3  # epochs in the mean
_FIRST_S = 5.0  # seconds of training, after the first step, that give the first estimate
_FIRST_STEPS = 2  # reports of progress in this time, at least
_VALIDATION = 1 / 3  # time that an image takes in validation, without gradients, relative to training


class TimeLeft:
    """The seconds left in the running stage and in all stages.

    An epoch of the running stage takes the mean of its last three epochs; before one is finished, as long as its steps
    so far say. An epoch of a stage that has not run takes as long as one of the nearest earlier stage, times the ratio
    of the pixels of its images. SWA, evaluation and the start of workers are left out, since they are short compared
    with the epochs.
    """

    def __init__(
        self, sizes_px: Sequence[int], epochs: Sequence[int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sizes, self._epochs, self._clock = sizes_px, epochs, clock
        self._images: Sequence[int] = [1] * len(sizes_px)
        self._held_out = 0
        self._seconds: dict[int, list[float]] = {}  # of each finished epoch, by stage
        self._since: float | None = None  # when the running epoch began
        self._first: tuple[int, float, int] | None = None  # stage, time and images done of the first step that is seen
        self._pace: float | None = None  # seconds for each pixel of an image, by the first steps of the running stage
        self._reports = 0

    def expect(self, images: Sequence[int], held_out: int) -> None:
        """Take this many images of an epoch of each stage, and in validation, into account."""
        self._images, self._held_out = images, held_out

    def start(self, stage: int, finished: Sequence[EpochMetrics]) -> None:
        """A stage starts, or resumes after these epochs. Times of later stages, of another fold, are dropped."""
        self._seconds = {number: seconds for number, seconds in self._seconds.items() if number < stage}
        self._seconds[stage] = [item.train_seconds + item.val_seconds for item in finished if not item.averaged]
        self._since, self._first, self._pace = self._clock(), None, None

    def step(self, item: Progress) -> bool:
        """Steps are done; returns whether enough of them have been seen for an estimate."""
        if item.step != "train":
            self._first = None
            return False
        now = self._clock()
        if self._first is None or self._first[0] != item.stage or item.done <= self._first[2]:
            self._first, self._reports = (item.stage, now, item.done), 0
            return False
        self._reports += 1
        _, since, done = self._first
        if now - since < _FIRST_S or self._reports < _FIRST_STEPS:
            return False
        self._pace = (now - since) / (item.done - done) / self._sizes[item.stage - 1] ** 2
        return True

    def add(self, item: EpochMetrics) -> None:
        """An epoch is finished."""
        if not item.averaged:
            self._seconds.setdefault(item.stage, []).append(item.train_seconds + item.val_seconds)
        self._since, self._first = self._clock(), None

    def seconds(self, stage: int) -> tuple[float, float] | None:
        """Seconds left in the stage, and in it and all later ones; None before the first steps are done."""
        pace, lefts = None, []
        for number, (size, epochs) in enumerate(zip(self._sizes, self._epochs, strict=True), start=1):
            done = self._seconds.get(number, [])
            pixels = size**2 * (self._images[number - 1] + _VALIDATION * self._held_out)  # of an epoch
            if done:
                last = done[-_LAST:]
                pace = sum(last) / len(last) / pixels
            elif number == stage and self._pace is not None:
                pace = self._pace
            if number < stage:
                continue
            if pace is None:
                return None
            epoch_s, left = pace * pixels, max(0, epochs - len(done))
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
