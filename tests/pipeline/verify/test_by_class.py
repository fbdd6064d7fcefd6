"""A class that is lost is named, however good the average looks."""

from __future__ import annotations

import numpy as np
from edge_compress.pipeline.verify.by_class import by_class, confused, remarks, worst
from hypothesis import given
from hypothesis import strategies as st

NAMES = ("cat", "dog", "newt")


def test_a_rare_class_that_is_lost_is_named_though_the_average_hardly_falls() -> None:
    labels = np.repeat([0, 1, 2], [500, 490, 10])
    dense, artifact = np.ones(1000, bool), np.ones(1000, bool)
    artifact[-6:] = False  # 0.6 points in all
    found = by_class(labels, dense, artifact, NAMES)
    assert found == {"cat": (500, 500, 500, 0), "dog": (490, 490, 490, 0), "newt": (10, 10, 4, 6)}
    assert worst(found)[0][:2] == ("newt", 60.0)
    (said,) = remarks("x86", found)
    assert said.startswith("x86: class 'newt' lost most: 10 of its 10 test samples were right, now 4 (60.0 points")


def test_what_can_be_chance_is_not_remarked() -> None:
    labels = np.repeat([0, 1], [5, 500])
    dense, artifact = np.ones(505, bool), np.ones(505, bool)
    artifact[0] = False  # one of five
    assert list(remarks("x86", by_class(labels, dense, artifact, NAMES))) == []
    assert list(remarks("x86", {})) == []


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_classes_add_up_to_the_whole(samples: list[tuple[int, bool, bool]]) -> None:
    labels, dense, artifact = (np.array(part) for part in zip(*samples, strict=True))
    counts = np.array(list(by_class(labels, dense, artifact, NAMES).values()))
    assert counts.sum(0).tolist() == [len(samples), dense.sum(), artifact.sum(), (dense & ~artifact).sum()]


def test_classes_without_names_are_numbered() -> None:
    assert list(by_class(np.array([3, 11]), np.ones(2, bool), np.ones(2, bool), ())) == ["3", "11"]


def test_the_confusions_that_rose_most_are_named_and_those_that_fell_are_not() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    dense = np.array([0, 0, 1, 0, 1, 1, 1, 0, 0, 2])
    artifact = np.array([1, 1, 1, 2, 1, 1, 1, 0, 2, 2])  # 0 as 1: 1 -> 3, 0 as 2: 0 -> 1, 2 as 0: 2 -> 1
    assert confused(labels, dense, artifact, ("a", "b")) == (("a", "b", 1, 3), ("a", "2", 0, 1))
    assert confused(labels, dense, dense, ("a", "b")) == ()
    assert confused(labels, dense, np.full(10, -1), ("a", "b")) == ()  # NaN scores are not counted
