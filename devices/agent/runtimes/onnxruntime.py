"""ONNX Runtime on the CPU; numpy comes with it."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from ..frames import Refusal, failure_kind
from .base import Runtime


class OnnxRuntime(Runtime):
    """ONNX Runtime on the cpu; numpy comes with it."""

    def __init__(self, package: str) -> None:
        import numpy

        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it would send usage data, from a thread of its own
        import onnxruntime

        self.numpy, self.runtime, self.version = numpy, onnxruntime, str(onnxruntime.__version__)
        onnxruntime.set_default_logger_severity(3)
        self.feeds: dict[str, Any] = {}

    def load(self, path: str, threads: int) -> None:
        """See `Runtime.load`."""
        self.path, self.threads, self.feeds = path, threads, {}
        self.session = self._session(self._options())

    def _options(self) -> Any:
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return options

    def _session(self, options: Any) -> Any:
        try:
            return self.runtime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base but this one
            raise Refusal(failure_kind("load", error), str(error)) from error

    def inputs(self) -> list[dict[str, Any]]:
        """See `Runtime.inputs`."""
        return [{"name": i.name, "kind": i.type, "shape": list(i.shape)} for i in self.session.get_inputs()]

    def feed(self, arrays: dict[str, Any]) -> None:
        """See `Runtime.feed`."""
        self.feeds = arrays

    def infer(self) -> Any:
        """See `Runtime.infer`."""
        try:
            return self.session.run(None, self.feeds)
        except Exception as error:
            raise Refusal(failure_kind("run", error), str(error)) from error

    def outputs(self) -> dict[str, Any]:
        """See `Runtime.outputs`."""
        return dict(zip([o.name for o in self.session.get_outputs()], self.infer()))  # noqa: B905 - strict is newer than 3.8

    def layers(self, runs: int) -> list[list[Any]]:
        """By its profiler, in a session of its own; the first inference is left out."""
        with tempfile.TemporaryDirectory() as folder:
            options = self._options()
            options.enable_profiling, options.profile_file_prefix = True, folder + "/profile"
            session = self._session(options)
            for _ in range(runs + 1):
                session.run(None, self.feeds)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        found: dict[Any, list[float]] = {}  # several operators can have one name
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                about = event["args"]
                key = (event["name"][: -len("_kernel_time")], about.get("op_name", ""), about.get("node_index"))
                found.setdefault(key, []).append(event["dur"] * 1000.0)
        return [[name, kind, _middle(times[1:] or times)] for (name, kind, _), times in found.items()]


def _middle(times: list[float]) -> float:
    """Mean of the middle half: the profiler counts whole microseconds, and some runs are interrupted."""
    ordered, quarter = sorted(times), len(times) // 4
    return statistics.mean(ordered[quarter : len(times) - quarter])
