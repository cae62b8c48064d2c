"""What a path holds: a run, a cache, a bundle, told by the names inside; and the refusal of another kind of place.

Loads the standard library only, so that a command checks its paths within milliseconds. What is inside is checked by
those who read it.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from ptxdist.errors import PtxdistError, RunError, StoreError, short

SETTINGS, RESULT = "settings.json", "result.json"  # of a run; the second one also of an evaluation
CATALOG, MANIFEST = "catalog.jsonl", "manifest.json"  # of a cache
CASES = "cases.csv"  # of an evaluation
PREDICT_SETTINGS = "predict.json"  # of a folder of `ptxdist predict`
SUFFIX = ".ptxdist"  # of a bundle
_MEMBER = b"card.json"  # the first one of a bundle

RUN, UNFINISHED, CACHE, BUNDLE = "run", "unfinished run", "cache", "bundle"
EVALUATION, PREDICTIONS, RUNS, NOTHING = "evaluation", "predictions", "runs", "nothing"
_FOR = {  # what else can be done with each
    RUN: "a run of `ptxdist train`, which `evaluate`, `report`, `inspect`, `predict`, `serve` and `export` take",
    UNFINISHED: "a run that is not finished; rerun the same `ptxdist train`, which skips finished stages",
    CACHE: "a cache of `ptxdist preprocess`, which `plan`, `train --data`, `evaluate --data`, `inspect`, `verify` take",
    BUNDLE: "a bundle of `ptxdist export`, which `predict`, `serve`, `export`, `evaluate --data CACHE --out OUT` take",
    EVALUATION: "a folder of `ptxdist evaluate`, which `compare`, `report` and `export --point` take",
    PREDICTIONS: "a folder of `ptxdist predict`, which `score` takes",
}
_MADE_BY = {RUN: "`ptxdist train --run {}` makes a run", CACHE: "make a cache with `ptxdist preprocess … --out {}`"}
_SHOWN = 3


def kind_of(path: Path) -> str:
    """The kind of a place; "file", "folder" or "pipe or device" for others, NOTHING where nothing is."""
    if path.is_dir():
        if (path / SETTINGS).is_file():
            return RUN if (path / RESULT).is_file() else UNFINISHED
        marks = {CATALOG: CACHE, MANIFEST: CACHE, CASES: EVALUATION, PREDICT_SETTINGS: PREDICTIONS}
        found = next((kind for name, kind in marks.items() if (path / name).is_file()), None)
        return found or (RUNS if any(path.glob(f"*/{SETTINGS}")) else "folder")
    if path.is_file():
        return BUNDLE if path.suffix == SUFFIX or _MEMBER in _start(path) else "file"
    return "pipe or device" if path.exists() else NOTHING


def _start(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(64)
    except OSError:
        return b""


def refuse_other(place: Path | str, *wanted: str) -> None:
    """Raise RunError, for a cache StoreError, where the place is of no wanted kind; s3://… is not looked at.

    A run that is not finished is wanted as UNFINISHED.
    """
    if isinstance(place, str):
        return
    kind = kind_of(place)
    if kind in wanted:
        return
    error: type[PtxdistError] = StoreError if wanted == (CACHE,) else RunError
    expected = " or ".join(_FOR[item].partition(",")[0] for item in wanted if item in _FOR and item != UNFINISHED)
    if kind == NOTHING:
        made = "; ".join(_MADE_BY[item].format(place) for item in wanted if item in _MADE_BY)
        raise error(f"nothing at {place}{near(place)}; expected {expected}; {made}")
    if kind == RUNS:
        inside = sorted(str(path.parent) for path in place.glob(f"*/{SETTINGS}"))
        more = f", … ({len(inside)})" if len(inside) > _SHOWN else ""
        raise error(f"{place} has runs inside; give one of them: {', '.join(inside[:_SHOWN])}{more}")
    if kind in _FOR:
        advice = "" if kind == UNFINISHED else f"; expected {expected}"
        raise error(f"{place} is {_FOR[kind]}{advice}")
    missing = "" if kind != "folder" else f" (no {CATALOG if wanted == (CACHE,) else SETTINGS})"
    made = "; ".join(_MADE_BY[item].format("OUT") for item in wanted if item in _MADE_BY)
    raise error(f"{place} is a {kind} and not {expected}{missing}; {made}")


def refuse_taken(folder: Path) -> None:
    """Raise RunError where the folder for an evaluation holds something else, such as a run or a cache."""
    kind = kind_of(folder)
    if kind not in (NOTHING, EVALUATION, RUNS, "folder"):
        raise RunError(f"{folder} is {in_words(kind)}; give --out a folder of its own for the evaluation")


def in_words(kind: str) -> str:
    """A kind of place, and what can be done with it."""
    return _FOR.get(kind, f"a {kind}")


def refuse_missing(place: Path, option: str, error: type[PtxdistError]) -> None:
    """Raise the error where neither a file nor a folder is at a path that an option names."""
    if not place.exists():
        raise error(f"{option}: nothing at {place}{near(place)}; give a path that exists")
    if not (place.is_file() or place.is_dir()):
        raise error(f"{option}: {place} is a pipe or a device; give a file or a folder")


def near(path: Path) -> str:
    """The nearest name beside a path that does not exist, as a question in parentheses; "" if none is near."""
    try:
        there = [item.name for item in path.absolute().parent.iterdir() if item.exists()]
    except OSError:
        return ""
    found = difflib.get_close_matches(path.name, there, n=1, cutoff=0.7)
    return f" (did you mean '{short(str(path.with_name(found[0])))}'?)" if found else ""
