"""The command `settings`: parse, call, print."""

from __future__ import annotations

from dataclasses import asdict

import click

from ptxdist.cli.options import json_option


@click.command(short_help="List all settings for --set and pipeline files.")
@click.argument("words", metavar="[WORD]...", nargs=-1)
@json_option
def settings(words: tuple[str, ...], as_json: bool) -> None:
    """List every setting with its type, its default and its meaning; with WORDs, those whose name has one of them.

    `train --set KEY=VALUE` sets one. A pipeline file has those from `name` on, a file of `--site` the others. In
    `stages.*.epochs`, * means all stages; 1 the first.

    \b
    Examples:
      ptxdist settings
      ptxdist settings epochs batch
    """
    from ptxdist import console
    from ptxdist.resolve import every_setting

    found = [item for item in every_setting() if not words or any(word in item.key for word in words)]
    if as_json:
        console.show_json([asdict(item) for item in found])
    else:
        console.show_settings([(item.key, item.type, item.default, item.meaning) for item in found])
    if not found:
        console.say(f"no setting has {' or '.join(map(repr, words))} in its name; `ptxdist settings` lists all")
