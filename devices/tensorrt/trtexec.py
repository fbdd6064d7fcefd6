"""trtexec, TensorRT's own command: its command lines by version, and its output and files as numbers. Nothing is run here.

Sources: NVIDIA/TensorRT, samples/common/sampleOptions.cpp and sampleReporting.cpp of 10.x and 11.x, and logs that users of
Jetsons published; 2026-11. TensorRT 11 takes precision from the graph alone and refuses the flags for it; it also turned some
defaults round (CUDA graphs, spin wait, no transfers), whose flags it still takes, so they are always given.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...pipeline.errors import BuildError, DeviceError, printable
from ...pipeline.options import Precision

PLACES = ("trtexec", "/usr/src/tensorrt/bin/trtexec")  # JetPack keeps it off the PATH
Program = Sequence[str]  # trtexec, or loop.py where only TensorRT's Python package is installed
WARMUP_MS = 500
_BUILD = (
    *("--builderOptimizationLevel=3", "--memPoolSize=workspace:2048"),  # MiB
    *("--profilingVerbosity=detailed", "--skipInference", "--verbose"),
)
_TIME = ("--avgRuns=100", "--useSpinWait", "--useCudaGraph", "--noDataTransfers", "--percentile=50,90,95,99")
_LAYER = re.compile(r'[\s,{\[]*"name" : "(.*)", "timeMs" : [^,]+, "averageMs" : ([^,]+),')  # of a line, from its start
# A stand-in for trtexec stamps the engines it writes; no time may ever be read from them.
SIMULATED = b"edge-compress: simulated engine"


class Version(NamedTuple):
    """A TensorRT version."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"

    @property
    def weakly_typed(self) -> bool:
        """Whether precisions are allowed by flags; from 11 on they are read from the graph alone."""
        return self.major < 11


OLDEST = Version(10, 0, 0)  # JetPack 6.1; before it explicit quantization and some flags differ


@dataclass(frozen=True)
class LayerTime:
    """A layer of an engine, as the profiler saw it."""

    name: str
    average_ms: float


@dataclass(frozen=True)
class Sparsity:
    """Layers by name."""

    eligible: tuple[str, ...]  # whose weights are 2:4
    picked: tuple[str, ...]  # that a sparse kernel was faster for


