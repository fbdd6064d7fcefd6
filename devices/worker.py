"""The process that runs models and takes their times: `python -m edge_compress.devices.worker`.

One JSON object a line on stdin, one answer a line on stdout. It imports the standard library, numpy, the runtime and
what it shares with agent.py, nothing else, so that a fresh one starts in a fraction of a second and no other library's
threads disturb it.

    {"op": "describe", "runtime": "onnxruntime", "threads": 1}
        -> {"ok": true, "machine": {"cpu": ..., "governor": ..., "runtime_version": ..., ...}}
    {"op": "measure", "runtime", "threads", "affinity", "models": [baseline, candidate, ...], "seed", "min_pairs",
     "max_pairs", "max_seconds", "half_width", "block", "min_sample_ms", "warmup_seconds", "warmup_window"}
        -> {"ok": true, "models": [{"wall_ns": [...], "cpu_ns": [...], "k": 3}, ...], "stop": "converged", ...}
    anything that cannot be done -> {"ok": false, "kind": "load" | "run" | "runtime" | "request", "error": "one line"}

Times are nanoseconds for a single inference: a sample runs k of them, so that it lasts at least `min_sample_ms` and all
models' samples last about the same. In every round each model gives one sample, in random order.
"""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .agent import Refusal, describe_machine, peak_rss, pin, sensors
from .measure.stats import half_width

_WARM = 0.05  # two consecutive windows differ by less: warm
_CLOCK_STEPS = 200  # a sample lasts at least this many steps of the clock


@dataclass
class Loaded:
    """A model in its runtime with its inputs in place; `run` is one inference."""

    run: Callable[[], object]
    version: str
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    k: int = 1


def _onnxruntime(path: str, threads: int, seed: int) -> Loaded:
    try:
        import onnxruntime
    except ImportError as error:
        raise Refusal("runtime", f"onnxruntime: {error}") from error
    onnxruntime.set_default_logger_severity(3)
    if not path:
        return Loaded(lambda: None, onnxruntime.__version__)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base but this one
        raise Refusal("load", f"{Path(path).name}: {error}") from error
    feeds = {i.name: random_input(i.name, i.type, i.shape, seed + n) for n, i in enumerate(session.get_inputs())}

    def run() -> None:
        try:
            session.run(None, feeds)
        except Exception as error:
            raise Refusal("run", f"{Path(path).name}: {error}") from error

    return Loaded(run, onnxruntime.__version__)


def _litert(path: str, threads: int, seed: int) -> Loaded:
    try:
        version = metadata.version("ai-edge-litert")
        from ai_edge_litert.interpreter import Interpreter
    except (ImportError, metadata.PackageNotFoundError) as error:
        raise Refusal("runtime", f"ai-edge-litert: {error}") from error
    if not path:
        return Loaded(lambda: None, version)
    try:
        interpreter = Interpreter(model_path=path, num_threads=threads)
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        raise Refusal("load", f"{Path(path).name}: {error}") from error
    for n, detail in enumerate(interpreter.get_input_details()):
        kind = _TENSOR_TYPES.get(np.dtype(detail["dtype"]).name, str(detail["dtype"]))
        shape = [int(size) for size in detail["shape"]]
        interpreter.set_tensor(detail["index"], random_input(detail["name"], kind, shape, seed + n))

    def run() -> None:
        try:
            interpreter.invoke()
        except RuntimeError as error:
            raise Refusal("run", f"{Path(path).name}: {error}") from error

    return Loaded(run, version)


_TENSOR_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "uint8": "tensor(uint8)", "int8": "tensor(int8)"}

# runtime name -> loader(path, threads, seed); an empty path asks for the version only
RUNTIMES: dict[str, Callable[[str, int, int], Loaded]] = {"onnxruntime": _onnxruntime, "litert": _litert}


def random_input(name: str, kind: str, shape: list[Any], seed: int) -> np.ndarray[Any, Any]:
    """Seeded values of the input's own type and shape; a free first dimension (the batch) is 1."""
    sizes = [1 if n == 0 and not isinstance(s, int) else s for n, s in enumerate(shape)]
    if not all(isinstance(s, int) and s > 0 for s in sizes):
        raise Refusal("load", f"input {name}: shape {shape}: only the first dimension may be free")
    rng = np.random.default_rng(seed)
    floats = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
    if kind in floats:
        return rng.standard_normal(sizes).astype(floats[kind])
    if kind == "tensor(uint8)":
        return rng.integers(0, 256, sizes, dtype=np.uint8)
    if kind == "tensor(int8)":
        return rng.integers(-128, 128, sizes, dtype=np.int8)
    raise Refusal("load", f"input {name}: type {kind}: expected float, float16, double, uint8 or int8")


