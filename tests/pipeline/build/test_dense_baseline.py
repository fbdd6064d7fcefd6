"""The dense baseline: the faster form on the device, chosen once, and one file for the search and the report."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from edge_compress import targets
from edge_compress.devices.measure.latency_cache import LatencyCache
from edge_compress.pipeline.axes.capture import capture
from edge_compress.pipeline.build.dense_baseline import AS_GIVEN, CONVOLUTIONS, dense_baseline
from edge_compress.pipeline.config import load as load_config
from edge_compress.pipeline.evaluate import evaluation_context
from edge_compress.pipeline.network.compute import CPU
from edge_compress.pipeline.options import Pattern
from edge_compress.pipeline.progress import Progress
from edge_compress.pipeline.run_context import RunContext
from edge_compress.pipeline.run_folder import RunFolder
from edge_compress.pipeline.signature import image_signature
from edge_compress.pipeline.types import Preprocess, Speedup
from torch import nn
from torch.nn import functional as F

SHAPE = (3, 12, 12)


class Padded(nn.Module):
    """A residual block whose shortcut is subsampled and padded with zero channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.body = nn.Conv2d(8, 16, 3, 2, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = (self.body(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))).relu()
        return self.head(x.mean((2, 3)))


class Stopwatch:
    """A device that finds the second file as many times as fast as it is told, and keeps what it was asked."""

    def __init__(self, speedup: float) -> None:
        self.speedup, self.compared, self.baselines = speedup, [], []

    def measure(self, baseline: Path, candidate: Path, settings: Any, progress: Any = None) -> Any:
        self.compared.append((baseline, candidate))
        return SimpleNamespace(speedup=Speedup(self.speedup, (self.speedup - 0.05, self.speedup + 0.05)))

    def facts(self, runtime: str, threads: int) -> dict[str, str]:
        return {}

    def meter(self, baseline: bytes, runtime: str, threads: int, seed: int) -> Any:
        self.baselines.append(baseline)
        return SimpleNamespace(width=1, dense_ms=1.0, close=lambda: None)


@pytest.fixture(params=["x86", "jetson", "phone"])
def target(request: pytest.FixtureRequest) -> Any:
    found = targets.load(request.param)
    if found.missing():
        pytest.skip(found.missing())
    return found


def run_of(folder: RunFolder, config: Any, module: nn.Module) -> RunContext:
    info = SimpleNamespace(image_shape=SHAPE, classes=tuple("abcde"))
    subject = SimpleNamespace(data=info, signature=image_signature(SHAPE), preprocess=Preprocess((0.5,) * 3, (0.5,) * 3, "none"))
    loaded: Any = SimpleNamespace(module=module, subject=subject)
    device: Any = None
    return RunContext(config, Progress(), folder, loaded, CPU, Pattern.CHANNEL, device, {})


@pytest.fixture
def config(tmp_path: Path) -> Any:
    return load_config(None, {"targets": ("x86",), "out": str(tmp_path / "run")})


def searched(module: nn.Module) -> nn.Module:
    """The network as the search knows it."""
    return capture(module, torch.zeros(1, *SHAPE)).module


def convolutions(target: Any, file: Path) -> int:
    if target.name == "phone":
        from edge_compress.targets.tflite import file as tflite_file

        return int(tflite_file.op_counts(file.read_bytes())["CONV_2D"])
    return sum(node.op_type == "Conv" for node in onnx.load(file).graph.node)


