"""The command `export`: parse, call, print."""

from __future__ import annotations

from pathlib import Path

import click

from ptxdist import places
from ptxdist.cli.options import FILE, FOLDER, PLACE, begin, json_option
from ptxdist.errors import SettingsError

SUFFIXES = (".onnx", ".pt2", places.SUFFIX)


@click.command(short_help="Write a model as one file to share.")
@click.argument("model", type=PLACE)
@click.option("--out", type=FILE, required=True, help="The file; its suffix is .onnx, .pt2 or .ptxdist.")
@click.option("--point", type=FOLDER, help="Folder of an evaluation on other data, whose tuned point is used.")
@click.option("--at", help="A stored working point is used, such as sensitivity=0.95.")
@json_option
def export(model: Path | str, out: Path, point: Path | None, at: str | None, as_json: bool) -> None:
    """Write MODEL, a finished run or a bundle, as one file to share.

    .onnx and .pt2 (torch.export) need no ptxdist: image in, probabilities out; their metadata describe the steps
    before and after. They are compared with the checkpoint first. .ptxdist is a bundle for `ptxdist predict`.

    \b
    Examples:
      ptxdist export runs/first --out model.ptxdist
      ptxdist export model.ptxdist --point elsewhere --out local.ptxdist
    """
    places.refuse_other(model, places.RUN, places.BUNDLE)
    if out.suffix not in SUFFIXES:
        raise SettingsError(f"--out {out}: the suffix names the format and has to be one of .onnx, .pt2 and .ptxdist")
    begin(f"reads {model} and writes {out}")
    from dataclasses import asdict

    from ptxdist import console
    from ptxdist.predict.export import export_model
    from ptxdist.storage.runs import local_run

    with console.progress() as update:
        result = export_model(local_run(model), out, evaluation=point, at=at, on_progress=update)
    if as_json:
        console.show_json(asdict(result))
        return
    pairs = [("size", f"{result.size_bytes / 2**20:.1f} MiB")]
    if result.difference is not None:
        pairs += [
            ("largest difference from the checkpoint", f"{result.difference:.2g} (allowed: {result.limit:.2g})"),
            ("compared on", f"{result.images} {result.images_from}"),
        ]
    console.show_pairs(str(out), pairs)
    console.out.print(f"sha256 {result.sha256}", soft_wrap=True)
    console.say("research use only; not a medical device")
