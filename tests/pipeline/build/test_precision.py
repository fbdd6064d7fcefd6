"""A file that is slower in int8 than in float is not what the user gets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from edge_compress.pipeline.build.precision import built_faster, precision_for
from edge_compress.pipeline.config import Config
from edge_compress.pipeline.options import Precision
from edge_compress.pipeline.progress import Progress
from edge_compress.pipeline.run_context import RunContext
from edge_compress.pipeline.run_folder import RunFolder
from edge_compress.pipeline.types import Artifact, Baseline, DenseForm, FileRef, Speedup
from edge_compress.targets import load


@dataclass(frozen=True)
class Request:
    """What of a `BuildRequest` is used."""

    precision: Precision
    folder: Path


@dataclass
class Target:
    """Writes its precision into the file."""

    excluded: str
    needs_device: bool = False
    name: str = "x86"
    runtime: str = "onnxruntime"
    limits: Any = field(default_factory=lambda: SimpleNamespace(precisions=(Precision.INT8, Precision.FP32)))

    def build(self, request: Any) -> Artifact:
        (request.folder / "model.onnx").write_text(request.precision)
        options = {"excluded": self.excluded} if request.precision is Precision.INT8 else {}
        return Artifact("x86", FileRef("model.onnx", "0", 4), "onnx", request.precision, "input", (1, 3, 8, 8), options=options)


@dataclass
class Device:
    """Says how much faster int8 is than float."""

    int8: float
    asked: list[tuple[str, str]] = field(default_factory=list)

    def measure(self, slow: Path, fast: Path, how: Any, tell: Any = None) -> Any:
        self.asked.append((slow.read_text(), fast.read_text()))
        return SimpleNamespace(speedup=Speedup(self.int8, (self.int8, self.int8)))


def built(
    tmp_path: Path, target: Target, device: Device | None, precision: Precision | None = None
) -> tuple[Artifact, list[str]]:
    notes: list[str] = []
    run: Any = SimpleNamespace(config=replace(Config(("x86",)), precision=precision), ui=Progress())
    stage: Any = SimpleNamespace(folder=tmp_path / "stage", note=notes.append)
    stage.folder.mkdir()
    (tmp_path / "artifacts").mkdir()
    request: Any = Request(Precision.INT8, tmp_path / "artifacts")
    found = built_faster(run, stage, target, request, device)  # type: ignore[arg-type]
    assert (tmp_path / "artifacts" / "model.onnx").read_text() == found.precision
    return found, notes


def test_int8_that_layers_in_float_made_slower_than_float_is_built_in_float_and_said(tmp_path: Path) -> None:
    device = Device(0.7)
    artifact, notes = built(tmp_path, Target("conv1"), device)
    assert artifact.precision is Precision.FP32
    assert device.asked == [("fp32", "int8")]
    assert notes == ["x86: with conv1 in float the int8 file is 0.70 times as fast as the float file, which is taken instead."]


@pytest.mark.parametrize(
    ("target", "device", "precision"),
    [
        (Target("conv1"), Device(1.2), None),  # faster all the same
        (Target(""), Device(0.7), None),  # all layers in int8: decided before the search
        (Target("conv1"), Device(0.7), Precision.INT8),  # asked for
        (Target("conv1"), None, None),  # nothing tells
        (Target("conv1", needs_device=True), Device(0.7), None),  # no file that a device can run
    ],
    ids=["faster", "all in int8", "asked for", "no device", "an engine"],
)
def test_int8_stays_where_it_is_faster_or_asked_for(
    target: Target, device: Device | None, precision: Precision | None, tmp_path: Path
) -> None:
    artifact, notes = built(tmp_path, target, device, precision)
    assert (artifact.precision, notes) == (Precision.INT8, [])


@dataclass
class Way:
    """How a network is pruned, as far as precision is concerned."""

    open: bool

    def measures_precision(self, target: Any) -> bool:
        return self.open and target.int8_may_be_slower

    def prober(self, target: Any, precision: Precision, note: Any) -> Any:
        return SimpleNamespace(candidate=lambda structure: precision.encode())


@pytest.mark.parametrize(
    ("target", "changes", "open_", "int8", "expected", "asked"),
    [
        ("x86", {}, True, 0.9, Precision.FP32, 1),
        ("x86", {}, True, 1.4, Precision.INT8, 1),
        ("x86", {"precision": Precision.INT8}, True, 0.9, Precision.INT8, 0),
        ("x86", {"max_size": 10**5}, True, 0.9, Precision.INT8, 0),  # the limit is on bytes, of which int8 takes a quarter
        ("x86", {}, False, 0.9, Precision.INT8, 0),  # masks: no budget on latency
        ("phone", {}, True, 0.9, Precision.INT8, 0),  # timings of this machine are not a phone's
    ],
)
def test_float_is_taken_where_the_dense_network_is_slower_in_int8(
    target: str, changes: dict[str, Any], open_: bool, int8: float, expected: Precision, asked: int, tmp_path: Path
) -> None:
    config = replace(Config((target,), out=tmp_path / "run"), **changes)
    device = Device(int8)
    with RunFolder(config, lambda _: None) as folder:
        (folder.path / "dense.onnx").write_text("float")
        run: Any = RunContext(config, Progress(quiet=True), folder, None, None, None, None, {})  # type: ignore[arg-type]
        baseline = Baseline(FileRef("dense.onnx", "0" * 64, 5), DenseForm("as given"))
        for _ in range(2):  # the second time from the run folder
            found = precision_for(run, "key", load(target), Way(open_), baseline, device)  # type: ignore[arg-type]
            assert found is expected
        assert len(device.asked) == asked
        assert any("--max-size" in note for note in run.notes) == ("max_size" in changes)
        assert [f"{int8:.2f} times as fast as in float" in note for note in folder.notes()] == [True] * asked
