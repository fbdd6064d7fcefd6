"""An aarch64 user space behind sshd, under QEMU, as a real Arm board: its outputs count, its times never do."""

from collections.abc import Iterator

import numpy as np
import onnxruntime
import peers
import pytest
from edge_compress.devices.measure.timing import TimingSettings
from edge_compress.pipeline.errors import UnavailableError
from edge_compress.pipeline.types import Kind
from small_models import convolution, two_layers

pytestmark = [pytest.mark.devices, pytest.mark.slow]
QUICK = TimingSettings(sessions=1, min_pairs=3, max_pairs=3, max_seconds=10.0, warmup_seconds=0.1)


@pytest.fixture(scope="module")
def arm(tmp_path_factory) -> Iterator[peers.Sshd]:
    with peers.arm64_sshd(tmp_path_factory.mktemp("arm")) as found:
        yield found


@pytest.fixture
def board(arm):
    found = arm.device(name="pi")
    yield found
    found.close()


def test_it_is_an_arm_board_and_says_that_it_is_emulated(board):
    with board.connect() as agent:
        found = agent.hello()
        assert found["machine"]["machine"] == "aarch64"
        assert agent.kind() is Kind.EMULATED  # although the board's file does not say so


def test_outputs_of_onnx_runtime_for_arm_are_those_of_this_machine(board, tmp_path):
    model = two_layers(tmp_path / "m.onnx", 24)
    image = np.random.default_rng(1).standard_normal((1, 16, 24, 24)).astype(np.float32)
    here = onnxruntime.InferenceSession(model).run(None, {"x": image})[0]
    with board.connect() as agent:
        there = agent.load(model, "onnxruntime", 1).run({"x": image})["y"]
    np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-4 * np.abs(here).max())


def test_its_times_are_emulated_and_nothing_is_searched_with_them(board, tmp_path):
    model = convolution(tmp_path / "m.onnx", 8)
    assert board.measure(model, model, QUICK).kind is Kind.EMULATED
    with pytest.raises(UnavailableError, match="emulated board"):
        board.facts("onnxruntime", 1)


def test_the_runtime_of_phones_starts_there(board):
    with board.connect() as agent:
        package, version = agent.runtime("litert")
    assert package == "ai_edge_litert"
    assert version[0].isdigit()
