from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from edge_compress.pipeline.codec import from_json, to_json
from edge_compress.pipeline.data.preprocess import to_input
from edge_compress.pipeline.data.splits import ArraySource, Split
from edge_compress.pipeline.signature import TOP1, Metric
from edge_compress.pipeline.task import samples as samples_module
from edge_compress.pipeline.task.classification import Classification, RightOnes
from edge_compress.pipeline.task.samples import Batch, ImageSamples
from edge_compress.pipeline.task.task import agreement, artifact_predictor, batches_of, judged, score_on
from edge_compress.pipeline.types import Accuracy, Kind, Percentiles, Preprocess, Speedup, Timing
from edge_compress.pipeline.verify import gates
from edge_compress.pipeline.verify.gates import Allowed, unpacked
from edge_compress.pipeline.verify.statistics import paired_ci95
from hypothesis import given, settings
from hypothesis import strategies as st


def saying(classes: list[int], count: int = 3) -> np.ndarray:
    """Logits whose largest is at the given class."""
    logits = np.zeros((len(classes), count), np.float32)
    logits[np.arange(len(classes)), classes] = 2.5
    return logits


def compare(artifact, pruned, dense, labels, kind=Kind.MEASURED):
    """What the gates make of logits."""
    batch = Batch(None, torch.from_numpy(labels))
    own, before = RightOnes(), RightOnes()
    own.update((torch.from_numpy(artifact),), batch)
    before.update((torch.from_numpy(dense),), batch)
    agreed = float(agreement((torch.from_numpy(artifact),), (torch.from_numpy(pruned),)).mean())
    return gates.compare(TOP1, own, before, agreed, len(labels), kind)


# ------------------------------------------------------------------------------------------------ compare


def test_accuracy_by_hand():
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    dense = saying([0, 1, 2, 0, 1, 2, 1, 2])  # 6 of 8
    pruned = saying([0, 1, 2, 0, 1, 1, 0, 0])
    artifact = saying([0, 1, 2, 0, 0, 1, 0, 0])  # 5 of 8: two lost, one won
    found = compare(artifact, pruned, dense, labels)
    assert (found.value, found.dense_value, found.drop) == (62.5, 75.0, 12.5)
    assert found.agreement == 7 / 8
    assert (found.samples, found.kind) == (8, Kind.MEASURED)
    assert found.drop_ci95 == paired_ci95(2, 1, 8)
    assert unpacked(found).tolist() == [True, True, True, True, False, False, True, False]
    assert compare(artifact, pruned, dense, labels, Kind.EMULATED).kind is Kind.EMULATED


@given(st.integers(1, 60), st.integers(0, 2**31), st.floats(0, 1))
@settings(deadline=None)
def test_accuracy_is_that_of_the_paired_outcomes(n, seed, wrong):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    dense, pruned, artifact = (saying(list(np.where(rng.random(n) < wrong, rng.integers(0, 3, n), labels))) for _ in range(3))
    found = compare(artifact, pruned, dense, labels)
    before, after = dense.argmax(1) == labels, artifact.argmax(1) == labels
    assert found.value == pytest.approx(100 * after.mean())
    assert found.drop == pytest.approx(100 * (before.mean() - after.mean()))
    assert found.agreement == pytest.approx((artifact.argmax(1) == pruned.argmax(1)).mean())
    low, high = found.drop_ci95
    assert low - 1e-9 <= found.drop <= high + 1e-9
    assert unpacked(found).tolist() == after.tolist()
    assert from_json(Accuracy, to_json(found)) == found


def test_four_images_that_stay_correct_do_not_show_that_nothing_is_lost():
    labels = np.array([0, 1, 2, 1])
    same = saying([0, 2, 2, 1])
    found = compare(same, same, same, labels)
    assert (found.drop, found.agreement) == (0.0, 1.0)
    low, high = found.drop_ci95
    assert low == -high
    assert 30 < high < 60  # a loss of a third of all images could easily go unnoticed on four


def test_marks_that_do_not_fit_the_accuracy_are_refused_and_none_are_none():
    found = compare(saying([0, 1, 1]), saying([0, 1, 2]), saying([0, 1, 2]), np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="2 of 3 images are marked as correct"):
        unpacked(replace(found, value=100.0))
    with pytest.raises(ValueError, match="8 bits for 30 images"):
        unpacked(replace(found, samples=30))
    assert unpacked(replace(found, correct="")) is None


class Wrongs(RightOnes):
    """100 for each image that is classified wrongly: of two networks the one with the lower value is better."""

    def value(self):
        return 100.0 - super().value()

    def per_sample(self):
        return 100.0 - super().per_sample()


