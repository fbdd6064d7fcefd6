"""The interface of a runtime to the agent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class Runtime(ABC):
    """A runtime, and in it at most one model. What cannot be done is a `Refusal`."""

    version = ""

    @abstractmethod
    def load(self, path: str, threads: int) -> None:
        """Load a model's file in place of the one before; `threads` is for the work inside one operator."""

    @abstractmethod
    def inputs(self) -> list[dict[str, Any]]:
        """{name, kind, shape} of each input; kinds are those of ONNX Runtime, such as "tensor(float)"."""

    @abstractmethod
    def feed(self, arrays: dict[str, Any]) -> None:
        """Put inputs in place."""

    @abstractmethod
    def infer(self) -> object:
        """One inference of the inputs in place: what is timed."""

    @abstractmethod
    def outputs(self) -> dict[str, Any]:
        """Outputs by name, of one inference."""

    @abstractmethod
    def layers(self, runs: int) -> list[list[Any]]:
        """[name, kind, nanoseconds] of each operator, by the runtime's own profiler."""
