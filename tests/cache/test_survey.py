"""The numbers of a cache that settings are chosen by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_caches import make_cache

from ptxdist.cache.catalog import FILE_NAME, read_catalog, write_catalog
from ptxdist.cache.survey import survey
from ptxdist.errors import StoreError


def test_survey_of_a_cache(cache: Path) -> None:
    found = survey(cache)
    assert (found.cases, found.positive, found.unlabelled, found.patients, found.positive_patients) == (10, 5, 0, 10, 5)
    assert (found.train, found.val, found.sizes_px) == ((6, 3), (4, 2), (32, 64))
    assert found.mask_px == (1600, 1600, 1600)  # squares of 40 pixels in images of 128
    assert found.mask_share == (1600 / 128**2,) * 3
    assert found.brightness is not None
    assert 130 < found.brightness.low < found.brightness.high < 170


def test_rejected_and_unlabelled_cases_do_not_count(tmp_path: Path) -> None:
    folder = make_cache(tmp_path / "cache")
    catalog = read_catalog(folder)
    first, *others, last = catalog.cases
    cases = (replace(first, split="rejected", fold=-1), *others, replace(last, masks=None, split="unlabelled", fold=-1))
    write_catalog(replace(catalog, cases=cases), folder / FILE_NAME)
    found = survey(folder)
    assert (found.cases, found.positive, found.unlabelled, found.train, found.val) == (8, 4, 1, (5, 2), (3, 2))


def test_a_folder_that_is_no_cache_and_a_cache_without_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a ptxdist cache"):
        survey(tmp_path)
    folder = make_cache(tmp_path / "cache")
    (folder / "manifest.json").unlink()
    with pytest.raises(StoreError, match="no finished store"):
        survey(folder)
