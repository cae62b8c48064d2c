"""The command `score`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ptxdist import places
from ptxdist.cli.options import FILE, FINDING, LABELS, MATCH, begin, json_option
from ptxdist.errors import LabelError

THRESHOLD = "Pixels of probability images that reach it are inside.  [default: 0.5]"
SIZE = "Side of the images in pixels, if both sides are tables.  [default: 1024]"


@click.command(short_help="Score the masks of any tool.")
@click.argument("predictions", type=FILE)
@click.option("--truth", type=FILE, required=True, help=f"True masks: {LABELS}")
@click.option("--match", help=MATCH)
@click.option("--finding", default="pneumothorax", show_default=True, help=FINDING)
@click.option("--patients", type=FILE, help="CSV with image id, patient; intervals are then by patient.")
@click.option("--subset", is_flag=True, help="Score the images that are in both, if some are in one only.")
@click.option("--threshold", type=float, help=THRESHOLD)
@click.option("--dialect", help="Encoding of a table of predictions, such as relative-columns.  [default: detected]")
@click.option("--truth-dialect", help="Encoding of a table of true masks.  [default: detected]")
@click.option("--size-px", type=click.IntRange(1), help=SIZE)
@click.option("--surfaces", is_flag=True, help="Also HD95 and surface Dice; needs the extra `surfaces`.")
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
@json_option
def score(predictions: Path, truth: Path, patients: Path | None, markdown: bool, as_json: bool, **options: Any) -> None:
    """Score the masks of any tool under every definition of Dice in use, without a model.

    PREDICTIONS is a submission table (.csv, .csv.gz), a folder of mask or probability PNGs, a folder of NIfTI masks as
    nnU-Net writes them (extra `nifti`), or a folder of `ptxdist predict`.

    \b
    Example:
      ptxdist score submission.csv --truth train-rle.csv --patients nih_id.csv
    """
    for path, option in ((predictions, "PREDICTIONS"), (truth, "--truth"), (patients, "--patients")):
        if path:
            places.refuse_missing(path, option, LabelError)
    begin(f"scores {predictions} by {truth}")
    from ptxdist import api, console
    from ptxdist.console.results import show_external
    from ptxdist.scores.external import as_markdown

    result = api.score(predictions, truth, patients=patients, **options)
    if as_json:
        console.show_json(result.model_dump(mode="json"))
    elif markdown:
        print(console.plain(as_markdown(result)), end="")
    else:
        show_external(result)
    for note in result.notes:
        console.say(f"note: {note}")