def test_an_error_rate_that_rises_has_its_drop_in_its_interval_and_the_right_images_marked():
    labels = np.arange(200) % 3
    right = saying(list(labels))
    worse = saying([(label + (i < 20)) % 3 for i, label in enumerate(labels)])
    batch = Batch(None, torch.from_numpy(labels))
    own, before = Wrongs(), Wrongs()
    own.update((torch.from_numpy(worse),), batch)
    before.update((torch.from_numpy(right),), batch)
    errors = Metric("error rate", "%", higher_is_better=False)
    found = gates.compare(errors, own, before, 0.9, 200, Kind.MEASURED)
    assert (found.value, found.drop) == (10.0, 10.0)
    assert found.drop_ci95 == paired_ci95(20, 0, 200)
    assert unpacked(found, errors).tolist() == [i >= 20 for i in range(200)]


def test_an_answer_that_is_no_number_is_wrong():
    labels = np.array([0, 1])
    broken = np.array([[np.nan, 0, 0], [0, 1, 0]], np.float32)
    found = compare(broken, saying([0, 1]), saying([0, 1]), labels)
    assert (found.value, found.drop, found.agreement) == (50.0, 50.0, 0.5)
    assert found.drop_ci95[0] < 50.0 < found.drop_ci95[1]
    assert compare(broken, broken, saying([0, 1]), labels).agreement == 0.5  # no answer agrees with nothing


# ------------------------------------------------------------------------------------------------ judge

TIME = Percentiles(1.0, 1.1, 1.2)
FAST = Timing("local", Kind.MEASURED, TIME, TIME, Speedup(2.0, (1.8, 2.2)), 0.01, 5, 200, 1)
GOOD = Accuracy(91.0, 0.5, 0.99, 1000, Kind.MEASURED)


def speed(low: float, high: float) -> Timing:
    return replace(FAST, speedup=Speedup((low + high) / 2, (low, high)))


def judge(accuracy, latency, *, max_drop, min_speedup, max_size_bytes=None, size_bytes=0):
    return gates.judge(Allowed(TOP1, max_drop, min_speedup, max_size_bytes), accuracy, latency, size_bytes=size_bytes)


def test_all_gates_passed():
    verdict = judge(GOOD, FAST, max_drop=1.0, min_speedup=1.0)
    assert verdict.passed
    assert verdict.reasons == ()


@pytest.mark.parametrize("interval", [(1.0, 1.4), (0.97, 1.6), (0.5, 0.8), (math.nan, 2.0)])
@pytest.mark.parametrize("min_speedup", [0.0, 0.5, 1.0, 1.3])
def test_a_speedup_whose_interval_reaches_one_is_not_real_whatever_was_allowed(interval, min_speedup):
    verdict = judge(GOOD, speed(*interval), max_drop=1.0, min_speedup=min_speedup)
    assert not verdict.passed
    assert len(verdict.reasons) == 1
    assert "not real" in verdict.reasons[0]
    assert "reaches 1.0" in verdict.reasons[0]
    assert f"{interval[0]:.2f}" in verdict.reasons[0]


@given(
    low=st.floats(0.2, 4, allow_nan=False),
    width=st.floats(0, 2),
    drop=st.floats(-5, 5),
    max_drop=st.floats(0, 3),
    min_speedup=st.floats(0.5, 3),
)
def test_a_verdict_is_the_gates_and_nothing_else(low, width, drop, max_drop, min_speedup):
    accuracy = replace(GOOD, drop=drop)
    verdict = judge(accuracy, speed(low, low + width), max_drop=max_drop, min_speedup=min_speedup)
    failed = (drop > max_drop) + (low <= 1.0 + FAST.noise_floor or low < min_speedup)
    assert verdict.passed == (failed == 0)
    assert len(verdict.reasons) == failed
    assert all("\n" not in reason for reason in verdict.reasons)


def test_a_speedup_under_what_was_asked_for_names_both():
    verdict = judge(GOOD, speed(1.2, 1.4), max_drop=1.0, min_speedup=1.3)
    assert verdict.reasons == ("speedup: lower end 1.20 of the 95 % interval is below --min-speedup 1.3",)


def test_a_speedup_within_the_noise_floor_is_none():
    noisy = replace(speed(1.01, 1.03), noise_floor=0.05)
    verdict = judge(GOOD, noisy, max_drop=1.0, min_speedup=1.0)
    assert not verdict.passed
    (reason,) = verdict.reasons
    assert "none that can be told from noise" in reason
    assert "[1.01, 1.03]" in reason
    assert "0.050" in reason
    assert judge(GOOD, replace(noisy, noise_floor=0.005), max_drop=1.0, min_speedup=1.0).passed
    assert judge(GOOD, replace(speed(1.06, 1.08), noise_floor=0.05), max_drop=1.0, min_speedup=1.0).passed


