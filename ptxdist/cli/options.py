"""What several commands share: types of arguments, the `--json` option, who does the work.

Owns: the words of options that stand in more than one command. Refuses: nothing. Called by: the modules of commands.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from ptxdist.executor import Executor


class Place(click.Path):
    """A folder, or the address of one in an object store, which stays a text: `Path` would take a slash from it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click does; an address as it is."""
        return value if "://" in str(value) else super().convert(value, param, ctx)


FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(path_type=Path)
PLACE = Place(path_type=Path)
CORES = "Processes.  [default: one per core]"
ADDRESS = "A Ray cluster to do the work, on storage that its nodes share.  [default: this machine]"
Command = TypeVar("Command", bound=Callable[..., Any])


def json_option(command: Command) -> Command:
    """`--json`: the result on stdout as JSON."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def executor_for(workers: int, address: str | None) -> AbstractContextManager[Executor]:
    """Processes on this machine, or with an address the nodes of a Ray cluster."""
    if address is None:
        from ptxdist.executor import processes

        return processes(workers)
    from ptxdist.cluster.executor import ray_tasks

    return ray_tasks(address)
