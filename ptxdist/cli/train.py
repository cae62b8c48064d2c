"""The command `train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ptxdist import places
from ptxdist.cli.options import PLACE, begin, json_option
from ptxdist.errors import RunError

if TYPE_CHECKING:
    from ptxdist.config import Settings


@click.command(short_help="Train a pipeline, evaluate it and write a report.")
@click.option("--workers", type=click.IntRange(1), help="Ray Train workers (DDP ranks).  [default: 1, or the site's]")
@click.option("--pipeline", default="paper", show_default=True, help="A name from pipelines/, or a TOML file.")
@click.option("--site", help="A name from configs/ (local, gpu), or a TOML file, with settings of this machine.")
@click.option("--data", type=PLACE, help="The cache, a folder or s3://….  [default: cache, or the site's]")
@click.option("--run", type=PLACE, help="The run, a folder or s3://….  [default: runs/PIPELINE]")
@click.option("--encoder-weights", help="imagenet, none, or a file.  [default: the pipeline's]")
@click.option("--init", help="A run, a bundle or a file of weights: fine-tune that whole network.")
@click.option("--fold", help="The fold to hold out, or all: one run each, evaluated together.  [default: 0]")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting: stages.1.epochs=5")
@click.option("--no-reuse", is_flag=True, help="Train anew what a run beside this one has already trained.")
@click.option("--without-ray", is_flag=True, help="Train in this process, or in those that torchrun has started.")
@click.option("--dry-run", is_flag=True, help="Print the resolved settings and stop.")
@json_option
def train(
    workers: int | None,
    pipeline: str,
    site: str | None,
    data: Path | str | None,
    run: Path | str | None,
    encoder_weights: str | None,
    init: str | None,
    fold: str | None,
    assignments: tuple[str, ...],
    no_reuse: bool,
    without_ray: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train a pipeline with Ray Train, evaluate it and write a report. Rerun it to resume after an interruption.

    \b
    Examples:
      ptxdist train --pipeline plan.toml --data cache --run runs/first
      ptxdist train --workers 4 --pipeline exp4 --data cache
    """
    from ptxdist.config import complete
    from ptxdist.resolve import load_settings

    settings = load_settings(
        pipeline,
        site=site,
        assignments=assignments,
        options={
            "train.workers": workers,
            "train.reuse": False if no_reuse else None,
            "data.cache": str(data) if data else None,
            "pipeline.model.encoder_weights": encoder_weights,
            "pipeline.model.init": init,
            "pipeline.fold": int(fold) if fold and fold.isdecimal() else None if fold == "all" else fold,
        },
    )
    cache, run = data or Path(settings.data.cache), run or Path("runs") / settings.pipeline.name
    if not dry_run:
        if "://" not in str(cache):
            places.refuse_other(Path(cache), places.CACHE)
        _refuse_other_folder(run)
        begin(f"trains {settings.pipeline.name} on {cache}, in {run}", keeps=True)
    from ptxdist import console
    from ptxdist.train.choices import refuse_unknown

    refuse_unknown(settings)
    if dry_run:
        console.show_json(complete(settings))
        return

    from ptxdist.api import ray_with_log
    from ptxdist.console.results import show_result
    from ptxdist.console.training import TrainingDisplay
    from ptxdist.records import PipelineResult
    from ptxdist.run.folds import OUT_OF_FOLD, train_folds
    from ptxdist.run.pipeline import train as train_run

    is_other_rank = without_ray and os.environ.get("RANK", "0") != "0"
    if is_other_rank:  # of torchrun's processes only the first one prints
        console.out.quiet = console.err.quiet = True
    work = train_folds if fold == "all" else train_run
    engine = None if without_ray else ray_with_log
    with TrainingDisplay(settings.pipeline.stages) as display:
        result = work(settings, run, engine=engine, on_event=display.show, on_progress=display.progress)
    if is_other_rank:
        return
    if isinstance(result, PipelineResult):
        page = _report_page(settings, run)
        content = {**result.model_dump(mode="json"), "report": str(page)}
        evaluation = result.evaluation
        where = f"report: {page}\noverlays: {page.parent / 'overlays'}"
    else:
        content = result.model_dump(mode="json")
        evaluation = result
        where = f"out-of-fold evaluation: {Path(run) / OUT_OF_FOLD}"
    if as_json:
        console.show_json(content)
    else:
        show_result(evaluation)
        console.out.print(where, soft_wrap=True)


def _refuse_other_folder(run: Path | str) -> None:
    kind = places.kind_of(run) if isinstance(run, Path) else places.NOTHING
    if kind not in (places.RUN, places.UNFINISHED, places.RUNS, places.NOTHING, "folder"):
        raise RunError(f"--run {run} is {places.in_words(kind)}; give a new folder, or a run to resume")


def _report_page(settings: Settings, run: Path | str) -> Path:
    """The report on this machine; for a run in an object store, in its cached copy."""
    from ptxdist.rundir import REPORT_PAGE
    from ptxdist.storage.runs import Mirror

    return (run if isinstance(run, Path) else Mirror(run, data=settings.data).folder) / REPORT_PAGE
