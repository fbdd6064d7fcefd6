"""What a device answers is compared only where it is an answer of the same kind; else the device failed, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from edge_compress.devices.board import Board
from edge_compress.devices.opening import open_board
from edge_compress.pipeline.errors import DeviceError
from edge_compress.pipeline.options import Precision
from edge_compress.pipeline.types import Artifact, FileRef
from edge_compress.pipeline.verify.device_answers import on_device
from edge_compress.targets.x86 import X86

HERE = np.zeros((4, 3), np.float32)
ARTIFACT = Artifact("x86", FileRef("model.onnx", "0", 1), "onnx", Precision.FP32, "input", (1, 8))


class OfBoard(X86):
    """Answers here as they are, and there whatever a board sends."""

    @contextmanager
    def runner(self, file: Path, threads: int = 1) -> Iterator[Any]:
        yield lambda inputs: HERE

    @contextmanager
    def runner_through(self, file: Path, ask: Any) -> Iterator[Any]:
        yield ask


class Samples:
    """Four of them."""

    def __len__(self) -> int:
        return 4

    def batch(self, positions: Any) -> Any:
        return SimpleNamespace(artifact_inputs=lambda _: HERE)


@pytest.mark.parametrize(
    "answer",
    [
        lambda _: (HERE, HERE),
        lambda _: np.zeros((4, 5), np.float32),
        lambda _: np.zeros((3, 3), np.float32),
        lambda _: {}["output"],
    ],
    ids=["too many", "of another width", "of too few samples", "without an output"],
)
def test_answers_that_are_not_the_artifacts_outputs_are_the_boards_failure(
    answer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = SimpleNamespace(
        name="bench",
        kind=lambda: "measured",
        load=lambda *_: SimpleNamespace(run=answer, package="onnxruntime", version="1"),
    )

    @contextmanager
    def connect() -> Iterator[Any]:
        yield agent

    board = open_board(Board("bench", ("x86",), "ssh", address="first"))
    monkeypatch.setattr(board, "connect", connect)

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        yield

    run: Any = SimpleNamespace(
        board=board,
        config=SimpleNamespace(threads=1, device="bench"),
        folder=SimpleNamespace(path=tmp_path, stage=lambda *_: SimpleNamespace(once=lambda cls, make: make())),
        loaded=SimpleNamespace(data=SimpleNamespace(test=Samples())),
        stage=stage,
    )
    with pytest.raises(DeviceError, match="the answers of bench") as caught:
        on_device(run, SimpleNamespace(key="0"), OfBoard(), ARTIFACT)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
