"""A candidate's answers in ONNX Runtime: the dense graph, exported once, cut to shape and given the candidate's weights.

In int8, where the artifact will be: two to three times as fast as float on processors with int8 kernels, and what int8 costs a
candidate is in its reward. Activation ranges are the dense network's. They fit its candidates, whose BatchNorm statistics are
their own, well enough to compare them; the artifact's are calibrated on the pruned network itself.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ...calibration.ranges import collect, ranges
from ...targets.base import Structure
from ...targets.onnx.edit import OnnxEditor
from ...targets.onnx.export import export_float
from ...targets.onnx.fill import fill
from ...targets.onnx.graph import Graph
from ...targets.onnx.int8 import STEPS, Recipe, has_vnni, quantize
from ..errors import BuildError, deepest_cause
from ..graph.trace import layer_nodes, shape_of
from ..network.memory import inference_batch_size
from ..signature import INPUT_NAME, image_signature

BATCH = 250
SAME = 1e-3  # largest difference from the network's answers, as a share of their largest value, that float32 may make
RECIPES = tuple(  # large maps have outliers; without VNNI sums of 8-bit weights can saturate
    Recipe(method, bits)
    for method in ("min-max", "percentile-99.999", "percentile-99.99")
    for bits in ((8,) if has_vnni() else (8, 7))
)
NORM_VALUES = ("weight", "bias", "running_mean", "running_var")

Layer = nn.Conv2d | nn.Linear
Norm = nn.BatchNorm2d | nn.BatchNorm1d


class CandidateGraph:
    """The graph of a canonical network with a free batch axis.

    It is exported with drawn values in place of the network's own: the exporter leaves out a bias that is zero and makes one of
    two tensors that are equal, and either would leave a candidate's value without a place. Every value is written for every
    candidate; one that has no place is an error, never left out.

    Args:
        net: canonical dense network, eval mode, shapes propagated.
        image_shape: (C, H, W).

    Raises:
        BuildError: the exporter refused the network, a layer's values are not in what it gave, or the runtime does not answer
            as the network does.
    """

    def __init__(self, net: fx.GraphModule, image_shape: tuple[int, ...]) -> None:
        channels, height, width = image_shape
        self._after = {str(n.target): name for n, _ in layer_nodes(net) if (name := _norm_after(net, n))}
        model = export_float(_drawn(net, self._after), image_signature((channels, height, width)))
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
        self._dense, self.recipe = Graph(model), RECIPES[0]
        exported = set(self._dense.constants)
        # A BatchNorm that has no statistics of its own in the graph is part of the layer before it.
        self._norms = {layer: norm for layer, norm in self._after.items() if f"{norm}.running_mean" not in exported}
        dense, drawn = self._values(net), _drawn_layers(net)
        self._written = {name for name in dense if name.rpartition(".")[0] in drawn}
        self._fixed = {name: value.detach().clone() for name, value in dense.items() if name not in self._written}
        missing = sorted(self._written - exported)
        if missing:
            raise BuildError(f"{missing[0]} is not in the exported graph", do="replace the operation that reads this layer")
        self._real = self._model(net, Structure({}))
        self._compare(net, self._real, image_shape)

    def in_int8(self, calibration: NDArray[np.float32]) -> CandidateGraph:
        """Returns the graph in int8, by the recipe with which the dense network's answers differ least from those in float.

        Args:
            calibration: (n, C, H, W) network inputs that the dense network's activation ranges are taken on.
        """
        seen = collect(self._real, [calibration], threads=torch.get_num_threads())
        exact = _run(self._real, calibration)[0]
        tried = [quantize(self._real, ranges(seen, recipe.ranges), recipe) for recipe in RECIPES]
        errors = [float(np.square(_run(model, calibration)[0] - exact).mean()) for model in tried]
        best = int(np.argmin(errors))
        same = copy.copy(self)
        same._dense, same.recipe = Graph(tried[best]), RECIPES[best]
        return same

    def answers(self, net: nn.Module, structure: Structure, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (n, classes) of the candidate.

        Args:
            net: the candidate with its weights and BatchNorm statistics.
            structure: its shape.
            inputs: (n, C, H, W).

        Raises:
            BuildError: the candidate's values and the graph cut to the structure do not fit each other, or the runtime refused
                the graph.
        """
        return _run(self._model(net, structure), inputs)[0]

    def _compare(self, net: fx.GraphModule, model: onnx.ModelProto, image_shape: tuple[int, ...]) -> None:
        """Refuse a graph that does not answer as the network does, naming the first layer whose output differs.

        Args:
            net: the dense network.
            model: its graph, with its values; its layers' outputs become outputs of the graph.
            image_shape: (C, H, W); more than one image is asked for, so that a literal batch size shows.
        """
        images = torch.randn(3, *image_shape, generator=torch.Generator().manual_seed(0))
        recorder = _Recorder(net)
        with torch.no_grad():
            expected = {"": recorder.run(images.to(next(net.parameters()))).float().cpu()}
        found = {"": _run(model, images.numpy())[0]}
        if _difference(found[""], expected[""]) <= SAME:
            return
        tensors = {name: node.output[0] for name, node in Graph(model).layers().items() if node.op_type != "MatMul"}
        shown = copy.deepcopy(model)
        shown.graph.output.extend(onnx.ValueInfoProto(name=tensor) for tensor in tensors.values())
        _, *outputs = _run(shown, images.numpy())
        pairs = [
            (name, output, recorder.seen[self._norms.get(name, name)]) for name, output in zip(tensors, outputs, strict=True)
        ]
        first = next((name for name, output, seen in pairs if _difference(output, seen) > SAME), "the answer")
        raise BuildError(
            "the exported graph of the dense network does not answer as the network does",
            found=f"a difference of {_difference(found[''], expected['']):.1%}, first at {first}",
            expected=f"at most {SAME:.1%}",
            do="give the operations around this layer modules of their own, such as nn.BatchNorm2d",
        )

    def _model(self, net: nn.Module, structure: Structure) -> onnx.ModelProto:
        """The dense graph cut to a structure, with the values of a network of this structure."""
        editor, values = OnnxEditor(self._dense), self._values(net)
        editor.cut(structure)
        for name, dense in self._fixed.items():
            value = values.pop(name, dense)
            if not torch.equal(value.detach().cpu(), dense.cpu()):
                raise BuildError(f"{name} of the candidate is not the dense network's", expected="a layer that no plan changes")
        places = {name.removesuffix("_quantized") for name in editor.used_constants()} & self._written
        if lost := places - values.keys():
            raise BuildError(f"the candidate has no {min(lost)}")
        if lost := values.keys() - places:
            raise BuildError(f"{min(lost)} of the candidate has no place in the cut graph")
        fill(editor, {name: value.detach().cpu().numpy() for name, value in values.items()}, STEPS[self.recipe.weight_bits])
        return editor.build()

    def _values(self, net: nn.Module) -> dict[str, torch.Tensor]:
        """All values of layers and of the norms that are not part of one, under the names of their initializers."""
        modules, inside = dict(net.named_modules()), set(self._norms.values())
        values: dict[str, torch.Tensor] = {}
        for name, module in modules.items():
            if isinstance(module, Layer):
                weight, bias = module.weight, module.bias
                if bias is None and name in self._after:
                    bias = weight.new_zeros(len(weight))  # the exported graph was given one, see `_drawn`
                norm = modules.get(self._norms.get(name, ""))
                if isinstance(norm, Norm):
                    assert norm.running_mean is not None  # _norm_after
                    assert norm.running_var is not None
                    of_norm = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
                    weight, bias = fuse_conv_bn_weights(weight, bias, *of_norm)
                values[f"{name}.weight"] = weight
                if bias is not None:
                    values[f"{name}.bias"] = bias
            elif isinstance(module, Norm) and name not in inside:
                parts = {part: getattr(module, part) for part in NORM_VALUES}
                values |= {f"{name}.{part}": value for part, value in parts.items() if value is not None}
        return values


