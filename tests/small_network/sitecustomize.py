"""With this folder on PYTHONPATH, `model.encoder = "small"` is known in every Python process, Ray's workers included.

Tests of whole runs use it: a checkpoint with ResNet-34 has 300 MB. With SLOW_S, each step takes so many seconds
longer, so that a test has the time to kill something during it. torch's compiler is left out, since loading it takes
two seconds in each process. Ray looks for new nodes every second instead of every 20 seconds.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any


class _NoCompiler(types.ModuleType):
    """Stands for torch._dynamo, which optimizers load only to exclude themselves from it."""

    # What torch.distributed calls.
    utils = types.SimpleNamespace(get_optimize_ddp_mode=lambda: "")

    def disable(self, function: Any, *others: Any, **more: Any) -> Any:
        return function

    def graph_break(self) -> None:
        """Nothing is compiled."""


def _add_encoder(encoders: Any) -> None:
    if "tiny_encoder" in sys.modules:  # it is what imports the encoders, for a test that adds its own
        return
    sys.path.append(str(Path(__file__).parents[1]))
    from tiny_encoder import TINY

    def build() -> Any:
        sys.modules.setdefault("torch._dynamo", _NoCompiler("torch._dynamo"))
        features = TINY.build()
        if "SLOW_S" in os.environ:
            features.register_forward_pre_hook(lambda *_: time.sleep(float(os.environ["SLOW_S"])))
        return features

    encoders.ENCODERS["small"] = replace(TINY, build=build)


def _look_often(coordinator: Any) -> None:
    coordinator._AutoscalingCoordinatorActor.TICK_INTERVAL_S = 1


class _Finder:
    """Changes modules when they are loaded."""

    def __init__(self, changes: dict[str, Callable[[Any], None]]) -> None:
        self._changes = changes

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        change = self._changes.pop(name, None)
        if change is None:
            return None
        spec: Any = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


_COORDINATOR = "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator"
_FINDER: Any = _Finder({"ptxdist.train.encoders": _add_encoder, _COORDINATOR: _look_often})
sys.meta_path.insert(0, _FINDER)
