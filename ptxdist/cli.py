"""The commands: parse, call, print; no logic.

Owns: click. Refuses: command lines that do not parse (click, exit code 2). Heavy imports stand inside the commands, so
that `ptxdist --help` answers at once.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ptxdist import __version__
from ptxdist.config import DEFAULT_PIPELINE
from ptxdist.errors import PtxdistError, RunError, SettingsError

if TYPE_CHECKING:
    from ptxdist.config import Settings
    from ptxdist.rundir import PipelineResult

FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(path_type=Path)
DEMO_CASES, DEMO_POSITIVE_SHARE = 280, 0.5
CORES = "Processes.  [default: one per core]"
Command = TypeVar("Command", bound=Callable[..., Any])


class _Commands(click.Group):
    """Prints a refusal as one line and ends with its exit code; anything else keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        from ptxdist import console

        try:
            return super().invoke(ctx)
        except PtxdistError as error:
            console.fail(str(error))
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            console.say("interrupted; what is finished is kept, and the same command goes on from there")
            ctx.exit(130)


def json_option(command: Command) -> Command:
    """`--json`: the result on stdout as JSON."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ptxdist")
def cli() -> None:
    """Pneumothorax segmentation, from DICOM files to numbers one can trust."""


@cli.command()
@click.argument("out", type=FOLDER)
@click.option("--cases", type=int, default=300, show_default=True, help="Images to draw; with --labels, 0 means all.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--positive-share", type=float, default=0.2215, show_default=True, help="Share with a pneumothorax.")
@click.option("--labels", type=FILE, help="Draw images for the ids and masks of this label table.")
@click.option("--workers", type=click.IntRange(1), default=lambda: os.cpu_count() or 1, help=CORES)
@json_option
def phantom(
    out: Path, cases: int, seed: int, positive_share: float, labels: Path | None, workers: int, as_json: bool
) -> None:
    """Write a synthetic SIIM-like data set to OUT.

    Example: ptxdist phantom phantoms --cases 300 --seed 0
    """
    from ptxdist import console
    from ptxdist.data.phantom import write_phantoms

    with console.progress() as update:
        result = write_phantoms(
            out,
            cases=cases,
            seed=seed,
            positive_share=positive_share,
            labels=labels,
            workers=workers,
            on_image=lambda done: update("images", done, cases or done),
        )
    if as_json:
        console.show_json(asdict(result))
    else:
        console.show_pairs(str(out), [(name, str(value)) for name, value in asdict(result).items()])


@cli.command()
@click.option("--dicom", type=FOLDER, required=True, help="Folder with DICOM files, nested as they are.")
@click.option("--labels", type=FILE, required=True, help="CSV with ImageId and EncodedPixels; may be .gz.")
@click.option("--out", type=FOLDER, required=True, help="The cache to make or to renew.")
@click.option("--patients", type=FILE, help="CSV: image id, patient; keeps patients on one side of the split.")
@click.option("--size", "sizes", type=click.IntRange(32), multiple=True, default=(256, 512), show_default=True)
@click.option("--workers", type=click.IntRange(1), default=lambda: os.cpu_count() or 1, help=CORES)
@json_option
def preprocess(
    dicom: Path, labels: Path, out: Path, patients: Path | None, sizes: tuple[int, ...], workers: int, as_json: bool
) -> None:
    """Turn DICOM files and a label table into a training cache.

    Run it again after anything changed: only what is concerned is made anew.

    Example: ptxdist preprocess --dicom dicom-images-train --labels train-rle.csv --out cache
    """
    from ptxdist import console
    from ptxdist.data.preprocess import preprocess as build

    with console.progress() as update:
        result = build(dicom, labels, out, patients=patients, sizes_px=sizes, workers=workers, on_progress=update)
    if as_json:
        work = {"cache": out, "sizes_px": result.sizes_px, "written": result.written, "reused": result.reused}
        console.show_json({**work, **result.catalog.summary()})
    else:
        console.show_catalog(result.catalog)
        if result.rejects:
            console.say(
                f"{len(result.rejects)} files could not be used, see {out / 'rejects.csv'}; "
                f"the first one: {result.rejects[0].path} {result.rejects[0].reason}"
            )
        done = f"{result.written} shards written, {result.reused} kept" if result.written else "nothing had to be done"
        console.say(f"{out} is ready at {', '.join(map(str, result.sizes_px))} px: {done}")


@cli.command()
@click.option("--workers", type=click.IntRange(1), help="Ray Train workers (DDP ranks).  [default: configs]")
@click.option("--pipeline", default=DEFAULT_PIPELINE, show_default=True, help="A name from pipelines/, or a TOML file.")
@click.option("--site", help="A name from configs/ (local, gpu), or a TOML file, on top of the defaults.")
@click.option("--data", type=FOLDER, help="The cache.  [default: configs]")
@click.option("--run", type=FOLDER, help="The run folder.  [default: runs/PIPELINE]")
@click.option("--encoder-weights", help="imagenet, none, or a file.  [default: the pipeline's]")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting: stages.1.epochs=5")
@click.option("--dry-run", is_flag=True, help="Print the resolved settings and stop.")
@json_option
def train(
    workers: int | None,
    pipeline: str,
    site: str | None,
    data: Path | None,
    run: Path | None,
    encoder_weights: str | None,
    assignments: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train a pipeline with Ray Train, evaluate it and write a report; the same command goes on after an interruption.

    Example: ptxdist train --workers 4 --pipeline exp4 --data cache
    """
    from ptxdist import console
    from ptxdist.config import load_settings, snapshot

    settings = load_settings(
        pipeline,
        site=site,
        assignments=assignments,
        options={
            "train.workers": workers,
            "data.cache": str(data) if data else None,
            "pipeline.model.encoder_weights": encoder_weights,
        },
    )
    if dry_run:
        console.show_json(snapshot(settings))
        return
    result, page = _train(settings, run or Path("runs") / settings.pipeline.name)
    if as_json:
        console.show_json({**result.model_dump(mode="json"), "report": str(page)})
    else:
        console.show_result(result.stages, result.evaluation)
        console.out.print(f"report: {page}\noverlays: {page.parent / 'overlays'}", soft_wrap=True)


