"""What a stage saves and when: checkpoints, the best weights so far, and which of them a resumed stage starts from.

Owns: the choice of the best epoch, and which files below a stage's folder are kept. Files are written by a thread while
the training goes on, on rank 0 only. `checkpoint` has their format.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ptxdist import files
from ptxdist.config import StageSettings, TrainSettings
from ptxdist.records import EpochMetrics
from ptxdist.train.checkpoint import (
    TrainingState,
    await_checkpoint,
    checkpoints,
    load_checkpoint,
    save_checkpoint,
    save_weights,
    snapshot,
)
from ptxdist.train.distributed import barrier, gather_texts, rank

_PREEMPTED_S = 1.0  # seconds between checkpoints after a preemption notice


@dataclass(eq=False)
class Saver:
    """Saves one stage below `folder`, in the thread of `writer`, which as a context manager ends with a whole file.

    `sha256` is that of the best weights, "" before there are any; it is up to date after `wait`. `preempted` is called
    on rank 0 and says whether there is a preemption notice.
    """

    folder: Path
    stage: StageSettings
    train: TrainSettings
    preempted: Callable[[], bool]
    sha256: str = ""
    writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "ptxdist-checkpoints"))
    _writing: Future[None] | None = None
    _saved_at: float = field(default_factory=time.monotonic)
    _saved: TrainingState | None = None

    def load(self, say: Callable[[str], None]) -> TrainingState | None:
        """The newest whole checkpoint, which rank 0 chooses for all ranks; None if there is none.

        `say` is called for each damaged one. Raises CheckpointError if another rank cannot read it.
        """
        state = None
        if rank() == 0:
            files.remove_leftovers(self.folder)  # of a killed trainer; only rank 0 writes there
            state = load_checkpoint(self.folder, say)
        barrier()  # rank 0 may have read and rejected damaged ones for minutes
        name = gather_texts(state.name if state else "")[0]
        if name and rank() != 0:
            state = await_checkpoint(self.folder / name)
        barrier()
        if state is not None:
            self.sha256 = state.progress["best_sha256"]
        return state

    def is_due(self, images: int) -> bool:
        """Whether to save inside an epoch, this many images after the last time; True on rank 0 only."""
        if rank() != 0:
            return False
        seconds = time.monotonic() - self._saved_at
        return (
            0 < self.train.checkpoint_every_s <= seconds
            or 0 < self.train.checkpoint_every_images <= images
            or (seconds >= _PREEMPTED_S and self.preempted())
        )

    def save(
        self,
        state: TrainingState,
        history: Sequence[EpochMetrics],
        *,
        best: EpochMetrics | None = None,
        checkpoint: bool = True,
    ) -> None:
        """On rank 0: copy the state, and write it in the background after the former one.

        A `checkpoint` of it is written unless that is False, and its weights as those of `best`, if that is given.
        """
        self._saved_at = time.monotonic()
        if rank() != 0:
            return
        self.wait()
        self._saved = state = snapshot(state, self._saved)
        ends = range(len(history), max(0, len(history) - self.train.keep_checkpoints - 1), -1)
        needed = {self.best_path(max(history[:end], key=self.merit)) for end in ends}

        def write() -> None:
            if best is not None:
                self.sha256 = save_weights(state.model, self.best_path(best))
            state.progress["best_sha256"] = self.sha256
            if checkpoint:
                save_checkpoint(self.folder, state, keep=self.train.keep_checkpoints)
            for path in set(self.folder.glob("best-*.safetensors")) - needed:  # no kept checkpoint refers to them
                path.unlink()

        self._writing = self.writer.submit(write)

    def wait(self) -> None:
        """Wait until what is written in the background is whole; raises its error."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def last_good(self) -> str:
        """Words for an error: the newest checkpoint."""
        self.wait()
        found = checkpoints(self.folder)
        return f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"

    def best_path(self, metrics: EpochMetrics) -> Path:
        """The file of an epoch's weights, if they are the best."""
        return self.folder / f"best-{metrics.epoch:04d}{'-average' if metrics.averaged else ''}.safetensors"

    def merit(self, metrics: EpochMetrics) -> tuple[float, float]:
        """Larger is better; the lower validation loss decides between equal scores.

        After phantoms, it is the later epoch: scores on radiographs do not tell how good a start a network is.
        """
        if self.stage.phantoms:
            return float(metrics.epoch), float(metrics.averaged)
        if self.stage.best_by == "loss":
            return -metrics.val_loss, 0.0
        return getattr(metrics.at_full, self.stage.best_by) or 0.0, -metrics.val_loss
