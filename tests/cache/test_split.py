"""The split: covers all, keeps groups together, is alike in all folds, and depends on nothing it should not."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptxdist.cache.split import AREA_STRATA_PX, assign_folds, measure_leakage
from ptxdist.labels import rle
from ptxdist.labels.patients import read_patients
from ptxdist.labels.tables import read_labels

Cases = tuple[list[str], list[str], list[int]]


@st.composite
def case_lists(draw: st.DrawFn) -> Cases:
    """Ids, groups and areas of up to 120 cases."""
    count = draw(st.integers(0, 120))
    number = random.Random(draw(st.integers(0, 2**32 - 1)))
    groups = draw(st.integers(1, 80))
    return (
        [f"case{index}" for index in range(count)],
        [f"patient{number.randrange(groups)}" for _ in range(count)],
        [number.choice([0, 0, 0, 100, 9_000, 50_000]) for _ in range(count)],
    )


@given(case_lists(), st.integers(2, 10), st.integers(0, 5))
@settings(max_examples=60)
def test_split_covers_all_and_keeps_groups_whatever_order_and_names(cases: Cases, folds: int, seed: int) -> None:
    ids, groups, areas = cases
    found = assign_folds(ids, groups, areas, folds=folds, seed=seed)
    assert len(found) == len(ids)
    assert set(found) <= set(range(folds))
    assert all(len({f for f, g in zip(found, groups, strict=True) if g == group}) == 1 for group in set(groups))

    order = random.Random(seed).sample(range(len(ids)), len(ids))
    shuffled = assign_folds(
        [ids[i] for i in order], [groups[i] for i in order], [areas[i] for i in order], folds=folds, seed=seed
    )
    assert shuffled == [found[i] for i in order]

    names = {group: f"{group[::-1]} {seed}" for group in groups}
    assert assign_folds(ids, [names[group] for group in groups], areas, folds=folds, seed=seed) == found


@given(st.integers(0, 2**32 - 1), st.integers(200, 500), st.floats(0.1, 0.6))
@settings(max_examples=20)
def test_folds_are_alike_in_size_and_in_masks_of_each_size(seed: int, count: int, share: float) -> None:
    number = random.Random(seed)
    groups = [str(index // 2) for index in range(count)]  # pairs
    areas = [number.choice([2_000, 9_000, 30_000]) if number.random() < share else 0 for _ in range(count)]
    found = assign_folds([str(index) for index in range(count)], groups, areas)
    for stratum in (
        lambda area: True,
        lambda area: area > 0,
        lambda area: 0 < area < AREA_STRATA_PX[0],
        lambda area: area >= AREA_STRATA_PX[1],
    ):
        per_fold = Counter(fold for fold, area in zip(found, areas, strict=True) if stratum(area))
        counts = [per_fold[fold] for fold in range(10)]
        assert max(counts) - min(counts) <= 6, counts
        assert abs(counts[0] - sum(counts) / 10) <= 4


@given(case_lists(), st.integers(2, 10), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_known_cases_keep_their_folds_when_others_come_and_go(cases: Cases, folds: int, seed: int) -> None:
    ids, groups, areas = cases
    number = random.Random(seed)

    def split(kept: list[int], known: dict[str, int]) -> dict[int, int]:
        names, patients = ([column[i] for i in kept] for column in (ids, groups))
        found = assign_folds(names, patients, [areas[i] for i in kept], folds=folds, known=known)
        return dict(zip(kept, found, strict=True))

    former = [i for i in range(len(ids)) if number.random() < 0.6]
    before = split(former, {})
    kept = [i for i in range(len(ids)) if i not in former or number.random() < 0.7]
    after = split(kept, {ids[i]: fold for i, fold in before.items()})
    assert all(after[i] == fold for i, fold in before.items() if i in after)
    of_group: dict[str, set[int]] = {}
    for i, fold in after.items():
        of_group.setdefault(groups[i], set()).add(fold)
    assert all(len(found) == 1 for found in of_group.values())


def test_patients_found_to_be_one_are_joined_where_most_of_them_is() -> None:
    known = {"a": 1, "b": 2, "c": 2, "d": 0, "e": 3, "f": 3}
    joined = ["same", "same", "same", "d", "pair", "pair"]
    found = assign_folds(list(known), joined, [0, 0, 0, 9_000, 0, 0], folds=4, known=known)
    assert found == [2, 2, 2, 0, 3, 3]
    even = assign_folds(["a", "b"], ["same", "same"], [0, 0], folds=4, known={"a": 3, "b": 1})
    assert even == [1, 1]  # as many in each: the first fold


def test_new_cases_go_where_their_strata_are_emptiest() -> None:
    ids = [str(index) for index in range(100)]
    areas = [9_000 if index % 5 == 0 else 0 for index in range(100)]
    known = {case: fold for case, fold in zip(ids, assign_folds(ids, ids, areas), strict=True) if fold != 4}
    found = assign_folds(ids, ids, areas, known=known)
    assert all(fold == known.get(case, 4) for case, fold in zip(ids, found, strict=True))


def test_seed_changes_the_split() -> None:
    ids = [str(index) for index in range(100)]
    first, second = (assign_folds(ids, ids, [0] * 100, seed=seed) for seed in (0, 1))
    assert first != second


def test_leakage_is_counted_by_hand() -> None:
    leakage = measure_leakage(
        groups=["a", "a", "b", "b", "c", "d"],
        positive=[True, True, False, True, True, False],
        val=[True, False, False, False, True, True],
        grouped_by="nothing",
    )
    assert (leakage.groups, leakage.positive_groups) == (4, 3)
    assert (leakage.val_cases, leakage.val_positive) == (3, 2)
    assert (leakage.shared_cases, leakage.shared_positive) == (1, 1)


def test_random_split_of_pairs_leaks_as_much_as_probability_says() -> None:
    count = 2_000
    groups = [str(index // 2) for index in range(count)]
    val = [index % 20 < 2 for index in range(count)]  # whole pairs: a tenth of the cases
    leakage = measure_leakage(groups, [False] * count, val, "patient map")
    assert leakage.shared_cases == 0
    assert leakage.random_shared == pytest.approx(0.9, abs=0.02)  # the other one of the pair trains
    assert leakage.random_shared_positive == 0
    assert np.isfinite(leakage.random_shared)


def test_the_challenges_patients_are_kept_apart_where_a_random_split_mixes_most_of_them(real_data: Path) -> None:
    """The numbers of the whole table: 12,047 images of 6,171 patients, the 2,669 positive ones of 802."""
    masks = read_labels(real_data / "siim-real" / "train-rle.csv.gz")
    patients = read_patients(real_data / "siim-real" / "nih_id.csv")
    groups = [patients[case_id] for case_id in masks]
    folds = assign_folds(list(masks), groups, [rle.area_px(texts, 1024, 1024) for texts in masks.values()])
    leakage = measure_leakage(groups, list(map(bool, masks.values())), [fold == 0 for fold in folds], "patient map")
    assert (leakage.groups, leakage.positive_groups) == (6_171, 802)
    assert (leakage.shared_cases, leakage.shared_positive) == (0, 0)
    assert (leakage.random_shared, leakage.random_shared_positive) == pytest.approx((0.63, 0.95), abs=0.015)
    assert (leakage.val_cases, leakage.val_positive) == pytest.approx((1_205, 267), abs=8)
