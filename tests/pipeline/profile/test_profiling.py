"""A profile of real files on this machine: layers by their own names, memory, JSON that reads back, a page without a network."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from edge_compress.calibration.ranges import collect, ranges
from edge_compress.devices.local import LocalDevice
from edge_compress.devices.measure.timing import TimingSettings
from edge_compress.pipeline.codec import from_json, to_json
from edge_compress.pipeline.profile import profiling
from edge_compress.pipeline.profile.layer_names import names_of
from edge_compress.pipeline.profile.page import to_html
from edge_compress.pipeline.profile.profiling import LayerTime, Profile, Row
from edge_compress.pipeline.progress import Progress
from edge_compress.pipeline.signature import image_signature
from edge_compress.pipeline.types import Kind, Percentiles
from edge_compress.targets.onnx.export import export_float
from edge_compress.targets.onnx.int8 import Recipe, quantize
from torch import nn

SHAPE = (3, 16, 16)
SETTINGS = TimingSettings(sessions=1, min_pairs=5, max_pairs=10, max_seconds=5.0, warmup_seconds=0.1)


class Residual(nn.Module):
    """A stem, a residual branch of two layers, a classifier."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv1, self.conv2 = nn.Conv2d(16, width, 3, padding=1), nn.Conv2d(width, 16, 3, padding=1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.conv2(self.conv1(x).relu())).relu()
        return self.fc(x.mean((2, 3)))


LAYERS = {"stem", "conv1", "conv2", "fc"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("files")
    dense, pruned = (export_float(Residual(width).eval(), image_signature(SHAPE)) for width in (64, 16))
    image = np.random.default_rng(0).standard_normal((4, *SHAPE)).astype(np.float32)
    int8 = quantize(dense, ranges(collect(dense, [image]), "min-max"), Recipe("min-max", 8))
    made = {}
    for name, model in (("dense", dense), ("pruned", pruned), ("int8", int8)):
        made[name] = folder / f"{name}.onnx"
        made[name].write_bytes(model.SerializeToString())
    return made


@pytest.fixture(scope="module")
def result(files: dict[str, Path]) -> Profile:
    models = [files["dense"], files["pruned"], files["int8"]]
    return profiling.profile(models, "local", SETTINGS, Progress(io.StringIO()))


def test_every_layer_has_its_own_name_in_float_and_in_int8(result: Profile) -> None:
    for row in result.rows:
        names = [layer.name for layer in row.layers]
        assert len(names) == len(set(names))
        assert {name for name in names if not name.startswith("(")} == LAYERS, (row.name, names)
        assert all(layer.ms > 0 for layer in row.layers if layer.name in LAYERS)


def test_the_layers_that_were_pruned_take_less_and_make_up_the_most(result: Profile) -> None:
    dense, pruned, _ = ({layer.name: layer.ms for layer in row.layers} for row in result.rows)
    assert pruned["conv1"] < dense["conv1"]
    assert dense["conv1"] + dense["conv2"] > 0.5 * sum(dense.values())


def test_memory_is_that_of_one_process_with_one_model(result: Profile) -> None:
    for row in result.rows:
        assert 2e7 < row.peak_rss_bytes < 2e9


def test_a_profile_reads_back_from_its_json(result: Profile) -> None:
    assert from_json(Profile, to_json(result)) == result
    assert result.kind is Kind.MEASURED
    assert (result.device, result.runtime, result.threads) == ("local", "onnxruntime", 1)


def test_the_page_shows_every_layer_of_every_model_and_loads_nothing(result: Profile, files: dict[str, Path]) -> None:
    page = to_html(result)
    assert "<svg" in page
    for name in (*LAYERS, *(path.name for path in files.values())):
        assert name in page
    assert re.findall(r"(?:src|href)=\"(?!data:|#)", page) == []
    assert "<script" not in page


def test_what_was_not_measured_is_tagged_everywhere() -> None:
    times = Percentiles(1.0, 2.0, 3.0)
    row = Row("<b>a</b>.onnx", times, None, 10**8, (LayerTime("stem", "Conv", 0.5),))
    emulated = Profile("pi & co", Kind.EMULATED, "onnxruntime", 1, (row,), ("a note",))
    page = to_html(emulated)
    assert "1.00 (emulated)" in page
    assert "ms in one inference (emulated)" in page
    assert "<b>a</b>" not in page
    assert "pi &amp; co" in page
    assert any("is emulated: its times are not those of any device" in line for line in profiling.table(emulated))


def test_a_runtime_without_a_profiler_gives_a_note_and_no_plot(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_compress.devices.transport.connection import LoadedModel
    from edge_compress.pipeline.errors import UnavailableError

    def none(*_: object) -> None:
        raise UnavailableError("profiling", found="litert: its Python interface has no profiler")

    monkeypatch.setattr(LoadedModel, "layers", none)
    row = Row("dense", Percentiles(1.0, 1.0, 1.0))
    with LocalDevice().connect() as agent:
        looked, note = profiling._looked_into(agent, row, files["dense"], SETTINGS)
    assert note == "no times by layer: litert: its Python interface has no profiler"
    assert looked.layers == ()
    assert "<svg" not in to_html(Profile("x", Kind.MEASURED, "litert", 1, (looked,), (note,)))


def test_operators_of_a_file_that_is_not_onnx_keep_the_runtimes_names(tmp_path: Path) -> None:
    assert names_of(tmp_path / "m.engine", [("conv_1", "Conv"), ("x", "Add")]) == ("conv_1", "(Add)")
