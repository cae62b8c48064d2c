"""How evaluated images compare with those that a model was trained on, in words.

A property is called different where chance hardly explains it and where it matters: the difference is more than
`_ERRORS` standard errors, and shares have odds that differ by a factor of `_ODDS`, medians are `_SPREADS` standard
deviations apart. Standard errors are those of independent images; in random halves of 848 radiographs by patient they
are up to 1.4 times as large, and each property was called different in at most 0.5 % of 2,000 such pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from ptxdist.records import Elsewhere, Profile, SeenImages

_ERRORS, _ODDS, _SPREADS = 4, 1.5, 0.5
_MIDDLE = slice(1, 4)  # of the percentiles of a property: the quartiles


def seen_before(seen: SeenImages) -> str:
    """How many of the images the model was trained on, in words; "" if none."""
    if not seen.case_ids:
        return ""
    others = "" if seen.patients is None else f", {seen.patients:,} more are of a patient in the training"
    return f"{seen.equal:,} have the same pixels as a training image, {seen.alike:,} only look like one{others}"


NOT_KNOWN = "what the training images were like is not known: the model is of an older version"


class Compared(NamedTuple):
    """A property of images by its name, with its values here and in the training, and whether they are different."""

    name: str
    here: str
    there: str
    differs: bool


def compared(about: Elsewhere) -> list[Compared]:
    """Every property, here and in the training; [] if the training is not known."""
    here, there = about.here, about.there
    if there is None:
        return []
    return [Compared(name, value(here), value(there), differ(here, there)) for name, value, differ in _PROPERTIES]


def different(about: Elsewhere) -> list[str]:
    """What is different here, and then what is not clearly different, as sentences with both values.

    One sentence if the training is not known.
    """
    if about.there is None:
        return [NOT_KNOWN]
    found: dict[str, list[str]] = {"different": [], "not clearly different": []}
    for item in compared(about):
        kind = "different" if item.differs else "not clearly different"
        found[kind].append(f"{item.name} {item.here} here, {item.there} in the training")
    return [f"{kind}: {'; '.join(values)}" for kind, values in found.items() if values]


def _median(field: str, form: str) -> Callable[[Profile], str]:
    def value(side: Profile) -> str:
        percentiles = getattr(side, field)
        return form.format(percentiles[_MIDDLE][1]) if percentiles else "not known"

    return value


def _views(side: Profile) -> str:
    return ", ".join(f"{100 * count / side.images:.0f} % {view}" for view, count in side.views.items())


def _shares_differ(here: tuple[int, int], there: tuple[int, int]) -> bool:
    """Whether the shares of two sides differ; of each side the number of images that have something, and of all."""
    (some, images), (others, training) = here, there
    both = (some + others) / (images + training)
    error = math.sqrt(both * (1 - both) * (1 / images + 1 / training))
    odds = (some + 0.5) * (training - others + 0.5) / ((images - some + 0.5) * (others + 0.5))
    return abs(some / images - others / training) > _ERRORS * error and max(odds, 1 / odds) > _ODDS


def _views_differ(here: Profile, there: Profile) -> bool:
    views = {*here.views, *there.views}
    sides = [[(side.views.get(view, 0), side.images) for view in views] for side in (here, there)]
    return any(map(_shares_differ, *sides))


def _medians_differ(field: str, count: str = "images") -> Callable[[Profile, Profile], bool]:
    def differ(here: Profile, there: Profile) -> bool:
        mine, training = getattr(here, field), getattr(there, field)
        if not mine or not training:
            return False
        low, middle, high = training[_MIDDLE]
        spread = (high - low) / 1.349  # of a normal distribution
        apart = abs(mine[_MIDDLE][1] - middle)
        error = 1.2533 * spread * math.sqrt(1 / getattr(here, count) + 1 / getattr(there, count))
        return bool(apart > max(_SPREADS * spread, _ERRORS * error))

    return differ


# The name of each property of images, its value in words, and whether two sets of images differ in it.
_PROPERTIES: tuple[tuple[str, Callable[[Profile], str], Callable[[Profile, Profile], bool]], ...] = (
    (
        "positive images",
        lambda side: f"{100 * side.positives / side.images:.1f} %",
        lambda *sides: _shares_differ(*((side.positives, side.images) for side in sides)),
    ),
    ("median mask", _median("mask_share", "{:.2%} of the image"), _medians_differ("mask_share", "positives")),
    ("median grey level", _median("brightness", "{:.0f}"), _medians_differ("brightness")),
    ("median age", _median("age", "{:.0f}"), _medians_differ("age")),
    ("median longer side", _median("side_px", "{:,.0f} pixels"), _medians_differ("side_px")),
    ("views", _views, _views_differ),
)
