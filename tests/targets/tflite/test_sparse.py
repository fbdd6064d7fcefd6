"""Sparse encoding: the same answers from fewer bytes, and what keeps XNNPACK from using it, by name."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from edge_compress.pipeline.data.splits import network_inputs
from edge_compress.pipeline.options import Precision
from edge_compress.pipeline.signature import image_signature
from edge_compress.pipeline.types import Preprocess, Speedup
from edge_compress.targets import phone
from edge_compress.targets.base import BuildRequest
from edge_compress.targets.tflite import file as tflite_file
from edge_compress.targets.tflite import sparse as tflite_sparse
from edge_compress.targets.tflite.run import predictor
from small_mobile import SHAPE, Mobile, converted, depthwise
from torch import nn

lacking = phone.TARGET.missing()
pytestmark = pytest.mark.skipif(lacking is not None, reason=f"phone: {lacking}")


@pytest.fixture(scope="module")
def plain() -> bytes:
    return converted(Mobile())


def test_the_sparse_file_is_smaller_and_answers_the_same(plain: bytes) -> None:
    data = tflite_sparse.encode(plain)
    images = np.random.default_rng(0).integers(0, 256, (4, *SHAPE[1:], 3)).astype(np.uint8)
    expected = predictor(plain)(images)
    assert np.abs(predictor(data)(images) - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.ptp(expected) > 0
    assert tflite_file.op_counts(data)["DENSIFY"] == 5
    pointwise_bytes = 4 * (16 * 48 + 48 * 16 + 16 * 48 + 48 * 24 + 24 * 320)
    assert len(plain) - len(data) > 0.4 * pointwise_bytes  # a fifth stays, with a byte or two for each place


def test_rows_are_stored_as_the_format_says(plain: bytes) -> None:
    """Read back by hand: segments count the nonzeros of each output channel, indices say which inputs they belong to."""
    dense, model = tflite_file.read(plain), tflite_file.read(tflite_sparse.encode(plain))
    graph = tflite_file.graph_of(model)
    weights = [
        tflite_file.constant(dense, tflite_file.graph_of(dense).tensors[op.inputs[1]])
        for op in tflite_file.graph_of(dense).operators
        if tflite_sparse._pointwise(dense, op) is not None
    ]
    stored = [graph.tensors[op.inputs[0]] for op in graph.operators if tflite_file.op_name(model, op) == "DENSIFY"]
    assert len(weights) == len(stored) == 5
    for weight, tensor in zip(weights, stored, strict=True):
        *outer, last = tensor.sparsity.dimMetadata
        assert [d.denseSize for d in outer] == list(weight.shape[:3])
        values = np.frombuffer(bytes(model.buffers[tensor.buffer].data), np.float32)
        segments, indices = np.array(last.arraySegments.values), np.array(last.arrayIndices.values)
        again = np.zeros((weight.shape[0], weight.shape[3]), np.float32)
        for row in range(len(segments) - 1):
            part = slice(segments[row], segments[row + 1])
            again[row, indices[part]] = values[part]
        assert np.array_equal(again, weight.reshape(again.shape))
    assert {type(t.sparsity.dimMetadata[-1].arrayIndices).__name__ for t in stored} == {"Uint8VectorT"}
    assert "Uint16VectorT" in {type(t.sparsity.dimMetadata[-1].arraySegments).__name__ for t in stored}


def test_the_classifier_is_kept_out_of_the_sparse_part(plain: bytes) -> None:
    model = tflite_file.read(tflite_sparse.encode(plain))
    graph = tflite_file.graph_of(model)
    names = [tflite_file.op_name(model, op) for op in graph.operators]
    assert names[-3:] == ["MEAN", "RESHAPE", "FULLY_CONNECTED"]
    assert [int(n) for n in graph.tensors[graph.operators[-3].outputs[0]].shape] == [1, 1, 1, 320]


def test_a_network_that_meets_every_condition_has_no_reason_to_be_dense(plain: bytes) -> None:
    assert tflite_sparse.why_dense(plain) == ""


@pytest.mark.parametrize(
    ("net", "zeros", "reason"),
    [
        (lambda: Mobile(), 0.6, r"6\d\.\d % of the 1x1 convolutions' weights are zero, more than 66\.7 % are needed"),
        (lambda: Mobile(stem=nn.Conv2d(3, 16, 7, 2, 3)), 0.8, "no 3x3 convolution of stride 2"),
        (lambda: Mobile(stem=nn.Conv2d(3, 16, 3, 1, 1)), 0.8, "no 3x3 convolution of stride 2"),
        (lambda: Mobile(inner=nn.Conv2d(48, 48, 3, 1, 1)), 0.8, r"CONV_2D \d+ is a convolution that is not 1x1"),
        (lambda: Mobile(inner=depthwise(48, 7)), 0.8, r"DEPTHWISE_CONV_2D \d+ is not a depthwise 3x3 or 5x5"),
        (lambda: Mobile(inner=depthwise(48, 3, 1, 2)), 0.8, r"DEPTHWISE_CONV_2D \d+ is not a depthwise 3x3 or 5x5"),
        (lambda: Mobile(inner=nn.MaxPool2d(3, 1, 1)), 0.8, r"the operator MAX_POOL_2D \d+ is not among those"),
    ],
)
def test_the_condition_that_fails_is_named(net, zeros: float, reason: str) -> None:
    found = tflite_sparse.why_dense(converted(net(), zeros))
    assert re.search(reason, found), found


def test_int8_networks_are_named_as_such(plain: bytes) -> None:
    from edge_compress.calibration.ranges import ranges
    from edge_compress.targets.tflite.int8 import collect, quantize

    images = np.random.default_rng(0).integers(0, 256, (2, *SHAPE[1:], 3)).astype(np.float32)
    assert "is not computed in float" in tflite_sparse.why_dense(quantize(plain, ranges(collect(plain, [images]), "min-max")))


def request(net: nn.Module, folder: Path) -> BuildRequest:
    mean = (0.5,) * 3
    return BuildRequest(
        net, b"", image_signature(SHAPE), ("a",) * 300, Precision.FP32, [], lambda predict: 0.0, folder, mean=mean, std=mean
    )


def test_sparse_weights_are_taken_only_where_they_were_measured_faster(plain: bytes, tmp_path: Path) -> None:
    for low, said in ((0.99, "no"), (1.4, "yes")):
        timed = []

        def speedup(dense: Path, sparse: Path, low=low, timed=timed) -> Speedup:
            timed.extend((dense.read_bytes(), sparse.read_bytes()))
            return Speedup(1.5, (low, 2.0))

        chosen = phone._sparse_if_faster(plain, replace(request(nn.Identity(), tmp_path), speedup=speedup))
        (note,) = chosen.notes
        assert chosen.options == {"sparse": said}
        assert timed == [plain, tflite_sparse.encode(plain)]
        assert chosen.network == timed[said == "yes"]
        assert f"1.50 times as fast as dense ones (95 % interval {low:.2f} to 2.00)" in note


def test_zeros_are_stored_where_no_device_tells_what_skipping_them_buys(plain: bytes, tmp_path: Path) -> None:
    chosen = phone._sparse_if_faster(plain, request(nn.Identity(), tmp_path))
    (note,) = chosen.notes
    assert (chosen.network == plain, chosen.options) == (True, {"sparse": "no"})
    assert "no device to measure on" in note


def test_a_condition_that_fails_is_in_the_notes_and_nothing_is_measured(tmp_path: Path) -> None:
    data = converted(Mobile(stem=nn.Conv2d(3, 16, 3, 1, 1)))
    asked = replace(request(nn.Identity(), tmp_path), speedup=lambda dense, sparse: pytest.fail("measured"))
    chosen = phone._sparse_if_faster(data, asked)
    (note,) = chosen.notes
    assert (chosen.network == data, chosen.options) == (True, {"sparse": "no"})
    assert "because no 3x3 convolution of stride 2" in note


def test_a_built_file_says_what_this_machine_measured_and_answers_as_the_network(tmp_path: Path) -> None:
    net = Mobile().eval()
    whole = tflite_sparse.half_zero(converted(net, zeros=0.0))
    asked = request(net, tmp_path)
    with torch.no_grad():
        net.last.weight.mul_(torch.rand(net.last.weight.shape) > 0.9)
    artifact = phone.TARGET.build(asked)
    assert (whole, artifact.options["sparse"]) == (False, "no")  # the last convolution holds most of the weights, not all
    images = np.random.default_rng(0).integers(0, 256, (3, *SHAPE[1:], 3)).astype(np.uint8)
    inputs = network_inputs(images, Preprocess(asked.mean, asked.std, "none"))
    with torch.no_grad(), phone.TARGET.runner(tmp_path / "model.tflite") as run:
        expected = net(torch.from_numpy(inputs)).numpy()
        assert np.abs(run(images) - expected).max() < 1e-4 * np.abs(expected).max()
