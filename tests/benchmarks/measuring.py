"""What the benchmarks share: rounds in turn, the spread of a number, the machine, dated files of results."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Min, median and max of a number that was measured several times."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def in_turn(ways: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, float]]:
    """Each way's spread over so many rounds, in which the ways take turns; a first round is dropped."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            value = way()
            if number:
                found[name].append(value)
    return {name: spread(values) for name, values in found.items()}


def per_second(step: Callable[[], int], seconds: float) -> float:
    """Units per second of calls that each do some and say how many, for so long at least."""
    done, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or not done:
        done += step()
    return done / elapsed


def processor() -> str:
    """Name of the CPU, and whether it multiplies bf16."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.is_file() else ""
    name = next((line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line), "unknown CPU")
    kinds = [kind for kind in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if kind in text]
    return f"{name}, {os.cpu_count()} cores, {' '.join(kinds) or 'no AVX2'}"


def header(what: str, packages: Sequence[str], **settings: Any) -> dict[str, Any]:
    """The first part of a report: what, when, with which versions and settings, on what."""
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "what": what,
        "date": date.today().isoformat(),
        "machine": f"{processor()}, Python {platform.python_version()}",
        "versions": versions,
        "settings": settings,
    }


def table(unit: str, rows: Mapping[str, Mapping[str, float]], digits: int = 0) -> str:
    """A Markdown table: min, median and max of each row."""
    lines = [f"| {unit} | min | median | max |", "|---|---|---|---|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[key]:,.{digits}f}" for key in ("min", "median", "max")) + " |")
    return "\n".join(lines)


def publish(report: Mapping[str, Any], text: str, save: str | None) -> None:
    """Print a report's text under its header; with a name, keep both below `results`, dated, as Markdown and JSON."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    full = f"# {report['what']}\n\n{report['date']}; {report['machine']}; {versions}; {settings}.\n\n{text}\n"
    print(full)
    if save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{report['date']}-{save}"
        path.with_suffix(".md").write_text(full)
        path.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
