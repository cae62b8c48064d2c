"""The commands around runs: train, evaluate, report, inspect, demo; parse, call, print.

Owns: their options. Refuses: command lines that do not parse. Called by: click.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ptxdist.cli.data import phantom, preprocess
from ptxdist.cli.options import FILE, FOLDER, PLACE, json_option
from ptxdist.config import DEFAULT_PIPELINE
from ptxdist.errors import PtxdistError, RunError, SettingsError

if TYPE_CHECKING:
    from ptxdist.config import Settings
    from ptxdist.records import PipelineResult
    from ptxdist.run.pipeline import OpenEngine

DEMO_CASES, DEMO_POSITIVE_SHARE = 280, 0.5


@click.command()
@click.option("--workers", type=click.IntRange(1), help="Ray Train workers (DDP ranks).  [default: configs]")
@click.option("--pipeline", default=DEFAULT_PIPELINE, show_default=True, help="A name from pipelines/, or a TOML file.")
@click.option("--site", help="A name from configs/ (local, gpu), or a TOML file, on top of the defaults.")
@click.option("--data", type=PLACE, help="The cache, a folder or s3://….  [default: configs]")
@click.option("--run", type=PLACE, help="The run, a folder or s3://….  [default: runs/PIPELINE]")
@click.option("--encoder-weights", help="imagenet, none, or a file.  [default: the pipeline's]")
@click.option("--fold", help="The fold to hold out, or all: one run each, pooled at the end.  [default: 0]")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting: stages.1.epochs=5")
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
    fold: str | None,
    assignments: tuple[str, ...],
    without_ray: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train a pipeline with Ray Train, evaluate it and write a report; the same command goes on after an interruption.

    Example: ptxdist train --workers 4 --pipeline exp4 --data cache
    """
    from ptxdist import console
    from ptxdist.config import complete
    from ptxdist.resolve import load_settings

    settings = load_settings(
        pipeline,
        site=site,
        assignments=assignments,
        options={
            "train.workers": workers,
            "data.cache": str(data) if data else None,
            "pipeline.model.encoder_weights": encoder_weights,
            "pipeline.fold": int(fold) if fold and fold.isdecimal() else None if fold == "all" else fold,
        },
    )
    if dry_run:
        console.show_json(complete(settings))
        return
    run = run or Path("runs") / settings.pipeline.name
    if fold == "all":
        if isinstance(run, str):
            raise SettingsError(f"--fold all writes to a folder, not to {run}; give --fold 0, --fold 1, … a run each")
        _train_folds(settings, run, with_ray=not without_ray, as_json=as_json)
        return
    result, page = _train(settings, run, with_ray=not without_ray)
    if as_json:
        console.show_json({**result.model_dump(mode="json"), "report": str(page)})
    else:
        console.show_result(result.stages, result.evaluation)
        console.out.print(f"report: {page}\noverlays: {page.parent / 'overlays'}", soft_wrap=True)


def _train_folds(settings: Settings, run: Path, *, with_ray: bool, as_json: bool) -> None:
    """Train RUN/fold-0, RUN/fold-1, …, each with its own fold held out, and pool what they say of it."""
    from ptxdist import console
    from ptxdist.cache.catalog import read_catalog
    from ptxdist.storage.caches import local_cache
    from ptxdist.train.evaluate import evaluate_again

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SettingsError(
            "--fold all under torchrun is not possible, since its processes end with the first fold; "
            "give --fold 0, --fold 1, … one after the other, or let Ray start the workers"
        )
    folds = read_catalog(local_cache(settings.data.cache, (), data=settings.data)).folds
    runs = [run / f"fold-{fold}" for fold in range(folds)]
    for fold, path in enumerate(runs):
        console.say(f"fold {fold} of 0 to {folds - 1} is held out")
        pipeline = settings.pipeline.model_copy(update={"fold": fold})
        _train(settings.model_copy(update={"pipeline": pipeline}), path, with_ray=with_ray)
    out = run / "out-of-fold"
    with console.progress() as update:
        evaluation, _ = evaluate_again(runs, folder=out, on_cases=lambda done, total: update("images", done, total))
    if as_json:
        console.show_json(evaluation.model_dump(mode="json"))
    else:
        console.show_result((), evaluation)
        console.out.print(f"out-of-fold evaluation: {out}", soft_wrap=True)


