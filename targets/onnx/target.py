"""Shared code of the targets with ONNX files. Heavy imports stay inside functions: targets are listed without them."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ...pipeline.signature import FileTensor, Signature
from ..base import AS_GIVEN, AS_RETURNED, BuildRequest, Converted, Interface, Runner, Target, scaling_of

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from ...calibration.ranges import Range
    from .int8 import Recipe

PIXELS = "float32 NCHW, already scaled and normalised"
PACKAGES = ("onnx", "onnxscript", "onnxruntime", "torch")


class OnnxTarget(Target):
    """A target whose artifact is an ONNX file; see `targets.base.Target`."""

    def missing(self) -> str | None:
        """Which packages an ONNX file cannot be made without are not installed, with the command that installs them; or None."""
        absent = [name for name in PACKAGES if find_spec(name) is None]
        return f"packages are missing: pip install {' '.join(absent)}" if absent else None

    def baseline(self, module: nn.Module, interface: Interface) -> bytes:
        """The float file of a dense network, see `targets.base.Target`."""
        self.require()
        from .export import export_float

        return self.file_of(export_float(module, interface.signature), interface.classes)

    @abstractmethod
    def file_of(self, model: onnx.ModelProto, classes: tuple[str, ...]) -> bytes:
        """The model's file with the metadata its reader needs."""


def taken(signature: Signature, classes: tuple[str, ...]) -> str:
    """What a file takes and gives, as a note."""
    if classes:
        return f"input: {PIXELS}; output: logits"
    sides = signature.inputs, signature.outputs
    inputs, outputs = (", ".join(f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in specs) for specs in sides)
    return f"inputs {AS_GIVEN}, one sample: {inputs}; outputs: {outputs}"


def sides_of(
    model: onnx.ModelProto, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[FileTensor, ...], tuple[FileTensor, ...]]:
    """Returns the input and output tensors of a file; with `mean` and `std` its inputs are normalised pixels."""
    from onnx.helper import tensor_dtype_to_np_dtype

    def tensor(value: onnx.ValueInfoProto, layout: str, scaling: str) -> FileTensor:
        kind = value.type.tensor_type
        shape = tuple(dim.dim_value or -1 for dim in kind.shape.dim)
        return FileTensor(value.name, shape, layout, tensor_dtype_to_np_dtype(kind.elem_type).name, scaling)

    given = scaling_of(mean, std)
    inputs = tuple(tensor(value, "NCHW" if mean else "", given) for value in model.graph.input)
    return inputs, tuple(tensor(value, "", AS_RETURNED) for value in model.graph.output)


def facts_of(model: onnx.ModelProto, classes: tuple[str, ...]) -> dict[str, str]:
    """What a file's metadata say of its inputs and outputs."""
    names = [value.name for value in model.graph.output]
    given = PIXELS if classes else AS_GIVEN
    return {"classes": json.dumps(classes), "input": given, "output": ", ".join(names)}


def best_int8(
    network: onnx.ModelProto,
    request: BuildRequest,
    quantize: Callable[[onnx.ModelProto, Mapping[str, Range], Recipe], onnx.ModelProto],
    load: Callable[[bytes, int], Runner],
    activation_type: str,
    weight_bits: tuple[int, ...] = (8,),
) -> Converted[onnx.ModelProto]:
    """The QDQ network that costs least on the search split; `load` returns a runner of a file's bytes with so many threads."""
    from ..int8_choice import Int8Format, choose_int8
    from .export import export_float
    from .int8 import ends, histograms

    how = Int8Format(
        activation_type=activation_type,
        export=lambda module: export_float(module, request.signature),
        collect=lambda model: histograms(model, request),
        quantize=quantize,
        load=lambda model: load(model.SerializeToString(), request.threads),
        weight_bits=weight_bits,
        ends=ends(network),
    )
    return choose_int8(network, request, how)
