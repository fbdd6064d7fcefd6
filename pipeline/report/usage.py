"""Inference code and the input and output tensors of an artifact ("Use it"), for the report, the run folder and the bundle."""

from __future__ import annotations

import keyword
from dataclasses import dataclass

import numpy as np

from ...devices.transport.adb import ADB_FOLDER
from ..signature import FileTensor
from .format import Table, render
from .report import Report, ReportedArtifact

_COMPILED = "use_litert_compiled.py.jinja"
_SNIPPETS = {  # by target: language, what it needs, template
    "x86": (
        ("Python", "pip install numpy onnxruntime", "use_onnxruntime.py.jinja"),
        ("C++", "ONNX Runtime's C++ package", "use_onnxruntime.cpp.jinja"),
    ),
    "phone": (
        ("Python", "pip install numpy ai-edge-litert", "use_litert.py.jinja"),
        ("Python (CompiledModel)", "pip install numpy 'ai-edge-litert>=2.3'", _COMPILED),
        ("Kotlin (Android)", 'implementation("com.google.ai.edge.litert:litert:1.4.0")', "use_litert.kt.jinja"),
        ("Time it on a phone", f"adb, and LiteRT's benchmark_model in {ADB_FOLDER}", "use_benchmark_model.sh.jinja"),
    ),
    "executorch": (("Python", "pip install numpy torch executorch", "use_executorch.py.jinja"),),
    "jetson": (("Python (on the Jetson)", "TensorRT of JetPack, and a PyTorch build for it", "use_tensorrt.py.jinja"),),
}
_BUFFERS = ("float32", "float16", "int32", "int8", "uint8", "bool")  # what LiteRT's tensor buffers hold in Python
_C_TYPES = {"float32": "float", "float64": "double", "float16": "Ort::Float16_t", "bool": "bool"}  # others: such as int64_t


@dataclass(frozen=True)
class Snippet:
    """Inference code in one language."""

    language: str
    syntax: str  # its name for highlighters
    needs: str
    code: str


def interface(target: str, artifact: ReportedArtifact, labels: tuple[str, ...]) -> Table:
    """Returns the table of the file's input and output tensors."""
    rows = [(f"input {tensor.name}", *_cells(tensor)) for tensor in artifact.inputs]
    rows += [(f"output {tensor.name}", *_cells(tensor)) for tensor in artifact.outputs]
    if labels:
        shown = ", ".join(labels[:20]) + (f" and {len(labels) - 20} more" if len(labels) > 20 else "")
        rows.append(("labels, in the order of the logits", "", "", shown))
    return Table(f"What {target}'s file takes and gives", ("Tensor", "type", "shape", "numbers"), tuple(rows), numeric=False)


def snippets(report: Report, target: str) -> tuple[Snippet, ...]:
    """Returns inference code for a target's artifact; () where there is none, or it is of an older run."""
    artifact = report.targets[target].artifact
    if artifact is None or not artifact.inputs:
        return ()
    image, sides = artifact.inputs[0].layout, (*artifact.inputs, *artifact.outputs)
    values = {
        "file": artifact.path.rpartition("/")[2],
        "inputs": artifact.inputs,
        "outputs": artifact.outputs,
        "arguments": [_argument(i, tensor.name) for i, tensor in enumerate(artifact.inputs)],
        "adb_folder": ADB_FOLDER,
        "image": image,
        "channels": artifact.inputs[0].shape[3 if image == "NHWC" else 1] if image else 0,
        "size": (artifact.inputs[0].shape[1:3] if image == "NHWC" else artifact.inputs[0].shape[2:4]) if image else (),
        "mean": list(report.preprocess.mean),
        "std": list(report.preprocess.std),
        "c_types": {tensor.dtype: _C_TYPES.get(tensor.dtype, f"{tensor.dtype}_t") for tensor in sides},
        "bytes": {tensor.dtype: np.dtype(tensor.dtype).itemsize for tensor in sides},
    }
    able = all(tensor.dtype in _BUFFERS for tensor in sides)
    return tuple(
        Snippet(name, template.split(".")[1], needs, render(template, **values))
        for name, needs, template in _SNIPPETS.get(target, ())
        if able or template != _COMPILED
    )


def _argument(position: int, name: str) -> str:
    return name if name.isidentifier() and not keyword.iskeyword(name) else f"input_{position}"


def _cells(tensor: FileTensor) -> tuple[str, str, str]:
    shape = " x ".join(str(n) for n in tensor.shape)
    return tensor.dtype, f"{shape} {tensor.layout}".strip(), tensor.scaling