def _train(settings: Settings, run: Path | str, *, with_ray: bool) -> tuple[PipelineResult, Path]:
    from ptxdist import console
    from ptxdist.cluster.doctor import refuse_unfit
    from ptxdist.report.report import write_report
    from ptxdist.run.pipeline import only_training, plan_run, run_pipeline
    from ptxdist.rundir import RAY_LOG
    from ptxdist.storage.runs import working_run

    open_engine: OpenEngine | None = None  # this process, or torchrun's
    first = with_ray or os.environ.get("RANK", "0") == "0"
    if with_ray:
        from ptxdist.cluster.engine import ray_engine

        open_engine = ray_engine
    else:
        from ptxdist.run.local import refuse_other_workers

        refuse_other_workers(settings)
        if not first:
            console.out.quiet = console.err.quiet = True  # rank 0 speaks and writes for all
        if isinstance(run, str) and settings.train.workers > 1:
            raise SettingsError(f"{run} is written by one process or with Ray; leave out --without-ray")
    stages = settings.pipeline.stages
    with (
        working_run(run, [stage.size_px for stage in stages], settings.data) as mirror,
        only_training(mirror.folder) if first else nullcontext(),
    ):
        with console.progress() as update:
            plan = plan_run(
                settings, mirror, writes=first, on_progress=lambda step, *counts: update(f"check of {step}", *counts)
            )
            if first:
                refuse_unfit(mirror.folder)
        log = mirror.folder / RAY_LOG
        try:
            with (
                console.TrainingDisplay(
                    [stage.size_px for stage in stages],
                    [stage.epochs for stage in stages],
                    "Ray starts" if with_ray else "training starts",
                ) as display,
                console.divert(log) if with_ray else nullcontext(),
            ):
                result = run_pipeline(plan, open_engine, on_event=display.show)
        except PtxdistError as error:
            if not with_ray:
                raise
            raise type(error)(f"{error} (Ray's own words are in {log})") from error
        return result, write_report(mirror.folder if isinstance(run, str) else run)


@click.command()
@click.argument("runs", type=PLACE, nargs=-1, required=True)
@click.option("--out", type=FOLDER, help="Folder for the evaluation.  [default: inside the run]")
@click.option("--patients", type=FILE, help="CSV of image id and patient, where the cache was made without one.")
@json_option
def evaluate(runs: tuple[Path | str, ...], out: Path | None, patients: Path | None, as_json: bool) -> None:
    """Evaluate finished runs on the cases they have held out, on this machine.

    Runs of one fold are an ensemble, whose probabilities are averaged; runs of several folds are pooled.

    Example: ptxdist evaluate runs/exp4/fold-* --out runs/exp4/out-of-fold
    """
    from ptxdist import console
    from ptxdist.storage.runs import local_run
    from ptxdist.train.evaluate import evaluate_again

    if out is None and isinstance(runs[0], str):
        raise RunError(f"{runs[0]} is only read; give --out a folder for the evaluation")
    with console.progress() as update:
        evaluation, result = evaluate_again(
            [local_run(run) for run in runs],
            folder=out,
            patients=patients,
            on_cases=lambda done, total: update("images", done, total),
        )
    if as_json:
        console.show_json(evaluation.model_dump(mode="json"))
    else:
        console.show_result(result.stages if result else (), evaluation)


@click.command()
@click.argument("runs", type=PLACE, nargs=-1, required=True)
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
@json_option
def compare(runs: tuple[Path | str, ...], markdown: bool, as_json: bool) -> None:
    """Compare evaluated runs with the first of them, on the cases that all have evaluated.

    Example: ptxdist compare runs/exp1 runs/exp2 runs/exp4
    """
    from ptxdist import console
    from ptxdist.scores.compare import as_markdown
    from ptxdist.scores.compare import compare as compare_runs
    from ptxdist.storage.runs import local_run

    comparison = compare_runs([local_run(run) for run in runs])
    if as_json:
        console.show_json(comparison.model_dump(mode="json"))
    elif markdown:
        print(as_markdown(comparison), end="")
    else:
        console.show_comparison(comparison)


