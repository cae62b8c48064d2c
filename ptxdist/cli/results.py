"""The commands that read finished runs: evaluate, compare, report, inspect (also of a cache)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ptxdist import places
from ptxdist.cli.options import FILE, FOLDER, PLACE, begin, json_option
from ptxdist.errors import LabelError, StoreError

if TYPE_CHECKING:
    from ptxdist.predict.elsewhere import Split

_TARGET = click.FloatRange(0, 1, min_open=True)


@click.command(short_help="Score runs on held-out cases, or models on other data.")
@click.argument("runs", metavar="MODEL...", type=PLACE, nargs=-1, required=True)
@click.option("--out", type=FOLDER, help="Folder for the evaluation.  [default: inside the run]")
@click.option("--patients", type=FILE, help="CSV of image id and patient, where the cache was made without one.")
@click.option("--data", type=PLACE, help="Another cache to evaluate on: data from elsewhere.")
@click.option(
    "--split",
    type=click.Choice(["all", "train", "val"]),
    default="all",
    show_default=True,
    help="With --data: the cases of the cache to evaluate on.",
)
@click.option("--sensitivity", type=_TARGET, multiple=True, help="Find the working point with this sensitivity.")
@click.option("--specificity", type=_TARGET, multiple=True, help="Find the working point with this specificity.")
@click.option(
    "--prevalence",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of positive images for which PPV and NPV are stated.  [default: that of the images]",
)
@click.option("--workers", type=click.IntRange(1), help="Evaluate on so many Ray workers.  [default: in this process]")
@json_option
def evaluate(
    runs: tuple[Path | str, ...],
    out: Path | None,
    patients: Path | None,
    data: Path | str | None,
    split: Split,
    sensitivity: tuple[float, ...],
    specificity: tuple[float, ...],
    prevalence: float | None,
    workers: int | None,
    as_json: bool,
) -> None:
    """Evaluate finished runs on the cases that each has held out.

    Runs of one fold are an ensemble, whose probabilities are averaged; runs of several folds are pooled. With --data,
    runs and bundles are evaluated on another cache, at the operating point that they have; several are an ensemble.

    A working point flags images by their score, and `predict --at sensitivity=0.95` uses it. Ray workers, or processes
    of torchrun, divide the cases.

    \b
    Examples:
      ptxdist evaluate runs/first/fold-* --out runs/first/out-of-fold
      ptxdist evaluate runs/first --data other-hospital --out elsewhere \\
        --sensitivity 0.95
    """
    from ptxdist import api

    api.refuse_unfit(runs, out, data, split, (*sensitivity, *specificity), prevalence)
    _refuse_other(runs, patients, data)
    shown = runs[0] if len(runs) == 1 else f"{len(runs)} models"
    begin(f"evaluates {shown} on {'its own held-out cases' if data is None else data}")
    from ptxdist import console
    from ptxdist.console.results import show_result
    from ptxdist.rundir import EVALUATION, read_stages

    if data is None:
        for run in runs:
            if isinstance(run, Path):
                read_stages(run)  # before torch is imported
    from ptxdist.predict.elsewhere import unknown_patients

    evaluation = api.evaluate(
        runs,
        out=out,
        patients=patients,
        data=data,
        split=split,
        sensitivity=sensitivity,
        specificity=specificity,
        prevalence=prevalence,
        workers=workers,
    )
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes only the first one prints
        return
    if patients and (missing := unknown_patients(out or Path(runs[0]) / EVALUATION, patients)):
        console.say(f"warning: {missing}")
    if as_json:
        console.show_json(evaluation.model_dump(mode="json"))
    else:
        show_result(evaluation)
        console.say(_next(runs, out, data, [point.name for point in evaluation.working]))


def _next(runs: tuple[Path | str, ...], out: Path | None, data: Path | str | None, working: list[str]) -> str:
    """What can be done with an evaluation: its page, and the use of its first working point."""
    place, words = out or runs[0], ""
    if working and len(runs) == 1 and data is not None:
        words = f"; `ptxdist export {runs[0]} --point {place} --at {working[0]} --out …` makes a model with this point"
    elif working and out is None:
        words = f"; `ptxdist predict {place} … --at {working[0]}` uses the working point"
    return f"`ptxdist report {place}` writes a page of it{words}"


def _refuse_other(runs: tuple[Path | str, ...], patients: Path | None, data: Path | str | None) -> None:
    """Errors for places of another kind, before anything heavy is imported."""
    for run in runs:
        places.refuse_other(run, *((places.RUN, places.UNFINISHED) if data is None else (places.RUN, places.BUNDLE)))
    if data is not None:
        places.refuse_other(data, places.CACHE)
    if patients:
        places.refuse_missing(patients, "--patients", LabelError)


@click.command(short_help="Compare evaluated runs with the first one.")
@click.argument("runs", type=PLACE, nargs=-1, required=True)
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
@json_option
def compare(runs: tuple[Path | str, ...], markdown: bool, as_json: bool) -> None:
    """Compare evaluated runs with the first one, on the cases that all have evaluated.

    Folders of evaluations work too. Those on different data are compared for each data set; with --markdown they
    become one table of models by data sets.

    \b
    Examples:
      ptxdist compare runs/exp1 runs/exp2 runs/exp4
      ptxdist compare runs/first elsewhere --markdown
    """
    for run in runs:
        places.refuse_other(run, places.RUN, places.UNFINISHED, places.EVALUATION, "folder")
    begin(f"compares {len(runs)} evaluations")
    from ptxdist import console
    from ptxdist.console.results import show_comparison
    from ptxdist.scores.compare import as_markdown, by_data, matrix_markdown
    from ptxdist.storage.runs import local_run

    parts = by_data([local_run(run) for run in runs])
    several, comparison = len(parts) > 1, parts[0].comparison
    if as_json:
        console.show_json(
            [part.model_dump(mode="json") for part in parts] if several else comparison.model_dump(mode="json")
        )
    elif markdown:
        print(console.plain(matrix_markdown(parts) if several else as_markdown(comparison)), end="")
    else:
        for part in parts:
            if several:
                console.out.print(part.data, style="bold")
            show_comparison(part.comparison)


@click.command(short_help="Write the report of a finished run again.")
@click.argument("run", type=PLACE)
@json_option
def report(run: Path | str, as_json: bool) -> None:
    """Write the report of a finished run: one HTML page, and overlay pictures.

    \b
    Example:
      ptxdist report runs/first
    """
    places.refuse_other(run, places.RUN, places.EVALUATION)
    begin(f"writes the report of {run}")
    from ptxdist import api, console

    page = api.report(run)
    if as_json:
        console.show_json({"report": str(page)})
    else:
        console.out.print(f"report: {page}", soft_wrap=True)


@click.command(short_help="Show what is in a cache or a run.")
@click.argument("path", type=PLACE)
@json_option
def inspect(path: Path | str, as_json: bool) -> None:
    """Show what is in a cache or a run; for a cache, also draw a contact sheet with the masks outlined.

    \b
    Example:
      ptxdist inspect cache
    """
    places.refuse_other(path, places.RUN, places.UNFINISHED, places.CACHE)
    begin(f"reads {path}")
    if isinstance(path, str):
        from ptxdist.storage.caches import local_cache
        from ptxdist.storage.runs import is_run, local_run

        path = local_run(path) if is_run(path) else local_cache(path)
    if (path / places.SETTINGS).is_file():
        _inspect_run(path, as_json)
    else:
        _inspect_cache(path, as_json)


def _inspect_run(run: Path, as_json: bool) -> None:
    from ptxdist import console
    from ptxdist.console.results import show_result, show_stages
    from ptxdist.rundir import RESULT, read_result, read_settings, read_stage_result, stage_folder

    settings = read_settings(run)
    if os.path.lexists(run / RESULT):
        result = read_result(run)
        if as_json:
            console.show_json(result.model_dump(mode="json"))
        else:
            show_stages(result.stages)
            show_result(result.evaluation)
        return
    folders = [stage_folder(run, n, stage.size_px) for n, stage in enumerate(settings.pipeline.stages, start=1)]
    done = [stage for stage in map(read_stage_result, folders) if stage]
    if as_json:
        console.show_json({"finished": False, "stages": [stage.model_dump(mode="json") for stage in done]})
    else:
        if done:
            show_stages(done)
        console.say(f"not finished: {len(done)} of {len(folders)} stages; rerun `ptxdist train` to resume")


def _inspect_cache(cache: Path, as_json: bool) -> None:
    from ptxdist import console
    from ptxdist.cache.catalog import read_catalog
    from ptxdist.cache.manifest import MANIFEST, read_manifest
    from ptxdist.cache.outlines import draw_contact_sheet
    from ptxdist.cache.store import open_store
    from ptxdist.cache.summary import split_doubts

    catalog = read_catalog(cache)
    if not read_manifest(cache).sizes:
        raise StoreError(f"{cache} has no stores ({MANIFEST} is missing or too old); rerun `ptxdist preprocess`")
    stores = [open_store(cache, size) for size in sorted(read_manifest(cache).sizes)]
    if as_json:
        rows = [{"size_px": item.size_px, "cases": item.cases, "fingerprint": item.fingerprint} for item in stores]
        summary = {**catalog.summary(), "doubts": split_doubts(catalog)}
        console.show_json({**summary, "stores": rows, "contact_sheet": draw_contact_sheet(cache)})
    else:
        console.show_catalog(catalog)
        console.show_pairs("stores", [(f"{s.size_px} px, {s.cases:,} cases", s.fingerprint) for s in stores])
        console.out.print(f"contact sheet: {draw_contact_sheet(cache)}", soft_wrap=True)
