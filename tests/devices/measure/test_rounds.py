"""What a board says of times is checked before it counts: it comes from outside."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from edge_compress.devices.measure.rounds import measured
from edge_compress.devices.measure.timing import TimingSettings
from edge_compress.pipeline.errors import DeviceError


class Board:
    """Answers with the same times, but for one field."""

    name = "board"

    def __init__(self, field: str = "", value: Any = None) -> None:
        self.field, self.value = field, value

    def ask(self, request: dict[str, Any], *_: Any) -> tuple[dict[str, Any], None]:
        if request["op"] == "warm":
            answer: dict[str, Any] = {"k": [1, 1], "seconds": 0.1}
        else:
            rounds = request["rounds"]
            times = [[2e6] * rounds, [1e6] * rounds]
            answer = {"wall_ns": times, "cpu_ns": times, "seconds": 0.1, "temperatures_c": [], "frequencies_mhz": []}
            answer["peak_rss_bytes"] = 1
        place, _, field = self.field.partition(".")
        return (answer | {field: self.value} if place == request["op"] else answer), None

    def hello(self) -> dict[str, Any]:
        return {"power_mode": "", "boot_id": "1", "machine": {}}


def session(board: Board) -> Any:
    models = [SimpleNamespace(name=name, handle=i, version="1") for i, name in enumerate(("dense", "artifact"))]
    return measured(board, models, TimingSettings(min_pairs=10, max_pairs=10), 0)  # type: ignore[arg-type]


def test_times_that_can_be_are_taken() -> None:
    assert len(session(Board()).baseline.wall_ns) == 10


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e9, "soon", None, [[1.0], "x"]], ids=str)
@pytest.mark.parametrize("field", ["warm.seconds", "warm.k", "pairs.seconds", "pairs.wall_ns", "pairs.cpu_ns"])
def test_times_that_cannot_be_are_the_boards_fault(field: str, bad: Any) -> None:
    value = [[bad] * 10, [bad] * 10] if field in ("pairs.wall_ns", "pairs.cpu_ns") and not isinstance(bad, list) else bad
    with pytest.raises(DeviceError, match=rf"board: .*{field.partition('.')[2]}.*expected numbers"):
        session(Board(field, value))


def test_an_inference_in_no_time_is_refused() -> None:
    with pytest.raises(DeviceError, match=r"wall_ns.*above 0"):
        session(Board("pairs.wall_ns", [[0.0] * 10, [1.0] * 10]))


@pytest.mark.parametrize(("field", "claimed"), [("warm.seconds", 6e7), ("pairs.seconds", 6e7), ("warm.k", [1, 63_602_688])])
def test_a_board_cannot_claim_more_time_or_inferences_than_a_session_may_take(field: str, claimed: Any) -> None:
    with pytest.raises(DeviceError, match=rf"{field.partition('.')[2]}.*at most"):
        session(Board(field, claimed))
