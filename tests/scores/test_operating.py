"""The operating point: the search counts what the masks are, and its estimate is not optimistic."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ptxdist.cache.split import assign_folds
from ptxdist.records import OperatingPoint
from ptxdist.scores import operating
from ptxdist.scores.counts import LEVELS
from ptxdist.scores.metrics import image_dice, scores
from ptxdist.scores.operating import AREAS_PX, FOLDS, LEVELS_TRIED, tune
from ptxdist.train.scoring import count, mask_at, to_levels

SIDE_PX = 48


def histograms_of(probability: torch.Tensor, truth: torch.Tensor) -> np.ndarray:
    levels = to_levels(probability).flatten(1)
    parts = [
        [torch.bincount(own[chosen], minlength=LEVELS) for chosen in (torch.ones_like(inside), inside)]
        for own, inside in zip(levels, truth.flatten(1), strict=True)
    ]
    return np.array([[part.numpy() for part in pair] for pair in parts], np.int32)


@pytest.fixture(scope="module")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Forty probability maps of soft boxes, half of them with a box as truth; some boxes are false alarms."""
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(40, SIDE_PX, SIDE_PX, generator=generator) * 0.4
    truth = torch.zeros(40, SIDE_PX, SIDE_PX, dtype=torch.bool)
    for index in range(40):
        top, left = torch.randint(0, 24, (2,), generator=generator).tolist()
        side = 12 + index % 12
        if index % 2 == 0:
            truth[index, top : top + side, left : left + side] = True
            probability[index, top : top + side, left : left + side] += 0.45
        elif index % 5 == 0:
            probability[index, top : top + 7, left : left + 7] += 0.55
    return probability, truth


