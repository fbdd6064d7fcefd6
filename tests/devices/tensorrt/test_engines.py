"""What a board keeps of an engine may be damaged: it is built again."""

import sys

import pytest
from edge_compress.devices.access import open_board
from edge_compress.devices.board import Board
from edge_compress.devices.tensorrt.device import TensorRtDevice
from jetsons import onnx_file


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"eligible": []}', b'{"eligible": 5, "picked": []}', b"\xff", b"[" * 10_000]
)
def test_an_engine_whose_record_is_damaged_is_built_again(jetson, tmp_path, damage):
    board = Board("nano", ("jetson",), "ssh", runtime="tensorrt", address="nano", python=sys.executable)
    device = open_board(board)
    assert isinstance(device, TensorRtDevice)
    path = onnx_file(tmp_path / "m.onnx", sparse=True)
    with device.engines() as engines:
        first = engines.engine(path)
        record = (jetson.standin.home / first.path).with_suffix(".json")
        whole = record.read_bytes()
        record.write_bytes(damage)
        assert engines.engine(path) == first
        assert record.read_bytes() == whole
    assert len(jetson.commands("--onnx=")) == 2
    device.close()
