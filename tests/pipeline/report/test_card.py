"""The card and the manifest of a bundle say what the artifact's own file takes, not what the network takes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from edge_compress import targets
from edge_compress.pipeline.options import Precision
from edge_compress.pipeline.release.bundle import manifest_of
from edge_compress.pipeline.release.model_card import model_card
from edge_compress.pipeline.report.report import Report
from edge_compress.pipeline.signature import image_signature
from edge_compress.targets.base import Converted
from edge_compress.targets.tflite import run as tflite
from fake_run import fake_results, fake_target, to_report

IMAGE = {"name": "args_0", "quantization": (1.0, -128), "shape": np.array([1, 32, 32, 3]), "dtype": np.int8}
LOGITS = {"name": "output_0", "quantization": (0.25, 3), "shape": np.array([1, 10]), "dtype": np.int8}


class Interpreter:
    """LiteRT's, of a file that takes stored pixels."""

    def __init__(self, model_content: bytes) -> None:
        assert model_content == b"file"

    def allocate_tensors(self) -> None: ...

    def get_input_details(self) -> list[dict[str, Any]]:
        return [IMAGE]

    def get_output_details(self) -> list[dict[str, Any]]:
        return [LOGITS]


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    """The report of a run whose artifact takes int8 pixels, channels last."""
    library: Any = ModuleType("ai_edge_litert.interpreter")
    library.Interpreter = Interpreter
    monkeypatch.setitem(sys.modules, "ai_edge_litert", ModuleType("ai_edge_litert"))
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", library)
    sides = tflite.sides_of(b"file", image_signature((3, 32, 32), 10), pixels=True)
    request: Any = SimpleNamespace(folder=tmp_path, baseline=b"float", precision=Precision.INT8)
    artifact = targets.load("phone").artifact(request, Converted(b"file"), b"file", "tflite", sides)
    file = dataclasses.replace(artifact.file, path="artifacts/phone/model.tflite")
    made = fake_target(artifact=dataclasses.replace(artifact, file=file))
    return to_report(fake_results(evaluations=2, targets={"phone": made}))


def test_the_card_gives_the_files_own_types_shapes_and_scales(phone: Report) -> None:
    card = model_card(phone, "phone", [])
    lines = [line.replace("\\", "") for line in card.splitlines()]
    given = "(quantized - zero_point) * scale: pixels 0..255, scale 1, zero point -128"
    assert f"- input `args_0`: int8, 1 x 32 x 32 x 3 NHWC: {given}" in lines
    assert "- output `output_0`: int8, 1 x 10: (quantized - zero_point) * scale: logits, scale 0.25, zero point 3" in lines
    assert "3 x 32 x 32" not in card.replace("x 32 x 32 x 3 NHWC", "")
    assert "NCHW" not in card
    assert "std" not in card  # pixels go in as they are stored
    assert "ai_edge_litert" in card


def test_the_manifest_gives_the_files_own_input(phone: Report) -> None:
    manifest = manifest_of("bundle", phone, "phone", {})
    assert (manifest.input_name, manifest.input_shape) == ("args_0", (1, 32, 32, 3))
