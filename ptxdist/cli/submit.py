"""`ptxdist submit`: run another command, its paths made absolute, as a job on a Ray cluster."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import click

from ptxdist import interrupts
from ptxdist.cli.options import begin
from ptxdist.errors import SettingsError


@click.command(short_help="Run a command as a job on a Ray cluster.", context_settings={"ignore_unknown_options": True})
@click.option("--address", required=True, help="The cluster's dashboard, such as http://HEAD:8265.")
@click.option("--status", "status_of", metavar="JOB", help="Print the state of a job.")
@click.option("--logs", "logs_of", metavar="JOB", help="Follow the log of a job that was submitted before.")
@click.option("--stop", "stop_job", metavar="JOB", help="Stop a job.")
@click.option("--follow/--no-follow", default=True, show_default=True, help="Follow the log of the new job to its end.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def submit(
    context: click.Context,
    address: str,
    status_of: str | None,
    logs_of: str | None,
    stop_job: str | None,
    follow: bool,
    command: tuple[str, ...],
) -> None:
    """Run a ptxdist command as a job on a Ray cluster, follow its log, exit with its exit code.

    Paths are made absolute: data and runs belong on storage that all nodes share. Ctrl-C leaves the job running.
    Submitted again, `train` resumes its run.

    \b
    Example:
      ptxdist submit --address http://127.0.0.1:8265 -- train --workers 8 \\
        --pipeline exp4 --data /shared/cache
    """
    if sum(map(bool, (status_of, logs_of, stop_job, command))) != 1:
        raise click.UsageError("give either a command after --, or one of --status, --logs and --stop with a job")
    absolute: list[str] = []
    if command:
        group = context.find_root().command
        assert isinstance(group, click.Group)
        absolute = absolute_paths(group.commands, command)
    begin(f"asks the cluster at {address}")
    from ptxdist import console
    from ptxdist.cluster import submit as jobs

    if status_of:
        console.show_json(jobs.status(status_of, address=address))
        return
    if stop_job:
        console.say(f"job {stop_job}: {jobs.stop(stop_job, address=address)}")
        return
    job = [logs_of] if logs_of else []

    def submitted(job_id: str) -> None:
        job.append(job_id)
        console.say(f"job {job_id}: ptxdist {shlex.join(absolute)}")

    on_log = partial(print, end="", flush=True)
    try:
        if logs_of:
            code = jobs.follow(logs_of, address=address, on_log=on_log)
        else:
            code = jobs.submit(absolute, address=address, on_log=on_log, on_submitted=submitted, following=follow)
    except KeyboardInterrupt:
        if not job:
            raise
        console.say(
            f"job {job[0]} is still running; `ptxdist submit --address {address} --logs {job[0]}` follows it, "
            "--stop stops it"
        )
        raise SystemExit(interrupts.exit_code()) from None
    raise SystemExit(code)


def absolute_paths(commands: Mapping[str, click.Command], command: Sequence[str]) -> list[str]:
    """The command line with absolute paths, and with the default cache and run folder as options.

    Raises click's error when the command line does not parse, so a wrong job is never submitted.
    """
    name, *arguments = command
    target = commands.get(name)
    if target is None or name == "submit":
        raise SettingsError(
            f"'{name}' cannot be submitted; these commands can: {', '.join(sorted(set(commands) - {'submit'}))}"
        )
    context = target.make_context(name, list(arguments), resilient_parsing=False)
    given = [context.params[p.name] for p in target.params if p.name and isinstance(p.type, click.Path)]
    paths = {str(path) for value in given if value for path in (value if isinstance(value, tuple) else (value,))}
    paths = {path for path in paths if "://" not in path}

    def absolute(word: str) -> str:
        option, separator, value = word.partition("=")
        if word in paths:
            return os.path.abspath(word)
        if separator and value in paths:
            return f"{option}={os.path.abspath(value)}"
        return word

    arguments = [absolute(word) for word in arguments]
    if name == "train":
        from ptxdist.resolve import load_settings

        params = context.params
        settings = load_settings(params["pipeline"], site=params["site"], assignments=params["assignments"])
        if params["data"] is None:
            cache = settings.data.cache
            arguments += ["--data", cache if "://" in cache else os.path.abspath(cache)]
        if params["run"] is None:
            arguments += ["--run", os.path.abspath(Path("runs") / settings.pipeline.name)]
    return [name, *arguments]
