"""A torch module as a float ONNX graph: BatchNorm folded, names kept, bytes that depend on the module alone."""

from __future__ import annotations

import ast
import contextlib
import copy
import inspect
import io
import logging
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._pytree import tree_leaves

from ...pipeline.errors import BuildError, deepest_cause
from ...pipeline.signature import Signature
from ..stand_ins import stand_ins
from .exporter_cache import collect_operators_once, exported_once
from .graph import Graph
from .zeros import drop_zero_additions

OUTPUT = "edge_compress_output_"  # names of outputs while they are exported: the exporter may use theirs for operators
SCOPES = "pkg.torch.onnx.name_scopes"  # what the exporter notes at a node: where in the module tree it comes from
OPSET = 18  # the exporter's own; a later one would go through its version converter for nothing
_ROUNDING = 1e-3  # of an output's largest value: what folding may change in float32


def export_float(module: nn.Module, signature: Signature) -> onnx.ModelProto:
    """The module in eval mode as an ONNX graph of float32 operators, batch 1.

    Inputs and outputs have the names of the signature. Initializers carry their module names
    (`layer1.0.conv1.weight`, `.bias`), BatchNorm is folded into the convolution before it, constant reshapes name no
    channel count (so that units can be cut), and no trace of the machine or the time is left: equal modules give equal bytes.
    The module is not changed.

    Raises:
        BuildError: the exporter refused an operator.
    """
    outputs = tuple(spec.name for spec in signature.outputs)

    def export() -> onnx.ModelProto:
        return export_graph(fold_batchnorm(module, signature), zeros(signature), outputs, by_name=signature.by_name)

    return exported_once(module, signature, export)


def zeros(signature: Signature) -> dict[str, torch.Tensor]:
    """One sample of zeros for each input of a signature, by name."""
    return {spec.name: torch.zeros(1, *spec.shape, dtype=getattr(torch, spec.dtype)) for spec in signature.inputs}


def export_graph(
    module: nn.Module, example: Mapping[str, torch.Tensor], outputs: tuple[str, ...], *, by_name: bool = True
) -> onnx.ModelProto:
    """A module in eval mode as an ONNX graph with inputs of these names, shapes and types; the rest as in `export_float`.

    Args:
        module: float32, on the CPU.
        example: its inputs.
        outputs: names of its outputs, in order.
        by_name: whether the inputs are keyword arguments of those names; else they are positional.

    Raises:
        BuildError: the exporter refused an operator.
    """
    inputs = dict(example)
    collect_operators_once()
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                () if by_name else tuple(inputs.values()),
                kwargs=inputs if by_name else None,
                dynamo=True,
                external_data=False,
                verbose=False,
                optimize=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=[f"{OUTPUT}{k}" for k in range(len(outputs))],
            )
            model = program.model_proto if program is not None else None
    except Exception as error:  # the exporter raises many types, all of them about the user's module
        raise BuildError(
            "the model cannot be exported to ONNX", found=deepest_cause(error), do="replace this operation"
        ) from error
    if model is None:
        raise BuildError("the ONNX exporter gave no graph", do="export the module with torch.onnx.export to see why")
    _name_outputs(model, outputs)
    _separate_layers(model)
    _name_folded(model, module)
    _strip(model)
    _free_reshapes(model)
    drop_zero_additions(model)
    _pool_means(model)
    return model


