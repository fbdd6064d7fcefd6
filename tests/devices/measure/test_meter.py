"""A search's quick ratios: what goes wrong while a candidate is timed arrives as what it is."""

from __future__ import annotations

from contextlib import closing
from typing import Any, NoReturn

import numpy as np
import pytest
from edge_compress.devices.agent.frames import Gone
from edge_compress.devices.local import LocalDevice
from edge_compress.devices.measure import meter as quick
from edge_compress.devices.measure.meter import QuickMeter
from edge_compress.devices.transport.base import AgentEnded
from edge_compress.devices.transport.connection import Connection
from onnx import TensorProto, helper, numpy_helper


def scaling(factor: float) -> bytes:
    """A network of one multiplication."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8]) for name in "xy")
    weight = numpy_helper.from_array(np.array([factor], np.float32), "w")
    graph = helper.make_graph([helper.make_node("Mul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    return bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString())


@pytest.mark.parametrize(("cause", "told"), [(KeyboardInterrupt, KeyboardInterrupt), (Gone, AgentEnded)])
def test_an_interrupt_or_a_lost_board_during_a_candidate_stays_what_it_is(
    monkeypatch: pytest.MonkeyPatch, cause: type[BaseException], told: type[BaseException]
) -> None:
    def broken_off(agent: Connection, *_: Any) -> None:
        def fail(*_: Any, **__: Any) -> NoReturn:
            raise cause

        monkeypatch.setattr(agent.stream._channel, "receive", fail)
        agent.ask({"op": "ping"}, 5.0, "timing")

    meter = LocalDevice().meter(scaling(2.0), "onnxruntime", 1, 0)
    assert isinstance(meter, QuickMeter)
    assert meter.dense_ms > 0
    monkeypatch.setattr(quick, "measured", broken_off)
    with closing(meter), pytest.raises(told):
        meter.ratio(scaling(float(np.random.default_rng().random())))  # new to the machine: it is removed afterwards
    assert meter._agent is None
