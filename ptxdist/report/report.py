"""The report of a finished run: one HTML page with its pictures inside, and the pictures with outlines as files.

Everything comes from the files of the run and from the cache; no network is run, and no patient identifier is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ptxdist import __version__, files
from ptxdist.cache.catalog import Catalog, hold_out, read_catalog
from ptxdist.cache.duplicates import read_pairs
from ptxdist.cache.manifest import read_manifest
from ptxdist.cache.store import Store, open_store, store_path
from ptxdist.config import DataSettings
from ptxdist.errors import RunError
from ptxdist.records import Elsewhere, EvaluationResult
from ptxdist.report.gallery import draw_galleries
from ptxdist.report.page import Gallery, Page, Section, render
from ptxdist.report.sections import RunData, sections_elsewhere
from ptxdist.report.sections import sections as all_sections
from ptxdist.rundir import (
    CASES,
    EVALUATION,
    REPORT,
    RESULT,
    read_environment,
    read_evaluation,
    read_origin,
    read_result,
    read_settings,
)
from ptxdist.scores.headline import points
from ptxdist.scores.tables import CaseRow, read_cases, read_predictions, refuse_other_split
from ptxdist.storage.caches import local_cache

_FOOT = f"Written by ptxdist {__version__} from the files of the {{}}. It fetches nothing and runs no script."


def write_report(run: Path, *, sections: Callable[[RunData], Iterable[Section]] = all_sections) -> Path:
    """Write RUN/report, which replaces a former one when it is complete, and return the path of its index.html.

    `run` may also be the folder of an evaluation on data from elsewhere. Raises RunError when the run is not finished,
    its tables are missing, its cache was split differently after it, or the report cannot be written; StoreError when
    the cache is missing.
    """
    if (run / CASES).is_file():
        evaluation = read_evaluation(run)
        if evaluation.elsewhere is None:
            raise RunError(f"{run} is an evaluation; give a run, for example one of those that were evaluated")
        return _write_elsewhere(run, evaluation, evaluation.elsewhere)
    settings, result = read_settings(run), read_result(run)
    size_px, fold = settings.pipeline.stages[-1].size_px, settings.pipeline.fold
    cache = local_cache(settings.data.cache, [size_px], data=settings.data)
    catalog = read_catalog(cache)
    refuse_other_split(run, catalog, fold)
    if fold:
        catalog = hold_out(catalog, fold, read_pairs(cache))
    if read_evaluation(run / EVALUATION) != result.evaluation:
        raise RunError(f"{run / RESULT} and {run / EVALUATION} differ; `ptxdist evaluate {run}` writes both")
    environment, origin = read_environment(run), read_origin(run)

    def chosen(rows: Sequence[CaseRow], galleries: Sequence[Gallery]) -> Iterable[Section]:
        return sections(RunData(settings, result, environment, catalog, rows, galleries, origin))

    about = Page(
        _title(run, settings.pipeline.name), catalog.finding.name, settings.pipeline.purpose, (), _FOOT.format("run")
    )
    return _write(run, about, result.evaluation, catalog, _sharpest_store(cache, size_px), chosen)


def _title(run: Path, pipeline: str) -> str:
    """The run by its folder, and its pipeline, which may have a name as general as "plan"."""
    run = run.absolute()
    name = f"{run.parent.name}/{run.name}" if run.name.startswith("fold-") else run.name
    return pipeline if name == pipeline else f"{name}: pipeline {pipeline}"


def _write_elsewhere(folder: Path, evaluation: EvaluationResult, elsewhere: Elsewhere) -> Path:
    cache = local_cache(elsewhere.data, data=DataSettings(cache=elsewhere.data))
    catalog, store = read_catalog(cache), _sharpest_store(cache, min(read_manifest(cache).sizes))
    purpose = f"evaluated on {Path(elsewhere.data).name}, data from elsewhere"
    about = Page(" + ".join(elsewhere.models), catalog.finding.name, purpose, (), _FOOT.format("evaluation"))
    return _write(folder, about, evaluation, catalog, store, partial(sections_elsewhere, evaluation, catalog))


def _write(
    place: Path,
    about: Page,
    evaluation: EvaluationResult,
    catalog: Catalog,
    store: Store,
    sections: Callable[[Sequence[CaseRow], Sequence[Gallery]], Iterable[Section]],
) -> Path:
    """Write the report of a run or an evaluation: the page `about` it with these sections, and the overlays."""
    # The cases are at the operating point in use, the masks at that of predictions.csv.
    rows, predictions = read_cases(place, points(evaluation)[0].tuned), read_predictions(place)
    if {row.case_id for row in rows} != predictions.keys():
        raise RunError(f"the tables of {place} are of different evaluations; `ptxdist evaluate {place}` writes both")
    with files.replacing_folder(place / REPORT, busy="") as folder:
        overlays = folder / "overlays"
        overlays.mkdir()
        galleries = draw_galleries(rows, predictions, catalog.labelled, store, overlays)
        page = replace(about, sections=tuple(sections(rows, galleries)))
        (folder / "index.html").write_text(render(page), encoding="utf-8")
    return place / REPORT / "index.html"


def _sharpest_store(cache: Path, size_px: int) -> Store:
    """The largest complete store of a cache, for pictures; the last stage's own if there is no other."""
    there = {size: record for size, record in read_manifest(cache).sizes.items() if store_path(cache, size).is_dir()}
    return open_store(cache, max([size_px, *(size for size, record in there.items() if record.complete)]))
