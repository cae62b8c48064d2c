"""The program: `python -m ptxdist` is `ptxdist`."""

from __future__ import annotations

import atexit
import errno
import io
import os
import sys

from ptxdist import interrupts


def main() -> None:
    """Run the command line; signals are handled from the start, also while it is imported."""
    interrupts.install()
    try:
        try:
            _open_closed()
            if isinstance(sys.stdout, io.TextIOWrapper):  # a locale may lack some characters
                sys.stdout.reconfigure(errors="replace")
            from ptxdist.cli import cli

            cli(prog_name="ptxdist")
        finally:
            interrupts.end()  # inside, so that an interruption at this very moment is said too
    except KeyboardInterrupt:
        interrupts.end()
        interrupts.say()
        sys.exit(interrupts.exit_code())
    finally:
        error = sys.exception()
        if error is None or isinstance(error, SystemExit):  # else the interpreter shows a defect
            _end(error.code if error else 0)


def _end(code: object) -> None:
    """End the process with what the interpreter does first, and without the rest.

    Freeing modules takes PyTorch up to a second, and may crash in threads of a Ray that has just started.
    """
    import threading  # late: signals are handled before it is imported

    if not interrupts.arrived():
        threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    lost = _flush()
    if lost and not code:
        os.write(2, f"error: output: {lost}\n".encode())
        code = 1
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _open_closed() -> None:
    """Open streams that the caller has closed (`>&-`): else the next file gets their number, and what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            stream = open(number, "w" if number else "r", encoding="utf-8")  # noqa: SIM115  until the end
            vars(sys).update({name: stream, f"__{name}__": stream})


def _flush() -> str:
    """Write out what has been printed; what prevents it, or "" when it is only that nobody reads it any more."""
    lost = ""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError as error:  # the interpreter would end with a code of its own
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            lost = "" if error.errno == errno.EPIPE else str(error.strerror)
    return lost


if __name__ == "__main__":
    main()
