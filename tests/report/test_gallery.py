"""Which cases a report shows, and that their outlines are where their masks are."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ptxdist.cache.outlines import outline_path
from ptxdist.report.gallery import SIZE, choose
from ptxdist.scores.tables import CaseRow


def row(name: str, truth: int, predicted: int, dice: float) -> CaseRow:
    return CaseRow(name, "group", 0, predicted, truth, dice, 0.5)


def names(chosen: list[CaseRow]) -> list[str]:
    return [item.case_id for item in chosen]


def test_best_median_and_worst_come_from_the_found_ones() -> None:
    rows = [row(f"f{number:02}", 100, 50, number / 20) for number in range(20)]
    chosen = choose([*rows[::2], *rows[1::2]])
    assert chosen["best"] == (20, [rows[n] for n in (19, 18, 17, 16)])
    assert names(chosen["worst"][1]) == ["f00", "f01", "f02", "f03"]
    assert names(chosen["median"][1]) == ["f11", "f10", "f09", "f08"]


@pytest.mark.parametrize("found", range(14))
def test_no_case_is_shown_twice_and_none_is_left_out_while_there_is_room(found: int) -> None:
    rows = [row(f"f{number:02}", 100, 50, number / 20) for number in range(found)]
    shown = [name for count, chosen in choose(rows).values() for name in names(chosen)]
    assert len(shown) == len(set(shown)) == min(found, 3 * SIZE)


def test_missed_ones_and_false_alarms_come_largest_first() -> None:
    rows = [row(f"m{number}", 100 + number, 0, 0) for number in range(6)]
    rows += [row(f"a{number}", 0, 10 + number, 0) for number in range(2)]
    rows += [row("right", 0, 0, 1)]
    chosen = choose(rows)
    assert chosen["missed"][0] == 6
    assert names(chosen["missed"][1]) == ["m5", "m4", "m3", "m2"]
    assert names(chosen["false-alarms"][1]) == ["a1", "a0"]


def test_an_outline_encloses_its_mask_at_the_scale_of_the_picture() -> None:
    mask = np.zeros((1024, 1024), np.uint8)
    mask[100:300, 200:600] = 1
    mask[700:800, 700:800] = 255
    parts = outline_path(mask, 512).split("Z")[:-1]
    boxes = []
    for part in parts:
        points = np.array([float(number) for number in re.findall(r"[\d.]+", part)]).reshape(-1, 2)
        boxes.append((*points.min(0), *points.max(0)))
    found = np.array(sorted(boxes))
    assert found == pytest.approx(np.array([(100, 50, 300, 150), (350, 350, 400, 400)]), abs=0.6)


def test_an_empty_mask_has_no_outline() -> None:
    assert outline_path(np.zeros((64, 64), np.uint8)) == ""
