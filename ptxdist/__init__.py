"""ptxdist: DICOM chest X-rays with masks → verified cache → distributed two-stage U-Net → numbers one can trust.

The Python API, as `examples/notebook.py` uses it. Each name is loaded on first use, and torch only with those that
need it:

    write_phantoms      synthetic images with masks         `ptxdist phantom`
    preprocess          image files and masks → cache       `ptxdist preprocess`
    load_settings       a pipeline, as Settings
    train, train_folds  cache → run                         `ptxdist train`, `ptxdist train --fold all`
    evaluate            runs → scores                       `ptxdist evaluate`
    evaluate_elsewhere  models on another cache → scores    `ptxdist evaluate --data`
    compare             evaluated runs beside each other    `ptxdist compare`
    score               masks of any tool → scores          `ptxdist score`
    write_report        run → HTML page                     `ptxdist report`
    Predictor           run or bundle → masks               `ptxdist predict`
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptxdist.cache.preprocess import preprocess
    from ptxdist.phantoms.dataset import write_phantoms
    from ptxdist.predict.elsewhere import evaluate_elsewhere
    from ptxdist.predict.predictor import Prediction, Predictor
    from ptxdist.report.report import write_report
    from ptxdist.resolve import load_settings
    from ptxdist.run.folds import train_folds
    from ptxdist.run.pipeline import train
    from ptxdist.scores.compare import compare
    from ptxdist.scores.external import score_predictions as score
    from ptxdist.train.evaluate import evaluate_runs as evaluate

__all__ = [
    "Prediction",
    "Predictor",
    "__version__",
    "compare",
    "evaluate",
    "evaluate_elsewhere",
    "load_settings",
    "preprocess",
    "score",
    "train",
    "train_folds",
    "write_phantoms",
    "write_report",
]
__version__ = "0.1.0"

_FROM = {
    "Prediction": ("predict.predictor", "Prediction"),
    "Predictor": ("predict.predictor", "Predictor"),
    "compare": ("scores.compare", "compare"),
    "evaluate": ("train.evaluate", "evaluate_runs"),
    "evaluate_elsewhere": ("predict.elsewhere", "evaluate_elsewhere"),
    "load_settings": ("resolve", "load_settings"),
    "preprocess": ("cache.preprocess", "preprocess"),
    "score": ("scores.external", "score_predictions"),
    "train": ("run.pipeline", "train"),
    "train_folds": ("run.folds", "train_folds"),
    "write_phantoms": ("phantoms.dataset", "write_phantoms"),
    "write_report": ("report.report", "write_report"),
}

# `ptxdist.train` is the function and not the folder of this name. Python sets the attribute when the folder is first
# imported, so the folder (a docstring) is imported now, and the attribute removed.
importlib.import_module("ptxdist.train")
del globals()["train"]


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module 'ptxdist' has no attribute {name!r}")
    module, attribute = _FROM[name]
    return getattr(importlib.import_module(f"ptxdist.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
