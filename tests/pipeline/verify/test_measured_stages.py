"""What was measured on a board is measured again once the board's file says something else under the same name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from edge_compress import targets
from edge_compress.devices.board import Board
from edge_compress.devices.opening import open_board
from edge_compress.devices.remote import RemoteDevice
from edge_compress.pipeline.build import dense_baseline
from edge_compress.pipeline.options import Precision
from edge_compress.pipeline.pattern import searching
from edge_compress.pipeline.profile import in_run
from edge_compress.pipeline.types import Artifact, FileRef
from edge_compress.pipeline.verify import artifact as artifacts
from edge_compress.pipeline.verify import device_answers, unpruned
from edge_compress.pipeline.verify.engine.steps import EngineWork

PI = Board("pi", ("x86",), "ssh", address="first")
NANO = Board("nano", ("jetson",), "ssh", runtime="tensorrt", address="first")
X86 = targets.load("x86")
FILE = FileRef("artifacts/x86/model.onnx", "0", 1)
ARTIFACT = Artifact("x86", FILE, "onnx", Precision.INT8, "input", (1, 3, 8, 8), baseline=FILE)
SOME: Any = SimpleNamespace(key="0", file=FILE, form=SimpleNamespace(form=""), limits=None)


class Asked(Exception):
    """A stage was asked for."""


class Folder:
    """Keeps the settings of the stage it waits for, and ends the work there."""

    def __init__(self, awaited: str) -> None:
        self.awaited, self.path = awaited, Path()

    def stage(self, name: str, version: str, settings: Any, inputs: Any = ()) -> Any:
        if name == self.awaited:
            raise Asked(settings)
        return SimpleNamespace(key="0", result=lambda cls: None)


def answer_stage(run: Any, device: RemoteDevice) -> None:
    device_answers.on_device(run, SOME, X86, ARTIFACT)


def timing_stage(run: Any, device: RemoteDevice) -> None:
    artifacts.verified(run, SOME, X86, ARTIFACT, SOME, SOME)


def engine_stage(run: Any, device: Any) -> None:
    assert EngineWork(run, SOME, targets.load("jetson"), ARTIFACT, device).is_done


def usage_stage(run: Any, device: RemoteDevice) -> None:
    in_run.usage_of(run, SOME, X86, SimpleNamespace(artifact=ARTIFACT, latency=SOME))


def compared_stage(run: Any, device: RemoteDevice) -> None:
    unpruned.unpruned_of(run, "0", SOME, X86, SOME, SOME, SimpleNamespace(artifact=ARTIFACT, accuracy=SOME))


def baseline_stage(run: Any, device: RemoteDevice) -> None:
    dense_baseline.dense_baseline(run, "0", X86, SOME, device)


def candidates_stage(run: Any, device: RemoteDevice) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searching, "fewer_judged", lambda *_: {})
        searching.searched(run, [], "0", SOME, X86, Precision.INT8, device, X86.limits, SOME)


@pytest.mark.parametrize(
    ("awaited", "work", "board"),
    [
        ("device-x86", answer_stage, PI),
        ("timing-x86", timing_stage, PI),
        ("usage-x86", usage_stage, PI),
        ("unpruned-compared-x86", compared_stage, PI),
        ("baseline-x86", baseline_stage, PI),
        ("candidates", candidates_stage, PI),
        ("engine-jetson", engine_stage, NANO),
    ],
)
def test_another_board_under_the_same_name_does_not_get_the_first_ones_figures(
    awaited: str, work: Callable[[Any, Any], None], board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpruned, "unpruned_file", lambda *_: (SOME, SOME))

    def settings(changed: Board) -> Any:
        device = open_board(changed)
        config = SimpleNamespace(device=board.name, threads=1, seed=0, score="hasa", lambda_="auto", max_size=None)
        run: Any = SimpleNamespace(folder=Folder(awaited), config=config, board=device, pattern=None, loaded=None, compute=None)
        try:
            with pytest.raises(Asked) as raised:
                work(run, device)
        finally:
            device.close()
        return raised.value.args[0]

    first = settings(board)
    assert settings(replace(board, notes="in the rack", file="elsewhere.toml")) == first
    for changed in ({"address": "second"}, {"affinity": (4,)}, {"power_mode": "15W"}):
        assert settings(replace(board, **changed)) != first
