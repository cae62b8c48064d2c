"""ptxdist: DICOM chest X-rays with masks → verified cache → distributed two-stage U-Net → numbers one can trust.

The Python API has the names of the commands and of their options; `examples/notebook.ipynb` goes the whole way with it.
Each name is loaded on first use, and torch only with those that need it:

    phantom       synthetic images with masks
    preprocess    image files and masks → cache
    plan          cache → a pipeline that fits data and machine
    train         cache → run
    evaluate      runs → scores, also on another cache
    compare       evaluated runs beside each other
    score         masks of any tool → scores
    report        run → HTML page
    Predictor     run or bundle → a Prediction for a file or an array

Every error is a `ptxdist.errors.PtxdistError`.
"""

import importlib

TYPE_CHECKING = False  # `typing` would be half the time until the program handles signals
if TYPE_CHECKING:
    from typing import Any

    from ptxdist.api import compare, evaluate, phantom, plan, preprocess, report, score, train
    from ptxdist.predict.predictor import Prediction, Predictor

__all__ = [
    "Prediction",
    "Predictor",
    "__version__",
    "compare",
    "evaluate",
    "phantom",
    "plan",
    "preprocess",
    "report",
    "score",
    "train",
]
__version__ = "0.1.0"

# `ptxdist.train` and `ptxdist.report` are functions and not folders. Python sets the attribute when a
# folder is first imported, so the folders (docstrings) are imported now, and the attributes removed.
for _name in ("report", "train"):
    importlib.import_module(f"ptxdist.{_name}")
    del globals()[_name]


def __getattr__(name: str) -> "Any":
    if name not in __all__:
        raise AttributeError(f"module 'ptxdist' has no attribute {name!r}")
    module = "predict.predictor" if name.startswith("Predict") else "api"
    return getattr(importlib.import_module(f"ptxdist.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
