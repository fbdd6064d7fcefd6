"""ExecuTorch with XNNPACK on the CPU."""

from __future__ import annotations

from typing import Any

from ..board import runtime_versions
from ..frames import Refusal, failure_kind
from .base import Runtime


class ExecuTorch(Runtime):
    """ExecuTorch with XNNPACK on the cpu. A .pte file has no names for its inputs: they are numbered."""

    def __init__(self, package: str) -> None:
        import torch
        from executorch.exir.tensor import scalar_type_table
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime as Loader

        self.torch, self.library, self.loader = torch, portable_lib, Loader.get()
        self.dtypes = {int(code): dtype for dtype, code in scalar_type_table.items()}
        self.method: Any = None
        self.program: Any = None
        self.version = runtime_versions().get(package, "unknown")

    def load(self, path: str, threads: int) -> None:
        """See `Runtime.load`."""
        try:
            self.method = self.program = None  # they hold the thread pool that is replaced now
            self.library._unsafe_reset_threadpool(threads)
            self.program = self.loader.load_program(path)
            self.method = self.program.load_method("forward")
            meta = self.method.metadata
            infos = [meta.input_tensor_meta(i) for i in range(meta.num_inputs())]
            self.given = [self.torch.zeros([int(n) for n in info.sizes()], dtype=self.dtypes[info.dtype()]) for info in infos]
            self.infer()
        except Exception as error:
            raise Refusal(failure_kind("load", error), str(error)) from error

    def inputs(self) -> list[dict[str, Any]]:
        """See `Runtime.inputs`."""
        names = {"float32": "float", "float64": "double"}
        kinds = [str(value.dtype).partition(".")[2] for value in self.given]
        return [
            {"name": f"input_{i}", "kind": f"tensor({names.get(kind, kind)})", "shape": list(value.shape)}
            for i, (kind, value) in enumerate(zip(kinds, self.given))  # noqa: B905
        ]

    def feed(self, arrays: dict[str, Any]) -> None:
        """See `Runtime.feed`."""
        try:
            given = [self.torch.tensor(arrays[f"input_{i}"]) for i in range(len(self.given))]
        except (KeyError, TypeError) as error:
            raise Refusal("request", f"inputs: {error}") from error
        for i, (value, before) in enumerate(zip(given, self.given)):  # noqa: B905
            if (value.shape, value.dtype) != (before.shape, before.dtype):
                found, wanted = (f"{x.dtype} {list(x.shape)}" for x in (value, before))
                raise Refusal("request", f"inputs: input_{i} is {found}, not {wanted}")
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
