"""Batches: every case once, in the same order and with the same draws for any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptxdist.cache.store import open_store
from ptxdist.config import Transform
from ptxdist.train.augment import Augmentation
from ptxdist.train.dataset import Share, batches, epoch_order, positives_order, training_shares, validation_shares

NAMES = [f"case-{number}" for number in range(10)]


@given(cases=st.integers(1, 90), batch=st.integers(1, 20), ranks=st.integers(1, 5), epoch=st.integers(0, 3))
def test_ranks_unite_to_the_global_batches_each_case_once(cases: int, batch: int, ranks: int, epoch: int) -> None:
    order = epoch_order(np.arange(cases) * 3, seed=1, epoch=epoch)
    shares = [training_shares(order, batch, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1, "every rank takes part in every step"
    for step, global_batch in enumerate(training_shares(order, batch, 0, 1)):
        parts = [share[step].indices for share in shares]
        assert sorted(np.concatenate(parts)) == sorted(global_batch.indices)
        assert {share[step].global_size for share in shares} == {len(global_batch.indices)}
    assert sorted(np.concatenate([part.indices for share in shares for part in share])) == list(range(0, 3 * cases, 3))


@given(
    positives=st.integers(0, 30),
    negatives=st.integers(0, 60),
    share=st.floats(0.05, 0.95),
    epoch=st.integers(0, 3),
)
def test_positive_cases_are_spread_evenly_in_the_share_asked_for(
    positives: int, negatives: int, share: float, epoch: int
) -> None:
    count = positives + negatives
    indices, positive = np.arange(count) * 2, np.arange(count) < positives
    order = epoch_order(indices, seed=5, epoch=epoch, positive=positive, positive_share=share)
    assert len(order) == count
    assert set(order.tolist()) <= set(indices.tolist())
    if not positives or not negatives:
        assert sorted(order) == indices.tolist()
        return
    drawn = order < 2 * positives
    for start in range(0, count, 8):
        batch = drawn[start : start + 8]
        assert abs(batch.sum() - share * len(batch)) <= 1 + len(batch) / count + 1e-9
    for kind in (drawn, ~drawn):  # nobody a third time before everybody was there twice
        times = np.unique(order[kind], return_counts=True)[1]
        everybody = len(times) == (positives if kind is drawn else negatives)
        assert times.max() - (times.min() if everybody else 0) <= 1
    again = epoch_order(indices[::-1], seed=5, epoch=epoch, positive=positive[::-1], positive_share=share)
    assert (order == again).all()


@given(
    positives=st.integers(0, 20),
    negatives=st.integers(0, 60),
    shares=st.lists(st.floats(0.05, 0.95), min_size=1, max_size=6),
)
def test_an_epoch_of_positives_has_each_once_and_negatives_in_turn(
    positives: int, negatives: int, shares: list[float]
) -> None:
    indices, positive = np.arange(positives + negatives) * 2, np.arange(positives + negatives) < positives

    def order(epoch: int, turn: int = 1) -> np.ndarray:
        return positives_order(indices[::turn], seed=5, positive=positive[::turn], positive_shares=shares[:epoch])

    times = np.zeros(2 * negatives, int)
    for epoch, share in enumerate(shares, start=1):
        found = order(epoch)
        assert (found == order(epoch, -1)).all(), "the order of the cases does not matter"
        assert len(set(found.tolist())) == len(found), "nobody twice"
        if not positives or not negatives:
            assert sorted(found) == indices.tolist()
            continue
        drawn = found < 2 * positives
        assert drawn.sum() == positives
        wanted = positives * (1 - share) / share
        assert abs(len(found) - positives - min(wanted, negatives)) <= 0.5
        for start in range(0, len(found), 8):
            batch = drawn[start : start + 8]
            assert abs(batch.sum() - len(batch) * positives / len(found)) < 1 + 1e-9
        times[found[~drawn] - 2 * positives] += 1
        assert np.ptp(times[::2]) <= 1, "every negative case before any comes again"


@given(order=st.lists(st.integers(0, 9), max_size=60), batch=st.integers(1, 7))
def test_repeats_count_how_often_a_case_was_there_before(order: list[int], batch: int) -> None:
    shares = training_shares(np.array(order, np.int64), batch, 0, 1)
    found = [number for share in shares for number in share.repeats.tolist()]
    assert found == [order[:place].count(index) for place, index in enumerate(order)]


def test_a_case_that_comes_twice_in_an_epoch_is_augmented_anew(cache: Path) -> None:
    shares = training_shares(np.array([4, 4, 4, 4, 4, 4]), 2, 0, 1)
    assert [share.repeats.tolist() for share in shares] == [[0, 1], [2, 3], [4, 5]]
    found = batches(open_store(cache, 64), shares, augmentation=Augmentation("siim", 1), names=NAMES, epoch=1)
    assert len({image.numpy().tobytes() for batch in found for image in batch.image}) > 3


@given(cases=st.integers(0, 90), ranks=st.integers(1, 5))
def test_validation_has_every_case_once_in_blocks_that_do_not_depend_on_the_ranks(cases: int, ranks: int) -> None:
    indices = np.arange(cases)
    alone = {tuple(share.indices) for share in validation_shares(indices, 0, 1)}
    shared = [tuple(share.indices) for rank in range(ranks) for share in validation_shares(indices, rank, ranks)]
    assert set(shared) == alone
    assert sorted(index for block in shared for index in block) == list(range(cases))


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    indices = np.arange(50)
    first = epoch_order(indices, seed=1, epoch=1)
    assert (first == epoch_order(indices[::-1], seed=1, epoch=1)).all()
    assert (first != epoch_order(indices, seed=1, epoch=2)).any()
    assert (first != epoch_order(indices, seed=2, epoch=1)).any()


def test_batches_hold_the_stored_samples(cache: Path) -> None:
    store = open_store(cache, 64)
    shares = training_shares(np.array([5, 0, 9, 3, 7]), 2, 0, 1)
    seen = list(batches(store, shares))
    assert [batch.index.tolist() for batch in seen] == [[5, 0], [9, 3], [7]]
    for batch in seen:
        assert tuple(batch.image.shape[1:]) == tuple(batch.mask.shape[1:]) == (1, 64, 64)
        for row, index in enumerate(batch.index.tolist()):
            image, mask = store.sample(index)
            assert (batch.image[row, 0].numpy() == image).all()
            assert (batch.mask[row, 0].numpy() == mask).all()


def test_an_empty_share_is_an_empty_batch(cache: Path) -> None:
    nobody = np.array([], np.int64)
    (batch,) = batches(open_store(cache, 32), [Share(nobody, 1, nobody)])
    assert tuple(batch.image.shape) == (0, 1, 32, 32)


@pytest.mark.parametrize("kind", ["by table", "in full"])
def test_draws_depend_on_seed_epoch_and_case_only(cache: Path, full_recipe: tuple[Transform, ...], kind: str) -> None:
    store, recipe = open_store(cache, 64), "siim" if kind == "by table" else full_recipe

    def augmented(order: list[int], batch: int, seed: int, epoch: int) -> dict[int, bytes]:
        shares = training_shares(np.array(order), batch, 0, 1)
        found = batches(store, shares, augmentation=Augmentation(recipe, seed), names=NAMES, epoch=epoch)
        return {i: b.image[row].numpy().tobytes() for b in found for row, i in enumerate(b.index.tolist())}

    first = augmented(list(range(10)), 4, 1, 1)
    assert first == augmented(list(range(9, -1, -1)), 3, 1, 1)
    assert first != augmented(list(range(10)), 4, 1, 2)
    assert first != augmented(list(range(10)), 4, 2, 1)
    assert len(set(first.values())) == 10


def test_a_mixed_case_has_its_part_of_another_training_case_in_image_and_mask(cache: Path) -> None:
    """And it is the same in any order, in any batch, on any rank."""
    store, training = open_store(cache, 64), np.array([0, 2, 3, 5, 8])
    augmentation = Augmentation("none", 1, mix=0.8)

    def mixed(order: list[int], batch: int, others: npt.NDArray[np.int64]) -> dict[int, tuple[bytes, bytes]]:
        shares = [share for rank in range(2) for share in training_shares(np.array(order), batch, rank, 2)]
        found = list(batches(store, shares, augmentation=augmentation, names=NAMES, others=others, epoch=4))
        return {
            index: (b.image[row].numpy().tobytes(), b.mask[row].numpy().tobytes())
            for b in found
            for row, index in enumerate(b.index.tolist())
        }

    found, changed = mixed(training.tolist(), 4, training), 0
    assert found == mixed(training[::-1].tolist(), 3, training[::-1])
    for index, (image, mask) in found.items():
        part = augmentation.part(epoch=4, case=NAMES[index])
        expected = [array.copy() for array in store.sample(index)]
        if part:
            other = int(training[int(part.case * len(training))])
            for source, target in zip(store.sample(other), expected, strict=True):
                part.copy(source, target)
            changed += other != index
        assert (image, mask) == (expected[0].tobytes(), expected[1].tobytes())
    assert changed > 1


def test_image_and_mask_are_flipped_together_and_only_the_image_changes_in_brightness() -> None:
    image = np.tile(np.arange(64, dtype=np.uint8) * 2 + 50, (64, 1))
    mask = np.tile(np.where(np.arange(64) < 10, 200, 0).astype(np.uint8), (64, 1))
    augmentation, flipped, brightness = Augmentation("siim", 0), 0, set()
    for case in range(200):
        new_image, new_mask = np.empty_like(image), np.empty_like(mask)
        augmentation.draw(epoch=0, case=str(case)).write(image, mask, new_image, new_mask)
        is_flipped = bool((new_mask == mask[:, ::-1]).all())
        assert is_flipped or (new_mask == mask).all()
        assert (new_image[0, 0] > new_image[0, -1]) == is_flipped
        flipped += is_flipped
        brightness.add(int(new_image.mean()))
    assert 70 < flipped < 130
    assert len(brightness) > 20


def test_a_batch_that_is_kept_is_not_written_over(cache: Path) -> None:
    """Host memory is used again, but only when no tensor and no view of it is left."""
    store = open_store(cache, 64)
    shares = [Share(np.array([index]), 1, np.array([0])) for index in [0, 1, 2, 3] * 5]
    views, places = [], set()
    for number, batch in enumerate(batches(store, shares)):
        places.add(batch.image.data_ptr())
        if number < 4:
            views.append(batch.image[0, 0, 3:5].numpy())  # and the batch itself is let go
    for index, view in enumerate(views):
        assert (view == store.sample(index)[0][3:5]).all()
    assert len(places) < len(shares), "memory is used again"


def test_an_error_while_preparing_reaches_the_reader(cache: Path) -> None:
    with pytest.raises(IndexError):
        list(batches(open_store(cache, 32), [Share(np.array([10_000_000]), 1, np.array([0]))]))


def test_a_reader_that_stops_early_leaves_no_thread(cache: Path) -> None:
    import threading

    reader = batches(open_store(cache, 32), [Share(np.array([0]), 1, np.array([0]))] * 50)
    next(reader)
    reader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ptxdist-ahead")]
