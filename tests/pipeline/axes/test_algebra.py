"""The algebra of axes: reshapes and permutations there and back, and units that stay what they were."""

from __future__ import annotations

import math

import numpy as np
from edge_compress.pipeline.axes.algebra import Store, fixed, size_of
from edge_compress.pipeline.axes.resolve import resolve
from hypothesis import given, settings
from hypothesis import strategies as st

sizes = st.lists(st.sampled_from([2, 3, 4]), min_size=1, max_size=4)


@given(sizes, st.data())
@settings(deadline=None, max_examples=60)
def test_there_and_back_is_the_same_axis(shape: list[int], data: st.DataObject) -> None:
    store = Store()
    axis = store.fresh(math.prod(shape))
    parts = store.regroup([axis], shape, "view")
    order = data.draw(st.permutations(range(len(shape))))
    moved = [parts[k] for k in order]
    flat = store.regroup(moved, [math.prod(shape)], "view")[0]
    back = store.regroup([flat], [shape[k] for k in order], "view")
    again = store.regroup([back[order.index(k)] for k in range(len(shape))], [math.prod(shape)], "view")[0]
    store.join(axis, again, "add")
    resolved = resolve(store)
    assert not resolved.reasons
    primes = {p for part in parts for atom in part for of in resolved.of(atom.labels) for p in of}
    assert len(primes) == sum(shape)


@given(st.sampled_from([2, 3, 4]), st.sampled_from([2, 3, 5]))
@settings(deadline=None, max_examples=20)
def test_a_factor_that_stays_leaves_the_other(outer: int, inner: int) -> None:
    store = Store()
    axis = store.fresh(outer * inner)
    first, _ = store.regroup([axis], (outer, inner), "view")
    store.freeze(first, "unbind")
    resolved = resolve(store)
    units = [p for p in resolved.of(axis[0].labels)]
    assert len(set(units)) == inner
    assert units[:inner] * outer == units


@given(st.integers(2, 6), st.integers(2, 6))
@settings(deadline=None, max_examples=20)
def test_what_is_joined_with_places_stays(a: int, b: int) -> None:
    store = Store()
    axis = store.fresh(a * b)
    store.regroup([axis], (a, b), "view")
    store.join(axis, fixed(a * b), "add in layer")
    resolved = resolve(store)
    assert {resolved.stays(label) for label in axis[0].labels} == {"add in layer"}


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
@settings(deadline=None, max_examples=40)
def test_a_concatenation_taken_apart(parts: list[int]) -> None:
    store = Store()
    axes = [store.fresh(n) for n in parts]
    whole = store.concatenate(axes, "cat")
    assert size_of(whole) == sum(parts)
    end = 0
    for axis, n in zip(axes, parts, strict=True):
        piece = store.take(whole, np.arange(end, end + n)) if sum(parts) > 1 else whole
        end += n
        if n > 1:
            np.testing.assert_array_equal(piece[0].labels, axis[0].labels)


def test_two_ways_keep_the_smaller_factor() -> None:
    store = Store()
    axis = store.fresh(12)
    store.regroup([axis], (2, 6), "view")
    store.regroup([axis], (3, 4), "view")
    resolved = resolve(store)
    assert len({p for of in resolved.of(axis[0].labels) for p in of if p not in resolved.reasons}) >= 1
