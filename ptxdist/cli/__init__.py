"""The commands: parse, call, print; no logic.

Owns: the group of commands and how they end. Refuses: command lines that do not parse (click, exit code 2). Heavy
imports stand inside the commands, so that `ptxdist --help` answers at once.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

import click

from ptxdist import __version__
from ptxdist.cli.data import phantom, preprocess, verify
from ptxdist.cli.doctor import doctor
from ptxdist.cli.export import export
from ptxdist.cli.predict import predict
from ptxdist.cli.runs import compare, demo, evaluate, inspect, report, train
from ptxdist.cli.serve import serve
from ptxdist.cli.submit import submit
from ptxdist.errors import PtxdistError


class _Commands(click.Group):
    """Prints a refusal as one line and ends with its exit code; anything else keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        from ptxdist import console

        try:
            return super().invoke(ctx)
        except PtxdistError as error:
            console.fail(str(error))
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            console.say("interrupted; what is finished is kept, and the same command goes on from there")
            ctx.exit(130)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ptxdist")
def cli() -> None:
    """Pneumothorax segmentation, from DICOM files to numbers one can trust."""


for _command in (
    compare,
    demo,
    doctor,
    evaluate,
    export,
    inspect,
    phantom,
    predict,
    preprocess,
    report,
    serve,
    submit,
    train,
    verify,
):
    cli.add_command(_command)


def main() -> None:
    """Entry point of the `ptxdist` command."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # lets `finally` clean up
    cli(prog_name="ptxdist")
