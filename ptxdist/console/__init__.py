"""Terminal output: progress, tables, the error line.

Owns: rich. Results go to stdout, everything else to stderr, so that `--json` can be piped. Where stderr is not a
terminal, progress is a line every ten seconds, so that a log file stays readable.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ptxdist.console.tables import (
    show_catalog,
    show_damages,
    show_findings,
    show_pairs,
    show_settings,
)
from ptxdist.console.terminal import divert, err, fail, out, progress, ray_log, say, show_json
from ptxdist.errors import plain

if TYPE_CHECKING:
    from ptxdist.console.results import show_comparison, show_external, show_result, show_stages
    from ptxdist.console.training import TrainingDisplay, epoch_line, epoch_table

__all__ = [
    "TrainingDisplay",
    "divert",
    "epoch_line",
    "epoch_table",
    "err",
    "fail",
    "out",
    "plain",
    "progress",
    "ray_log",
    "say",
    "show_catalog",
    "show_comparison",
    "show_damages",
    "show_external",
    "show_findings",
    "show_json",
    "show_pairs",
    "show_result",
    "show_settings",
    "show_stages",
]

# Loaded on first use: both import the settings and the records of a run, which the data commands do not need.
_LATE = {
    **dict.fromkeys(("show_comparison", "show_external", "show_result", "show_stages"), "results"),
    **dict.fromkeys(("TrainingDisplay", "epoch_line", "epoch_table"), "training"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'ptxdist.console' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ptxdist.console.{_LATE[name]}"), name)
