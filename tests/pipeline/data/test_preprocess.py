"""Pixels to network inputs: normalisation, and what the augmentations may and may not do to an image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from edge_compress.pipeline.data.preprocess import augmented, to_input
from edge_compress.pipeline.data.splits import network_inputs
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.options import Augment
from edge_compress.pipeline.types import Preprocess
from hypothesis import given, settings
from hypothesis import strategies as st


def random_images(n: int, height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, (n, height, width, channels), dtype=np.uint8)


def plain(augment: str, channels: int = 1) -> Preprocess:
    return Preprocess((0.0,) * channels, (1 / 255,) * channels, augment)  # inputs are the pixel values


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_to_input_is_pixel_over_255_minus_mean_over_std_per_channel() -> None:
    images = random_images(3, 5, 4, 3)
    inputs = to_input(images, Preprocess((0.1, 0.2, 0.3), (0.5, 0.25, 2.0), "none"))
    assert inputs.shape == (3, 3, 5, 4)
    assert inputs.dtype == torch.float32
    assert inputs.is_contiguous()
    expected = (images[2, 4, 1, 2] / 255 - 0.3) / 2.0
    assert inputs[2, 2, 4, 1].item() == pytest.approx(expected, abs=1e-6)
    assert inputs[1, 0, 0, 3].item() == pytest.approx((images[1, 0, 3, 0] / 255 - 0.1) / 0.5, abs=1e-6)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**31))
def test_network_inputs_are_bit_for_bit_what_torch_computes(channels: int, side: int, seed: int) -> None:
    """Artifacts are judged on the very inputs that the network was trained on, wherever these were made."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (3, side, side + 1, channels), dtype=np.uint8)
    prep = Preprocess(tuple(rng.random(channels)), tuple(rng.random(channels) + 0.1), "none")
    mean, std = (torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1) for values in (prep.mean, prep.std))
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).sub(mean).div(std)
    assert np.array_equal(network_inputs(pixels, prep), expected.numpy())
    assert torch.equal(to_input(pixels, prep), expected)


def test_to_input_leaves_the_pixels_alone_even_when_they_are_read_only() -> None:
    images = random_images(2, 4, 4, 1)
    before = images.copy()
    images.flags.writeable = False
    to_input(images[:, ::-1], plain("none"))
    to_input(images, plain("none"))
    assert (images == before).all()


@pytest.mark.parametrize("name", Augment)
def test_augmentation_is_a_function_of_the_generator_alone(name: str) -> None:
    images = random_images(20, 16, 16, 3)
    first, again, other = (augmented(images, plain(name, 3), generator(s)) for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name == "none")


def test_none_is_the_plain_image() -> None:
    images = random_images(4, 8, 8, 1)
    prep = Preprocess((0.3,), (0.4,), "none")
    assert torch.equal(augmented(images, prep, generator()), to_input(images, prep))


@settings(deadline=None, max_examples=20)
@given(
    height=st.integers(8, 24), width=st.integers(8, 24), seed=st.integers(0, 1000), name=st.sampled_from(["crop-flip", "shift"])
)
def test_every_augmented_image_is_a_crop_of_its_own_padded_image(height: int, width: int, seed: int, name: str) -> None:
    images = random_images(6, height, width, 2, seed)
    pad = height // 8
    result = augmented(images, plain(name, 2), generator(seed)).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for image, varied in zip(images, result, strict=True):
        padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        variants = [varied, varied[:, ::-1]] if name == "crop-flip" else [varied]
        crops = [padded[y : y + height, x : x + width] for y in range(2 * pad + 1) for x in range(2 * pad + 1)]
        assert any((crop == variant).all() for crop in crops for variant in variants)


@pytest.mark.parametrize(("name", "mirrored_share"), [("crop-flip", 0.5), ("shift", 0.0)])
def test_only_crop_flip_mirrors_and_shifts_reach_every_corner(name: str, mirrored_share: float) -> None:
    image = np.zeros((1, 16, 16, 1), np.uint8)
    image[0, 4:12, 4] = 255  # a bar on the left ...
    image[0, 4, 4:12] = 128  # ... with an arm to the right at its top: an upside-down L
    result = augmented(np.repeat(image, 600, 0), plain(name), generator()).round()[:, 0]
    bars = (result == 255).sum(1).argmax(1)  # column of the bar
    arms = (result == 128).float().sum(1).argmax(1)
    mirrored = (arms < bars).float().mean().item()
    assert mirrored == pytest.approx(mirrored_share, abs=0.08)
    tops = (result > 0).any(2).float().argmax(1)
    assert set(tops.tolist()) == {2, 3, 4, 5, 6}  # 16 // 8 = 2 pixels each way
    straight = bars[arms >= bars] if name == "crop-flip" else bars
    assert set(straight.tolist()) == {2, 3, 4, 5, 6}


def test_padding_is_black_before_normalisation() -> None:
    images = np.full((50, 8, 8, 1), 255, np.uint8)
    prep = Preprocess((0.5,), (0.5,), "shift")
    assert set(augmented(images, prep, generator()).unique().tolist()) == {-1.0, 1.0}


def test_unknown_augmentation_is_named_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'mixup'.*none, crop-flip, shift"):
        augmented(random_images(1, 8, 8, 1), plain("mixup"), generator())


def test_mean_of_another_channel_count_is_refused() -> None:
    with pytest.raises(InputError, match=r"found 3 means .* expected 1 of each"):
        to_input(random_images(1, 8, 8, 1), plain("none", 3))