def test_levels_begin_exactly_where_a_threshold_compares() -> None:
    edges = torch.arange(1, LEVELS, dtype=torch.float64).div(LEVELS).float()
    around = [edges, torch.nextafter(edges, torch.zeros(1)), torch.nextafter(edges, torch.ones(1)), edges + 1e-6]
    values = torch.cat(
        [*around, torch.tensor([0.0, 1.0]), torch.rand(20_000, generator=torch.Generator().manual_seed(0))]
    )
    reached = (values[:, None] >= edges).sum(1)
    assert to_levels(values).tolist() == reached.tolist()
    assert to_levels(values.reshape(2, 1, -1)[:, 0]).shape == (2, len(values) // 2)


@pytest.mark.parametrize("kind", ["pair", "triplet"])
def test_scores_of_the_search_are_those_of_the_masks(images: tuple[torch.Tensor, torch.Tensor], kind: str) -> None:
    probability, truth = images
    ids = [f"case-{index:02}" for index in range(40)]
    area = truth.flatten(1).sum(1).numpy()
    found = tune(histograms_of(probability, truth), area, ids, ids, kind)
    assert found is not None
    tuned, estimate = found
    assert (tuned.point.top == tuned.point.bottom) == (kind == "pair") or tuned.point.top >= tuned.point.bottom

    def counts_at(points: list[OperatingPoint]) -> np.ndarray:
        masks = torch.stack([mask_at(own, point, 1.0) for own, point in zip(probability, points, strict=True)])
        return count(masks, truth).numpy()

    assert tuned.scores == scores(counts_at([tuned.point] * 40))
    fold = assign_folds(ids, ids, area.tolist(), folds=FOLDS)
    assert (estimate == counts_at([tuned.points[number] for number in fold])).all()
    assert tuned.estimate == scores(estimate)
    assert tuned.estimate.kaggle_dice <= tuned.scores.kaggle_dice
    surface = np.array(tuned.surface, float)
    assert surface.shape == (len(LEVELS_TRIED), len(AREAS_PX))
    row, column = tuned.thresholds.index(tuned.point.bottom), tuned.areas_px.index(tuned.point.min_area_px)
    assert surface[row, column] == pytest.approx(tuned.scores.kaggle_dice, abs=1e-6)
    if kind == "pair":
        for row, column in ((5, 0), (20, 3), (30, 1)):
            threshold = tuned.thresholds[row]
            point = OperatingPoint(top=threshold, min_area_px=int(AREAS_PX[column]), bottom=threshold)
            assert surface[row, column] == pytest.approx(scores(counts_at([point] * 40)).kaggle_dice, abs=1e-6)


def naive_best(total: dict[tuple[int, ...], float]) -> tuple[int, ...]:
    """The point whose neighbours that are tried have the best mean, and the lowest of equal ones."""
    means = {}
    for place in sorted(total):
        around = itertools.product(*((index - 1, index, index + 1) for index in place))
        found = [total[other] for other in around if other in total]
        means[place] = sum(found) / len(found)
    return next(place for place, mean in means.items() if mean >= max(means.values()) - 1e-9)


@pytest.mark.parametrize("kind", ["pair", "triplet"])
def test_the_search_over_four_thresholds_is_that_of_a_plain_loop(
    images: tuple[torch.Tensor, torch.Tensor], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    probability, truth = images
    tried, areas, levels = np.array([0, 0.3, 0.5, 0.6, 0.9]), np.array([0, 4, 9, 16]), np.arange(40, 190, 30)
    for name, value in (("IMAGES_TRIED", tried), ("AREAS_PX", areas), ("LEVELS_TRIED", levels)):
        monkeypatch.setattr(operating, name, value)
    random = np.random.default_rng(3)
    image_scores = np.clip(0.35 + 0.3 * (truth.flatten(1).any(1).numpy()) + random.normal(0, 0.15, 40), 0, 1)
    image_scores[:3] = (0.5, 0.4999996, 0.4999994)  # rounded to six digits, the second one reaches 0.5
    ids = [f"case-{index:02}" for index in range(40)]
    area = truth.flatten(1).sum(1).numpy()
    found = tune(histograms_of(probability, truth), area, ids, ids, kind, image_scores)
    assert found is not None

    def point_of(place: tuple[int, ...]) -> OperatingPoint:
        image, top, smallest, bottom = place
        return OperatingPoint(
            image=tried[image], top=levels[top] / LEVELS, min_area_px=areas[smallest], bottom=levels[bottom] / LEVELS
        )

    def counts_at(point: OperatingPoint) -> np.ndarray:
        pairs = zip(probability, image_scores.tolist(), strict=True)
        return count(torch.stack([mask_at(own, point, score) for own, score in pairs]), truth).numpy()

    places = [
        place
        for place in itertools.product(*map(range, (len(tried), len(levels), len(areas), len(levels))))
        if (place[1] == place[3] if kind == "pair" else place[1] >= place[3])
    ]
    dice = {place: image_dice(counts_at(point_of(place))) for place in places}
    fold = np.array(assign_folds(ids, ids, area.tolist(), folds=FOLDS))
    best = naive_best({place: own.sum() for place, own in dice.items()})
    chosen = [naive_best({place: own[fold != k].sum() for place, own in dice.items()}) for k in range(FOLDS)]
    tuned, estimate = found
    assert tuned.point == point_of(best)
    assert tuned.point.image > 0, "the scores help"
    assert tuned.points == tuple(map(point_of, chosen))
    assert tuned.scores == scores(counts_at(tuned.point))
    assert (estimate == np.stack([counts_at(tuned.points[k])[row] for row, k in enumerate(fold)])).all()
    for bottom, smallest in itertools.product(range(len(levels)), range(len(areas))):
        place = (best[0], bottom if kind == "pair" else best[1], smallest, bottom)
        shown = tuned.surface[bottom][smallest]
        assert shown == (pytest.approx(dice[place].mean(), abs=1e-6) if place in dice else None)


@pytest.mark.parametrize("kind", ["pair", "triplet"])
def test_scores_that_tell_nothing_change_nothing(kind: str) -> None:
    for seed in range(2):
        hist, area = noise(np.random.default_rng(seed))
        ids = [str(index) for index in range(30)]
        plain, headed = (tune(hist, area, ids, ids, kind, image_scores) for image_scores in (None, np.ones(30)))
        assert plain is not None
        assert headed is not None
        assert headed[0] == plain[0]
        assert headed[0].model_dump_json() == plain[0].model_dump_json()
        assert (headed[1] == plain[1]).all()


def test_a_point_in_words_and_in_json() -> None:
    plain = OperatingPoint(top=0.5, min_area_px=0, bottom=0.5)
    assert plain.words == "a mask is made of all pixels that reach 0.5"
    assert plain.model_dump_json() == '{"top":0.5,"min_area_px":0,"bottom":0.5}', "as in version 0.1.0"
    headed = OperatingPoint(image=0.45, top=0.7, min_area_px=1024, bottom=0.3)
    assert headed.words == (
        "a mask is empty unless the score reaches 0.45 and 1,024 pixels reach 0.7; it is made of all pixels that reach "
        "0.3"
    )
    assert OperatingPoint.model_validate_json(headed.model_dump_json()) == headed
    assert [headed.admits(score) for score in (0.45, 0.4499996, 0.4499994)] == [True, True, False]


def test_the_point_removes_the_false_alarms(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    probability, truth = images
    ids = [f"case-{index:02}" for index in range(40)]
    plain = scores(count(probability >= 0.5, truth).numpy())
    found = tune(histograms_of(probability, truth), truth.flatten(1).sum(1).numpy(), ids, ids, "pair")
    assert found is not None
    assert found[0].scores.kaggle_dice > plain.kaggle_dice
    assert found[0].estimate.kaggle_dice > 0.9


def noise(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Histograms of 30 masks whose sizes are independent of the truth, and the truth's areas."""
    area = np.where(random.random(30) < 0.5, 20_000, 0)
    hist = np.zeros((30, 2, LEVELS), np.int32)
    for row in range(30):
        hist[row, 0, : random.integers(1, LEVELS)] = 200
    hist[:, 1] = hist[:, 0] * (area > 0)[:, None] // 2
    return hist, area


def test_a_fold_has_no_part_in_its_own_point() -> None:
    """Whatever the cases of one fold look like, the point they are masked by stays the same."""
    hist, area = noise(np.random.default_rng(0))
    ids = [f"case-{index:02}" for index in range(30)]
    own = np.array(assign_folds(ids, ids, area.tolist(), folds=FOLDS)) == 2
    other = np.where(own[:, None, None], hist[:, :, ::-1], hist)
    before, after = (tune(each, area, ids, ids, "triplet") for each in (hist, other))
    assert before is not None
    assert after is not None
    assert before[0].points[2] == after[0].points[2]
    assert before[0].points != after[0].points


def test_what_is_tuned_on_noise_is_estimated_lower_than_it_seems() -> None:
    """The best point of many scores better than on new cases."""
    random, seems, holds = np.random.default_rng(1), 0.0, 0.0
    ids = [str(index) for index in range(30)]
    for _ in range(20):
        found = tune(*noise(random), ids, ids, "pair")
        assert found is not None
        seems, holds = seems + found[0].scores.kaggle_dice, holds + found[0].estimate.kaggle_dice
    assert holds < seems - 20 * 0.01


def test_one_patient_cannot_be_tuned_on() -> None:
    hist = np.zeros((4, 2, LEVELS), np.int32)
    assert tune(hist, np.zeros(4, np.int64), list("abcd"), ["one"] * 4, "pair") is None


def test_few_cases_may_leave_a_fold_without_any() -> None:
    """One case of each kind: each is missing in every fold alike, so all go to the first folds."""
    area = np.array([0, 1_000, 5_000, 20_000, 0])
    hist = np.zeros((5, 2, LEVELS), np.int32)
    hist[:, :, -1] = area[:, None]
    ids = list("abcde")
    assert len(set(assign_folds(ids, ids, area.tolist(), folds=FOLDS))) < FOLDS
    found = tune(hist, area, ids, ids, "triplet")
    assert found is not None
    assert found[0].estimate.kaggle_dice == 1.0


def test_a_mask_is_empty_below_its_area_and_else_all_from_the_bottom_on() -> None:
    probability = torch.tensor([0.9, 0.8, 0.3, 0.1])

    def mask(top: float, area: int, bottom: float) -> list[bool]:
        return mask_at(probability, OperatingPoint(top=top, min_area_px=area, bottom=bottom), 0.0).tolist()

    assert mask(0.75, 2, 0.25) == [True, True, True, False]
    assert mask(0.75, 3, 0.25) == [False] * 4
    assert mask(0.9, 0, 0.9) == [True, False, False, False]