def _train(settings: Settings, run: Path) -> tuple[PipelineResult, Path]:
    from ptxdist import console
    from ptxdist.cluster.coordinator import plan_run, run_pipeline
    from ptxdist.learn.report import write_report
    from ptxdist.rundir import RAY_LOG

    plan, stages = plan_run(settings, run), settings.pipeline.stages
    try:
        with (
            console.TrainingDisplay([s.size_px for s in stages], [s.epochs for s in stages]) as display,
            console.divert(run / RAY_LOG),
        ):
            result = run_pipeline(plan, on_event=display.show)
    except PtxdistError as error:
        raise type(error)(f"{error} (Ray's own words are in {run / RAY_LOG})") from error

    return result, write_report(run)


@cli.command(context_settings={"ignore_unknown_options": True})
@click.option("--address", required=True, help="The cluster's dashboard, such as http://HEAD:8265.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def submit(address: str, command: tuple[str, ...]) -> None:
    """Run a ptxdist command as a job on a Ray cluster, follow its log, end with its exit code.

    Paths are made absolute: data and runs belong on storage that all nodes share. Ctrl-C leaves the job running.

    Example: ptxdist submit --address http://127.0.0.1:8265 -- train --workers 8 --pipeline exp4 --data /shared/cache
    """
    from ptxdist import console
    from ptxdist.cluster.submit import submit as hand_over

    absolute = absolute_paths(command)
    job: list[str] = []

    def submitted(job_id: str) -> None:
        job.append(job_id)
        console.say(f"job {job_id}: ptxdist {shlex.join(absolute)}")

    try:
        code = hand_over(
            absolute, address=address, on_log=lambda text: click.echo(text, nl=False), on_submitted=submitted
        )
    except KeyboardInterrupt:
        if job:
            console.say(f"job {job[0]} goes on; `ray job logs --follow --address {address} {job[0]}` shows it")
        raise SystemExit(130) from None
    raise SystemExit(code)


def absolute_paths(command: Sequence[str]) -> list[str]:
    """The command line with its relative paths made absolute and the default cache and run folder spelt out.

    Raises click's own error when it does not parse, so that a wrong job is never submitted.
    """
    name, *arguments = command
    target = cli.commands.get(name)
    if target is None or name == "submit":
        raise SettingsError(
            f"'{name}' is no command that can be submitted; there are: {', '.join(sorted(cli.commands))}"
        )
    context = target.make_context(name, list(arguments), resilient_parsing=False)
    paths = {
        str(context.params[parameter.name])
        for parameter in target.params
        if parameter.name and isinstance(parameter.type, click.Path) and context.params[parameter.name]
    }

    def absolute(word: str) -> str:
        option, separator, value = word.partition("=")
        if word in paths:
            return os.path.abspath(word)
        if separator and value in paths:
            return f"{option}={os.path.abspath(value)}"
        return word

    arguments = [absolute(word) for word in arguments]
    if name == "train":
        from ptxdist.config import load_settings

        params = context.params
        settings = load_settings(params["pipeline"], site=params["site"], assignments=params["assignments"])
        if params["data"] is None:
            arguments += ["--data", os.path.abspath(settings.data.cache)]
        if params["run"] is None:
            arguments += ["--run", os.path.abspath(Path("runs") / settings.pipeline.name)]
    return [name, *arguments]


@cli.command()
@click.argument("run", type=FOLDER)
@json_option
def evaluate(run: Path, as_json: bool) -> None:
    """Evaluate a finished run's weights on its held-out cases again, on this machine.

    Example: ptxdist evaluate runs/exp4
    """
    from ptxdist import console
    from ptxdist.learn.evaluate import evaluate_again

    with console.progress() as update:
        result = evaluate_again(run, on_cases=lambda done, total: update("images", done, total))
    if as_json:
        console.show_json(result.evaluation.model_dump(mode="json"))
    else:
        console.show_result(result.stages, result.evaluation)


@cli.command()
@click.argument("run", type=FOLDER)
@json_option
def report(run: Path, as_json: bool) -> None:
    """Write the report of a finished run: one HTML page, and overlay pictures.

    Example: ptxdist report runs/exp4
    """
    from ptxdist import console
    from ptxdist.learn.report import write_report

    page = write_report(run)
    if as_json:
        console.show_json({"report": str(page)})
    else:
        console.out.print(f"report: {page}", soft_wrap=True)


@cli.command()
@click.argument("path", type=FOLDER)
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Show what a cache or a run holds; for a cache, also draw a contact sheet with the masks outlined.

    Example: ptxdist inspect cache
    """
    from ptxdist.rundir import SETTINGS

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
    from ptxdist.data.catalog import read_catalog
    from ptxdist.data.draw import draw_contact_sheet
    from ptxdist.data.store import open_store, read_manifest

    catalog = read_catalog(cache)
    stores = [open_store(cache, size) for size in sorted(read_manifest(cache))]
    sheet = draw_contact_sheet(cache)
    if as_json:
        rows = [{"size_px": item.size_px, "cases": item.cases, "fingerprint": item.fingerprint} for item in stores]
        console.show_json({**catalog.summary(), "stores": rows, "contact_sheet": sheet})
    else:
        console.show_catalog(catalog)
        console.show_pairs("stores", [(f"{s.size_px} px, {s.cases:,} cases", s.fingerprint) for s in stores])
        console.out.print(f"contact sheet: {sheet}", soft_wrap=True)


@cli.command()
@click.option("--out", type=FOLDER, default=Path("demo"), show_default=True, help="Folder for data, cache and run.")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Ray Train workers.")
@json_option
@click.pass_context
def demo(context: click.Context, out: Path, workers: int, as_json: bool) -> None:
    """The whole way on synthetic data: phantoms, cache, two stages with Ray Train, numbers, report.

    Example: ptxdist demo
    """
    from ptxdist import console
    from ptxdist.config import load_settings

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


def main() -> None:
    """Entry point of the `ptxdist` command."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # lets `finally` clean up
    cli(prog_name="ptxdist")
