"""`edge-compress profile`: which runtime measures which files."""

from __future__ import annotations

import pytest
from edge_compress.devices.measure.timing import TimingSettings
from edge_compress.pipeline.cli.main import main
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.profile import profiling


@pytest.mark.parametrize(
    ("files", "runtime"),
    [
        (("a.tflite", "b.tflite"), "litert"),
        (("a.pte",), "executorch"),
        (("a.onnx", "b.onnx"), "onnxruntime"),
        (("a.pte", "b.onnx"), "onnxruntime"),  # which then refuses the first
    ],
)
def test_files_are_measured_in_the_runtime_they_are_for(
    files: tuple[str, ...], runtime: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def seen(models: object, device: str, timing: TimingSettings, ui: object) -> None:
        asked.append(timing.runtime)
        raise InputError("seen enough")

    monkeypatch.setattr(profiling, "profile", seen)
    assert main(["profile", *files]) == 2
    assert "seen enough" in capsys.readouterr().err
    assert asked == [runtime]
