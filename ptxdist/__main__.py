"""The program: `python -m ptxdist` is `ptxdist`."""

from __future__ import annotations

import atexit
import io
import os
import sys

from ptxdist import interrupts


def main() -> None:
    """Run the command line; signals are handled from the start, also while it is imported."""
    interrupts.install()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a locale may lack some characters
        sys.stdout.reconfigure(errors="replace")
    try:
        from ptxdist.cli import cli

        cli(prog_name="ptxdist")
    except interrupts.Interrupted as error:
        interrupts.say()
        sys.exit(error.exit_code)
    finally:
        code = getattr(sys.exception(), "code", 1)
        if interrupts.arrived():
            atexit._run_exitfuncs()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except OSError:  # nobody reads it any more; else the interpreter would end with a code of its own
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if interrupts.arrived():  # the end of the interpreter may crash in threads of a Ray that has just started
            os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    main()
