"""Compress a trained PyTorch network into a smaller, measurably faster, verified artifact for a device.

    found = edge_compress.inspect(module, example_inputs)        what can be pruned of it
    result = edge_compress.compress("recipe.py", target="x86")   the whole pipeline
    module = edge_compress.load("runs/a", model=my_factory)      the pruned, trained network of a run

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline.axes.inspect import inspect
    from .pipeline.cli.api import Result, compress, load
    from .pipeline.task.recipe import Recipe

# From 1.29 on ONNX Runtime sends usage data to its maker by default, and keeps a device id; read once, when it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = version("edge-compress")
__all__ = ["Recipe", "Result", "__version__", "compress", "inspect", "load"]

_PLACES = {
    "Recipe": "pipeline.task.recipe",
    "Result": "pipeline.cli.api",
    "compress": "pipeline.cli.api",
    "inspect": "pipeline.axes.inspect",
    "load": "pipeline.cli.api",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_PLACES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
