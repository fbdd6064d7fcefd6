"""The output of TensorFlow Lite's `benchmark_model` as numbers: for phones, which have no Python for the agent.

Four generations of its output are read (TensorFlow 2.4 and before, 2.5 and later, LiteRT with percentiles, and the
oldest one, which prints averages only), with or without the prefixes of a log. It prints statistics, no samples: an
interval takes several invocations of baseline and artifact in turn. Source: tensorflow/lite/tools/benchmark and its
successor in google-ai-edge/LiteRT.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ...pipeline.errors import DeviceError

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_MEAN = re.compile(rf"(?:Inference|Average inference) timings in us: .*\bInference(?: \(avg\))?: ({_NUMBER})")
_MEDIAN = re.compile(rf"(?<![\w:(])count=\d+ .*\bmedian=({_NUMBER})")
_FOOTPRINT = re.compile(
    rf"(?:Peak memory footprint|Memory footprint delta from the start of the tool) \(MB\): init={_NUMBER} overall=({_NUMBER})"
)
_PEAK = re.compile(rf"Overall peak memory footprint \(MB\) via periodic monitoring: ({_NUMBER})")

_LONGEST = 1000  # characters of a line with statistics, which have some 200: matching takes the square of the length


@dataclass(frozen=True)
class BenchmarkRun:
    """One invocation; what its generation does not print is None."""

    mean_us: float  # of an inference
    median_us: float | None = None
    memory_mb: float | None = None  # overall, as printed


@dataclass(frozen=True)
class OperatorTime:
    """A row of the operator profile."""

    kind: str  # such as CONV_2D
    mean_ms: float
    name: str  # of the tensor it writes


def parse(text: str) -> BenchmarkRun:
    """The figures in what benchmark_model printed, stdout and stderr together.

    Raises:
        DeviceError: the result is missing, or the memory footprint is negative or not finite.
    """
    text = "\n".join(line for line in text.splitlines() if len(line) <= _LONGEST)
    means = _MEAN.findall(text)
    if not means:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        found, do = f"no result ({lines[-1][:200]})" if lines else "no output", "run it by hand on the device to see why"
        raise DeviceError("benchmark_model", found=found, expected="a line with inference timings", do=do)
    memory = _PEAK.search(text) or _FOOTPRINT.search(text)
    memory_mb = float(memory[1]) if memory else None
    if memory_mb is not None and not 0 <= memory_mb < math.inf:
        raise DeviceError("benchmark_model: its memory", found=f"{memory_mb} MB", expected="a size")
    return BenchmarkRun(float(means[-1]), _median_us(text), memory_mb)


def parse_operators(text: str) -> tuple[OperatorTime, ...]:
    """The operators of the measured loop in the order they ran; empty where they were not profiled.

    The table comes twice, for preparing the graph and for running it: the last one counts.

    Raises:
        DeviceError: a row has no time.
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
    try:
        return OperatorTime(cells[0], float(cells[-6]), cells[-1].strip("[]").partition("]")[0])
    except ValueError as error:
        raise DeviceError("benchmark_model: a row of its operators", found=cells[-6][:100], expected="milliseconds") from error


def _median_us(text: str) -> float | None:
    """Of the measured loop: the first statistics after the second "Running benchmark for at least"; the first is warm-up.

    The profiler prints a line alike ("Timings (microseconds): count=..."), which is not it.
    """
    *before, loop = text.split("Running benchmark for at least")
    lines = [line for line in loop.splitlines() if "Timings (microseconds)" not in line and "Memory (bytes)" not in line]
    found = [float(match[1]) for match in map(_MEDIAN.search, lines) if match]
    return found[0 if before else -1] if found else None
