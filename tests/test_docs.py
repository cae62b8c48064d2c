"""README and docs: short, with links that lead somewhere, paths that exist and an example that runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in _anchors(file), f"{page.name}: {target}"


def test_readme_and_architecture_stay_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 120
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md", "docs/decisions.md"])
def test_files_that_are_named_exist(page: str) -> None:
    """Paths of the package such as `train/losses.py`, or of the repository; test files also by their name alone."""
    for span in re.findall(r"`((?:[\w-]+/)*[\w.-]+\.(?:py|toml|md)|tests/[\w/]+/)`", (ROOT / page).read_text()):
        places = (ROOT / span, ROOT / "ptxdist" / span, *(ROOT / "tests").rglob(span if "/" not in span else "-"))
        assert any(place.exists() for place in places), f"{page}: {span}"


def test_the_readmes_example_predicts(
    finished_run: Path, small_dataset: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    path = min(small_dataset.dicom.rglob("*.dcm"))
    for old, new in (('"runs/exp4"', repr(str(finished_run))), ('"image.dcm"', repr(str(path)))):
        assert old in code
        code = code.replace(old, new)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["prediction"].mask.dtype == np.bool_
    assert str(names["prediction"].mask.shape) in capsys.readouterr().out
