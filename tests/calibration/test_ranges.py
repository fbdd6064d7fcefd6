import numpy as np
import onnx
import pytest
from edge_compress.calibration.ranges import METHODS, Histogram, collect, entropy, min_max, percentile, ranges
from edge_compress.pipeline.errors import BuildError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper


def histogram(values, bins=2048):
    counts, edges = np.histogram(values, bins)
    return Histogram(float(edges[0]), float(edges[-1]), counts.astype(np.int64))


def network():
    """x -> 2x -> relu -> out, 2 x 2 images."""
    nodes = [helper.make_node("Mul", ["input", "two"], ["double"]), helper.make_node("Relu", ["double"], ["out"])]
    io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 2, 2]) for name in ("input", "out")]
    graph = helper.make_graph(nodes, "g", io[:1], io[1:], [numpy_helper.from_array(np.array(2, np.float32), "two")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def inputs(n=50):
    return np.random.default_rng(0).standard_normal((n, 1, 2, 2), dtype=np.float32)


def test_collected_counts_are_those_of_the_tensors():
    images = inputs()
    seen = collect(network(), [images])
    out = np.maximum(2 * images, 0)
    assert min_max(seen["input"]) == (float(images.min()), float(images.max()))
    assert min_max(seen["out"]) == (0.0, float(out.max()))
    assert seen["out"].counts.sum() == images.size
    assert seen["out"].counts[0] >= (out == 0).sum() > 0
    expected, _ = np.histogram(images, 2048, (images.min(), images.max()))
    assert np.abs(np.cumsum(seen["input"].counts) - np.cumsum(expected)).max() <= 2  # float32 bins at their borders


def test_what_only_a_relu_reads_has_the_range_of_the_relu():
    assert min_max(collect(network(), [inputs()])["double"])[0] == 0.0


def test_what_is_an_output_beside_feeding_a_relu_keeps_its_own_range():
    model = network()
    model.graph.output.append(helper.make_tensor_value_info("double", TensorProto.FLOAT, [1, 1, 2, 2]))
    images = inputs()
    seen = collect(model, [images])
    assert min_max(seen["double"]) == (float(2 * images.min()), float(2 * images.max()))


@pytest.mark.parametrize(("bounds", "cut"), [((0.5, 3.0), False), ((-3.0, -0.5), False), ((0.0, 0.5), True), ((-0.5, 0.5), True)])
def test_what_a_clip_reads_has_the_range_of_the_clip_only_where_that_holds_zero(bounds, cut):
    model = network()
    node = model.graph.node[1]
    node.op_type = "Clip"
    for name, value in zip(("low", "high"), bounds, strict=True):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
        node.input.append(name)
    images = inputs()
    seen = collect(model, [images])
    expected = bounds if cut else (float(2 * images.min()), float(2 * images.max()))
    assert min_max(seen["double"]) == pytest.approx(expected)


def test_how_inputs_are_batched_changes_nothing_and_the_model_is_left_alone():
    model, images = network(), inputs()
    before = model.SerializeToString()
    one, many = collect(model, [images]), collect(model, [images[:7], images[7:31], images[31:]])
    assert all(np.array_equal(one[name].counts, many[name].counts) for name in one)
    assert model.SerializeToString() == before
    onnx.checker.check_model(model)


def test_values_without_a_range_are_refused():
    images = inputs(3)
    images[1, 0, 0, 0] = np.nan
    with pytest.raises(BuildError, match="no finite range for input"):
        collect(network(), [images])
    with pytest.raises(BuildError, match="0 inputs"):
        collect(network(), [])


@given(
    seed=st.integers(0, 10_000),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-3, 3),
    method=st.sampled_from(sorted(METHODS)),
)
@settings(deadline=None, max_examples=60)
def test_every_method_gives_a_range_within_what_was_seen_that_holds_zero(seed, scale, shift, method):
    values = scale * (np.random.default_rng(seed).standard_normal(3000) + shift)
    low, high = METHODS[method](histogram(values))
    assert min(values.min(), 0) - 1e-6 * scale <= low <= 0 <= high <= max(values.max(), 0) + 1e-6 * scale
    assert high > low


@given(seed=st.integers(0, 10_000), percent=st.floats(90, 99.999))
@settings(deadline=None, max_examples=60)
def test_a_percentile_keeps_its_share_and_no_bin_more(seed, percent):
    values = np.random.default_rng(seed).standard_normal(20_000)
    seen = histogram(values)
    low, high = percentile(seen, percent)
    width = (seen.highest - seen.lowest) / len(seen.counts)
    assert ((values >= low) & (values <= high)).mean() >= percent / 100 - 1e-3
    tail = (100 - percent) / 200
    assert low >= np.quantile(values, tail, method="lower") - 2 * width - 1e-9
    assert high <= np.quantile(values, 1 - tail, method="higher") + 2 * width + 1e-9


def test_entropy_cuts_off_a_far_value_and_keeps_an_even_spread():
    rng = np.random.default_rng(0)
    lonely = np.append(np.abs(rng.standard_normal(100_000)), 60.0)
    assert 3.0 < entropy(histogram(lonely))[1] < 20.0
    assert entropy(histogram(rng.uniform(0, 1, 100_000)))[1] > 0.95
    low, high = entropy(histogram(np.append(rng.standard_normal(100_000), 60.0)))
    assert -6.0 < low < -3.0  # never wider than what was seen
    assert 3.0 < high < 30.0


def test_a_tensor_that_is_always_the_same_has_a_range():
    for value in (0.0, 3.0):
        seen = Histogram(value, value, np.array([5] + [0] * 2047))
        for method in METHODS.values():
            low, high = method(seen)
            assert low == 0.0
            assert high == pytest.approx(value)


def test_ranges_are_given_for_every_tensor_and_an_unknown_method_is_an_error():
    seen = collect(network(), [inputs()])
    assert set(ranges(seen, "entropy")) == {"input", "double", "out"}
    with pytest.raises(KeyError):
        ranges(seen, "guess")


@pytest.mark.parametrize("mask", [-np.inf, np.finfo(np.float32).min, -1e9, -1e4])
@pytest.mark.parametrize("method", METHODS)
def test_masks_are_not_counted_and_saturate_well_below_all_scores(mask, method):
    scores = np.random.default_rng(0).standard_normal((50, 1, 2, 2), dtype=np.float32)
    plain = ranges(collect(network(), [scores]), method)["input"]
    masked = scores.copy()
    masked[::5, 0, 0, 0] = mask
    seen = collect(network(), [masked])["input"]
    low, high = ranges({"input": seen}, method)["input"]
    assert seen.masked
    assert -20.0 < low <= plain[0] - 10.0
    assert 0.5 < high <= scores.max() + 1e-6


def test_a_mask_alone_is_far_below_scores_of_any_size():
    mask = np.zeros((4, 1, 2, 2), np.float32)
    mask[:, 0, 1] = np.finfo(np.float32).min
    low, high = ranges(collect(network(), [mask]), "min-max")["input"]
    assert (low, high) == (-512.0, 0.0)
    low, high = ranges(collect(network(), [np.full_like(mask, -1e9)]), "min-max")["input"]
    assert (low, high) == (-512.0, 0.0)


def test_large_values_of_both_signs_are_no_masks():
    samples = np.random.default_rng(0).uniform(-32_768, 32_767, (50, 1, 2, 2)).astype(np.float32)
    seen = collect(network(), [samples])["input"]
    assert not seen.masked
    assert ranges({"input": seen}, "min-max")["input"] == (float(samples.min()), float(samples.max()))
