"""What to do instead of an option that a command does not have."""

from __future__ import annotations

import re
from collections.abc import Sequence

import click

from ptxdist.errors import plain, short

_EXAMPLE = re.compile(r"^ *(ptxdist (?:.*\\\n)*.*)$", re.MULTILINE)
_OTHERS = {  # options of other programs
    "resume": "Rerun the same command: it resumes from the last checkpoint",
    "gpus": "`--workers N` trains on N GPUs, one for each worker",
    "gpu": "`--set train.device=gpu` insists on a GPU; a GPU that is there is used without it",
    "folds": "`--fold all` trains one run for each fold of the cache; `preprocess --folds` makes the folds",
    "output": "The option is --out, and for `train` --run",
    "outdir": "The option is --out, and for `train` --run",
    "input": "Paths are given without an option; `ptxdist COMMAND --help` shows where",
    "model": "Models are given without an option, as in `ptxdist predict MODEL PATH`",
    "verbose": "All commands say what they do; for other programs there is --json",
}


def advice(error: click.ClickException, words: Sequence[str]) -> str:
    """The end of the message of a command line that does not parse; "" if there is nothing to add.

    `words` are those of the command line.
    """
    if isinstance(error, click.NoSuchOption):
        option = error.option_name
        name = option.lstrip("-").replace("-", "_")
        if error.ctx is not None and error.ctx.info_name == "train":
            from ptxdist.resolve import set_in_words

            if ways := set_in_words(name, plain(short(_value_of(option, words), 100))):
                vars(error)["possibilities"] = None  # click's own suggestions
                return f"Use {ways}; `ptxdist settings` lists all settings."
        if name in _OTHERS:
            vars(error)["possibilities"] = None  # click's own suggestions
            return f"{_OTHERS[name]}."
    elif isinstance(error, click.MissingParameter) and error.ctx is not None:
        needed = f"{error.param.help} " if isinstance(error.param, click.Option) else ""
        example = _EXAMPLE.search(error.ctx.command.help or "")
        return needed + (f"For example: {' '.join(example[1].replace(chr(92), '').split())}" if example else "")
    return ""


def _value_of(option: str, words: Sequence[str]) -> str:
    """What the command line gives to an option; VALUE if nothing."""
    for number, word in enumerate(words):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option and number + 1 < len(words) and not words[number + 1].startswith("-"):
            return words[number + 1]
    return "VALUE"
