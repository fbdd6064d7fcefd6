"""ExecuTorch with XNNPACK on the CPU."""

from __future__ import annotations

from typing import Any

from ..board import runtime_versions
from ..frames import Refusal, failure_kind
from .base import Runtime

# torch's numbers of types (c10/core/ScalarType.h): their names in torch and in ONNX Runtime
KINDS = {
    0: ("uint8", "uint8"),
    1: ("int8", "int8"),
    2: ("int16", "int16"),
    3: ("int32", "int32"),
    4: ("int64", "int64"),
    5: ("float16", "float16"),
    6: ("float32", "float"),
    7: ("float64", "double"),
    11: ("bool", "bool"),
}


class ExecuTorch(Runtime):
    """ExecuTorch with XNNPACK on the cpu. A .pte file has no names for its inputs: they are numbered."""

    def __init__(self, package: str) -> None:
        import torch
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime as Loader

        self.torch, self.library, self.loader = torch, portable_lib, Loader.get()
        self.version = runtime_versions().get(package, "unknown")

    def load(self, path: str, threads: int) -> None:
        """See `Runtime.load`."""
        try:
            self.method: Any = None
            self.program: Any = None  # they run in the pool that is replaced now
            self.library._unsafe_reset_threadpool(threads)
            self.program = self.loader.load_program(path)
            self.method = self.program.load_method("forward")
            meta = self.method.metadata
            infos = [meta.input_tensor_meta(i) for i in range(meta.num_inputs())]
            self.entries = [(f"input_{i}", KINDS[info.dtype()], [int(n) for n in info.sizes()]) for i, info in enumerate(infos)]
            self.given = [self.torch.zeros(shape, dtype=getattr(self.torch, kind)) for _, (kind, _), shape in self.entries]
            self.infer()
        except Exception as error:
            raise Refusal(failure_kind("load", error), str(error)) from error

    def inputs(self) -> list[dict[str, Any]]:
        """See `Runtime.inputs`."""
        return [{"name": name, "kind": f"tensor({kind})", "shape": shape} for name, (_, kind), shape in self.entries]

    def feed(self, arrays: dict[str, Any]) -> None:
        """See `Runtime.feed`."""
        try:
            given = [self.torch.tensor(arrays[name]) for name, _, _ in self.entries]
        except (KeyError, TypeError) as error:
            raise Refusal("request", f"inputs: {error}") from error
        for value, before, (name, _, _) in zip(given, self.given, self.entries):  # noqa: B905
            if (value.shape, value.dtype) != (before.shape, before.dtype):
                found, wanted = (f"{x.dtype} {list(x.shape)}" for x in (value, before))
                raise Refusal("request", f"inputs: {name} is {found}, not {wanted}")
        self.given = given

    def infer(self) -> Any:
        """See `Runtime.infer`."""
        try:
            return self.method.execute(self.given)
        except Exception as error:
            raise Refusal(failure_kind("run", error), str(error)) from error

    def outputs(self) -> dict[str, Any]:
        """See `Runtime.outputs`."""
        return {f"output_{i}": value.numpy() for i, value in enumerate(self.infer())}

    def layers(self, runs: int) -> list[list[Any]]:
        """See `Runtime.layers`."""
        raise Refusal("runtime", "executorch: its Python package has no profiler")
