"""A candidate's answers in ONNX Runtime: the dense graph, exported once, cut to shape and given the candidate's weights."""

from __future__ import annotations

import os

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..targets.base import Structure
from ..targets.onnx_export import INPUT_NAME, export_float
from ..targets.onnx_graph import cut
from .graph import layer_nodes

BATCH = 250


class CandidateGraph:
    """The float graph of a canonical network with a free batch axis.

    Args:
        net: canonical dense network, eval mode.
        image_shape: (C, H, W).
    """

    def __init__(self, net: fx.GraphModule, image_shape: tuple[int, ...]) -> None:
        channels, height, width = image_shape
        self._model = export_float(net, (channels, height, width))
        for value in (*self._model.graph.input, *self._model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
        self._norms = {str(n.target): name for n, _ in layer_nodes(net) if (name := _norm_after(net, n))}

    def answers(self, net: nn.Module, structure: Structure, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (n, classes) of the candidate.

        Args:
            net: the candidate with its weights and BatchNorm statistics.
            structure: its shape.
            inputs: (n, C, H, W).
        """
        model = cut(self._model, structure)
        self._fill(model, net)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = os.cpu_count() or 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        parts = [session.run(None, {INPUT_NAME: inputs[i : i + BATCH]})[0] for i in range(0, len(inputs), BATCH)]
        return np.concatenate(parts)

    def _fill(self, model: onnx.ModelProto, net: nn.Module) -> None:
        modules = dict(net.named_modules())
        values: dict[str, torch.Tensor] = {}
        for name, module in modules.items():
            if not isinstance(module, nn.Conv2d | nn.Linear):
                continue
            weight, bias = module.weight, module.bias
            norm = modules.get(self._norms.get(name, ""))
            if isinstance(norm, nn.BatchNorm2d):
                assert norm.running_mean is not None  # only such a norm is folded
                assert norm.running_var is not None
                weight, bias = fuse_conv_bn_weights(
                    weight, bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
                )
            values[f"{name}.weight"] = weight
            if bias is not None:
                values[f"{name}.bias"] = bias
        for initializer in model.graph.initializer:
            value = values.pop(initializer.name, None)
            if value is not None:
                initializer.CopyFrom(numpy_helper.from_array(value.detach().cpu().numpy(), initializer.name))


def _norm_after(net: fx.GraphModule, node: fx.Node) -> str:
    """Name of the BatchNorm that alone reads a layer's output: the exporter folds it into the layer."""
    readers = list(node.users)
    if len(readers) != 1 or readers[0].op != "call_module":
        return ""
    module = net.get_submodule(str(readers[0].target))
    return str(readers[0].target) if isinstance(module, nn.BatchNorm2d) and module.track_running_stats else ""
