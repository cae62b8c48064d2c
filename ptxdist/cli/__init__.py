"""The command line: every command parses, calls one function of the package, and prints the result.

Owns: the group of commands and their exit codes. Refuses: command lines that do not parse (click, exit code 2). Heavy
imports are inside the commands, so that `ptxdist --help` is fast.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from ptxdist import __version__, interrupts
from ptxdist.cli.data import phantom, preprocess, verify
from ptxdist.cli.demo import demo
from ptxdist.cli.doctor import doctor
from ptxdist.cli.export import export
from ptxdist.cli.hints import advice
from ptxdist.cli.plan import plan
from ptxdist.cli.predict import predict
from ptxdist.cli.results import compare, evaluate, inspect, report
from ptxdist.cli.score import score
from ptxdist.cli.serve import serve
from ptxdist.cli.settings import settings
from ptxdist.cli.submit import submit
from ptxdist.cli.train import train
from ptxdist.errors import LIMITS, PtxdistError, raise_limit, short, system_says

# What is wrong with a machine and not with ptxdist: a disk, permissions, limits.
_ENVIRONMENT = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE, *LIMITS),
)


class _Commands(click.Group):
    """Prints a PtxdistError as one line and exits with its code, and with 1 when a file cannot be read or written.

    Any other exception keeps its traceback. Commands are listed in the order of their use.
    """

    _words: tuple[str, ...] = ()

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def main(self, *args: Any, **extra: Any) -> Any:
        """As click's, but for an interruption between two of its steps, of which it says "Aborted!"."""
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except click.Abort:
            interrupts.say()
            sys.exit(interrupts.exit_code())
        sys.exit(code if isinstance(code, int) else 0)

    def make_context(self, info_name: str | None, args: list[str], *parents: Any, **extra: Any) -> click.Context:
        self._words = tuple(args)
        with _said(self._words):
            return super().make_context(info_name, args, *parents, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _said(self._words):
            return super().invoke(ctx)


@contextmanager
def _said(words: Sequence[str] = ()) -> Iterator[None]:
    try:
        with _errors_said(words):
            try:
                yield
            except Exception as error:
                if interrupts.arrived():  # which has caused it, as when it ended worker processes too
                    raise KeyboardInterrupt from None
                if isinstance(error, ImportError):  # of a library for which no file could be opened
                    raise_limit(error)
                raise
    except KeyboardInterrupt:  # also while an error is said
        interrupts.say()
        sys.exit(interrupts.exit_code())


@contextmanager
def _errors_said(words: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except PtxdistError as error:
        from ptxdist import console

        console.fail(str(error))
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError:  # its message is the whole help
        raise
    except click.ClickException as error:
        from ptxdist import console

        # It repeats words of the command line.
        vars(error)["message"] = f"{console.plain(short(error.message))} {advice(error, words)}".strip()
        raise
    except OSError as error:
        if error.errno not in _ENVIRONMENT:
            raise
        from ptxdist import console

        place = "" if error.errno in LIMITS else "output: "
        console.fail(f"{f'{error.filename}: ' if error.filename else place}{system_says(error)}")
        sys.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ptxdist")
def cli() -> None:
    """Segmentation of chest radiographs, by default of pneumothorax: from DICOM files to numbers one can trust."""


for _command in (
    *(demo, phantom, preprocess, verify, inspect, plan, train, evaluate, compare, report, predict, serve, export),
    *(score, settings, doctor, submit),
):
    cli.add_command(_command)
