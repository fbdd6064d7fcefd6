"""How many images reconstruction holds: what fits, and the report says so where that is fewer than wanted."""

from __future__ import annotations

from edge_compress.pipeline.reconstruct.memory import HELD_TENSORS, LEAST_IMAGES, affordable, reduced


def test_as_many_images_as_fit_and_never_fewer_than_a_least_number() -> None:
    image = 4 * 1000 * HELD_TENSORS
    assert affordable(1000, 500, 10**12) == 500
    assert affordable(1000, 500, 100 * image) == 100
    assert affordable(1000, 500, image) == LEAST_IMAGES


def test_fewer_images_than_wanted_are_told_with_the_memory_there_was() -> None:
    assert reduced("Layer-wise reconstruction", 500, 500, 2**30) == ""
    told = reduced("Layer-wise reconstruction", 100, 500, 2**30)
    assert "100 of 500 samples" in told
    assert "1.0 GiB" in told
