"""What is said while a cluster has no room for the workers, how often, and when it is given up."""

from __future__ import annotations

import json
import time

import pytest

from ptxdist.cluster import waiting
from ptxdist.cluster.failures import LostError
from ptxdist.cluster.waiting import Room, Waiting, has_node_types
from ptxdist.config import TrainSettings
from ptxdist.errors import ClusterError


class Story:
    """A `Waiting` on a clock of its own: what it says, when, while the cluster has some room."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, autoscales: bool = False, **train: object) -> None:
        self.now, self.said, self.room, self.placed = 100.0, list[tuple[float, str]](), Room(2, 2), False
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(waiting, "room", lambda use_gpu: self.room)
        monkeypatch.setattr(waiting, "has_place", lambda: self.placed)
        monkeypatch.setattr(waiting, "autoscales", lambda: autoscales)
        self.ended = dict[str, str]()
        monkeypatch.setattr(waiting, "ended_processes", lambda: dict(self.ended))
        settings = TrainSettings.model_validate({"workers": 2, **train})
        self.waiting = Waiting(settings, False, lambda text: self.said.append((self.now - 100, text)))

    def goes_on(self, seconds: float, heard: bool = False) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 0.5)
            self.waiting.look(heard)


def test_what_is_waited_for_is_said_at_once_and_every_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(monkeypatch)
    story.goes_on(60)
    assert story.said == [], "there is room"
    story.room = Room(1, 1)
    story.goes_on(62)
    assert [when for when, _ in story.said] == [62.5, 92.5]
    assert story.said[0][1] == (
        "1 of 2 workers has room; waiting for a node; one that was cut off has to start Ray again (2 s of 600 s); "
        "`--set train.min_workers=1` goes on with fewer"
    )
    story.waiting.refuse()  # not yet
    story.placed = True
    story.goes_on(55)
    story.waiting.refuse()
    assert len(story.said) == 2
    story.placed, story.room = False, Room(0, 2)
    story.goes_on(6)
    assert story.said[2][1] == (
        "0 of 2 workers have room; waiting for other work on the cluster, or a node that does not answer (2 s of 600 s)"
    )


def test_nothing_is_said_while_the_workers_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(monkeypatch)
    story.room = Room(0, 0)
    story.goes_on(1000, heard=True)
    assert story.said == []


@pytest.mark.parametrize(
    ("autoscales", "limit", "ends"), [(False, None, 600), (True, None, None), (True, 40.0, 40), (False, 40.0, 40)]
)
def test_the_wait_ends_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, autoscales: bool, limit: float | None, ends: int | None
) -> None:
    story = Story(monkeypatch, autoscales, capacity_timeout_s=limit)
    story.room = Room(1, 1)
    story.goes_on(3000 if ends is None else ends - 1)
    story.waiting.refuse()
    story.goes_on(6)
    if ends is None:
        assert "s, without limit)" in story.said[-1][1]
        story.waiting.refuse()
        return
    with pytest.raises(ClusterError, match=rf"no node came within {ends} s \(train.capacity_timeout_s\); start Ray"):
        story.waiting.refuse()


def test_processes_that_end_as_they_start_are_counted_since_the_workers_were_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    story = Story(monkeypatch)
    story.placed, story.ended = True, {"lost in the training": "10.0.0.2"}
    story.goes_on(10)
    for number in range(9):
        story.ended[f"start {number}"] = "10.0.0.3"
        story.goes_on(10)
    story.waiting.refuse()
    starts = ["3 of 10 time", "6 of 10 time", "9 of 10 time"]
    assert [text[:12] for _, text in story.said if "times" in text] == starts
    story.goes_on(1, heard=True)
    story.goes_on(10)
    story.ended["once more"] = "10.0.0.2"
    story.goes_on(100)
    story.waiting.refuse()
    assert [text[:12] for _, text in story.said if "times" in text] == starts
    story.ended.update({f"again {number}": "10.0.0.3" for number in range(9)})
    story.goes_on(10)
    with pytest.raises(ClusterError, match=r"10 of 10 times .* on 10\.0\.0\.2 and 10\.0\.0\.3; is the disk"):
        story.waiting.refuse()


def test_workers_that_are_silent_for_long_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(monkeypatch)
    story.placed, story.waiting.silence_s = True, 60
    story.goes_on(590)
    story.waiting.refuse()  # a start may take ten minutes
    story.waiting.silence_s = 600
    story.said.clear()
    story.goes_on(1, heard=True)
    story.goes_on(500)
    assert story.said[0][1] == (
        "the workers have been silent for 60 s of 600 s, twice train.collective_timeout_s, after which new ones start; "
        "does a disk or a file system hang?"
    )
    assert len(story.said) == 15
    story.goes_on(1, heard=True)
    story.goes_on(500)
    story.placed = False  # Ray starts others
    story.goes_on(10)
    story.placed = True
    story.goes_on(500)
    story.waiting.refuse()
    story.goes_on(110)
    with pytest.raises(LostError, match=r"the workers were silent for 60\d s"):
        story.waiting.refuse()


def test_the_time_in_which_the_driver_was_stopped_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(monkeypatch)
    story.placed, story.waiting.silence_s = True, 600
    story.goes_on(1, heard=True)
    story.goes_on(30)
    story.now += 3600
    story.goes_on(590)
    story.waiting.refuse()
    story.goes_on(15)
    with pytest.raises(LostError, match=r"the workers were silent for 60\d s"):
        story.waiting.refuse()


def test_fewer_workers_are_advised_only_where_they_help(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(monkeypatch, workers=4, min_workers=3)
    story.room = Room(0, 0)
    story.goes_on(6)
    assert "0 of 3 workers have room" in story.said[0][1]
    assert "min_workers" not in story.said[0][1]


# What Ray's monitor wrote for `ray start --head` with an autoscaling config and without.
HEAD = "f" * 51 + "00000"


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [({HEAD: "ray.head.default"}, True), ({HEAD: f"node_{HEAD}"}, False), ({}, False), (None, False)],
)
def test_an_autoscaler_is_known_by_its_node_types(mapping: dict[str, str] | None, expected: bool) -> None:
    assert has_node_types(json.dumps({"autoscaler_report": {"node_type_mapping": mapping}}).encode()) is expected
    assert not has_node_types(None)
