"""Argument types, options with their help texts, and executors that several commands share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ptxdist import interrupts
from ptxdist.errors import plain

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from ptxdist.executor import Executor


class Place(click.Path):
    """A folder, or an address in an object store, which stays a string: `Path` would remove one of its slashes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return an address as it is, and anything else as click does."""
        return value if "://" in str(value) else super().convert(value, param, ctx)


FINDING = "What the masks show: pleural effusion, nodule, consolidation, lung; or FILE.toml."
FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(path_type=Path)
PLACE = Place(path_type=Path)
LABELS = "Label table; file or folder of COCO, LabelMe, DICOM SEG; folder of mask images or NIfTI."
MATCH = "Names of masks, such as '*_mask.png' or '*.2.mask.png=*.1.img.png'.  [default: usual ones]"
CORES = "Number of processes.  [default: one per core]"
ADDRESS = "Ray cluster that does the work; its nodes must share the storage.  [default: this machine]"
Command = TypeVar("Command", bound=Callable[..., Any])


def begin(what: str, *, keeps: bool = False) -> None:
    """Say at once, on stderr, what a command does; what it needs is imported after that.

    `keeps`: a rerun after an interruption skips what is finished. Of torchrun's processes only the first one speaks.
    """
    if not keeps:
        interrupts.keeps_nothing()
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # nobody reads it
            print(plain(what), file=sys.stderr, flush=True)


def json_option(command: Command) -> Command:
    """Add `--json`, which prints the result on stdout as JSON."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def executor_for(workers: int, address: str | None) -> AbstractContextManager[Executor]:
    """Executor with processes on this machine, or with an address, on the nodes of a Ray cluster."""
    if address is None:
        from ptxdist.executor import processes

        return processes(workers)
    from ptxdist.cluster.executor import ray_tasks

    return ray_tasks(address)
