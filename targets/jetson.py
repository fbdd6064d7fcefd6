"""TensorRT on NVIDIA Jetson: an ONNX file, int8, half or float, that TensorRT 10.3 (JetPack 6.2) to 11.x builds engines from.

An engine belongs to one GPU and one TensorRT, so it is built on the board; what is built here is the file it is built from. It is
checked by our own linter always, by NVIDIA's parser where that is installed, and its answers are computed in ONNX Runtime with
every Q/DQ pair where it stands: the arithmetic TensorRT is asked for, not TensorRT.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..pipeline.errors import BuildError, UnavailableError
from ..pipeline.types import SPARSITY_KEY, Artifact, Kind, Pattern, Precision
from .base import BuildRequest, FloatArray, Limits, Runner, Structure
from .x86 import PACKAGES, OnnxProber, write_whole

if TYPE_CHECKING:
    import onnx
    from torch import nn

_BLOCK = 64  # images a call


class Jetson:
    """The target, see `targets.base.Target`."""

    name = "jetson"
    runtime = "tensorrt"
    simulation = Kind.ESTIMATED  # what `runner` answers: the graph's arithmetic, in another runtime
    needs_device = True  # the engine is built on a board, or on a GPU of this machine
    # int8 tensor cores want input channels in sixteens (mma m16n8k32 and m8n8k16): what is left over is padded
    limits = Limits(
        channel_multiple=16,
        precisions=(Precision.INT8, Precision.FP16, Precision.FP32),
        patterns=(Pattern.CHANNEL, Pattern.TWO_FOUR),
    )

    def missing(self) -> str | None:
        """Why the file cannot be built here; None when it can. A board is not needed for it."""
        absent = [name for name in PACKAGES if find_spec(name) is None]
        return f"packages are missing: pip install {' '.join(absent)}" if absent else None

    def build(self, request: BuildRequest) -> Artifact:
        """Write `model.onnx` and `baseline.onnx`, what engines are built from, into the request's folder.

        Raises:
            UnavailableError: a package is missing.
            BuildError: the network cannot be exported or quantized, or TensorRT would refuse it; the message names the node.
        """
        self._require()
        if request.precision not in self.limits.precisions:
            raise BuildError(
                "the jetson target cannot build this precision", found=request.precision, expected="int8, fp16 or fp32"
            )
        from .onnx.export import export_float

        request.folder.mkdir(parents=True, exist_ok=True)
        baseline = export_float(request.dense, request.image_shape)
        network = export_float(request.module, request.image_shape)
        sparse = two_four_layers(network) if request.pattern is Pattern.TWO_FOUR else frozenset()
        notes: tuple[str, ...] = ()
        options: dict[str, str] = {}
        choices: tuple[str, ...] = ()
        if request.precision is Precision.INT8:
            network, notes, options, choices = _choose_int8(network, request)
        elif request.precision is Precision.FP16:
            network = halve(network)
        for model, claimed in ((baseline, frozenset[str]()), (network, sparse)):
            _label(model, request, sparse=bool(claimed))
            _require_accepted(model, claimed)
        data = network.SerializeToString(deterministic=True)
        options |= {"opset": str(network.opset_import[0].version), "linter": "nothing found"}
        if sparse:
            options["two_four_layers"] = str(len(sparse))
        parser = _parsed(data, two_four=bool(sparse))
        return Artifact(
            target=self.name,
            file=write_whole(request.folder, "model.onnx", data),
            format="onnx",
            precision=request.precision,
            input_name=network.graph.input[0].name,
            input_shape=(1, *request.image_shape),
            notes=(*notes, parser, "input: float32 NCHW, already scaled and normalised; output: logits"),
            options=options,
            baseline=write_whole(request.folder, "baseline.onnx", baseline.SerializeToString(deterministic=True)),
            choices=choices,
        )

    @contextmanager
    def runner(self, path: Path, threads: int = 1) -> Iterator[Runner]:
        """The file's arithmetic in ONNX Runtime on the CPU, pair by pair; takes any number of inputs. This is not TensorRT.

        Raises:
            UnavailableError: onnxruntime is missing.
            BuildError: the file cannot be loaded; an engine runs on its board only.
        """
        if find_spec("onnxruntime") is None:
            raise UnavailableError("onnxruntime is not installed", do="pip install onnxruntime")
        if Path(path).suffix == ".engine":
            raise BuildError(f"{Path(path).name} cannot be run here", found="an engine", expected="the board it was built on")
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise BuildError(f"{Path(path).name} cannot be read", found=error.strerror or str(error)) from error
        yield simulate(data, threads)

    def prober(self, module: nn.Module, image_shape: tuple[int, int, int], precision: Precision) -> JetsonProber:
        """Files of candidates for a board, and estimates for when there is none, see `targets.base.Prober` and `Estimator`.

        Raises:
            UnavailableError: a package is missing.
            BuildError: the network cannot be exported.
        """
        self._require()
        return JetsonProber(module, image_shape, precision)

    def _require(self) -> None:
        reason = self.missing()
        if reason:
            raise UnavailableError("the jetson target cannot build here", found=reason)


class JetsonProber(OnnxProber):
    """The dense network, exported once; candidates are cut from it in float and then quantized."""

    def __init__(self, module: nn.Module, image_shape: tuple[int, int, int], precision: Precision) -> None:
        super().__init__(module, image_shape, Precision.FP32)
        self._precision, self._shape = precision, image_shape
        self._inputs = _input_positions(self._float)
        self._dense_s = self._seconds(Structure({}))

    def candidate(self, structure: Structure) -> bytes:
        """A file of this structure in the artifact's precision."""
        from .onnx.edit import cut

        model = cut(self._float, structure)
        if self._precision is Precision.INT8:
            from ..calibration.ranges import collect, ranges
            from .onnx.int8 import Recipe
            from .tensorrt.qdq import quantize

            rng = np.random.default_rng(0)
            images = rng.standard_normal((2, *self._shape), dtype=np.float32)  # what the ranges are does not change the time
            model = quantize(model, ranges(collect(model, [images], bins=16), "min-max"), Recipe("min-max", 8))
        elif self._precision is Precision.FP16:
            model = halve(model)
        return bytes(model.SerializeToString())

    def estimate(self, structure: Structure) -> float:
        """Time of this structure as a share of the dense one's in the same precision, by `jetson_estimate`: an estimate.

        What the precision itself saves is left out: without a board nobody knows it.
        """
        return self._seconds(structure) / self._dense_s

    def _seconds(self, structure: Structure) -> float:
        from .tensorrt.estimate import Work, seconds

        works = []
        for name in sorted(self.alive(structure)):
            layer = self.layers[name]
            inputs, outputs = structure.widths.get(name, (layer.inputs, layer.outputs))
            weights = layer.kernel * outputs * self.fan_in(layer, inputs)
            values = weights + inputs * self._inputs[name] + outputs * self.positions[name]
            works.append(Work(macs=self.positions[name] * weights, values=values))
        return seconds(works, self._precision)


