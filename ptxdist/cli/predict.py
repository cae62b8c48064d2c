"""The command `predict`: parse, call, print."""

from __future__ import annotations

from pathlib import Path

import click

from ptxdist import places
from ptxdist.cli.options import ADDRESS, FILE, FOLDER, PLACE, begin, executor_for, json_option
from ptxdist.errors import CatalogError


def _names(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    """Names separated by commas; an empty text is none."""
    names = tuple(part.strip() for part in value.split(",") if part.strip())
    if unknown := [name for name in names if name not in ("masks", "overlays", "seg")]:
        raise click.BadParameter(f"{unknown[0]!r} is not one of masks, overlays, seg", ctx, param)
    return names


@click.command(short_help="Segment radiographs with a run or a bundle.")
@click.argument("model", type=PLACE)
@click.argument("paths", metavar="PATH...", type=FILE, nargs=-1, required=True)
@click.option("--out", type=FOLDER, required=True, help="Folder for the results; finished files in it are skipped.")
@click.option("--with", "others", type=PLACE, multiple=True, help="A further model; probabilities are averaged.")
@click.option("--threshold", type=click.FloatRange(0, 1), help="Of a mask's pixels.  [default: the model's]")
@click.option("--min-area", type=click.IntRange(0), help="Masks of fewer pixels are emptied.  [default: the model's]")
@click.option("--at", help="A stored working point of MODEL, such as sensitivity=0.95.")
@click.option("--write", callback=_names, default="masks,overlays", show_default=True, help="Also possible: seg.")
@click.option("--keep-names", is_flag=True, help="Name the files in findings.csv and index.html, not only their ids.")
@click.option("--device", type=click.Choice(["auto", "cpu", "gpu"]), default="auto", show_default=True)
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes.")
@click.option("--address", help=ADDRESS)
@json_option
def predict(
    model: Path | str,
    paths: tuple[Path, ...],
    out: Path,
    others: tuple[Path | str, ...],
    threshold: float | None,
    min_area: int | None,
    at: str | None,
    write: tuple[str, ...],
    keep_names: bool,
    device: str,
    workers: int,
    address: str | None,
    as_json: bool,
) -> None:
    """Segment radiographs with MODEL, a finished run or a bundle.

    Each PATH is a DICOM file, a folder of any layout, or a zip file. Written are index.html, a page to look at,
    findings.csv, submission.csv, masks, overlays, and rejects.csv; with `--write seg` also DICOM SEG files, which name
    the patient as the radiographs do.

    \b
    Example:
      ptxdist predict runs/first new-images --out predictions
    """
    for place in (model, *others):
        places.refuse_other(place, places.RUN, places.BUNDLE)
    for path in paths:
        places.refuse_missing(path, "PATH", CatalogError)
    begin(f"loads {model}", keeps=True)
    from dataclasses import asdict

    from ptxdist import console
    from ptxdist.executor import serial
    from ptxdist.predict.folder import predict_files
    from ptxdist.predict.predictor import Predictor
    from ptxdist.records import OperatingPoint
    from ptxdist.rundir import FINDINGS_PAGE, FINDINGS_TABLE
    from ptxdist.storage.runs import local_run

    models = [local_run(place) for place in (model, *others)]
    predictor = Predictor.load(*models, device=device, at=at)  # type: ignore[arg-type]
    point = predictor.operating_point
    predictor.operating_point = OperatingPoint(
        image=point.image,
        top=point.top if threshold is None else threshold,
        min_area_px=point.min_area_px if min_area is None else min_area,
        bottom=point.bottom if threshold is None else threshold,
    )
    with console.progress() as update, executor_for(workers, address) as executor:
        result = predict_files(
            paths,
            out.absolute(),
            predictor,
            [path.absolute() for path in models],
            device=device,  # type: ignore[arg-type]
            outputs=write,
            executor=serial if workers == 1 and address is None else executor,
            workers=workers,
            keep_names=keep_names,
            on_progress=update,
        )
    point = predictor.operating_point
    page = out / FINDINGS_PAGE
    if as_json:
        caution = {"caution": predictor.caution} if predictor.caution else {}
        console.show_json(
            {"out": out, **asdict(result), "operating_point": point.model_dump(), **caution, "page": page}
        )
    else:
        done, profile = result.predicted + result.kept, predictor.cards[0].profile
        known, flagged = profile is not None and profile.likeness is not None, result.flagged - result.positive
        console.show_pairs(
            str(out),
            [
                ("images", f"{done:,}" + (f" ({result.kept:,} of them finished before)" if result.kept else "")),
                ("marked", f"{result.positive:,}"),
                *([("flagged without a mask", f"{flagged:,}")] if flagged else []),
                ("unlike the training images", f"{result.unlike:,}" if result.unlike or known else "not known"),
                ("repeated files", f"{result.repeated:,}"),
                ("rejected, see rejects.csv", f"{result.rejected:,}"),
                ("operating point", point.words),
            ],
        )
        console.say(f"open {page} in a browser; {FINDINGS_TABLE} beside it has the same as a table")
        console.say(" ".join(filter(None, ("Research use only; not a medical device.", predictor.caution))))
