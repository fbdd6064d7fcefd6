"""ONNX files in ONNX Runtime on this machine's CPU."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...pipeline.errors import BuildError, UnavailableError
from ..base import FloatArray, Images, Runner

if TYPE_CHECKING:
    import onnx

_BLOCK = 64  # images a call, where the file allows more than one


def predictor(model: str | bytes, threads: int = 1, *, pairwise: bool = False) -> Runner:
    """Inputs (n, C, H, W) to logits (n, classes) through a fresh ONNX Runtime session; `model` is a path or the file's bytes.

    With `pairwise` every Q/DQ pair rounds in place and all else is float, instead of ONNX Runtime's own int8 kernels.

    Raises:
        BuildError: the runtime refused the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if pairwise:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 3
    name = "the model" if isinstance(model, bytes) else Path(model).name
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base but this one
        raise BuildError(f"ONNX Runtime cannot load {name}", found=str(error)[:500]) from error
    if session.get_providers()[0] != "CPUExecutionProvider":
        raise BuildError(f"ONNX Runtime does not run {name} on the CPU", found=str(session.get_providers()))
    entry = session.get_inputs()[0]
    block = entry.shape[0] if isinstance(entry.shape[0], int) else _BLOCK

    def predict(images: Images) -> FloatArray:
        parts = [
            session.run(None, {entry.name: np.ascontiguousarray(images[at : at + block], dtype=np.float32)})[0]
            for at in range(0, len(images), block)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, session.get_outputs()[0].shape[1]), np.float32)

    return predict


def simulate(data: bytes, threads: int = 1) -> Runner:
    """The arithmetic that a QDQ file asks for: inputs (n, C, H, W) to logits (n, classes), each Q/DQ pair by itself.

    By default ONNX Runtime replaces the pairs by its own int8 kernels, whose arithmetic differs from TensorRT's and which on
    processors without VNNI saturate.

    Raises:
        BuildError: the bytes are not an ONNX model, or the runtime refused it.
    """
    import onnx

    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's own error type is not exported
        raise BuildError("the file is no ONNX model", found=str(error)[:300]) from error
    if _names_the_batch(model):
        return predictor(data, threads, pairwise=True)  # one by one
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return predictor(model.SerializeToString(), threads, pairwise=True)


def _names_the_batch(model: onnx.ModelProto) -> bool:
    """Whether the first size that some Reshape asks for is a number of samples, as attention's are; or is not known."""
    from onnx import numpy_helper

    constants = {i.name: i for i in model.graph.initializer}
    targets = [constants.get(node.input[1]) for node in model.graph.node if node.op_type == "Reshape"]
    return any(target is None or numpy_helper.to_array(target).tolist()[:1] != [0] for target in targets)


def require_runtime() -> None:
    """Raises UnavailableError unless ONNX Runtime is installed."""
    if find_spec("onnxruntime") is None:
        raise UnavailableError("onnxruntime is not installed", do="pip install onnxruntime")
