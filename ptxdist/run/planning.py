"""`ptxdist plan` as a function: look at a cache and at this machine, and write the pipeline that fits both."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ptxdist.cache.survey import Survey, survey
from ptxdist.config import PIPELINE_NAME, DataSettings, Settings
from ptxdist.errors import SettingsError
from ptxdist.files import write_whole
from ptxdist.run import timing
from ptxdist.run.advice import WRITTEN_BY, Advice, Machine, advise
from ptxdist.run.timing import Speed
from ptxdist.storage.caches import local_cache
from ptxdist.train.choices import refuse_unknown


@dataclass(frozen=True)
class Planned:
    """A pipeline file, and what it follows from: the data, the machine, the decisions, the measured speeds.

    `settings` are those of a training with it; `speeds` has one entry for each stage.
    """

    path: Path
    cache: str
    data: Survey
    machine: Machine
    advice: Advice
    settings: Settings
    speeds: tuple[Speed, ...]

    @property
    def minutes(self) -> float:
        """Estimated time of the training, without evaluation and report."""
        return sum(speed.minutes for speed in self.speeds)

    @property
    def command(self) -> str:
        """The command that trains it."""
        workers = f" --workers {len(self.machine.gpus)}" if len(self.machine.gpus) > 1 else ""
        return f"ptxdist train --pipeline {self.path} --data {self.cache}{workers}"


def write_plan(
    cache: Path | str, out: Path, *, on_progress: Callable[[str, int, int], None] = lambda what, done, total: None
) -> Planned:
    """Write the pipeline for a cache, a folder or s3://…, and this machine to `out`, and replace a former plan there.

    Trains each stage for a few steps to measure the speed. Raises SettingsError for a name that no pipeline file can
    have, for a file that is no plan and would be lost, and when it cannot be written; StoreError for a cache that is
    missing or cannot be trained on.
    """
    if out.exists() and not (out.is_file() and out.read_bytes().startswith(WRITTEN_BY.encode())):
        raise SettingsError(f"{out} exists and is not a plan of this command; give another name with --out")
    if out.suffix != ".toml":
        raise SettingsError(f"--out {out}: `ptxdist train --pipeline` reads files named *.toml; give such a name")
    if not re.fullmatch(PIPELINE_NAME, out.stem):
        raise SettingsError(
            f"--out {out}: the pipeline gets this name; use only letters, digits, '_', '.' and '-' in it"
        )
    folder = local_cache(cache, on_progress=on_progress)
    data, machine = survey(folder), timing.this_machine()
    advice = advise(data, machine)
    settings = Settings(data=DataSettings(cache=str(cache)), pipeline=advice.settings(out.stem))
    refuse_unknown(settings)
    speeds = tuple(timing.measure(settings, folder, on_progress))
    write_whole(out, advice.toml([speed.sentence for speed in speeds]), error=SettingsError)
    return Planned(out, str(cache), data, machine, advice, settings, speeds)
