"""ONNX Runtime on x86: one .onnx file, int8 (QDQ) or float, batch 1.

int8 is uint8 activations with int8 weights per channel. How ranges are taken and how many bits the weights use is decided by
what each choice costs on the search split, in ONNX Runtime on the machine at hand: without VNNI the int8 kernels sum pairs of
products in 16 bits and 8-bit weights saturate there, 7-bit weights do not.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..pipeline.errors import BuildError, UnavailableError
from ..pipeline.types import Artifact, FileRef, Pattern, Precision
from .base import BuildRequest, FloatArray, Infer, Limits, Runner, Structure

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from .onnx.edit import Layer

PACKAGES = ("onnx", "onnxscript", "onnxruntime", "torch")
_BLOCK = 64  # images a call, where the file allows more than one


class X86:
    """The target, see `targets.base.Target`."""

    name = "x86"
    runtime = "onnxruntime"
    limits = Limits(
        channel_multiple=8,
        precisions=(Precision.INT8, Precision.FP32),
        patterns=(Pattern.CHANNEL, Pattern.WEIGHT, Pattern.TWO_FOUR),  # the last two are stored zeros: they buy no time here
    )

    def missing(self) -> str | None:
        """Why artifacts cannot be built here; None when they can."""
        absent = [name for name in PACKAGES if find_spec(name) is None]
        return f"packages are missing: pip install {' '.join(absent)}" if absent else None

    def build(self, request: BuildRequest) -> Artifact:
        """Write `model.onnx` and `baseline.onnx` into the request's folder.

        Raises:
            UnavailableError: a package is missing.
            BuildError: the network cannot be exported, quantized or run.
        """
        self._require()
        if request.precision not in self.limits.precisions:
            raise BuildError("the x86 target cannot build this precision", found=request.precision, expected="int8 or fp32")
        from .onnx.export import export_float

        request.folder.mkdir(parents=True, exist_ok=True)
        baseline = export_float(request.dense, request.image_shape)
        network = export_float(request.module, request.image_shape)
        if request.precision is Precision.INT8:
            network, notes, options, choices = _choose_int8(network, request)
        else:
            notes, options, choices = (), {}, ()
        for model in (baseline, network):
            _label(model, request.classes)
        return Artifact(
            target=self.name,
            file=write_whole(request.folder, "model.onnx", network.SerializeToString(deterministic=True)),
            format="onnx",
            precision=request.precision,
            input_name=network.graph.input[0].name,
            input_shape=(1, *request.image_shape),
            notes=(*notes, "input: float32 pixels, already scaled and normalised; output: logits"),
            options=options,
            baseline=write_whole(request.folder, "baseline.onnx", baseline.SerializeToString(deterministic=True)),
            choices=choices,
        )

    @contextmanager
    def runner(self, path: Path, threads: int = 1) -> Iterator[Runner]:
        """The artifact in ONNX Runtime on the CPU; takes any number of inputs.

        Raises:
            UnavailableError: onnxruntime is missing.
            BuildError: the file cannot be loaded.
        """
        if find_spec("onnxruntime") is None:
            raise UnavailableError("onnxruntime is not installed", do="pip install onnxruntime")
        yield predictor(str(path), threads)

    @contextmanager
    def runner_through(self, path: Path, infer: Infer) -> Iterator[Runner]:
        """The artifact on another machine, see `targets.base.Elsewhere`."""
        import onnx

        graph = onnx.load(path).graph
        entry, logits = graph.input[0].name, graph.output[0].name

        def predict(inputs: FloatArray) -> FloatArray:
            single = (np.ascontiguousarray(inputs[at : at + 1], dtype=np.float32) for at in range(len(inputs)))
            return np.concatenate([infer({entry: image})[logits] for image in single])

        yield predict

    def prober(self, module: nn.Module, image_shape: tuple[int, int, int], precision: Precision) -> OnnxProber:
        """Latency models of candidates, see `targets.base.Prober`.

        Raises:
            UnavailableError: a package is missing.
            BuildError: the network cannot be exported or quantized.
        """
        self._require()
        return OnnxProber(module, image_shape, precision)

    def _require(self) -> None:
        reason = self.missing()
        if reason:
            raise UnavailableError("the x86 target cannot build here", found=reason)


class OnnxProber:
    """The dense network, exported once; candidates are cut from it without torch."""

    def __init__(self, module: nn.Module, image_shape: tuple[int, int, int], precision: Precision) -> None:
        from .onnx.edit import layers
        from .onnx.export import export_float

        self._float = export_float(module, image_shape)
        self._model = self._float
        if precision is Precision.INT8:
            from ..calibration.ranges import collect, ranges
            from .onnx.int8 import Recipe, quantize

            rng = np.random.default_rng(0)
            images = rng.standard_normal((4, *image_shape), dtype=np.float32)  # what the ranges are does not change the time
            recipe = Recipe("min-max", 8)
            self._model = quantize(self._float, ranges(collect(self._float, [images]), recipe.ranges), recipe)
        self.layers = layers(self._float)
        self.positions = _output_positions(self._float)
        self._alive: dict[tuple[str, ...], frozenset[str]] = {}

    def baseline(self) -> bytes:
        """The dense float model."""
        return bytes(self._float.SerializeToString())

    def candidate(self, structure: Structure) -> bytes:
        """A model of this structure in the artifact's precision."""
        from .onnx.edit import cut

        return bytes(cut(self._model, structure).SerializeToString())

    def macs(self, structure: Structure) -> int:
        """Multiply-accumulates of this structure's convolutions and linear layers, batch 1."""
        total = 0
        for name in self.alive(structure):
            layer = self.layers[name]
            inputs, outputs = structure.widths.get(name, (layer.inputs, layer.outputs))
            total += self.positions[name] * layer.kernel * outputs * self.fan_in(layer, inputs)
        return total

    def alive(self, structure: Structure) -> frozenset[str]:
        """The layers that are left when the removed branches are gone."""
        from .onnx.edit import cut, layers

        removed = tuple(sorted(structure.removed))
        if removed not in self._alive:
            self._alive[removed] = frozenset(layers(cut(self._float, Structure({}, removed))))
        return self._alive[removed]

    @staticmethod
    def fan_in(layer: Layer, inputs: int) -> int:
        """Input channels that one output of a layer sees when `inputs` are kept."""
        depthwise = layer.groups > 1 and layer.groups == layer.inputs
        return 1 if depthwise else inputs // layer.groups


