"""How long a training will still take, estimated from the epochs that are finished.

Owns: the rule of the estimate. Refuses: to guess before one epoch is finished. Called by: `console`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ptxdist.records import EpochMetrics

_LAST = 3  # epochs whose mean counts


class TimeLeft:
    """The seconds left in the running stage and in all stages.

    An epoch of the running stage takes as long as the mean of its last three. A stage without a finished epoch takes
    per epoch what the nearest earlier stage takes, times the ratio of the px of an image. Averaging, evaluation and the
    starts of workers are left out: they are short beside the epochs.
    """

    def __init__(
        self, sizes_px: Sequence[int], epochs: Sequence[int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sizes, self._epochs, self._clock = sizes_px, epochs, clock
        self._seconds: dict[int, list[float]] = {}  # of each finished epoch, by stage
        self._since: float | None = None  # when the running epoch began

    def start(self, stage: int, finished: Sequence[EpochMetrics]) -> None:
        """A stage starts, or goes on after these epochs."""
        self._seconds[stage] = [item.train_seconds + item.val_seconds for item in finished if not item.averaged]
        self._since = self._clock()

    def add(self, item: EpochMetrics) -> None:
        """An epoch is finished."""
        if not item.averaged:
            self._seconds.setdefault(item.stage, []).append(item.train_seconds + item.val_seconds)
        self._since = self._clock()

    def seconds(self, stage: int) -> tuple[float, float] | None:
        """Seconds left in the stage and in it and all after it; None while nothing is measured."""
        pace, lefts = None, []
        for number, (size, epochs) in enumerate(zip(self._sizes, self._epochs, strict=True), start=1):
            done = self._seconds.get(number, [])
            if done:
                last = done[-_LAST:]
                pace = sum(last) / len(last) / size**2  # seconds an epoch takes for each px of an image
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
