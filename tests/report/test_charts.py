"""Axes have round ticks, and points are drawn at the places of their values."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptxdist.records import Elsewhere, Profile
from ptxdist.report.charts import (
    Axis,
    Series,
    cell_axis,
    draw_interval,
    linear_axis,
    log_axis,
    plot,
    surface,
    tick_text,
)
from ptxdist.report.page import Facts, Forest
from ptxdist.report.tables import profiles

numbers = st.floats(-1e6, 1e6)


@given(numbers, st.floats(1e-3, 1e6))
def test_a_linear_axis_has_a_few_round_ticks_within_it(low: float, width: float) -> None:
    axis = linear_axis("", low, low + width)
    assert 2 <= len(axis.ticks) <= 6
    steps = np.diff(axis.ticks)
    assert np.allclose(steps, steps[0], rtol=1e-3)
    digit = steps[0] / 10 ** np.floor(np.log10(steps[0]) + 1e-3)
    assert min(abs(digit - round_one) for round_one in (1, 2, 5)) < 0.01
    assert axis.ticks[0] >= low - 1e-6 * width
    assert axis.ticks[-1] <= low + width * (1 + 1e-6)


@given(st.floats(1e-6, 1e5), st.floats(1.5, 1e6))
def test_a_logarithmic_axis_has_ticks_within_it_and_places_them_by_ratio(low: float, ratio: float) -> None:
    axis = log_axis("", low, low * ratio)
    assert all(low * 0.99 <= tick <= low * ratio * 1.01 for tick in axis.ticks)
    assert axis.place(low) == 0
    assert axis.place(low * ratio) == pytest.approx(100)
    assert axis.place(low * ratio**0.5) == pytest.approx(50)


@given(numbers)
def test_a_place_is_never_outside_the_plot(value: float) -> None:
    assert 0 <= linear_axis("", 0, 1).place(value) <= 100
    assert 0 <= log_axis("", 1, 1000).place(value) <= 100


def test_an_axis_without_width_is_still_one() -> None:
    assert linear_axis("", 3, 3).place(3) == 50
    assert linear_axis("epoch", 0.5, 1.5, whole=True).ticks == (1,)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.25, "0.25"), (40, "40"), (10_000, "10,000"), (1e-4, "1e-4"), (0.001, "0.001")]
)
def test_ticks_read_as_people_write(value: float, text: str) -> None:
    assert tick_text(value) == text


def test_a_line_runs_through_its_points_and_breaks_between_parts() -> None:
    axis = linear_axis("", 0, 10)
    drawn = plot(axis, axis, [Series("a", 1, (((0, 0), (5, 10)), ((6, 2), (10, 4))))], words="two parts")
    assert 'd="M0.00,100.00L50.00,0.00 M60.00,80.00L100.00,60.00"' in drawn
    assert drawn.count('class="mark s1"') == 4
    assert 'role="img" aria-label="two parts"' in drawn


def test_words_and_names_are_escaped() -> None:
    axis = Axis("<i>x</i>", 0, 1, (0, 1))
    drawn = plot(axis, axis, [], words='a "quoted" <b>', rules=[(0.5, "<script>")])
    assert not re.search("<(i|b|script)>", drawn)
    assert "&lt;script&gt;" in drawn


def test_an_interval_shows_value_ends_and_level() -> None:
    drawn = draw_interval(linear_axis("", 0, 1), 0.6, (0.25, 0.75), level=0.5)
    assert 'class="span" x1="25.00%" x2="75.00%"' in drawn
    assert 'class="level" x1="50.00%"' in drawn
    assert '<svg x="60.00%" y="50.00%"' in drawn
    assert "span" not in draw_interval(linear_axis("", 0, 1), None, None, level=None)


def test_the_outline_of_a_surface_surrounds_the_true_cells_only() -> None:
    inside = np.zeros((3, 4), bool)
    inside[1, 1:3] = True  # two cells beside each other have six sides
    axes = cell_axis("x", ["a", "b", "c", "d"]), cell_axis("y", ["1", "2", "3"])
    drawn = surface(*axes, "data:,", words="", inside=inside, ring=(1, 1))
    edge = re.search(r'class="edge" d="([^"]*)"', drawn)
    assert edge
    sides = {frozenset(side.split("L")) for side in edge[1].replace("M", "").split(" ")}
    assert len(sides) == 6
    assert frozenset(("25.00,66.67", "25.00,33.33")) in sides
    assert 'cx="37.50%" cy="50.00%"' in drawn


def test_many_cells_are_not_all_named() -> None:
    assert len(cell_axis("x", [str(number) for number in range(99)]).ticks) <= 10
    named = cell_axis("x", [f"{number / 40:g}" for number in range(1, 40)]).names
    assert named == ("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9")


@pytest.mark.parametrize(("side_px", "drawn"), [(1024.0, False), (2048.0, True)])
def test_a_property_without_spread_is_said_and_one_that_differs_is_drawn(side_px: float, drawn: bool) -> None:
    there = Profile(
        images=9, positives=3, mask_share=(), brightness=(1, 2, 3, 4, 5), age=(), side_px=(1024,) * 5, views={"PA": 9}
    )
    here = there.model_copy(update={"side_px": (side_px,) * 5})
    about = Elsewhere(
        data="", split="all", models=("m",), weights_sha256=("0",), point_from="", here=here, there=there, seen=None
    )
    facts, *blocks, _ = profiles(about)
    assert ("longer side in pixels" in [block.table.caption for block in blocks if isinstance(block, Forest)]) == drawn
    assert isinstance(facts, Facts)
    said = "The longer side in pixels is 1,024 here and in the training, without any spread."
    assert (said in facts.sentences) != drawn
