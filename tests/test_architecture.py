"""The import rule of ARCHITECTURE.md: imports point one way, each layer adds its libraries, modules stay small."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "ptxdist"

# A layer imports only from layers above it in this list.
LAYERS = ("", "errors", "config", "rundir", "data", "learn", "cluster", "console", "cli", "__main__")
NOT_ALLOWED = {("console", "cluster")}  # console stands beside cli, but only cli loads Ray

# In a layer, a module imports only from the groups before its own. A module that is not named is bound by the layers
# and by the absence of cycles alone.
ORDER = {
    "data": (
        {"rle", "tags", "codestream", "anatomy", "split", "spread", "remote"},
        {"pixels", "png", "reading", "picture", "store", "lease"},
        {"dicom", "dialect", "duplicates"},
        {"labels", "scan", "spacing", "segmentation", "chest"},
        {"catalog", "phantom", "inputs"},
        {"render", "draw"},
        {"preprocess"},
        {"verify"},
        {"staging"},
        {"mirror"},
    ),
    "learn": (
        {"augment", "distributed", "unet", "schedule", "remaining", "charts", "gallery", "model_card"},
        {"resident"},
        {"dataset", "losses", "metrics", "batchnorm", "page"},
        {"checkpoint", "averaging", "scoring", "intervals", "figures", "tables"},
        {"step", "operating", "compare"},
        {"loop", "analysis"},
        {"evaluate"},
        {"bundle", "report"},
        {"predictor"},
        {"predict", "export", "viewer"},
        {"server"},
    ),
    "cluster": (
        {"stage", "environment", "tracking", "connection", "node"},
        {"worker", "here", "spread", "doctor"},
        {"engine"},
        {"coordinator"},
        {"submit"},
    ),
    "cli": (
        {"options"},
        {"data", "submit", "doctor", "predict", "export", "serve"},
        {"runs"},
        {""},  # the package itself
    ),
}

LIBRARIES = {
    "": set(),
    "errors": set(),
    "config": {"pydantic"},
    "rundir": {"pydantic"},
    "data": {"numpy", "cv2", "PIL", "pydicom", "simplejpeg", "zarr", "google_crc32c", "highdicom", "obstore"},
    "learn": {
        "numpy",
        "cv2",
        "PIL",
        "torch",
        "torchvision",
        "albumentations",
        "safetensors",
        "stringzilla",
        "jinja2",
        "markupsafe",
        "fastapi",
        "starlette",  # what FastAPI stands on
        "uvicorn",
        "onnxruntime",
    },
    # requests, packaging and grpc are what Ray itself stands on
    "cluster": {"torch", "ray", "requests", "packaging", "grpc", "tensorboardX", "mlflow"},
    "console": {"rich"},
    "cli": {"click", "torch"},
    "__main__": set(),
}
LIGHT = {"", "errors", "config", "cli", "__main__"}  # what the start of the command line may load
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

    `from ptxdist.data import rle` imports the module ptxdist.data.rle.
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


def layer(module: str) -> str:
    return module.split(".")[0]


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
        if layer(name) not in LAYERS:
            found.append(f"{name}: no layer has this name")
            continue
        edges[name] = set()
        for target, level, at_once in imports(path, known):
            if name == "" and not at_once:
                continue  # the package hands on its Python API, loaded when it is asked for
            if level:
                found.append(f"{name}: relative import of {target}")
            elif target.split(".")[0] != PACKAGE:
                library = target.split(".")[0]
                if library not in sys.stdlib_module_names and library not in LIBRARIES[layer(name)]:
                    found.append(f"{name}: imports {library}")
            else:
                inner = target.removeprefix(PACKAGE).removeprefix(".")
                edges[name].add(inner)
                found += _wrong_edge(name, inner)
                if at_once and layer(name) in LIGHT and layer(inner) not in LIGHT:
                    found.append(f"{name}: loads {inner} at its start")
            if at_once and layer(name) == "cli" and target.split(".")[0] in {"torch", "ray"}:
                found.append(f"{name}: loads {target} at its start")
    return found + [f"{name}: is part of a cycle" for name in edges if name in _reachable(name, edges)]


def _wrong_edge(name: str, inner: str) -> list[str]:
    here, there = layer(name), layer(inner)
    if there not in LAYERS:
        return [f"{name}: imports {inner}, which is in no layer"]
    if here != there:
        wrong = LAYERS.index(there) > LAYERS.index(here) or (here, there) in NOT_ALLOWED
        return [f"{name}: imports {inner}, against the order of the layers"] if wrong else []
    groups = ORDER.get(here, ())
    rank = {module: number for number, group in enumerate(groups) for module in group}
    own, other = (rank.get(module.partition(".")[2]) for module in (name, inner))
    if own is not None and other is not None and other >= own:
        return [f"{name}: imports {inner}, against the order in {here}"]
    return []


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


def test_every_ordered_module_exists_or_is_planned() -> None:
    planned: set[str] = set()
    named = {f"{layer}.{name}".rstrip(".") for layer, groups in ORDER.items() for group in groups for name in group}
    assert named - set(modules(ROOT)) <= planned


@pytest.mark.parametrize(
    ("module", "text", "expected"),
    [
        ("data.rle", "from ptxdist.learn.loop import fit", "imports learn.loop, against the order of the layers"),
        ("errors", "import ptxdist.config", "imports config, against the order of the layers"),
        (
            "data.rle",
            "def f():\n    from ptxdist.data import catalog",
            "imports data.catalog, against the order in data",
        ),
        ("learn.loop", "from ptxdist.cluster import worker", "against the order of the layers"),
        ("learn.metrics", "from ptxdist import console", "imports console, against the order of the layers"),
        ("console", "from ptxdist.cluster import worker", "imports cluster.worker, against the order of the layers"),
        ("data.new", "from ptxdist.data import other", "is part of a cycle"),
        ("data.rle", "from . import catalog", "relative import"),
        ("data.rle", "def f():\n    import torch", "imports torch"),
        ("data.rle", "import ray.data", "imports ray"),
        ("learn.loop", "import ray", "imports ray"),
        ("learn.loop", "from rich.table import Table", "imports rich"),
        ("cluster.worker", "import click", "imports click"),
        ("cli", "from ptxdist.learn import loop", "loads learn.loop at its start"),
        ("cli", "import torch", "loads torch at its start"),
        ("cli.runs", "from ptxdist.data import rle", "loads data.rle at its start"),
        ("cli.options", "from ptxdist.cli import runs", "imports cli.runs, against the order in cli"),
        ("tools", "import json", "no layer has this name"),
        ("data.rle", "x = 1\n" * 400, "over 400 lines"),
    ],
)
def test_the_checker_finds_what_breaks_the_rule(tmp_path: Path, module: str, text: str, expected: str) -> None:
    sound = {
        "": "", "errors": "", "config": "from ptxdist.errors import E", "data": "", "data.rle": "import numpy",
        "data.catalog": "from ptxdist.data import rle", "data.other": "from ptxdist.data import new", "data.new": "",
        "learn": "", "learn.loop": "import torch", "learn.metrics": "", "cluster": "", "cluster.worker": "import ray",
        "console": "import rich", "cli.options": "", "cli.runs": "from ptxdist.cli import options",
        "cli": "def f():\n    from ptxdist.learn import loop\n    import torch",
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