def _drawn(net: fx.GraphModule, norms: dict[str, str]) -> fx.GraphModule:
    """A copy in which no value that a candidate may change is zero or equal to another; a layer before a norm has a bias."""
    same = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(0)
    for name in _drawn_layers(net):
        module = same.get_submodule(name)
        if isinstance(module, Layer) and module.bias is None and name in norms:
            module.bias = nn.Parameter(module.weight.new_zeros(len(module.weight)))
        for key, value in (*module.named_parameters(), *module.named_buffers()):
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator) + 0.5  # above zero, as a variance must be
                value.data = (noise if key == "running_var" else noise - 1.0).to(value)
    return same


def _drawn_layers(net: fx.GraphModule) -> dict[str, None]:
    """Layers and norms whose values a candidate may change, in order: no plan reaches a linear layer on maps."""
    flat = [str(n.target) for n, m in layer_nodes(net) if isinstance(m, nn.Conv2d) or len(shape_of(n) or ()) == 2]
    norms = [name for name, m in net.named_modules() if isinstance(m, Norm) and m.track_running_stats]
    return dict.fromkeys((*flat, *norms))


class _Recorder(fx.Interpreter):
    """Runs a network and keeps what its modules give."""

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__(net)
        self.seen: dict[str, torch.Tensor] = {}

    def call_module(self, target: fx.node.Target, args: tuple[fx.node.Argument, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output."""
        self.seen[str(target)] = output = super().call_module(target, args, kwargs)
        return output


def _difference(found: NDArray[np.float32], expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest value that was expected; infinite where the shapes differ."""
    wanted = expected.float().cpu().numpy()
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), np.finfo(np.float32).tiny))


def _run(model: onnx.ModelProto, inputs: NDArray[np.float32]) -> Sequence[NDArray[np.float32]]:
    """All outputs of a graph."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        size = inference_batch_size(inputs[0].size, BATCH)
        parts = [session.run(None, {INPUT_NAME: inputs[i : i + size]}) for i in range(0, len(inputs), size)]
    except Exception as error:  # its exceptions share no base but this one
        raise BuildError("ONNX Runtime cannot run a candidate of the network", found=deepest_cause(error)) from error
    return [np.concatenate(output) for output in zip(*parts, strict=True)]


def _norm_after(net: fx.GraphModule, node: fx.Node) -> str:
    """Name of the BatchNorm that alone reads a layer's output: the exporter folds it into the layer."""
    readers = list(node.users)
    if len(readers) != 1 or readers[0].op != "call_module":
        return ""
    module = net.get_submodule(str(readers[0].target))
    return str(readers[0].target) if isinstance(module, Norm) and module.track_running_stats else ""
