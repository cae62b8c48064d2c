"""The command `plan`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ptxdist import places
from ptxdist.cli.options import FILE, PLACE, begin, json_option
from ptxdist.errors import SettingsError

if TYPE_CHECKING:
    from ptxdist.cache.survey import Spread, Survey
    from ptxdist.run.advice import Machine


@click.command(short_help="Write a pipeline that fits a cache and this machine.")
@click.argument("cache", type=PLACE)
@click.option(
    "--out",
    type=FILE,
    default=Path("plan.toml"),
    show_default=True,
    help="The pipeline file; a former plan is replaced.",
)
@json_option
def plan(cache: Path | str, out: Path, as_json: bool) -> None:
    """Look at a cache and at this machine, and write a pipeline that fits both, each line with its reason.

    The same cache and machine give the same pipeline. Only its estimate of the time, from a few steps, differs.

    \b
    Example:
      ptxdist plan cache
    """
    if out.suffix != ".toml":
        raise SettingsError(f"--out {out}: `ptxdist train --pipeline` reads files named *.toml; give such a name")
    places.refuse_other(cache, places.CACHE)
    begin(f"looks at {cache}, then trains a few steps of each stage to estimate the time")
    from ptxdist import api, console

    planned = api.plan(cache, out=out)
    data, machine, advice, speeds = planned.data, planned.machine, planned.advice, planned.speeds
    if as_json:
        found = {
            "plan": out,
            "data": {**asdict(data), "finding": data.finding.name},
            "machine": asdict(machine),
            "notes": advice.warnings,
        }
        estimate = {"minutes": planned.minutes, "stages": [asdict(speed) for speed in speeds]}
        decisions = [asdict(decision) for decision in advice.decisions]
        console.show_json({**found, "decisions": decisions, "estimate": estimate, "next": planned.command})
        return
    console.show_pairs(str(cache), _data(data))
    console.show_pairs("this machine", _machine(machine))
    stages = [
        (f"stage {speed.stage}: {stage.size_px} px", f"{stage.epochs} epochs, about {speed.minutes:,.0f} minutes")
        for stage, speed in zip(planned.settings.pipeline.stages, speeds, strict=True)
    ]
    model = planned.settings.pipeline.model
    console.show_pairs(str(out), [("encoder", f"{model.encoder}, {model.encoder_weights}"), *stages])
    for text in advice.warnings:
        console.say(f"note: {text}")
    if any(speed.is_busy for speed in speeds):
        console.say("note: other programs use this machine, so training will take less time when they have ended")
    console.say(f"{out} has the reason of each setting. Next, about {planned.minutes:,.0f} minutes: {planned.command}")


def _data(data: Survey) -> list[tuple[str, str]]:
    from ptxdist.cache.summary import share

    def spread(found: Spread | None, factor: float, digits: int, unit: str) -> str:
        if found is None:
            return "none"
        low, middle, high = (f"{factor * value:,.{digits}f}" for value in found)
        return f"{middle} ({low} to {high}) {unit}"

    shown = f"with {data.finding.one}"
    return [
        ("labelled cases", f"{data.cases:,}"),
        (f" {shown}", f"{data.positive:,} ({share(data.positive, data.cases)})"),
        (" to train on, fold 0 held out", f"{data.train[0]:,} ({data.train[1]:,} {shown})"),
        (f"patients, by {data.grouped_by}", f"{data.patients:,} ({data.positive_patients:,} {shown})"),
        ("mask area, median (5 % to 95 %)", spread(data.mask_px, 1, 0, "pixels")),
        (" of the image", spread(data.mask_share, 100, 2, "%")),
        ("mean grey level of an image", spread(data.brightness, 1, 0, "of 255")),
        ("folds", f"{data.folds}"),
        ("sizes in the cache", ", ".join(map(str, data.sizes_px)) + " px"),
    ]


def _machine(machine: Machine) -> list[tuple[str, str]]:
    gpus = [f"{name}, {memory:,.0f} GiB" for name, memory in machine.gpus]
    return [
        ("CPU cores", f"{machine.cores}"),
        ("memory", f"{machine.memory_gib:,.0f} GiB"),
        ("GPUs", "; ".join(gpus) or "none"),
        ("numbers in training", "bf16" if machine.bf16 else "fp32"),
        ("ImageNet weights on this machine", ", ".join(machine.encoders) or "none"),
    ]