@click.command()
@click.argument("run", type=PLACE)
@json_option
def report(run: Path | str, as_json: bool) -> None:
    """Write the report of a finished run: one HTML page, and overlay pictures.

    Example: ptxdist report runs/exp4
    """
    from ptxdist import console
    from ptxdist.report.report import write_report
    from ptxdist.storage.runs import local_run

    page = write_report(local_run(run))
    if as_json:
        console.show_json({"report": str(page)})
    else:
        console.out.print(f"report: {page}", soft_wrap=True)


@click.command()
@click.argument("path", type=PLACE)
@json_option
def inspect(path: Path | str, as_json: bool) -> None:
    """Show what a cache or a run holds; for a cache, also draw a contact sheet with the masks outlined.

    Example: ptxdist inspect cache
    """
    from ptxdist.rundir import SETTINGS
    from ptxdist.storage.caches import local_cache
    from ptxdist.storage.runs import is_run, local_run

    if isinstance(path, str):
        path = local_run(path) if is_run(path) else local_cache(path)
    if not path.is_dir():
        raise RunError(f"no folder {path}; give a cache or a run")
    if (path / SETTINGS).is_file():
        _inspect_run(path, as_json)
    else:
        _inspect_cache(path, as_json)


def _inspect_run(run: Path, as_json: bool) -> None:
    from ptxdist import console
    from ptxdist.rundir import RESULT, read_result, read_settings, read_stage_result, stage_folder

    settings = read_settings(run)
    if (run / RESULT).is_file():
        result = read_result(run)
        if as_json:
            console.show_json(result.model_dump(mode="json"))
        else:
            console.show_result(result.stages, result.evaluation)
        return
    folders = [stage_folder(run, n, stage.size_px) for n, stage in enumerate(settings.pipeline.stages, start=1)]
    done = [stage for stage in map(read_stage_result, folders) if stage]
    if as_json:
        console.show_json({"finished": False, "stages": [stage.model_dump(mode="json") for stage in done]})
    else:
        console.show_result(done, None)
        console.say(f"not finished: {len(done)} of {len(folders)} stages; the same `ptxdist train` goes on from there")


def _inspect_cache(cache: Path, as_json: bool) -> None:
    from ptxdist import console
    from ptxdist.cache.catalog import read_catalog
    from ptxdist.cache.manifest import read_manifest
    from ptxdist.cache.outlines import draw_contact_sheet
    from ptxdist.cache.store import open_store

    catalog = read_catalog(cache)
    stores = [open_store(cache, size) for size in sorted(read_manifest(cache).sizes)]
    if as_json:
        rows = [{"size_px": item.size_px, "cases": item.cases, "fingerprint": item.fingerprint} for item in stores]
        console.show_json({**catalog.summary(), "stores": rows, "contact_sheet": draw_contact_sheet(cache)})
    else:
        console.show_catalog(catalog)
        console.show_pairs("stores", [(f"{s.size_px} px, {s.cases:,} cases", s.fingerprint) for s in stores])
        console.out.print(f"contact sheet: {draw_contact_sheet(cache)}", soft_wrap=True)


@click.command()
@click.option("--out", type=FOLDER, default=Path("demo"), show_default=True, help="Folder for data, cache and run.")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Ray Train workers.")
@json_option
@click.pass_context
def demo(context: click.Context, out: Path, workers: int, as_json: bool) -> None:
    """The whole way on synthetic data: phantoms, cache, two stages with Ray Train, numbers, report.

    Example: ptxdist demo
    """
    from ptxdist import console
    from ptxdist.resolve import load_settings

    sizes = [stage.size_px for stage in load_settings("demo").pipeline.stages]
    console.say(f"demo in {out}: made for a CPU, it trains at {' and '.join(map(str, sizes))} px, not at 256 and 512")
    phantoms, cache = out / "phantoms", out / "cache"
    console.out.quiet = as_json  # only the last step's result goes to stdout
    if not phantoms.is_dir():
        context.invoke(phantom, out=phantoms, cases=DEMO_CASES, positive_share=DEMO_POSITIVE_SHARE)
    context.invoke(
        preprocess,
        dicom=phantoms / "dicom-images",
        labels=phantoms / "train-rle.csv",
        out=cache,
        patients=phantoms / "patients.csv",
        sizes=(*sizes, 256, 512),
    )
    console.out.quiet = False
    context.invoke(train, workers=workers, pipeline="demo", data=cache, run=out / "run", as_json=as_json)
