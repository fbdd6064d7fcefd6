"""A torch module as a .pte file: exported with batch 1, BatchNorm folded, delegated to XNNPACK as far as it can be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.export import ExportedProgram

from ...pipeline.errors import BuildError, deepest_cause
from ...pipeline.signature import Signature
from ..onnx.export import fold_batchnorm, zeros
from ..quiet import quiet


class _Positional(nn.Module):
    """A module with keyword inputs, called with positional ones in the signature's order."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *values: torch.Tensor) -> object:
        """The module's outputs."""
        return self.module(**dict(zip(self.names, values, strict=True)))


def exported(module: nn.Module, signature: Signature) -> ExportedProgram:
    """The module in eval mode as an exported program, batch 1, with positional inputs. The module is not changed.

    Raises:
        BuildError: it cannot be exported.
    """
    folded = fold_batchnorm(module, signature)
    if signature.by_name:
        folded = _Positional(folded, tuple(spec.name for spec in signature.inputs)).eval()
    with converting("the model cannot be exported"):
        return torch.export.export(folded, tuple(zeros(signature).values()), strict=False)


def lowered(program: ExportedProgram) -> tuple[bytes, Counter[str]]:
    """The .pte file of a program, and the operators not delegated to XNNPACK, which run in ExecuTorch's slow portable kernels.

    Raises:
        BuildError: the converter refused an operator.
    """
    with converting("the model cannot be converted to .pte"):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        called = (n.target.__name__.split(".") for n in edge.exported_program().graph.nodes if n.op == "call_function")
        portable = Counter(parts[-2] for parts in called if len(parts) > 1)  # delegate calls and getitem have no namespace
        return bytes(edge.to_executorch().buffer), portable


@contextmanager
def converting(what: str) -> Iterator[None]:
    """Runs a converter silently and without gradients; whatever it raises becomes a BuildError that says `what` failed."""
    try:
        with quiet(), torch.no_grad():
            yield
    except Exception as error:  # converters raise many types, all of them about the user's module
        raise BuildError(what, found=deepest_cause(error), do="replace this operation") from error
