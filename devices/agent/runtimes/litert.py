"""LiteRT, or TensorFlow Lite as it was called before, with XNNPACK on the CPU."""

from __future__ import annotations

import importlib
from typing import Any

from ..board import runtime_versions
from ..frames import Refusal, failure_kind
from .base import Runtime


class LiteRt(Runtime):
    """LiteRT, or TensorFlow Lite as it was called before, with XNNPACK on the cpu."""

    def __init__(self, package: str) -> None:
        import numpy

        self.numpy = numpy
        self.interpreter_class = importlib.import_module(package + ".interpreter").Interpreter
        known = runtime_versions().get(package.replace("_", "-"), "unknown")
        self.version = str(getattr(importlib.import_module(package), "__version__", known))

    def load(self, path: str, threads: int) -> None:
        """See `Runtime.load`."""
        try:
            self.interpreter = self.interpreter_class(model_path=path, num_threads=threads)
            self.interpreter.allocate_tensors()
            self.entries = self.interpreter.get_input_details()
            for entry in self.entries:
                self.interpreter.set_tensor(entry["index"], self.numpy.zeros(entry["shape"], entry["dtype"]))
            self.outputs()
        except Exception as error:  # another numpy than it was built for is not a RuntimeError
            raise Refusal(failure_kind("load", error), str(error)) from error

    def inputs(self) -> list[dict[str, Any]]:
        """See `Runtime.inputs`."""
        names = {"float32": "float", "float64": "double"}
        kinds = [self.numpy.dtype(e["dtype"]).name for e in self.entries]
        return [
            {"name": e["name"], "kind": f"tensor({names.get(kind, kind)})", "shape": [int(n) for n in e["shape"]]}
            for e, kind in zip(self.entries, kinds)  # noqa: B905
        ]

    def feed(self, arrays: dict[str, Any]) -> None:
        """See `Runtime.feed`."""
        try:
            for entry in self.entries:
                self.interpreter.set_tensor(entry["index"], arrays[entry["name"]])
        except (KeyError, ValueError) as error:
            raise Refusal("request", f"inputs: {error}") from error

    def infer(self) -> None:
        """See `Runtime.infer`."""
        try:
            self.interpreter.invoke()
        except Exception as error:
            raise Refusal(failure_kind("run", error), str(error)) from error

    def outputs(self) -> dict[str, Any]:
        """See `Runtime.outputs`."""
        self.infer()
        return {o["name"]: self.interpreter.get_tensor(o["index"]) for o in self.interpreter.get_output_details()}

    def layers(self, runs: int) -> list[list[Any]]:
        """See `Runtime.layers`."""
        raise Refusal("runtime", "litert: its Python interface has no profiler")