def _name_outputs(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Give the outputs their names, where no other tensor has them."""
    graph = model.graph
    taken = {name for node in graph.node for name in (*node.input, *node.output)} | {i.name for i in graph.initializer}
    new = {f"{OUTPUT}{k}": name if name not in taken else f"{name}_output" for k, name in enumerate(names)}
    for node in graph.node:
        for places in (node.input, node.output):
            for at, name in enumerate(places):
                places[at] = new.get(name, name)
    for value in graph.output:
        value.name = new.get(value.name, value.name)


def described(model: onnx.ModelProto, notes: Mapping[str, str]) -> bytes:
    """The model's file with these notes as its only metadata."""
    del model.metadata_props[:]
    model.metadata_props.extend(onnx.StringStringEntryProto(key=key, value=value) for key, value in notes.items())
    return bytes(model.SerializeToString(deterministic=True))


def fold_batchnorm(module: nn.Module, signature: Signature) -> nn.Module:
    """An eval-mode float32 copy on the CPU in which each BatchNorm right after a convolution is part of that convolution.

    The forward stays the module's own: torch.fx, which may take another branch than a call, only finds the pairs, and the layers
    are replaced in their places. A module that it cannot trace, or that answers otherwise with the replaced layers, comes back as
    a plain copy; the exporter's optimizer then folds what it finds.
    """
    plain = _copied(module)
    try:
        replaced = _fused(plain, signature)
        if not replaced:
            return _copied(module)
        folded = copy.deepcopy(plain, replaced)  # a memo: these objects count as copied already
        if _same(_answers(folded, signature), _answers(plain, signature)):
            return folded
        reason = "it answers otherwise with BatchNorm folded"
    except Exception as error:  # tracing and calling run the user's forward: any type can come out of it
        reason = f"{type(error).__name__}: {error}"
    logging.getLogger(__name__).info("BatchNorm is left to the exporter: %s", reason)
    return _copied(module)  # tracing may have left its proxies in the other one


def _copied(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).cpu().float().eval()


def _fused(module: nn.Module, signature: Signature) -> dict[int, Any]:
    """What stands in for layers, by their id: for convolutions they and the BatchNorm behind them, for that the identity."""
    parameters = inspect.signature(module.forward).parameters
    names = [spec.name for spec in signature.inputs]
    fed = names if signature.by_name else list(parameters)[: len(names)]
    left = {n: p.default for n, p in parameters.items() if n not in fed and p.default is not p.empty}
    graph = fx.Tracer().trace(module, left)
    modules = dict(module.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    replaced: dict[int, Any] = {}
    for node in graph.nodes:
        norm = modules[node.target] if node.op == "call_module" else None
        # without running statistics it normalises by those of its input, which no weight can hold
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
            continue
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        conv = modules[str(source.target)]
        if isinstance(conv, nn.Conv2d) and calls[node.target] == calls[source.target] == 1:
            replaced |= {id(conv): fuse_conv_bn_eval(conv, norm), id(norm): nn.Identity()}
    return replaced


def _answers(module: nn.Module, signature: Signature) -> list[torch.Tensor]:
    """The tensors that a module gives for one sample of stand-ins."""
    arrays = stand_ins(signature, 1)
    inputs = [torch.from_numpy(array) for array in (arrays if isinstance(arrays, tuple) else (arrays,))]
    with torch.no_grad():
        if signature.by_name:
            found = module(**dict(zip((spec.name for spec in signature.inputs), inputs, strict=True)))
        else:
            found = module(*inputs)
    return [leaf.double() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]


def _same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Whether outputs differ by no more than rounding."""
    return len(found) == len(expected) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=_ROUNDING * float(b.abs().max()) if b.numel() else 0.0)
        for a, b in zip(found, expected, strict=True)
    )


def _separate_layers(model: onnx.ModelProto) -> None:
    """Every layer gets initializers of its own: the exporter's optimizer makes one of small tensors that are equal."""
    graph = model.graph
    initializers = {i.name: i for i in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    for node in graph.node:
        path = _module_of(node)
        for at, name in enumerate(node.input):
            owner, _, part = name.rpartition(".")
            shared = name in initializers and uses[name] > 1  # an operator into which another one was folded may be elsewhere
            if shared and path and owner and path != owner and part in ("weight", "bias"):
                own = f"{path}.{part}"
                if own not in initializers:
                    initializers[own] = graph.initializer.add()
                    initializers[own].CopyFrom(initializers[name])
                    initializers[own].name = own
                node.input[at] = own


def _module_of(node: onnx.NodeProto) -> str:
    """The name of the innermost module that a node comes from, "" for the whole one and where the exporter did not note it."""
    scopes = next((p.value for p in node.metadata_props if p.key == SCOPES), None)
    return "".join(ast.literal_eval(scopes)[-2:-1]) if scopes else ""  # modules from the outside in, then the node


def _name_folded(model: onnx.ModelProto, module: nn.Module) -> None:
    """Gives weights that the exporter transposed, those of linear layers on tokens, the name of their parameter again."""
    graph = model.graph
    taken = {name for node in graph.node for name in (*node.input, *node.output)} | {i.name for i in graph.initializer}
    initializers = {i.name: i for i in graph.initializer}
    owned, new = defaultdict[str, dict[str, torch.Tensor]](dict), dict[str, str]()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owned[name.rpartition(".")[0]][name] = parameter.detach()
    for node in graph.node:
        folded = initializers.get(node.input[1]) if node.op_type == "MatMul" else None
        if folded is None or folded.name in new or len(folded.dims) != 2:
            continue
        for name, tensor in owned[_module_of(node)].items():
            transposed = tuple(folded.dims) == tensor.shape[::-1]
            if transposed and name not in taken and np.array_equal(numpy_helper.to_array(folded).T, tensor):
                new[folded.name] = name
                taken.add(name)
                break
    for node in graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = new.get(name, name)
    for old, name in new.items():
        initializers[old].name = name


def _strip(model: onnx.ModelProto) -> None:
    """Remove traces of place and time: stack traces, source paths, notes."""
    model.doc_string = ""
    del model.metadata_props[:]
    graph = model.graph
    graph.name, graph.doc_string = "network", ""
    del graph.metadata_props[:]
    del graph.value_info[:]  # shapes: the runtime infers them, a cut changes them
    for item in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        item.doc_string = ""
        del item.metadata_props[:]


def _free_reshapes(model: onnx.ModelProto) -> None:
    """Constant targets (1, C) become (0, -1), the batch and the rest, so that both may change."""
    constants = {i.name: i for i in model.graph.initializer}
    for node in model.graph.node:
        initializer = constants.get(node.input[1]) if node.op_type == "Reshape" else None
        target = numpy_helper.to_array(initializer) if initializer is not None else np.zeros(0)
        if initializer is not None and target.shape == (2,) and target[0] in (0, 1):
            initializer.CopyFrom(numpy_helper.from_array(np.array([0, -1], dtype=np.int64), initializer.name))
            for attribute in [a for a in node.attribute if a.name == "allowzero"]:
                node.attribute.remove(attribute)  # it would make 0 a size


def _pool_means(model: onnx.ModelProto) -> None:
    """`x.mean((2, 3))` of images becomes GlobalAveragePool (+ Flatten), which has an int8 kernel; ReduceMean has none."""
    graph = model.graph
    if not any(node.op_type == "ReduceMean" for node in graph.node):
        return
    shapes = Graph(model).shapes
    axes_of = {i.name: numpy_helper.to_array(i).tolist() for i in graph.initializer if i.data_type == onnx.TensorProto.INT64}
    for at, node in reversed(list(enumerate(graph.node))):
        if node.op_type != "ReduceMean" or len(node.input) < 2:
            continue
        axes = axes_of.get(node.input[1])
        if axes is None or sorted(axes) not in ([2, 3], [-2, -1]) or len(shapes.get(node.input[0], ())) != 4:
            continue
        keep = next((bool(a.i) for a in node.attribute if a.name == "keepdims"), True)
        pooled = node.output[0] if keep else f"{node.output[0]}_pooled"
        new = [onnx.helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=f"{node.name}_pool")]
        if not keep:
            new.append(onnx.helper.make_node("Flatten", [pooled], [node.output[0]], name=f"{node.name}_flat", axis=1))
        graph.node.remove(node)
        for offset, item in enumerate(new):
            graph.node.insert(at + offset, item)
    used = {name for node in graph.node for name in node.input}
    unused = [i for i in graph.initializer if i.name not in used]
    for initializer in unused:
        graph.initializer.remove(initializer)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the exporter and the quantizer, which report their steps and warn about their own internals."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)
