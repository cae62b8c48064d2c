"""`ptxdist doctor`: check whether a run would work."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from ptxdist.cli.options import PLACE, begin, json_option
from ptxdist.errors import ClusterError


@click.command(short_help="Check whether a run would work on this machine or cluster.")
@click.option("--address", help="A Ray cluster (HEAD:6379), every node of it.  [default: this machine]")
@click.option("--data", type=PLACE, help="A cache, a folder or s3://…, that every node must be able to read.")
@click.option(
    "--run", type=PLACE, help="A run, a folder or s3://…, there or not, that every node must be able to write to."
)
@click.option("--full", is_flag=True, help="Read every byte of the cache, on every node.")
@json_option
def doctor(address: str | None, data: Path | str | None, run: Path | str | None, full: bool, as_json: bool) -> None:
    """Check before a run whether it would work: versions, GPUs, network, storage, disks, cache and clock of every node.

    The exit code is 11 if anything is wrong; warnings do not count.

    \b
    Examples:
      ptxdist doctor
      ptxdist doctor --address HEAD:6379 --data /shared/cache \\
        --run /shared/runs/first
    """
    begin(f"looks at {f'every node of {address}' if address else 'this machine'}")
    from ptxdist import console
    from ptxdist.cluster.doctor import diagnose

    findings = diagnose(address, cache=data, run=run, full=full)
    wrong = [item for item in findings if item.state == "wrong"]
    if as_json:
        console.show_json({"fit": not wrong, "findings": [asdict(item) for item in findings]})
    else:
        console.show_findings([(item.state, item.check, item.where, item.found, item.advice) for item in findings])
    if wrong:
        raise SystemExit(ClusterError.exit_code)
