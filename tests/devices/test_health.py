"""`devices check`: facts read from the board itself, and a noise floor that was really measured."""

import sys

import onnxruntime
import pytest
from edge_compress.devices import board as boards
from edge_compress.devices import health
from edge_compress.pipeline.errors import DeviceError, UnavailableError


@pytest.fixture
def bench(tmp_path):
    """Writes a board file whose transport is the stand-in for ssh."""

    def write(more: str = "") -> boards.Board:
        path = tmp_path / "bench.toml"
        path.write_text(f'targets = ["x86"]\ntransport = "ssh"\naddress = "board"\npython = "{sys.executable}"\n{more}')
        return boards.load(path)

    return write


def test_local_noise_floor_is_measured_in_fresh_processes():
    floor, (low, high), sessions = health.noise_floor(boards.load("local"))
    assert 0 <= floor < 0.5
    assert low <= 1 + floor
    assert high >= 1 - floor
    assert len(sessions) == 3
    assert all(len(s.baseline.wall_ns) >= 30 for s in sessions)
    assert "noise floor" in health.noise_line(floor, (low, high), sessions)


def test_facts_of_a_board_are_its_own(bench, standin):
    board = bench()
    found = health.describe(board)
    assert found.runtime == f"onnxruntime {onnxruntime.__version__}"
    text = "\n".join(health.lines(board, found))
    assert "yes, by ssh at board" in text
    assert f"onnxruntime {onnxruntime.__version__}" in text
    assert "emulated" not in text
    assert health.noise_floor(board)[0] < 0.5
    assert len(standin.calls("scp")) == 1


def test_a_board_that_is_down_or_cannot_measure_says_so(bench, standin):
    with pytest.raises(UnavailableError, match="tensorrt"):
        health.noise_floor(bench('runtime = "tensorrt"\n'))
    with pytest.raises(UnavailableError, match="emulated"):
        health.noise_floor(bench("emulated = true\n"))
    standin.tell(say="ssh: connect to host board port 22: No route to host", code=255)
    with pytest.raises(DeviceError, match="no route"):
        health.describe(bench())


def test_what_cannot_be_read_is_said(bench, standin):
    facts = health.describe(bench()).facts
    facts |= {"temperatures_c": {}, "clocks_mhz": {"cpu0": [600.0, 600.0, 1800.0]}, "runtimes": {}}
    found = health.Found(facts, None)
    text = "\n".join(health.lines(bench(), found))
    assert "heat        cannot be read" in text
    assert "cpu0 600 of 1800 MHz" in text
    assert "onnxruntime does not start (installed: none)" in text
