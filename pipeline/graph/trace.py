"""The user's network as one explicit graph in which every change of channels is a layer.

`canonical` traces the module with torch.fx and rewrites zero-padded shortcuts (He et al. 2015, option A: subsample, then pad
the channels with zeros) as 1x1 convolutions that select channels. After that, channel counts live in the weights of
convolutions, linear layers and BatchNorm only, so removing a channel is cutting weights, in torch and in the exported graph
alike, and no padding can shift what it is added to. The rewritten convolution is trainable: with the selection as its start.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import InputError

LAYERS = (nn.Conv2d, nn.Linear)
_TRAINING = {  # functions that are the identity unless told that they train -> position and default of that argument
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout), (2, True)),
}
_TRAINING_BY_NAME = {"stochastic_depth": (3, True), "drop_path": (2, False)}  # of torchvision and timm


def canonical(module: nn.Module, image_shape: tuple[int, int, int]) -> fx.GraphModule:
    """The network as a traced graph with explicit channel changes, in eval mode; computes the same function.

    The argument is left as it is. Submodule names stay; inserted convolutions are called `shortcut_<n>`. What is the identity in
    eval mode and was traced so (stochastic depth, functional dropout, `nn.Identity`) is taken out.

    Args:
        module: the trained network.
        image_shape: (C, H, W) of one input.

    Raises:
        InputError: the graph cannot be traced (control flow that depends on data), a layer is used twice, or two layers share
            weights; the message names the layer.
    """
    net = copy.deepcopy(module).eval()
    try:
        traced = fx.GraphModule(net, _Tracer().trace(net), type(net).__name__)
    except Exception as error:  # fx raises whatever the model's own code raises on a proxy
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"the network {type(module).__name__} cannot be traced",
            found=f"{_where(error, net)}: {text}",
            expected="a forward without control flow that depends on the input",
            do="move the branch out of forward, or give a factory that fixes it",
        ) from error
    _reject_sharing(traced)
    _drop_identities(traced)
    propagate_shapes(traced, image_shape)
    _selections_for_padding(traced)
    propagate_shapes(traced, image_shape)
    return traced


def propagate_shapes(net: fx.GraphModule, image_shape: tuple[int, int, int]) -> None:
    """Write every node's output shape into its meta data, by one run on a zero image."""
    parameter = next(net.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    with torch.inference_mode(False), torch.no_grad():
        ShapeProp(net).propagate(torch.zeros(2, *image_shape, device=device))


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of a node's tensor for a batch of two, or None if it is no single tensor."""
    meta = node.meta.get("tensor_meta")
    shape = getattr(meta, "shape", None)
    return tuple(shape) if shape is not None else None


def layer_nodes(net: fx.GraphModule) -> Iterator[tuple[fx.Node, nn.Conv2d | nn.Linear]]:
    """Convolutions and linear layers in the order they run."""
    modules = dict(net.named_modules())
    for node in net.graph.nodes:
        if node.op == "call_module" and is_layer(modules[str(node.target)]):
            yield node, modules[str(node.target)]


def submodule(net: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module a node calls, or None."""
    return net.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_layer(module: nn.Module | None) -> TypeGuard[nn.Conv2d | nn.Linear]:
    """Whether a module is a convolution or a linear layer."""
    return isinstance(module, LAYERS)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def is_add(node: fx.Node) -> bool:
    """Whether a node adds two tensors, the second one possibly scaled (`alpha`)."""
    if node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add):
        pass
    elif not (node.op == "call_method" and node.target in ("add", "add_")):
        return False
    operands = argument(node, 0, "input"), argument(node, 1, "other")
    return all(isinstance(a, fx.Node) and shape_of(a) for a in operands)


def is_relu(net: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is max(x, 0): applying it twice is applying it once."""
    if isinstance(submodule(net, node), nn.ReLU):
        return True
    if node.op == "call_function":
        return node.target in (F.relu, torch.relu, F.relu_)
    return node.op == "call_method" and node.target in ("relu", "relu_")


class _Tracer(fx.Tracer):
    """Keeps subclasses of torch's layers whole where they compute what their base computes."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        base = next((c for c in type(m).__mro__ if c.__module__.startswith("torch.nn.modules.")), nn.Module)
        own = [getattr(type(m), name, None) is getattr(base, name, None) for name in ("forward", "_conv_forward")]
        inherits = base not in (nn.Module, nn.Sequential) and all(own) and next(m.children(), None) is None
        return inherits or super().is_leaf_module(m, module_qualified_name)


def _drop_identities(net: fx.GraphModule) -> None:
    for node in list(net.graph.nodes):
        training = _TRAINING.get(node.target) or _TRAINING_BY_NAME.get(getattr(node.target, "__name__", ""))
        idle = (
            node.op == "call_function" and training is not None and argument(node, training[0], "training", training[1]) is False
        )
        if idle or isinstance(submodule(net, node), nn.Identity):
            node.replace_all_uses_with(node.all_input_nodes[0])
            net.graph.erase_node(node)
    net.recompile()


def _where(error: Exception, module: nn.Module) -> str:
    """The submodule whose forward raised while it was traced: the innermost of the user's modules on the stack."""
    names = {id(m): name for name, m in module.named_modules()}
    classes = {type(m).__name__ for m in module.modules()}
    found = type(module).__name__
    tb = error.__traceback__
    while tb is not None:
        owner = tb.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and type(owner).__name__ in classes:
            found = names.get(id(owner)) or type(owner).__name__
        tb = tb.tb_next
    return found


def _reject_sharing(net: fx.GraphModule) -> None:
    called: set[str] = set()
    owners: dict[int, str] = {}
    for node, layer in layer_nodes(net):
        name = str(node.target)
        other = owners.setdefault(id(layer.weight), name)
        if name in called or other != name:
            raise InputError(
                f"layer {name} cannot be pruned",
                found="weights that are used twice" if name in called else f"weights shared with {other}",
                expected="one use of every layer",
                do="give each use its own layer",
            )
        called.add(name)
    norms = [str(n.target) for n in net.graph.nodes if n.op == "call_module" and isinstance(submodule(net, n), _BatchNorm)]
    for name in norms:
        if norms.count(name) > 1:
            raise InputError(
                f"layer {name} cannot be pruned",
                found=f"a BatchNorm that is used {norms.count(name)} times",
                expected="one use of every layer",
                do="give each use its own layer",
            )
    if not called:
        raise InputError(
            "the network has no prunable layer", expected="at least one Conv2d or Linear layer", do="give a convolutional network"
        )


def _selections_for_padding(net: fx.GraphModule) -> None:
    for node in list(net.graph.nodes):
        pads = _channel_padding(node)
        if pads is None:
            continue
        source, (front, back) = node.args[0], pads
        stride, start = 1, _subsampling(source)
        if start is not None:
            source, stride = start
        shape = shape_of(source)
        assert shape is not None  # _channel_padding saw a tensor
        channels = shape[1]
        conv = nn.Conv2d(channels, channels + front + back, 1, stride, bias=False)
        with torch.no_grad():
            conv.weight.zero_()
            conv.weight[torch.arange(channels) + front, torch.arange(channels), 0, 0] = 1.0
        reference = next(net.parameters())
        name = f"shortcut_{sum(1 for n, _ in net.named_children() if n.startswith('shortcut_'))}"
        net.add_submodule(name, conv.to(device=reference.device, dtype=reference.dtype).eval())
        with net.graph.inserting_after(node):
            new = net.graph.call_module(name, (source,))
        node.replace_all_uses_with(new)
        net.graph.erase_node(node)
    net.graph.eliminate_dead_code()
    net.graph.lint()
    net.recompile()


def _channel_padding(node: fx.Node) -> tuple[int, int] | None:
    """(front, back) when a node pads the channels of an (N, C, H, W) tensor with zeros and nothing else."""
    if node.op != "call_function" or node.target not in (F.pad, torch.nn.functional.pad, torch._C._nn.pad):
        return None
    arguments = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | dict(node.kwargs)
    pad, source = arguments.get("pad"), arguments.get("input")
    if not isinstance(source, fx.Node) or len(shape_of(source) or ()) != 4 or not isinstance(pad, list | tuple):
        return None
    zeros = arguments.get("mode", "constant") == "constant" and arguments.get("value", 0) in (0, None)
    if not zeros or len(pad) != 6 or any(pad[:4]) or not all(isinstance(p, int) and p >= 0 for p in pad):
        return None
    return pad[4], pad[5]  # type: ignore[return-value]


def _subsampling(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(source, stride) when a node is x[:, :, ::s, ::s]."""
    if node.op != "call_function" or node.target is not operator.getitem or len(node.users) != 1:
        return None
    source, index = node.args
    if not isinstance(source, fx.Node) or not isinstance(index, tuple) or len(index) != 4:
        return None
    if any(not isinstance(i, slice) or i.start or i.stop is not None for i in index):
        return None
    steps = [i.step or 1 for i in index]  # type: ignore[union-attr]
    if steps[:2] != [1, 1] or steps[2] != steps[3] or not isinstance(steps[2], int):
        return None
    return source, steps[2]
