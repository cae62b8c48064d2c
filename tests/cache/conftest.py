"""The cache of `many_dataset`, and copies of it to renew."""

from __future__ import annotations

from pathlib import Path

import pytest
from cache_files import SIZES, Renewal

from ptxdist.cache.preprocess import PreprocessResult, preprocess


@pytest.fixture(scope="session")
def many_cache(many_dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreprocessResult]:  # type: ignore[no-untyped-def]
    """Cache of `many_dataset` at 32 and 48 px, in three shards. Nothing may write to it."""
    out, data = tmp_path_factory.mktemp("many") / "cache", many_dataset
    return out, preprocess(data.dicom, data.labels, out, patients=data.patients, sizes_px=SIZES, workers=2)


@pytest.fixture
def renewal(many_cache, many_dataset, tmp_path: Path) -> Renewal:  # type: ignore[no-untyped-def]
    return Renewal(many_cache[0], many_dataset, tmp_path)
