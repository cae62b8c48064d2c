"""How evaluated images compare with those that a model was trained on, in words."""

from __future__ import annotations

from collections.abc import Callable

from ptxdist.records import Elsewhere, Profile, SeenImages

_CENTRE = 2  # of the percentiles of a property


def seen_before(seen: SeenImages) -> str:
    """How many of the images the model was trained on, in words; "" if none."""
    if not seen.case_ids:
        return ""
    others = "" if seen.patients is None else f", {seen.patients:,} more are of a patient in the training"
    return f"{seen.equal:,} have the same pixels as a training image, {seen.alike:,} only look like one{others}"


def different(about: Elsewhere) -> list[str]:
    """A sentence for each property: its value here and in the training; one sentence if the training is not known."""
    if about.there is None:
        return ["what the training images were like is not known: the model is of an older version"]
    return [f"{name}: {value(about.here)} here, {value(about.there)} in the training" for name, value in _PROPERTIES]


def _median(field: str, form: str) -> Callable[[Profile], str]:
    def value(side: Profile) -> str:
        percentiles = getattr(side, field)
        return form.format(percentiles[_CENTRE]) if percentiles else "not known"

    return value


def _views(side: Profile) -> str:
    return ", ".join(f"{100 * count / side.images:.0f} % {view}" for view, count in side.views.items())


_PROPERTIES: tuple[tuple[str, Callable[[Profile], str]], ...] = (
    ("positive images", lambda side: f"{100 * side.positives / side.images:.1f} %"),
    ("median mask", _median("mask_share", "{:.2%} of the image")),
    ("median grey level", _median("brightness", "{:.0f}")),
    ("median age", _median("age", "{:.0f}")),
    ("median longer side", _median("side_px", "{:,.0f} pixels")),
    ("views", _views),
)
