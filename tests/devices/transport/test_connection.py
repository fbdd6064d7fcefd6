"""What a board answers and what a model's file says of its inputs, checked before it is relied on."""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_compress.devices.agent.frames import MAGIC
from edge_compress.devices.local import HereTransport
from edge_compress.devices.transport.base import Stream
from edge_compress.devices.transport.connection import Connection, LoadedModel, _random_input, layer_rows
from edge_compress.pipeline.errors import BuildError, DeviceError, UnavailableError

ANSWERING = "import os, sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read()); sys.stdout.flush(); os.read(0, 1 << 16)"


class Answering(HereTransport):
    """A board whose agent gives one answer, whatever it is asked, and ends."""

    def __init__(self, answer: Path) -> None:
        super().__init__("board", str(answer.parent))
        self.answer = answer

    def open(self, argv: Sequence[str], deadline_s: float) -> Stream:
        return Stream(self, [sys.executable, "-c", ANSWERING, str(self.answer)], deadline_s)


@pytest.fixture
def answering(tmp_path: Path) -> Callable[..., Connection]:
    """Connects to a board that answers with a header (bytes, or what becomes JSON) and a payload."""

    def connected(header: Any, payload: bytes = b"", claimed: int | None = None) -> Connection:
        head = header if isinstance(header, bytes) else json.dumps(header).encode()
        frame = struct.pack(">II", len(head) if claimed is None else claimed, len(payload)) + head + payload
        (tmp_path / "answer").write_bytes(MAGIC + frame)
        return Connection(Answering(tmp_path / "answer"), "board")

    return connected


def test_an_answer_comes_through(answering: Callable[..., Connection]) -> None:
    agent = answering({"ok": True, "tensors": []}, b"more")
    assert agent.ask({"op": "run", "handle": 1, "tensors": []}, 20, "asking") == ({"ok": True, "tensors": []}, b"more")
    agent.close()


def test_data_with_an_answer_that_has_none_are_not_read(answering: Callable[..., Connection]) -> None:
    agent = answering({"ok": True, "has": True}, b"m")
    with pytest.raises(DeviceError, match="bytes that are no frame came"):
        agent.ask({"op": "has", "sha256": ""}, 20, "asking")
    agent.close()


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({}, "an invalid reply: it has no ok"),
        ({"ok": 1}, "an invalid reply: ok is of type int"),
        ({"ok": None, "has": True}, "an invalid reply: ok is missing"),
        ({"ok": True}, "an invalid reply: it has no has"),
        ({"ok": True, "has": math.nan}, "an invalid reply: has is of type float"),
        ({"ok": True, "has": "\x1b[2J"}, "an invalid reply: has is of type str"),
        ({"ok": False}, "an invalid reply: it has no kind"),
        ({"ok": False, "kind": [], "error": ""}, "an invalid reply: kind is of type list"),
        ([{"ok": True, "has": True}], "bytes that are no frame came"),
        (None, "bytes that are no frame came"),
        (b"", "bytes that are no frame came"),
        (b"has: yes", "bytes that are no frame came"),
        (b"\xff\xfe", "bytes that are no frame came"),
        (b"[" * 100_000, "bytes that are no frame came"),
        (b'{"ok": true, "has": ' + b"9" * 5000 + b"}", "bytes that are no frame came"),
    ],
    ids=range(15),
)
def test_an_answer_that_is_none_is_the_boards_failure_in_one_line(
    header: Any, told: str, answering: Callable[..., Connection]
) -> None:
    agent = answering(header)
    with pytest.raises(DeviceError, match=r"^board board: sending m\b") as raised:
        agent.ask({"op": "has", "sha256": ""}, 20, "sending m")
    assert told in str(raised.value)
    assert str(raised.value).isprintable()
    assert raised.value.exit_code == 4
    assert agent.stream.process.poll() is not None  # the next answer could be that of another request
    agent.close()


def test_an_answer_of_gigabytes_is_given_up_before_it_is_read(answering: Callable[..., Connection]) -> None:
    agent = answering(b"{}", claimed=0xFFFFFFFF)
    with pytest.raises(DeviceError, match="bytes that are no frame came"):
        agent.hello()
    agent.close()


LOADED = {"handle": 1, "pid": 1, "package": "", "version": "", "inputs": []}


@pytest.mark.parametrize(
    ("heads", "payload", "told"),
    [
        ([{"name": "y", "dtype": "float32", "shape": [1, 2]}], bytes(9), "9 bytes, expected 8 bytes"),
        ([{"name": "y", "dtype": "float32", "shape": [1, 2]}], bytes(4), "4 bytes, expected 8 bytes"),
        ([{"name": "y", "dtype": "float32", "shape": [1 << 40, 1 << 20]}], bytes(8), "8 bytes, expected 4611686018427387904"),
        ([{"name": "y", "dtype": "float32", "shape": [0, 1 << 62, 1 << 62]}], b"", "expected arrays"),
        ([{"name": "y", "dtype": "float32", "shape": [-1, -2]}], bytes(8), r"an invalid reply: shape\[0\] is -1"),
        ([{"name": "y", "dtype": "object", "shape": [1]}], bytes(8), "expected numbers"),
        ([{"name": "y", "dtype": "no such type", "shape": [1]}], bytes(8), "expected numbers"),
        ([{"name": "y", "dtype": "V0", "shape": [3]}], b"", "expected"),
        ([{"name": "y", "dtype": "U2", "shape": [1]}], bytes(8), "y of type U2, expected numbers"),
        ([{"name": "y", "dtype": "(,)f4", "shape": [1]}], bytes(4), r"y of type \(,\)f4, expected numbers"),
        ([{"name": "y", "dtype": "float32", "shape": [1] * 65}], bytes(4), "expected arrays"),
        ([{"name": "y", "dtype": "f4,f4", "shape": [1]}], bytes(8), "expected numbers"),
        ([{"name": "y", "dtype": "datetime64[s]", "shape": [1]}], bytes(8), "expected numbers"),
    ],
    ids=str,
)
def test_outputs_that_are_no_numbers_of_their_shape_are_the_boards_failure(
    heads: list[dict[str, Any]], payload: bytes, told: str, answering: Callable[..., Connection]
) -> None:
    agent = answering({"ok": True, "tensors": heads}, payload)
    with pytest.raises(DeviceError, match=told) as raised:
        LoadedModel(agent, "m", LOADED).run({"x": np.zeros((1, 2), np.float32)})
    assert str(raised.value).isprintable()
    agent.stream.close()


def test_outputs_that_are_numbers_of_their_shape_are_taken(answering: Callable[..., Connection]) -> None:
    agent = answering({"ok": True, "tensors": [{"name": "y", "dtype": "float32", "shape": [1, 2]}]}, bytes(8))
    found = LoadedModel(agent, "m", LOADED).run({})
    assert (found["y"].dtype, found["y"].tolist()) == (np.float32, [[0.0, 0.0]])
    agent.stream.close()


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
