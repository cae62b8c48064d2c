"""Terminal output: progress, tables, the error line.

Owns: rich. Results go to stdout, everything else to stderr, so that `--json` can be piped. Where stderr is not a
terminal, progress is a line every ten seconds, so that a log file stays readable. `results` and `training` bring the
settings and the records of a run, which the data commands do not need, so they are imported where they are used.
"""

from ptxdist.console.tables import show_catalog, show_damages, show_findings, show_pairs, show_settings
from ptxdist.console.terminal import err, fail, out, progress, ray_log, say, show_json
from ptxdist.errors import plain

__all__ = [
    "err",
    "fail",
    "out",
    "plain",
    "progress",
    "ray_log",
    "say",
    "show_catalog",
    "show_damages",
    "show_findings",
    "show_json",
    "show_pairs",
    "show_settings",
]
