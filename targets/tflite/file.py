"""A .tflite file as Python objects and back: constants inside, aligned, equal vectors stored once.

The objects are those of the schema that ai-edge-litert carries (`ModelT` and so on); beside their reading and writing, here is
what every edit asks of them: operator names, constants, shapes.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from typing import Any

import flatbuffers
import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import BuildError

Array = NDArray[Any]

IDENTIFIER = b"TFL3"
ALIGNMENT = 16  # bytes; kernels may read weights where they lie in the file


def read(data: bytes, name: str = "the file") -> Any:
    """The file's `ModelT`. Constants that the file keeps behind the flatbuffer (the quantizer writes such) are taken inside.

    Raises:
        BuildError: the bytes are no .tflite file.
    """
    if data[4:8] != IDENTIFIER:
        raise BuildError(f"{name} is no .tflite file", found=repr(data[4:8]), expected=repr(IDENTIFIER))
    from ai_edge_litert import schema_py_generated as schema

    try:
        model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
        buffers = list(model.buffers)
    except Exception as error:  # whatever the generated code stumbles over
        raise BuildError(f"{name} is a damaged .tflite file", found=str(error)[:200], do="make it again") from error
    for buffer in buffers:
        if buffer.offset > 1 and buffer.size:  # 1 means "behind the flatbuffer, offset not known yet"
            buffer.data = np.frombuffer(data, np.uint8, buffer.size, buffer.offset)
        buffer.offset = buffer.size = 0
    return model


def write(model: Any) -> bytes:
    """The file of a `ModelT`; equal models give equal bytes."""
    builder = _Builder(1 << 16)
    builder.Finish(model.Pack(builder), IDENTIFIER)
    return bytes(builder.Output())


class _Builder(flatbuffers.Builder):  # type: ignore[misc]
    """Aligns constants, and stores a vector that is there already once: zero points alone are eight bytes a channel."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._known: dict[tuple[str, bytes], int] = {}

    def CreateNumpyVector(self, x: Array) -> int:
        """The offset of a vector with these numbers."""
        key = (x.dtype.str, x.tobytes())
        if key not in self._known:
            if x.dtype == np.uint8:
                # `StartVector` aligns what follows by the element; this makes sure of more
                self.Prep(ALIGNMENT, x.size)
            self._known[key] = super().CreateNumpyVector(x)
        return self._known[key]


def graph_of(model: Any) -> Any:
    """The one subgraph.

    Raises:
        BuildError: there are more.
    """
    if len(model.subgraphs) != 1:
        raise BuildError("the converted network", found=f"{len(model.subgraphs)} subgraphs", expected="one")
    return model.subgraphs[0]


def op_name(model: Any, op: Any) -> str:
    """`CONV_2D` and so on."""
    code = model.operatorCodes[op.opcodeIndex]
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    return _op_names().get(number, str(number))


def op_counts(data: bytes) -> Counter[str]:
    """Number of each operator in a file."""
    model = read(data)
    return Counter(op_name(model, op) for op in graph_of(model).operators)


def constant(model: Any, tensor: Any) -> Array | None:
    """A tensor's value in its own shape and type; None for an activation."""
    data = model.buffers[tensor.buffer].data
    if data is None or len(data) == 0:
        return None
    raw: Array = np.asarray(data, dtype=np.uint8)
    value: Array = raw.view(_dtypes()[tensor.type]).reshape(tuple(int(n) for n in tensor.shape))
    return value


def add_buffer(model: Any, value: Array) -> int:
    """Index of a new buffer with these numbers."""
    from ai_edge_litert import schema_py_generated as schema

    model.buffers.append(schema.BufferT(np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)))
    return len(model.buffers) - 1


def operator_code(model: Any, kind: str, version: int = 1) -> int:
    """Index of an operator's code, which is added where the model has none."""
    from ai_edge_litert import schema_py_generated as schema

    number = getattr(schema.BuiltinOperator, kind)
    for index, code in enumerate(model.operatorCodes):
        if max(code.builtinCode, code.deprecatedBuiltinCode) == number:
            return index
    model.operatorCodes.append(schema.OperatorCodeT(min(number, 127), version=version, builtinCode=number))
    return len(model.operatorCodes) - 1


def compact(model: Any) -> Any:
    """The model without tensors and constants that nothing uses; changes the model it is given."""
    graph = graph_of(model)
    used = {int(i) for op in graph.operators for i in (*op.inputs, *op.outputs) if i >= 0}
    used |= {int(i) for i in (*graph.inputs, *graph.outputs)}
    place = {old: new for new, old in enumerate(sorted(used))} | {-1: -1}
    for op in graph.operators:
        op.inputs, op.outputs = [place[int(i)] for i in op.inputs], [place[int(i)] for i in op.outputs]
    graph.inputs, graph.outputs = [place[int(i)] for i in graph.inputs], [place[int(i)] for i in graph.outputs]
    model.signatureDefs = [copy.deepcopy(signature) for signature in model.signatureDefs or []]
    for signature in model.signatureDefs:
        for tensor_map in (*(signature.inputs or []), *(signature.outputs or [])):
            tensor_map.tensorIndex = place[tensor_map.tensorIndex]
    graph.tensors = [graph.tensors[i] for i in sorted(used)]
    entries = [copy.copy(entry) for entry in model.metadata or []]
    wanted = sorted({0} | {tensor.buffer for tensor in graph.tensors} | {entry.buffer for entry in entries})
    where = {old: new for new, old in enumerate(wanted)}
    model.buffers = [model.buffers[i] for i in wanted]
    for tensor in graph.tensors:
        tensor.buffer = where[tensor.buffer]
    for entry in entries:
        entry.buffer = where[entry.buffer]
    model.metadata = entries or None
    return model


@functools.cache
def _op_names() -> dict[int, str]:
    from ai_edge_litert import schema_py_generated as schema

    return {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}


@functools.cache
def _dtypes() -> dict[int, Any]:
    from ai_edge_litert import schema_py_generated as schema

    kinds = {"FLOAT32": "<f4", "FLOAT16": "<f2", "INT32": "<i4", "INT64": "<i8", "INT8": "i1", "UINT8": "u1", "BOOL": "?"}
    return {getattr(schema.TensorType, name): np.dtype(kind) for name, kind in kinds.items()}
