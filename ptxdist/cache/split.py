"""Training and validation sides: folds that keep patients together, and what a split leaks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

FOLDS = 10  # fold 0 is held out: 10 % of the cases
AREA_STRATA_PX = (4_000, 16_000)  # small, medium and large masks: about a third of the real ones each


@dataclass(frozen=True)
class Leakage:
    """How many validation cases share a patient with training, compared with random splits of the same size.

    `grouped_by` is "patient map", "PatientID" or "nothing". The random shares are fractions of the validation cases and
    of the positive ones among them. `near_duplicates` counts pairs of images that look the same (see `duplicates`),
    `near_duplicates_shared` those with one image on each side.
    """

    grouped_by: str
    groups: int
    positive_groups: int
    val_cases: int
    val_positive: int
    shared_cases: int
    shared_positive: int
    random_shared: float
    random_shared_positive: float
    near_duplicates: int = 0
    near_duplicates_shared: int = 0


def assign_folds(
    case_ids: Sequence[str],
    groups: Sequence[str],
    areas_px: Sequence[int],
    *,
    folds: int = FOLDS,
    seed: int = 0,
    known: Mapping[str, int] | None = None,
) -> list[int]:
    """Fold of each case: no group is in two folds; folds are alike in negatives and small, medium and large masks.

    Groups are assigned in order of decreasing positives, each to the fold that lacks its strata most. The result
    depends on the ids, on which cases share a group and on the areas (0: negative), not on the order of the cases or
    the names of the groups. No cases give an empty list. Two groups are never all in one fold, unless they are known.

    `known` are folds of a former split, which these cases keep. A group whose cases are in several folds moves to the
    one that has most of them.
    """
    known = known or {}
    members: dict[str, list[int]] = {}
    for index in sorted(range(len(case_ids)), key=case_ids.__getitem__):
        members.setdefault(groups[index], []).append(index)
    strata = np.eye(4)[np.searchsorted((1, *AREA_STRATA_PX), areas_px, side="right")].reshape(-1, 4)
    counts = {group: strata[indices].sum(axis=0) for group, indices in members.items()}
    fair_share = np.maximum(strata.sum(axis=0), 1) / folds

    def turn(group: str) -> tuple[float, float, str]:
        tie = hashlib.sha256(f"{seed} {case_ids[members[group][0]]}".encode()).hexdigest()
        return -float(counts[group][1:].sum()), -float(counts[group].sum()), tie

    fold_of: dict[str, int] = {}
    for group, indices in members.items():
        former = Counter(known[case_ids[index]] for index in indices if case_ids[index] in known)
        if former:
            fold_of[group] = min(former, key=lambda fold: (-former[fold], fold))
    have = np.zeros((folds, 4))
    for group, fold in fold_of.items():
        have[fold] += counts[group]
    for group in sorted(members.keys() - fold_of, key=turn):
        # Growth of the squared fill, smallest where the strata of this group are emptiest.
        growth = (((have + counts[group]) / fair_share) ** 2 - (have / fair_share) ** 2).sum(axis=1)
        fold_of[group] = int(np.argmin(growth))
        have[fold_of[group]] += counts[group]
    if not known and len(members) > 1 and len(set(fold_of.values())) == 1:
        fold_of[max(members, key=turn)] = 1
    result = [0] * len(case_ids)
    for group, indices in members.items():
        for index in indices:
            result[index] = fold_of[group]
    return result


class Folded(Protocol):
    """An object with a fold, such as a Case; -1 is no fold."""

    @property
    def fold(self) -> int: ...  # noqa: D102


def split_indices(cases: Iterable[Folded], fold: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices, int64, of the cases to train on and of those in `fold`; cases without a fold are in neither."""
    own = np.array([case.fold for case in cases], np.int64)
    return np.flatnonzero((own >= 0) & (own != fold)), np.flatnonzero(own == fold)


def measure_leakage(groups: Sequence[str], positive: Sequence[bool], val: Sequence[bool], grouped_by: str) -> Leakage:
    """Leakage of a split, and the mean of 20 random splits with as many validation cases."""
    group = np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1]
    is_positive, is_val = np.asarray(positive, bool), np.asarray(val, bool)

    def shared(held_out: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        return held_out & np.isin(group, group[~held_out])

    shares = np.zeros((20, 2))
    for draw in range(len(shares)):
        held_out = np.zeros(len(group), bool)
        held_out[np.random.default_rng(draw).permutation(len(group))[: is_val.sum()]] = True
        leaked = shared(held_out)
        shares[draw] = (
            leaked.sum() / max(1, held_out.sum()),
            (leaked & is_positive).sum() / max(1, (held_out & is_positive).sum()),
        )
    return Leakage(
        grouped_by=grouped_by,
        groups=len(set(group.tolist())),
        positive_groups=len(set(group[is_positive].tolist())),
        val_cases=int(is_val.sum()),
        val_positive=int((is_val & is_positive).sum()),
        shared_cases=int(shared(is_val).sum()),
        shared_positive=int((shared(is_val) & is_positive).sum()),
        random_shared=float(shares[:, 0].mean()),
        random_shared_positive=float(shares[:, 1].mean()),
    )