def test_the_baseline_of_every_target_is_the_form_that_its_device_finds_faster(target: Any, config: Any, tmp_path: Path) -> None:
    """Beside the slower one every artifact would look faster than it is."""
    torch.manual_seed(0)
    module = Padded().eval()
    net = searched(module)
    stopwatch: Any
    images = np.random.default_rng(0).standard_normal((4, *SHAPE), dtype=np.float32)
    for speedup, form, layers in ((1.25, CONVOLUTIONS, 3), (0.8, AS_GIVEN, 2)):
        stopwatch = Stopwatch(speedup)
        out = tmp_path / str(speedup)
        with RunFolder(load_config(None, {"targets": ("x86",), "out": str(out)}), lambda _: None) as folder:
            found = dense_baseline(run_of(folder, config, module), "subject", target, net, stopwatch)
        assert found.form.form == form
        assert found.form.speedup is not None
        assert found.form.speedup.median == pytest.approx(1.25)  # of the faster one over the other, whichever it is
        assert found.form.speedup.ci95[0] < 1.25 < found.form.speedup.ci95[1]
        assert convolutions(target, out / found.file.path) == layers
        if target.name == "x86":
            with target.runner(out / found.file.path) as run, torch.no_grad():
                np.testing.assert_allclose(run(images), module(torch.from_numpy(images)).numpy(), atol=1e-4)


def test_the_choice_is_made_once_and_a_run_that_goes_on_keeps_it(config: Any) -> None:
    module = Padded().eval()
    net, target = searched(module), targets.load("x86")
    first: Any = Stopwatch(0.8)
    second: Any = Stopwatch(2.0)
    with RunFolder(config, lambda _: None) as folder:
        chosen = dense_baseline(run_of(folder, config, module), "subject", target, net, first)
    with RunFolder(config, lambda _: None) as folder:
        again = dense_baseline(run_of(folder, config, module), "subject", target, net, second)
    (given, rewritten), *more = first.compared
    assert not more
    assert [convolutions(target, file) for file in (given, rewritten)] == [2, 3]
    assert again == chosen
    assert not second.compared


def test_a_network_of_one_form_is_not_measured_and_without_a_device_it_is_the_searchs_own(config: Any) -> None:
    plain, padded = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval(),
        Padded().eval(),
    )
    stopwatch: Any = Stopwatch(2.0)
    target = targets.load("x86")
    with RunFolder(config, lambda _: None) as folder:
        one = dense_baseline(run_of(folder, config, plain), "plain", target, searched(plain), stopwatch)
        none = dense_baseline(run_of(folder, config, padded), "padded", target, searched(padded), None)
    assert (one.form.form, one.form.other, one.form.speedup) == (AS_GIVEN, "", None)
    assert not stopwatch.compared
    assert (none.form.form, none.form.other, none.form.speedup) == (CONVOLUTIONS, AS_GIVEN, None)


def test_the_search_measures_against_the_file_that_the_report_compares_with(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the form: a budget of half the dense latency is half of the baseline's in the report."""
    module = Padded().eval()
    net, target = searched(module), targets.load("x86")
    monkeypatch.setattr(evaluation_context, "scoring_inputs", lambda *_: torch.zeros(2, *SHAPE))
    monkeypatch.setattr(evaluation_context, "reward_samples", lambda *_: None)
    stopwatch: Any = Stopwatch(0.8)
    with RunFolder(config, lambda _: None) as folder:
        run = run_of(folder, config, module)
        found = dense_baseline(run, "subject", target, net, stopwatch)
        data = (folder.path / found.file.path).read_bytes()
    loaded: Any = run.loaded
    loaded.data = SimpleNamespace(train=None)
    loaded.subject.cost, loaded.subject.model_sha256, loaded.subject.code = SimpleNamespace(macs=1), "0", ""
    caches = []
    for form in (found.form.form, CONVOLUTIONS):
        with evaluation_context.open_bench(
            config,
            loaded,
            target,
            target.limits.precisions[-1],
            tmp_path / "memo",
            probed=lambda target, precision, note: target.prober(net, image_signature(SHAPE), precision),
            baseline=data,
            form=form,
            device=stopwatch,
            latencies=tmp_path / "latency",
        ) as bench:
            assert isinstance(bench.cache, LatencyCache)
            caches.append(bench.cache.path)
    assert stopwatch.baselines == [data, data]
    assert caches[0] != caches[1]  # ratios to one form are not taken for ratios to the other
