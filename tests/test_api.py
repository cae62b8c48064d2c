"""The Python API: importing it is light, and its names are what they say."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ptxdist


def test_importing_the_package_loads_nothing_heavy_and_train_stays_the_function() -> None:
    code = (
        "import sys, ptxdist\n"
        "assert not {'torch', 'numpy', 'ray', 'pydantic'} & set(sys.modules), 'heavy'\n"
        "from ptxdist.train.losses import __doc__\n"
        "assert ptxdist.train.__module__ == 'ptxdist.run.pipeline'\n"
        "from ptxdist import train\n"
        "assert train is ptxdist.train\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(set(ptxdist.__all__) - {"__version__"}))
def test_every_name_is_documented(name: str) -> None:
    assert (getattr(ptxdist, name).__doc__ or "").strip()
    assert name in dir(ptxdist)
    assert name == "Prediction" or name in (ptxdist.__doc__ or "")


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fly'"):
        _ = ptxdist.fly
