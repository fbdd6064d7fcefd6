from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from edge_compress.pipeline.data.preprocess import to_input
from edge_compress.pipeline.data.splits import ArraySource, Split
from edge_compress.pipeline.network.cost import cost_of
from edge_compress.pipeline.network.modes import borrowed
from edge_compress.pipeline.task.inference import logits, top1
from edge_compress.pipeline.types import ModelCost, Preprocess
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

PREP = Preprocess((0.5,), (0.25,), "crop-flip")


def _split(n: int = 23) -> Split:
    rng = np.random.default_rng(0)
    source = ArraySource(rng.integers(0, 256, (n + 5, 8, 8, 1), dtype=np.uint8), rng.integers(0, 3, n + 5))
    return Split(source, rng.permutation(n + 5)[:n])


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3))


def test_logits_are_of_plain_images_in_eval_mode_and_in_the_splits_order() -> None:
    net, split = _net().train(), _split()
    found = logits(net, split, PREP, batch=7)
    with torch.no_grad():
        expected = net.eval()(to_input(split.source.read(split.indices), PREP))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_logits_leave_the_module_as_it_was() -> None:
    net = _net().train()
    net[1].eval()  # a BatchNorm layer its owner froze
    before = {k: v.clone() for k, v in net.state_dict().items()}
    logits(net, _split(), PREP)
    assert [m.training for m in net] == [True, False, True, True, True]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(not p.is_inference() for p in net.parameters())


def test_modes_come_back_when_the_network_fails() -> None:
    net = _net().train()
    with pytest.raises(RuntimeError):
        logits(nn.Sequential(net, nn.Linear(99, 3)), _split(), PREP)
    assert all(m.training for m in net.modules())


def test_a_module_is_moved_to_the_device_and_back() -> None:
    class Recorder(nn.Linear):
        def to(self, *args: Any, **kwargs: Any) -> Recorder:
            moves.append(args)
            return self

    moves: list[Any] = []
    net = Recorder(2, 2)
    with borrowed(net, "meta"):
        assert moves == [("meta",)]
    assert moves == [("meta",), (torch.device("cpu"),)]
    with borrowed(net, "cpu"), borrowed(net):
        pass
    assert len(moves) == 2  # it was there


def test_logits_of_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="without images"):
        logits(_net(), _split().head(0), PREP)


def test_top1_is_percent_of_right_rows() -> None:
    values = np.array([[1, 2, 0], [3, 0, 0], [0, 0, 5], [9, 0, 0]], np.float32)
    assert top1(values, np.array([1, 0, 2, 1])) == 75.0


def test_top1_counts_a_row_with_nan_as_wrong() -> None:
    values = np.array([[np.nan, 0, 0], [0, np.nan, 9], [0, 1, 0]], np.float32)
    assert top1(values, np.array([0, 1, 1])) == pytest.approx(100 / 3)


@pytest.mark.parametrize("count", [0, 2])
def test_top1_refuses_labels_that_do_not_fit(count: int) -> None:
    with pytest.raises(ValueError, match="labels"):
        top1(np.zeros((count, 3), np.float32), np.zeros(count // 2, np.int64))


def test_cost_of_a_known_network() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),  # 8*8 * 16*3*9
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16),  # 4*4 * 16*1*9
        nn.Conv2d(16, 32, 1, groups=2),  # 4*4 * 32*8
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),  # 320
    ).train()
    params = 3 * 16 * 9 + 32 + (16 * 9 + 16) + (32 * 8 + 32) + 330
    assert cost_of(net, torch.zeros(1, 3, 8, 8)) == ModelCost(params, 64 * 16 * 27 + 16 * 16 * 9 + 16 * 32 * 8 + 320)
    assert net.training
    assert int(net[1].num_batches_tracked) == 0  # type: ignore[arg-type]
    assert not any(m._forward_hooks for m in net.modules())


def test_cost_of_a_traced_network_is_the_same() -> None:
    net = _net()
    assert cost_of(fx.symbolic_trace(net), torch.zeros(1, 1, 8, 8)) == cost_of(net, torch.zeros(1, 1, 8, 8))


def test_a_layer_called_twice_computes_twice_and_is_stored_once() -> None:
    layer = nn.Conv2d(2, 2, 1)
    assert cost_of(nn.Sequential(layer, layer), torch.zeros(1, 2, 5, 5)) == ModelCost(6, 2 * 25 * 4)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 3]), st.integers(1, 2), st.integers(1, 3), st.integers(4, 9))
def test_macs_are_the_multiplications_of_the_unfolded_product(
    inputs: int, outputs: int, kernel: int, stride: int, groups: int, size: int
) -> None:
    layer = nn.Conv2d(inputs * groups, outputs * groups, kernel, stride, groups=groups)
    columns = nn.functional.unfold(torch.zeros(1, inputs * groups, size, size), kernel, stride=stride)
    macs = groups * outputs * (columns.shape[1] // groups) * columns.shape[2]  # rows x inner x columns of each group's product
    assert cost_of(layer, torch.zeros(1, inputs * groups, size, size)).macs == macs