def simulate(data: bytes, threads: int = 1) -> Runner:
    """Inputs (n, C, H, W) to logits (n, classes): every Q/DQ pair rounds where it stands, all else is float.

    ONNX Runtime would put int8 kernels of its own in the pairs' place. They are another arithmetic than TensorRT's, and on
    processors without VNNI they saturate.

    Raises:
        BuildError: the runtime refused the model.
    """
    import onnx
    import onnxruntime

    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's own error type is not exported
        raise BuildError("the file is no ONNX model", found=str(error)[:300]) from error
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base but this one
        raise BuildError("ONNX Runtime cannot load the model", found=str(error)[:500]) from error
    name, classes = session.get_inputs()[0].name, session.get_outputs()[0].shape[1]

    def predict(inputs: FloatArray) -> FloatArray:
        blocks = (np.ascontiguousarray(inputs[at : at + _BLOCK], dtype=np.float32) for at in range(0, len(inputs), _BLOCK))
        parts = [session.run(None, {name: block})[0] for block in blocks]
        return np.concatenate(parts) if parts else np.zeros((0, classes), np.float32)

    return predict


def halve(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network in half precision between a float input and a float output. Leaves its argument as it is."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    from .onnx.int8 import quiet

    with quiet():
        half: onnx.ModelProto = convert_float_to_float16(_copy(model), keep_io_types=True, disable_shape_infer=False)
    del half.graph.value_info[:]
    return half


def two_four_layers(model: onnx.ModelProto) -> frozenset[str]:
    """Layers of a float network with at most two nonzero weights in every four consecutive inputs, by module name."""
    from onnx import numpy_helper

    from .onnx.edit import layers
    from .tensorrt.lint import fours_over_two, output_axis

    weights = {i.name: i for i in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    found = set()
    for name, layer in layers(model).items():
        values = np.moveaxis(numpy_helper.to_array(weights[f"{name}.weight"]), output_axis(nodes[layer.node]), 0)
        if layer.groups == 1 and not fours_over_two(values):
            found.add(name)
    return frozenset(found)


def _choose_int8(
    network: onnx.ModelProto, request: BuildRequest
) -> tuple[onnx.ModelProto, tuple[str, ...], dict[str, str], tuple[str, ...]]:
    """The QDQ network of the ranges that cost least on the search split; notes; options; what was tried.

    If int8 costs more than allowed, see `Trials.escalate`.
    """
    from ..calibration.ranges import METHODS
    from .onnx.int8 import Recipe, ends
    from .onnx.trials import Trials
    from .tensorrt.qdq import quantize

    float_top1 = request.score(simulate(network.SerializeToString(), request.threads))
    trials = Trials(network, request, quantize, simulate)
    for method in METHODS:
        trials.score(Recipe(method, 8))
    trials.escalate(float_top1 - request.max_drop_pp, ends(network))
    best = trials.best()
    drop = float_top1 - trials.top1[best]
    notes = [f"int8: {best}, chosen on the search split ({trials.top1[best]:.2f} % against {float_top1:.2f} % in float)"]
    if drop > request.max_drop_pp:
        notes.append(f"int8 costs {drop:.2f} points on the search split, more than the {request.max_drop_pp:.2f} aimed at")
    options = {
        "ranges": best.ranges,
        "weight_bits": "8",
        "rounding": "compensated" if best.compensated else "nearest",
        "activation_type": "int8",
        "excluded": ",".join(best.float_layers),
    }
    choices = (f"float: {float_top1:.2f} %", *(f"{recipe}: {top1:.2f} %" for recipe, top1 in trials.top1.items()))
    return trials.model(best), tuple(notes), options, choices


def _label(model: onnx.ModelProto, request: BuildRequest, *, sparse: bool) -> None:
    """What a reader of the file needs and the graph does not say."""
    import onnx

    notes = {
        "classes": json.dumps(request.classes),
        "input": "float32 NCHW, already scaled and normalised",
        "output": "logits",
        SPARSITY_KEY: "enable" if sparse else "disable",
    }
    del model.metadata_props[:]
    model.metadata_props.extend(onnx.StringStringEntryProto(key=key, value=value) for key, value in notes.items())


def _require_accepted(model: onnx.ModelProto, two_four: frozenset[str]) -> None:
    from .tensorrt.lint import lint

    findings = lint(model, two_four=two_four)
    if findings:
        more = f" and {len(findings) - 1} more" if len(findings) > 1 else ""
        raise BuildError("TensorRT would refuse the network", found=f"{findings[0]}{more}", do="replace this operation")


def _parsed(data: bytes, *, two_four: bool) -> str:
    """What NVIDIA's parser says, as a note.

    Raises:
        BuildError: it refused the file; so would a Jetson's.
    """
    from .tensorrt import parser_check as tensorrt_check

    reason = tensorrt_check.missing()
    if reason:
        return f"not seen by NVIDIA's parser: {reason}"
    try:
        verdict = tensorrt_check.check(data, two_four=two_four)
    except UnavailableError as error:
        return f"not seen by NVIDIA's parser: {error}"
    if not verdict.accepted:
        raise BuildError("NVIDIA's parser refuses the network", found=str(verdict), do="replace this operation")
    return str(verdict)


def _input_positions(model: onnx.ModelProto) -> dict[str, int]:
    """Layer -> positions of its input: height x width, 1 for a vector."""
    import onnx

    from .onnx.edit import layers

    graph = onnx.shape_inference.infer_shapes(model).graph
    sizes = {
        v.name: int(np.prod([d.dim_value for d in v.type.tensor_type.shape.dim][2:]))
        for v in (*graph.input, *graph.value_info, *graph.output)
    }
    source = {node.name: node.input[0] for node in model.graph.node}
    return {name: sizes[source[layer.node]] for name, layer in layers(model).items()}


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnx

    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    return copied


TARGET = Jetson()