class Worker:
    """Answers requests; keeps the last baseline loaded, so that a search loads only its candidates."""

    def __init__(self) -> None:
        self.parent = os.getppid()
        self.baseline: tuple[tuple[str, str, int, int], Loaded] | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        try:
            loader = RUNTIMES.get(request["runtime"])
            if loader is None:
                raise Refusal("request", f"runtime {request['runtime']!r}: not one of {', '.join(sorted(RUNTIMES))}")
            if request["op"] == "describe":
                version = loader("", 1, 0).version
                return {"ok": True, "machine": describe_machine() | {"runtime_version": version}}
            if request.get("affinity"):
                pin(request["affinity"])
            return {"ok": True, **self._measure(self._load(loader, request), request)}
        except Refusal as refusal:
            return {"ok": False, "kind": refusal.kind, "error": str(refusal)}

    def _load(self, loader: Callable[[str, int, int], Loaded], request: dict[str, Any]) -> list[Loaded]:
        first, *others = request["models"]
        threads, seed = request["threads"], request["seed"]
        key = (request["runtime"], first, threads, seed)
        if self.baseline is None or self.baseline[0] != key:
            self.baseline = (key, loader(first, threads, seed))
        baseline = Loaded(self.baseline[1].run, self.baseline[1].version)
        return [baseline, *(loader(path, threads, seed) for path in others)]

    def _measure(self, models: list[Loaded], request: dict[str, Any]) -> dict[str, Any]:
        resolution_ns = time.get_clock_info("perf_counter").resolution * 1e9
        floor_ns = max(request["min_sample_ms"] * 1e6, _CLOCK_STEPS * resolution_ns)
        gc.collect()
        gc.disable()
        try:
            warm_s = _warm_up(models, floor_ns, request["warmup_seconds"], request["warmup_window"])
            stop, readings = self._rounds(models, request)
        finally:
            gc.enable()
        return {
            "models": [{"wall_ns": m.wall, "cpu_ns": m.cpu, "k": m.k} for m in models],
            "stop": stop,
            "warmup_s": warm_s,
            "temperatures_c": [t for t, _ in readings],
            "frequencies_mhz": [f for _, f in readings],
            "peak_rss_bytes": peak_rss(os.getpid()),
            "machine": describe_machine() | {"runtime_version": models[0].version},
        }

    def _rounds(self, models: list[Loaded], request: dict[str, Any]) -> tuple[str, list[tuple[list[float], list[float]]]]:
        """Rounds in shuffled order until the interval is narrow enough or a limit is reached."""
        rng = np.random.default_rng(request["seed"])
        started = looked = time.monotonic()
        readings = [sensors()]
        done, check = 0, request["min_pairs"]
        while True:
            for i in rng.permutation(len(models)):
                wall, cpu = _sample(models[i])
                models[i].wall.append(wall)
                models[i].cpu.append(cpu)
            done += 1
            now = time.monotonic()
            if done >= request["max_pairs"]:
                return "pairs", readings
            if now - started > request["max_seconds"]:
                return "time", readings
            if os.getppid() != self.parent:  # nobody is left to read the answer
                sys.exit(1)
            if now - looked > 1.0:
                looked = now
                readings.append(sensors())
            if done >= check:
                check = done + max(5, done // 4)
                if _widest(models, request["block"]) < request["half_width"]:
                    return "converged", readings


def _widest(models: list[Loaded], block: int) -> float:
    """The widest half-width among the candidates' ratios; of the baseline's own times when it is alone."""
    base = np.array(models[0].wall)
    arrays = [base / np.array(m.wall) for m in models[1:]] or [base]
    return max(half_width(a, block=block) for a in arrays)


def _sample(model: Loaded) -> tuple[float, float]:
    """Wall and process CPU nanoseconds of one inference, the mean of k."""
    run = model.run
    cpu, wall = time.process_time_ns(), time.perf_counter_ns()
    for _ in range(model.k):
        run()
    wall = time.perf_counter_ns() - wall
    cpu = time.process_time_ns() - cpu
    return wall / model.k, cpu / model.k


def _warm_up(models: list[Loaded], floor_ns: float, seconds: float, window: int) -> float:
    """Run all models in turn until two consecutive windows of each agree, and set k; seconds it took.

    Samples of all models get about the same length: on a busy machine a longer one is interrupted more often, and the
    slower model would seem slower than it is.
    """
    started = time.monotonic()
    best = [math.inf] * len(models)  # ns of an inference that nothing interrupted: the least of wall and CPU time seen
    times: list[list[float]] = [[] for _ in models]

    def run_once() -> None:
        for n, model in enumerate(models):
            wall, cpu = _sample(model)
            best[n] = min(best[n], wall, cpu if cpu > 0 else wall)
            times[n].append(wall)

    for _ in range(2):
        run_once()
    for model, least, own in zip(models, best, times, strict=True):
        model.k = max(1, math.ceil(floor_ns / least))
        own.clear()
    while time.monotonic() - started < seconds:
        run_once()
        if len(times[0]) >= 2 * window and all(_settled(own, window) for own in times):
            break
    length = max(floor_ns, *best)
    for model, least in zip(models, best, strict=True):
        model.k = max(round(length / least), math.ceil(floor_ns / least))
    return time.monotonic() - started


def _settled(times: list[float], window: int) -> bool:
    before, after = np.median(times[-2 * window : -window]), np.median(times[-window:])
    return bool(abs(after / before - 1.0) < _WARM)


def main() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what native libraries print must not end up among the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when this process ends
    worker = Worker()
    for line in sys.stdin:
        answers.write(json.dumps(worker.answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
