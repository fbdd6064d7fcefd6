"""What a board or a model's file says of layers and inputs, checked before it is relied on."""

from __future__ import annotations

import math

import pytest
from edge_compress.devices.transport.connection import _random_input, layer_rows
from edge_compress.pipeline.errors import BuildError, DeviceError, UnavailableError


@pytest.mark.parametrize("ns", [math.nan, math.inf, -1.0])
def test_a_layer_without_a_time_is_refused(ns: float) -> None:
    with pytest.raises(DeviceError, match=r"profiling m.*for conv"):
        layer_rows([("conv", "Conv", 5.0), ("conv", "Conv", ns)], "profiling m")


def test_layers_that_took_no_time_at_all_have_no_shares() -> None:
    with pytest.raises(UnavailableError, match="profiling m"):
        layer_rows([("conv", "Conv", 0.0)], "profiling m")


def test_names_of_layers_cannot_act_on_a_terminal() -> None:
    assert layer_rows([("\x1b[2J", "Conv\x07", 1)], "") == (("\\x1b[2J", "Conv\\x07", 1.0),)


@pytest.mark.parametrize("kind", ["tensor(float)", "tensor(uint8)", "tensor(int64)"])
def test_inputs_that_would_fill_the_memory_are_not_made_up(kind: str) -> None:
    entry = {"name": "x", "kind": kind, "shape": ["n", 1 << 20, 1 << 20]}
    with pytest.raises(BuildError, match="input x of 1099511627776 elements"):
        _random_input("m", entry, 0)
