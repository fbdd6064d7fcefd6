"""The runtimes that models can be loaded in; each file wraps one. Nothing is imported until a model asks for it."""

from __future__ import annotations

from ..frames import Refusal
from .base import Runtime

# runtime -> the packages it may come in; the first that loads the model and runs it is taken
RUNTIMES = {"onnxruntime": ("onnxruntime",), "litert": ("ai_edge_litert", "tflite_runtime"), "executorch": ("executorch",)}


def started(runtime: str, package: str) -> Runtime:
    """The runtime out of one of its packages, without a model.

    Raises:
        Refusal: the package cannot be imported.
    """
    try:
        if runtime == "onnxruntime":
            from .onnxruntime import OnnxRuntime

            return OnnxRuntime(package)
        if runtime == "executorch":
            from .executorch import ExecuTorch

            return ExecuTorch(package)
        from .litert import LiteRt

        return LiteRt(package)
    except Exception as error:  # a wheel for another machine fails in its own ways
        raise Refusal("runtime", f"{package}: {error}") from error
