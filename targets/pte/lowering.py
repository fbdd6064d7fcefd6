"""A torch module as a .pte file: exported with batch 1, BatchNorm folded, given to XNNPACK as far as XNNPACK takes it."""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx, nn

from ...pipeline.errors import BuildError, deepest_cause
from ...pipeline.signature import Signature
from ..onnx.export import fold_batchnorm, zeros
from ..quiet import quiet

Example = tuple[torch.Tensor, ...]


class _Positional(nn.Module):
    """A module whose inputs are keyword arguments, as one that takes them in the signature's order."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *values: torch.Tensor) -> object:
        """The module's outputs."""
        return self.module(**dict(zip(self.names, values, strict=True)))


def one_sample(signature: Signature) -> Example:
    """Zeros for each input, in order."""
    return tuple(zeros(signature).values())


def exported(module: nn.Module, signature: Signature) -> fx.GraphModule:
    """The graph of the module in eval mode, batch 1, with positional inputs. The module is not changed.

    Raises:
        BuildError: it cannot be exported.
    """
    folded = fold_batchnorm(module)
    example = one_sample(signature)
    if signature.by_name:
        folded = _Positional(folded, tuple(spec.name for spec in signature.inputs)).eval()
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(folded, example, strict=False).module()
    except Exception as error:  # the exporter raises many types, all of them about the user's module
        raise BuildError("the model cannot be exported", found=deepest_cause(error), do="replace this operation") from error


def lowered(network: fx.GraphModule, example: Example) -> tuple[bytes, Counter[str]]:
    """The file of a graph, and the operators that XNNPACK left to ExecuTorch's portable kernels, which are slow.

    Raises:
        BuildError: the converter refused an operator.
    """
    try:
        with quiet(), torch.no_grad():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            program = torch.export.export(network, example, strict=False)
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            called = (n.target.__name__.split(".") for n in edge.exported_program().graph.nodes if n.op == "call_function")
            left = Counter(parts[-2] for parts in called if len(parts) > 1)  # not XNNPACK's parts, nor what takes their outputs
            return bytes(edge.to_executorch().buffer), left
    except Exception as error:  # of many types, all of them about the user's module
        raise BuildError(
            "the model cannot be converted to .pte", found=deepest_cause(error), do="replace this operation"
        ) from error
