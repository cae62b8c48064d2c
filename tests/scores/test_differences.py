"""Which properties of the evaluated images are called different from the training images."""

from __future__ import annotations

import numpy as np
import pytest

from ptxdist.records import Elsewhere, Profile
from ptxdist.scores.elsewhere import different

AT = (0.05, 0.25, 0.5, 0.75, 0.95)


def hospital(seed: int, images: int = 300, *, positive: float = 0.22, grey: float = 120.0, ap: float = 0.4) -> Profile:
    """A sample of a hospital: a patient has 1.6 images on average, which are alike."""
    random = np.random.default_rng(seed)
    patient = random.integers(0, images, images)
    positives = int((random.random(images)[patient] < positive).sum())
    views = random.random(images) < ap
    bright = random.normal(grey, 10, images)[patient] + random.normal(0, 15, images)

    def spread(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> tuple[float, ...]:
        return tuple(np.quantile(values, AT).tolist())

    return Profile(
        images=images,
        positives=positives,
        mask_share=spread(random.lognormal(-4, 1, max(1, positives))),
        brightness=spread(bright),
        age=spread(random.normal(50, 17, images)[patient]),
        side_px=(1024.0,) * 5,
        views={"AP": int(views.sum()), "PA": int((~views).sum())},
    )


def words(here: Profile, there: Profile | None) -> list[str]:
    about = Elsewhere(
        data="cache",
        split="all",
        models=("m",),
        weights_sha256=("0",),
        point_from="x",
        here=here,
        there=there,
        seen=None,
    )
    return different(about)


def named(line: str) -> set[str]:
    names = ("positive images", "median mask", "median grey level", "median age", "median longer side", "views")
    return {name for name in names if name in line}


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"positive": 0.05, "grey": 80.0, "ap": 1.0}, {"positive images", "median grey level", "views"}),
        ({"positive": 0.05}, {"positive images"}),
        ({"grey": 140.0}, {"median grey level"}),
        ({"grey": 124.0}, set()),
        ({"ap": 0.8}, {"views"}),
    ],
    ids=["another hospital", "prevalence", "exposure", "nearly the same exposure", "views"],
)
def test_a_second_hospital_differs_in_what_was_changed(other: dict[str, float], expected: set[str]) -> None:
    first, *rest = words(hospital(1, **other), hospital(0))
    assert first.startswith("different: " if expected else "not clearly different: ")
    assert named(first) == (expected or named(first))
    assert len(named(first) | named("".join(rest))) == 6


def test_a_second_sample_of_the_same_hospital_is_not_accused() -> None:
    pairs = [words(hospital(2 * n, 200), hospital(2 * n + 1, 400)) for n in range(60)]
    assert sum(lines[0].startswith("different") for lines in pairs) <= 1


def test_constant_and_unknown_properties_are_compared_too() -> None:
    one = hospital(0)
    larger = one.model_copy(update={"side_px": (2048.0,) * 5, "age": ()})
    assert words(larger, one)[0] == "different: median longer side 2,048 pixels here, 1,024 pixels in the training"
    nothing = one.model_copy(update={"positives": 0, "mask_share": ()})
    assert "median mask not known here" in words(nothing, one)[1]
    assert named(words(nothing, one)[0]) == {"positive images"}
    assert words(one, one)[0].startswith("not clearly different: ")
    assert words(one, None) == ["what the training images were like is not known: the model is of an older version"]
