"""ptxdist: DICOM chest X-rays with masks → verified cache → distributed two-stage U-Net → numbers one can trust.

`Predictor` and `Prediction` are the Python API; they are loaded when they are first asked for, torch with them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptxdist.predict.predictor import Prediction, Predictor

__all__ = ["Prediction", "Predictor", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in ("Prediction", "Predictor"):
        raise AttributeError(f"module 'ptxdist' has no attribute {name!r}")
    from ptxdist.predict import predictor

    return getattr(predictor, name)