@pytest.mark.parametrize(("drop", "passed"), [(1.0, True), (1.001, False), (-3.0, True), (math.nan, False)])
def test_the_drop_may_reach_its_gate_and_not_pass_it(drop, passed):
    verdict = judge(replace(GOOD, drop=drop), FAST, max_drop=1.0, min_speedup=1.0)
    assert verdict.passed is passed
    assert passed or verdict.reasons[0].startswith("accuracy: top-1 fell by")


@pytest.mark.parametrize("kind", [Kind.EMULATED, Kind.ESTIMATED, Kind.NONE])
def test_a_latency_that_was_not_measured_passes_no_gate(kind):
    verdict = judge(GOOD, replace(FAST, kind=kind), max_drop=1.0, min_speedup=1.0)
    assert not verdict.passed
    assert str(kind) in verdict.reasons[0]


def test_every_failed_gate_is_named():
    verdict = judge(replace(GOOD, drop=2.0), speed(0.9, 1.1), max_drop=1.0, min_speedup=1.0)
    assert [reason.split(":")[0] for reason in verdict.reasons] == ["accuracy", "speedup"]


# ------------------------------------------------------------------------------------------------ the artifact's answers


class Runtime:
    """A target whose artifact answers the mean of each third of an image."""

    takes_pixels = False

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.open = 0

    @contextmanager
    def runner(self, path: Path, threads: int = 1):
        self.open += 1
        yield self.run
        self.open -= 1

    def run(self, inputs: np.ndarray) -> np.ndarray:
        assert self.open == 1
        self.batches.append(len(inputs))
        return inputs.reshape(len(inputs), 3, -1).mean(2)


def test_every_image_of_the_split_is_answered_in_order():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (23, 6, 4, 1), dtype=np.uint8)
    split = Split(ArraySource(pixels, np.zeros(23, np.int64)), rng.permutation(23)[:17])
    prep = Preprocess((0.3,), (0.5,), "shift")
    expected = to_input(pixels[split.indices], prep).numpy().reshape(17, 3, -1).mean(2)  # plain, whatever training varied
    target = Runtime()
    target.open, predict = 1, artifact_predictor(target, target.run)
    answered = [predict(batch)[0].numpy() for batch in batches_of(ImageSamples(split, prep), 5)]
    np.testing.assert_allclose(np.concatenate(answered), expected, rtol=1e-6)
    assert target.batches == [5, 5, 5, 2]


def test_a_file_over_its_size_fails_and_one_at_it_passes():
    limits = {"max_drop": 1.0, "min_speedup": 1.0, "max_size_bytes": 98_496}
    verdict = judge(GOOD, FAST, **limits, size_bytes=98_497)
    assert not verdict.passed
    assert verdict.reasons == ("size: the file takes 98,497 bytes, at most 98,496 allowed",)
    assert judge(GOOD, FAST, **limits, size_bytes=98_496).passed


class Disk:
    """Images that are counted when they are read."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels, self.labels, self.read_count = pixels, np.zeros(len(pixels), np.int64), 0

    def read(self, indices: np.ndarray) -> np.ndarray:
        self.read_count += len(indices)
        return self.pixels[indices]


@pytest.mark.parametrize(("fits", "expected"), [(True, 1 + 17), (False, 1 + 17 * 3)])
def test_recipes_are_scored_on_images_that_were_read_once(monkeypatch, fits, expected):
    """One image is read to know what all of them take; what does not fit into memory is read for every recipe."""
    disk = Disk(np.random.default_rng(0).integers(0, 256, (23, 6, 4, 1), dtype=np.uint8))
    split = Split(disk, np.random.default_rng(1).permutation(23)[:17])
    target, prep = Runtime(), Preprocess((0.3,), (0.5,), "shift")
    target.open = 1
    monkeypatch.setattr(samples_module, "HELD_BYTES", 17 * 24 if fits else 17 * 24 - 1)
    score = score_on(Classification(), target, ImageSamples(split, prep), torch.nn.Identity())
    whole = to_input(disk.pixels[split.indices], prep).numpy()
    right = 100 * float((whole.reshape(17, 3, -1).mean(2).argmax(1) == 0).mean())
    assert [score(target.run) for _ in range(3)] == [pytest.approx(right)] * 3
    assert disk.read_count == expected


def test_artifacts_that_take_pixels_get_the_stored_ones():
    """No way through network inputs and back, which rounds."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)
    split = Split(ArraySource(pixels, np.zeros(5, np.int64)), np.arange(5))
    target, seen = Runtime(), []
    target.takes_pixels = True

    def predict(images):
        seen.append(images)
        return np.zeros((len(images), 2), np.float32)

    samples = ImageSamples(split, Preprocess((0.3,) * 3, (0.5,) * 3, "none"))
    judged(Classification(), samples, artifact_predictor(target, predict))
    assert seen[0].dtype == np.uint8
    assert np.array_equal(np.concatenate(seen), pixels)
