"""A run that never was, in the shape of a real one: for tests of what is made of a run's results."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from edge_compress.devices.measure.usage import LayerTime, Usage
from edge_compress.pipeline.config import Config
from edge_compress.pipeline.options import Pattern, Precision
from edge_compress.pipeline.report.collect import report_of
from edge_compress.pipeline.report.report import Header, Named, Report, Tool
from edge_compress.pipeline.signature import image_signature
from edge_compress.pipeline.types import (
    Accuracy,
    Artifact,
    Candidate,
    Checkpoint,
    DataInfo,
    Epoch,
    FileRef,
    Finalist,
    Kind,
    Knob,
    ModelCost,
    Percentiles,
    Plan,
    Preprocess,
    SearchResult,
    Sensitivity,
    Solved,
    Speedup,
    Splits,
    Subject,
    TargetResult,
    Timing,
    Verdict,
)
from edge_compress.pipeline.verify.gates import allowed
from edge_compress.pipeline.verify.references import References

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


CONFUSED = (("cat", "dog", 71, 90), ("ship", "deer", 0, 3))


@dataclass(frozen=True)
class RunResults:
    """All that a report is made of."""

    subject: Subject
    dense_value: float
    dense_search_value: float
    plan: Plan
    knobs: tuple[Knob, ...]
    search: SearchResult
    solved: Solved
    checkpoint: Checkpoint
    pruned_value: float
    targets: dict[str, TargetResult]
    command: str
    packages: dict[str, str]
    started: str
    finished: str
    stage_seconds: dict[str, float]
    notes: tuple[str, ...] = ()
    max_size_bytes: int | None = None
    licenses: dict[str, str] = field(default_factory=dict)
    prunable_macs_share: float | None = 0.874
    ranking: Sensitivity = field(default_factory=lambda: Sensitivity("hasa", 0.5, {}))


LAYERS = tuple(LayerTime(f"layer{k}.conv", "Conv", 0.1 + 0.01 * k) for k in range(10))
USAGE = Usage(60_000_000, 52_000_000, LAYERS)


def to_report(results: RunResults) -> Report:
    subject, config = results.subject, Config(("x86",), max_size=results.max_size_bytes)
    run: Any = SimpleNamespace(
        config=config, loaded=SimpleNamespace(subject=subject), seconds=results.stage_seconds, notes=results.notes
    )
    header = Header(
        Tool("0.1.0", results.packages, results.licenses),
        Named(subject.model, subject.model_sha256),
        subject.data,
        subject.preprocess,
        subject.signature,
        subject.metric,
        config.seed,
        results.command,
        results.started,
        results.finished,
    )
    return report_of(
        run,
        header,
        References(results.dense_value, results.pruned_value, results.dense_search_value),
        allowed(config, subject.metric, results.dense_value),
        results.targets,
        plan=results.plan,
        knobs=results.knobs,
        ranking=results.ranking,
        search=results.search,
        solved=results.solved,
        checkpoint=results.checkpoint,
        prunable_macs_share=results.prunable_macs_share,
        usage={name: USAGE for name, found in results.targets.items() if found.latency is not None},
    )


def fake_knobs(blocks: int) -> tuple[Knob, ...]:
    knobs = []
    for stage, width in enumerate((16, 32, 64), start=1):
        counts = tuple(range(width, 0, -width // 8))
        knobs.append(Knob("conv1" if stage == 1 else f"layer{stage}.0.shortcut", "stream", width, counts))
        for block in range(blocks):
            branch = f"block:layer{stage}.{block}.conv2"
            knobs.append(Knob(f"layer{stage}.{block}.conv1", "channel", width, counts, branch))
            knobs.append(Knob(branch, "block", 1, (1, 0)))
    return tuple(knobs)


def fake_search(knobs: tuple[Knob, ...], evaluations: int, kind: Kind) -> SearchResult:
    """Candidates along a trade-off, found ever better; invented numbers of a plausible shape."""
    rng = np.random.default_rng(3)
    tried, rewards = [], []
    for i in range(evaluations):
        skill = 1 - math.exp(-3 * i / evaluations)
        ratio = float(np.clip(rng.normal(0.62 - 0.18 * skill, 0.1), 0.22, 0.98))
        accuracy = float(np.clip(0.9 - (0.42 - 0.22 * skill) * (1.02 - ratio) ** 1.4 - abs(rng.normal(0, 0.05)), 0.1, 0.92))
        levels = tuple(int(v) for v in rng.integers(0, [len(k.kept) for k in knobs]))
        cost = ModelCost(int(272_474 * ratio**1.5), int(40_810_000 * ratio**1.3))
        tried.append(Candidate(levels, accuracy, 2.5 - 2 * accuracy, ratio, kind, cost, 0.3))
        rewards.append(accuracy if ratio <= 0.5 else -1.0 - ratio)
    best = tried[rewards.index(max(rewards))]
    savings = tuple(tuple(0.002 * (i + 1) * level for level in range(len(k.kept))) for i, k in enumerate(knobs))
    return SearchResult(
        "ppo", best, tuple(tried), tuple(rewards), evaluations, 141.3, 0.5, (best,), latency_reused=12, savings=savings
    )


def fake_timing(kind: Kind = Kind.MEASURED, **changes: Any) -> Timing:
    rng = np.random.default_rng(4)
    dense, artifact = (tuple(float(v) for v in m * (1 + rng.gamma(1.5, 0.03, 500))) for m in (1.0, 0.43))
    timing = Timing(
        device="local (x86-64, 2 cores)",
        kind=kind,
        dense=Percentiles(1.0371, 1.1173, 1.2191),
        artifact=Percentiles(0.4491, 0.4837, 0.5379),
        speedup=Speedup(2.3119, (2.2473, 2.3817)),
        noise_floor=0.0072,
        sessions=5,
        pairs=1500,
        threads=1,
        environment={"runtime": "onnxruntime 1.32.0", "cpu": "x86-64 with AVX2", "governor": "unknown"},
        dense_samples_ms=dense,
        artifact_samples_ms=artifact,
    )
    return dataclasses.replace(timing, **changes)


def fake_target(kind: Kind = Kind.MEASURED, **changes: Any) -> TargetResult:
    target = TargetResult(
        status="ok",
        verdict=Verdict(passed=True),
        artifact=Artifact(
            "x86",
            FileRef("artifacts/x86/model.onnx", "ab" * 32, 181_403),
            "onnx",
            Precision.INT8,
            "input",
            (1, 3, 32, 32),
            notes=("ranges: min-max, 7-bit weights (this CPU has no VNNI)",),
            options={"weights": "7 bit, per channel", "activations": "uint8"},
            baseline=FileRef("artifacts/x86/dense.onnx", "cd" * 32, 1_103_365),
            choices=("percentile 99.999, 7-bit: 91.02 %", "min-max, 8-bit: 90.31 %"),
        ),
        accuracy=Accuracy(91.18, 0.62, 0.9874, 5000, Kind.MEASURED, 91.8, (0.31, 0.94), confused=CONFUSED),
        latency=fake_timing(kind),
    )
    return dataclasses.replace(target, **changes)


def fake_results(blocks: int = 3, evaluations: int = 60, kind: Kind = Kind.MEASURED, **changes: Any) -> RunResults:
    """A run that never was, in the shape of a real one: ResNet-20 (or -56) on CIFAR-10."""
    knobs = fake_knobs(blocks)
    kept = {
        k.name: tuple(range(k.kept[(i * 5) % len(k.kept)] if k.kind == "channel" else k.kept[1]))
        for i, k in enumerate(knobs)
        if k.kind != "block"
    }
    shape = ModelCost(272_474, 40_813_184)
    info = DataInfo("npz:cifar10.npz", "12" * 32, CIFAR, (3, 32, 32), Splits(45_000, 5_000, 5_000))
    subject = Subject(
        "nets.py:resnet20",
        "34" * 32,
        info,
        Preprocess((0.5,) * 3, (0.25,) * 3, "crop-flip"),
        shape,
        image_signature((3, 32, 32), 10),
    )
    epochs = tuple(Epoch(i + 1, 0.9 / (i + 1) + 0.2, 91.4 - 9 * math.exp(-i / 4), 31.5) for i in range(20))
    shares = {k.name: tuple(2.0 * (k.size - i) / (k.size * (k.size + 1)) for i in range(k.size)) for k in knobs if k.size > 1}
    results = RunResults(
        subject=subject,
        dense_value=91.8,
        dense_search_value=91.66,
        plan=Plan(Pattern.CHANNEL, "hasa", kept, ("block:layer1.1.conv2",)),
        knobs=knobs,
        ranking=Sensitivity("hasa", 0.5, {name: tuple(range(len(each))) for name, each in shares.items()}, (), shares),
        search=(search := fake_search(knobs, evaluations, kind)),
        solved=Solved(
            (Finalist(search.best, 0.8812, 0.41),), 0, FileRef("stages/compensate/weights.safetensors", "78" * 32, 412_300)
        ),
        checkpoint=Checkpoint(
            FileRef("stages/finetune/student.safetensors", "56" * 32, 412_300), epochs, ModelCost(98_210, 15_310_000), 0.6396
        ),
        pruned_value=91.24,
        targets={"x86": fake_target(kind)},
        command="edge-compress --target x86 --model nets.py:resnet20 --weights resnet20.pt --data npz:cifar10.npz",
        packages={"edge-compress": "0.1.0", "torch": "2.14.1", "onnxruntime": "1.32.0", "numpy": "2.3.5"},
        started="2026-01-05T10:00:00+00:00",
        finished="2026-01-05T11:12:40+00:00",
        stage_seconds={"sensitivity": 61.2, "search": 141.3, "finetune": 630.1, "build": 21.9, "verify": 95.0},
    )
    return dataclasses.replace(results, **changes)
