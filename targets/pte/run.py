"""A .pte file in ExecuTorch: its outputs, and its input and output tensors."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

from ...pipeline.errors import BuildError, UnavailableError, install_hint
from ...pipeline.signature import FileTensor, Signature
from ..base import AS_RETURNED, Infer, Runner, scaling_of
from ..onnx.run import in_blocks
from ..quiet import quiet


def predictor(data: bytes, *, name: str = "the model", infer: Infer | None = None) -> Runner:
    """The file's inputs to its outputs, sample by sample, in the threads of ExecuTorch's own pool.

    The pool is process-wide: resizing it would free the one that loaded models hold. `infer` makes the inferences
    instead, with the agent's names: `input_0`, `output_0`.

    Raises:
        UnavailableError: the package was built for another PyTorch.
        BuildError: the runtime refused the model; from the runner: or its inputs.
    """
    with quiet():  # the package warns that its interface may change, and its library writes below Python
        try:
            from executorch.exir.tensor import scalar_type_table
            from executorch.runtime import Runtime
        except ImportError as error:  # its library is linked against one version of PyTorch's
            raise UnavailableError(
                "ExecuTorch cannot be loaded", found=str(error)[:300], do=install_hint("executorch")
            ) from error
        try:
            program = Runtime.get().load_program(data)  # holds the bytes, which its methods do not
            method = program.load_method("forward")
            meta = method.metadata
            dtypes = {int(code): str(dtype).removeprefix("torch.") for dtype, code in scalar_type_table.items()}
            types = [dtypes[meta.input_tensor_meta(i).dtype()] for i in range(meta.num_inputs())]
        except (RuntimeError, ValueError, KeyError) as error:
            raise BuildError(f"ExecuTorch cannot load {name}", found=str(error)[:500]) from error
    loaded = (program, method)  # together: see above

    def answer(given: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        if infer is not None:
            found = infer(given)
            return [found[f"output_{i}"] for i in range(len(found))]
        try:
            outputs = loaded[1].execute([torch.tensor(array) for array in given.values()])
        except (RuntimeError, ValueError) as error:  # values of another shape, or an operator that gave up
            raise BuildError(f"ExecuTorch cannot run {name}", found=str(error)[:500]) from error
        return [value.numpy() for value in outputs if isinstance(value, torch.Tensor)]

    return in_blocks([(f"input_{i}", kind) for i, kind in enumerate(types)], answer, 1)


def sides_of(
    signature: Signature, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[FileTensor, ...], tuple[FileTensor, ...]]:
    """Returns the input and output tensors of a file, which has no names for them; inputs are normalised pixels with `mean`."""
    given = scaling_of(mean, std)
    inputs = tuple(FileTensor(s.name, (1, *s.shape), "NCHW" if mean else "", s.dtype, given) for s in signature.inputs)
    return inputs, tuple(FileTensor(s.name, (1, *s.shape), "", s.dtype, AS_RETURNED) for s in signature.outputs)