def version_of(log: str) -> Version | None:
    """The version in the banner that every call begins with; None without one. v8602 is 8.6.2, v100300 is 10.3.0."""
    found = re.search(r"&&&& RUNNING TensorRT\.\w+ \[TensorRT v(\d{4,6})\]", log)
    if found is None:
        return None
    number = int(found[1])
    if number >= 100_000:
        return Version(number // 10_000, number // 100 % 100, number % 100)
    return Version(number // 1000, number // 100 % 10, number % 100)


def precision_flags(version: Version, precision: Precision) -> tuple[str, ...]:
    """Flags that allow a graph's precision. An int8 graph may keep what its Q/DQ pairs do not cover in half precision."""
    if not version.weakly_typed:
        return ()
    return {Precision.INT8: ("--fp16", "--int8"), Precision.FP16: ("--fp16",)}.get(precision, ())


def build_command(
    program: Program, onnx: str, engine: str, version: Version, precision: Precision, *, sparse: bool, cache: str, layers: str
) -> list[str]:
    """The command that builds an engine from an ONNX file and does nothing else.

    `sparse` lets it try 2:4 kernels, which it takes where they are faster. `cache` is a file of kernel timings, made or added to;
    `layers` is the file for the description of the engine's layers.
    """
    return [
        *program,
        f"--onnx={onnx}",
        f"--saveEngine={engine}",
        *precision_flags(version, precision),
        f"--sparsity={'enable' if sparse else 'disable'}",
        f"--timingCacheFile={cache}",
        *_BUILD,
        f"--exportLayerInfo={layers}",
    ]


def time_command(program: Program, engine: str, times: str, iterations: int, duration_s: int = 0) -> list[str]:
    """Time an engine: so many inferences at least, and for so long, after the warm-up. No transfers, no profiler."""
    return [
        *program,
        f"--loadEngine={engine}",
        f"--warmUp={WARMUP_MS}",
        f"--duration={duration_s}",
        f"--iterations={iterations}",
        *_TIME,
        f"--exportTimes={times}",
    ]


def profile_command(program: Program, engine: str, profile: str, iterations: int = 100) -> list[str]:
    """Time an engine's layers, in a separate run: the profiler slows down the engine."""
    return [
        *program,
        f"--loadEngine={engine}",
        f"--iterations={iterations}",
        "--dumpProfile",
        f"--exportProfile={profile}",
        "--separateProfileRun",
    ]


def output_command(program: Program, engine: str, sources: Mapping[str, str], target: str) -> list[str]:
    """Run an engine once on inputs from files (input -> file of raw bytes) and write its outputs."""
    return [
        *program,
        f"--loadEngine={engine}",
        f"--loadInputs={','.join(f'{name}:{file}' for name, file in sources.items())}",
        f"--exportOutput={target}",
        "--iterations=1",
        "--duration=0",
        "--warmUp=0",
    ]


def require_passed(log: str, code: int, what: str) -> None:
    """Raise the error for a call that did not end with PASSED.

    Raises:
        BuildError: TensorRT refused the model.
        DeviceError: an option it does not know, no memory, a crash.
    """
    if code == 0 and "&&&& PASSED TensorRT." in log:
        return
    errors = [line.split("[E]", 1)[1].strip() for line in log.splitlines() if "[E]" in line]
    unknown = [e for e in errors if e.startswith("Unknown option")]
    told = "; ".join(dict.fromkeys(unknown or errors))[:500]
    if unknown:
        raise DeviceError(what, found=told, expected="the options of this TensorRT", do="report this: it is a mistake of ours")
    if re.search(r"out of memory|OutOfMemory|Cuda Runtime \(out of", log, re.IGNORECASE):
        raise DeviceError(what, found="its memory ran out", expected="memory for it", do="end other programs on the board")
    if "Failed to parse onnx file" in log or "Parsing model failed" in log or "Failed to create engine" in log:
        raise BuildError(what, found=told or "no reason in its log", expected="a graph this TensorRT takes")
    how = f"exit code {code}" if code >= 0 else f"signal {-code}"
    raise DeviceError(what, found=told or how, expected="&&&& PASSED at the end of its log")


def compute_times_ms(text: str) -> list[float]:
    """GPU compute time of every inference, from the file of --exportTimes.

    Raises:
        DeviceError: the file is not what trtexec writes.
    """
    try:
        found = [float(row["computeMs"]) for row in json.loads(text)]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DeviceError("the times trtexec wrote cannot be read", found=str(error), expected="rows with computeMs") from error
    if not found or not all(0 < time < math.inf for time in found):
        raise DeviceError("the times trtexec wrote mean nothing", found=f"{len(found)} times, the least {min(found, default=0)}")
    return found


def warnings(log: str) -> tuple[str, ...]:
    """Warnings of trtexec about its own figures: unstable clocks, a host that cannot keep up."""
    lines = re.findall(r"\[W\] \* (.+)$", log, re.MULTILINE)
    return tuple(dict.fromkeys(printable(line.strip()) for line in lines if "unstable" in line or "bound by" in line))


def gpu(log: str) -> dict[str, str]:
    """Description of the GPU, from the log of a call that used it; empty where the log has none."""
    found = {"gpu": r"Selected Device: (.+)$", "compute_capability": r"Compute Capability: ([\d.]+)", "sms": r"\bSMs: (\d+)"}
    matches = {key: re.search(pattern, log, re.MULTILINE) for key, pattern in found.items()}
    return {key: printable(match[1].strip()) for key, match in matches.items() if match}


def layer_times(text: str) -> tuple[LayerTime, ...]:
    """Layers from the file of --exportProfile. It does not escape names, so a file that is not valid JSON is read by pattern.

    Raises:
        DeviceError: the file is not what trtexec writes.
    """
    try:
        try:
            rows: list[dict[str, Any]] = [row for row in json.loads(text) if "averageMs" in row]
        except ValueError:
            found = [match for line in text.split("\n") if (match := _LAYER.match(line))]
            rows = [{"name": match[1], "averageMs": match[2]} for match in found]
        layers = tuple(LayerTime(printable(str(row["name"])), float(row["averageMs"])) for row in rows)
        if wrong := [layer for layer in layers if not 0 <= layer.average_ms < math.inf]:
            raise ValueError(f"{wrong[0].average_ms} ms")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        expected = "rows with averageMs"
        raise DeviceError("the profile trtexec wrote cannot be read", found=str(error)[:200], expected=expected) from error
    return layers


def sparsity(log: str) -> Sparsity:
    """Which layers could use 2:4 kernels and which do, from a build with --verbose."""

    def names(pattern: str) -> tuple[str, ...]:
        found = re.search(rf"\(Sparsity\) {pattern}:(.*)$", log, re.MULTILINE)
        return tuple(printable(part.strip()) for part in found[1].split(",") if part.strip()) if found else ()

    return Sparsity(names("Layers eligible for sparse math"), names("TRT inference plan picked sparse implementation for layers"))


def _spelled(value: re.Match[str]) -> str:
    """Infinity and not-a-number, which C++ writes in its own way, as Python's decoder of JSON spells them."""
    return value[1] + {"inf": "Infinity", "nan": "NaN"}[value[2]]


def outputs(text: str) -> dict[str, list[float]]:
    """The values of an engine's outputs by name, from the file of --exportOutput.

    Raises:
        DeviceError: the file is not what trtexec writes, or the number of values does not match an output's shape.
    """
    try:
        found = json.loads(re.sub(r"(?<=[\[,\s])(-?)(inf|nan)(?=[\s,\]])", _spelled, text))
        if not isinstance(found, list) or not found:
            raise ValueError("no tensors")
        tensors = [(str(one["name"]), str(one["dimensions"]), list(map(float, one["values"]))) for one in found]
        counts = [math.prod(map(int, shape.split("x"))) for _, shape, _ in tensors]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DeviceError("the outputs trtexec wrote cannot be read", found=str(error), expected="a list of tensors") from error
    for (name, _, values), count in zip(tensors, counts, strict=True):
        if len(values) != count:
            raise DeviceError(f"the output {name} of trtexec", found=f"{len(values)} values", expected=f"{count}")
    return {name: values for name, _, values in tensors}
