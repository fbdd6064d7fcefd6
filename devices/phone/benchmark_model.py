"""What TensorFlow Lite's `benchmark_model` prints, as numbers: for phones, which have no Python for the agent.

Four generations of its output are read (TensorFlow 2.4 and before, 2.5 and later, LiteRT with percentiles, and the
oldest one, which prints averages only), with or without the prefixes of a log. It prints statistics, no samples: an
interval takes several invocations of baseline and artifact in turn. Source: tensorflow/lite/tools/benchmark and its
successor in google-ai-edge/LiteRT.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...pipeline.errors import DeviceError

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_STATISTICS = re.compile(rf"(?<![\w:(])count=\d+(?: \w+={_NUMBER})*")
_PAIR = re.compile(rf"(\w+)=({_NUMBER})")
_SUMMARY = re.compile(r"(?:Inference|Average inference) timings in us: (.*)")
_SUMMARY_PAIR = re.compile(rf"(Init|First inference|Warmup|Inference)(?: \(avg\))?: ({_NUMBER})")
_FOOTPRINT = re.compile(
    rf"(?:Peak memory footprint|Memory footprint delta from the start of the tool) \(MB\): init=({_NUMBER}) overall=({_NUMBER})"
)
_PEAK = re.compile(rf"Overall peak memory footprint \(MB\) via periodic monitoring: ({_NUMBER})")


@dataclass(frozen=True)
class BenchmarkRun:
    """One invocation. Microseconds; what its generation does not print is None."""

    mean_us: float  # of an inference
    count: int | None  # inferences in the measured loop
    init_us: float | None = None
    first_us: float | None = None  # the very first inference, warm-up
    warmup_us: float | None = None  # mean
    least_us: float | None = None
    most_us: float | None = None
    std_us: float | None = None
    p5_us: float | None = None
    median_us: float | None = None
    p95_us: float | None = None
    memory_mb: float | None = None  # overall, as printed
    delegate: str = ""  # its name, where one was applied
    fallback: bool = False  # some or all of the graph runs on the cpu although a delegate was asked for


@dataclass(frozen=True)
class OperatorTime:
    """A row of the operator profile."""

    kind: str  # such as CONV_2D
    mean_ms: float
    share: float  # of all, 0 to 1
    name: str  # of the tensor it writes


def parse(text: str) -> BenchmarkRun:
    """The figures in what benchmark_model printed, stdout and stderr together.

    Raises:
        DeviceError: it holds no result.
    """
    summaries = [dict(_SUMMARY_PAIR.findall(m[1])) for m in map(_SUMMARY.search, text.splitlines()) if m]
    if not summaries or "Inference" not in summaries[-1]:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        raise DeviceError(
            "benchmark_model",
            found=f"no result ({lines[-1][:200]})" if lines else "no output",
            expected="a line with inference timings",
            do="run it by hand on the device to see why",
        )
    summary = {key: float(value) for key, value in summaries[-1].items()}
    loop = _measured_loop(text)
    footprint, peak = _FOOTPRINT.search(text), _PEAK.search(text)
    delegate, fallback = _delegate(text)
    # avg and the summary's mean have six digits; of a single inference only `curr` is printed
    return BenchmarkRun(
        mean_us=summary["Inference"],
        count=int(loop["count"]) if loop else None,
        init_us=summary.get("Init"),
        first_us=summary.get("First inference"),
        warmup_us=summary.get("Warmup"),
        least_us=loop.get("min", loop.get("curr")),
        most_us=loop.get("max", loop.get("curr")),
        std_us=loop.get("std"),
        p5_us=loop.get("p5"),
        median_us=loop.get("median"),
        p95_us=loop.get("p95"),
        memory_mb=float(peak[1]) if peak else float(footprint[2]) if footprint else None,
        delegate=delegate,
        fallback=fallback,
    )


def parse_operators(text: str) -> tuple[OperatorTime, ...]:
    """The operators of the measured loop in the order they ran; empty where they were not profiled.

    The table comes twice, for preparing the graph and for running it: the last one counts.
    """
    tables: list[list[OperatorTime]] = []
    inside = False
    for line in text.splitlines():
        if "= Run Order =" in line:
            inside = True
            tables.append([])
        elif re.search(r"=====.*=====|^\s*Number of nodes", line):
            inside = False
        elif inside and (row := _operator(line)) is not None:
            tables[-1].append(row)
    return tuple(tables[-1]) if tables else ()


def _operator(line: str) -> OperatorTime | None:
    """A row: type, start (in older versions), first, average ms, share, cumulative share, memory, times called, name."""
    cells = [cell.strip() for cell in line.split("\t") if cell.strip()]
    if len(cells) < 8 or cells[0].startswith("["):
        return None
    mean, share, name = cells[-6], cells[-5], cells[-1]
    return OperatorTime(cells[0], float(mean), float(share.rstrip("%")) / 100, name.strip("[]").partition("]")[0])


def _measured_loop(text: str) -> dict[str, float]:
    """Statistics of the measured loop: the first after the second "Running benchmark for at least"; the first is warm-up.

    The profiler prints a line alike ("Timings (microseconds): count=..."), which is not it.
    """
    parts = text.split("Running benchmark for at least")
    found = [
        dict(_PAIR.findall(match[0]))
        for line in parts[-1].splitlines()
        if "Timings (microseconds)" not in line and "Memory (bytes)" not in line
        for match in [_STATISTICS.search(line)]
        if match
    ]
    if not found:
        return {}
    chosen = found[0] if len(parts) > 1 else found[-1]
    return {key: float(value) for key, value in chosen.items()}


def _delegate(text: str) -> tuple[str, bool]:
    """(name of the delegate, whether the cpu does some of its work)."""
    for line in text.splitlines():
        match = re.search(r"Explicitly applied (\w+) delegate", line)
        if match:
            return match[1], "completely executed" not in line
    return "", "will not be executed by the delegate" in text
