"""How well a ratio can be measured again: the dense/pruned ratio of one pair of networks, ten times, on a busy machine.

Each repetition is what a report's speedup comes from: fresh processes, interleaved pairs, the two-level bootstrap. `--load`
processes that multiply matrices compete for the cores all the while. What it comes to: the range of the ten ratios as a
share of their median, and how many of the ten 95 % intervals hold that median, the grand one.

    python benchmarks/timing.py --out benchmarks/results/timing.json
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from edge_compress import targets
from edge_compress.devices.access import open_named
from edge_compress.devices.device import Device
from edge_compress.devices.measure.timing import TimingSettings
from edge_compress.pipeline.codec import to_json
from edge_compress.pipeline.files import atomic_write
from edge_compress.pipeline.pattern.units import Units
from edge_compress.pipeline.signature import image_signature
from edge_compress.pipeline.verify.artifact import MOST_SESSIONS
from edge_compress.targets.onnx.export import export_float
from torch import nn

SHAPE = (3, 32, 32)
BUSY = "import numpy as np\na = np.random.default_rng(0).standard_normal((384, 384))\nwhile True:\n    a @ a\n"


def resnet20() -> nn.Module:
    """ResNet-20 for 32 pixels (He et al. 2015, section 4.2) with 1x1 convolutions as shortcuts; random weights."""
    from torchvision.models.resnet import BasicBlock

    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    width = 16
    for stage, channels in enumerate((16, 32, 64)):
        for block in range(3):
            stride = 2 if stage and not block else 1
            shortcut = None
            if stride != 1:
                shortcut = nn.Sequential(nn.Conv2d(width, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
            layers.append(BasicBlock(width, channels, stride, shortcut))
            width = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


def make_pair(folder: Path) -> tuple[Path, Path]:
    """ResNet-20, and the same with half of every group's channels: (dense, pruned)."""
    way = Units(resnet20(), torch.zeros(1, *SHAPE), image_signature(SHAPE), targets.load("x86").limits, "none", 0)
    levels = tuple(0 if knob.kind == "block" else knob.level(0.5) for knob in way.knobs)
    pruned = way.blank(way.plan_for(levels, {k.name: tuple(range(k.size)) for k in way.knobs}))
    made = folder / "dense.onnx", folder / "pruned.onnx"
    for path, module in zip(made, (way.net, pruned), strict=True):
        path.write_bytes(export_float(module, image_signature(SHAPE)).SerializeToString())
    return made


@contextlib.contextmanager
def competing(processes: int) -> Iterator[None]:
    """Processes that keep a core busy each."""
    one = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([sys.executable, "-c", BUSY], env=one) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def repeated(device: Device, dense: Path, pruned: Path, settings: TimingSettings, number: int) -> dict[str, object]:
    """One repetition: the ratio, its interval, and what to know about it."""
    load, started = os.getloadavg()[0], time.monotonic()
    timing = device.measure(dense, pruned, TimingSettings(**{**settings.__dict__, "seed": 1000 * number}))
    return {
        "ratio": timing.speedup.median,
        "ci95": list(timing.speedup.ci95),
        "load_average": load,
        "seconds": round(time.monotonic() - started, 1),
        "pairs": timing.pairs,
        "dense_p50_ms": timing.dense.p50_ms,
        "noise_floor": timing.noise_floor,
        "quality": list(timing.quality),
        "wall_over_cpu": float(timing.environment["wall_over_cpu"]),
        "session_spread": float(timing.environment["session_spread"]),
    }


def summary(runs: list[dict[str, object]]) -> dict[str, float]:
    """Range of the ratios over their median, and how many intervals hold it."""
    ratios = [float(str(run["ratio"])) for run in runs]
    middle = statistics.median(ratios)
    intervals = [[float(end) for end in run["ci95"]] for run in runs if isinstance(run["ci95"], list)]
    return {
        "median": middle,
        "range_over_median": (max(ratios) - min(ratios)) / middle,
        "intervals_with_median": sum(low <= middle <= high for low, high in intervals),
    }


@click.command(help=__doc__)
@click.option("--device", default="local", show_default=True, help="Where, as in edge-compress profile.")
@click.option("--models", nargs=2, type=click.Path(path_type=Path), help="A dense and a pruned file instead of ResNet-20.")
@click.option("--repetitions", default=10, show_default=True)
@click.option("--load", default=2, show_default=True, help="Processes that compete for the cores of this machine.")
@click.option("--sessions", default=TimingSettings.sessions, show_default=True)
@click.option("--max-seconds", default=TimingSettings.max_seconds, show_default=True, help="Of each session.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    device: str,
    models: tuple[Path, Path] | None,
    repetitions: int,
    load: int,
    sessions: int,
    max_seconds: float,
    out: Path,
) -> None:
    """Measure, write, and say what it comes to."""
    settings = TimingSettings(sessions=sessions, most_sessions=MOST_SESSIONS, max_seconds=max_seconds)
    command = shlex.join(["python", "benchmarks/timing.py", *sys.argv[1:]])
    runs: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(open_named(device)) as opened, competing(load):
        dense, pruned = models or make_pair(Path(folder))
        for number in range(repetitions):
            runs.append(repeated(opened, dense, pruned, settings, number))
            low, high = runs[-1]["ci95"]  # type: ignore[misc]
            click.echo(f"{number + 1}/{repetitions}: {runs[-1]['ratio']:.3f} [{low:.3f}, {high:.3f}]", err=True)
        facts = opened.facts(settings.runtime, settings.threads)
    record = {
        "command": command,
        "device": device,
        "machine": {**facts, "cpus": os.cpu_count()},
        "competing_processes": load,
        "settings": to_json(settings),
        "summary": summary(runs),
        "runs": runs,
    }
    atomic_write(out, json.dumps(record, indent=1) + "\n")
    click.echo(json.dumps(record["summary"]))


if __name__ == "__main__":
    main()