def predictor(model: str | bytes, threads: int = 1) -> Runner:
    """Inputs (n, C, H, W) to logits (n, classes) through a fresh ONNX Runtime session; `model` is a path or the file's bytes.

    Raises:
        BuildError: the runtime refused the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
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

    def predict(inputs: FloatArray) -> FloatArray:
        parts = [
            session.run(None, {entry.name: np.ascontiguousarray(inputs[at : at + block], dtype=np.float32)})[0]
            for at in range(0, len(inputs), block)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, session.get_outputs()[0].shape[1]), np.float32)

    return predict


def _choose_int8(
    network: onnx.ModelProto, request: BuildRequest
) -> tuple[onnx.ModelProto, tuple[str, ...], dict[str, str], tuple[str, ...]]:
    """The int8 network of the recipe that costs least on the search split; notes; options; what was tried.

    Weight bits are settled with min-max ranges, then the other ways to take ranges are tried with those bits. If int8 costs more
    than allowed, see `Trials.escalate`.
    """
    from ..calibration.ranges import METHODS
    from .onnx.int8 import Recipe, ends, has_vnni, quantize
    from .onnx.trials import Trials

    float_top1 = request.score(predictor(network.SerializeToString(), request.threads))
    trials = Trials(network, request, quantize, predictor)
    for bits in (8, 7):
        trials.score(Recipe("min-max", bits))
    bits = trials.best().weight_bits
    for method in list(METHODS)[1:]:
        trials.score(Recipe(method, bits))
    trials.escalate(float_top1 - request.max_drop_pp, ends(network))
    best = trials.best()
    drop = float_top1 - trials.top1[best]
    kernels = (
        "has VNNI: 8-bit weights are exact" if has_vnni() else "has no VNNI: 8-bit weights can saturate, 7-bit weights cannot"
    )
    notes = [
        f"int8: {best}, chosen on the search split ({trials.top1[best]:.2f} % against {float_top1:.2f} % in float)",
        f"this processor {kernels}",
    ]
    if drop > request.max_drop_pp:
        notes.append(f"int8 costs {drop:.2f} points on the search split, more than the {request.max_drop_pp:.2f} aimed at")
    options = {
        "ranges": best.ranges,
        "weight_bits": str(best.weight_bits),
        "rounding": "compensated" if best.compensated else "nearest",
        "activation_type": "uint8",
        "excluded": ",".join(best.float_layers),
    }
    choices = (f"float: {float_top1:.2f} %", *(f"{recipe}: {top1:.2f} %" for recipe, top1 in trials.top1.items()))
    return trials.model(best), tuple(notes), options, choices


def _output_positions(model: onnx.ModelProto) -> dict[str, int]:
    """Layer -> how many output positions it computes: height x width, 1 for a linear layer on a vector."""
    import onnx

    from .onnx.edit import layers

    graph = onnx.shape_inference.infer_shapes(model).graph
    shapes: dict[str, Any] = {v.name: v.type.tensor_type.shape.dim for v in (*graph.value_info, *graph.output)}
    positions = {}
    for name, layer in layers(model).items():
        sizes = [int(dim.dim_value) for dim in shapes[layer.output]]
        positions[name] = int(np.prod(sizes)) // layer.outputs
    return positions


def _label(model: onnx.ModelProto, classes: tuple[str, ...]) -> None:
    """What a reader of the file needs and the graph does not say."""
    import onnx

    notes = {"classes": json.dumps(classes), "input": "float32 pixels, already scaled and normalised", "output": "logits"}
    del model.metadata_props[:]
    model.metadata_props.extend(onnx.StringStringEntryProto(key=key, value=value) for key, value in notes.items())


def write_whole(folder: Path, name: str, data: bytes) -> FileRef:
    """Write a file whole or not at all."""
    handle, scratch = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(scratch).chmod(0o644)
        Path(scratch).replace(folder / name)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    return FileRef(name, hashlib.sha256(data).hexdigest(), len(data))


TARGET = X86()
