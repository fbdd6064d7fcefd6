"""A captured network run operator by operator, with the parameters its module has at that moment.

The exported graph is for reading values in between; what is trained and built is the module. A graph is made for one batch size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..network.calling import fresh
from ..network.row_sampling import MOST_POSITIONS, input_strips, sampled_rows
from .capture import Captured, as_example, capture, operator_name

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


def samples(inputs: Any) -> int:
    """Number of samples in network inputs: a tensor, or a tuple or dict of tensors with the samples along axis 0."""
    return len(pytree.tree_leaves(inputs)[0])


def part_of(inputs: Any, start: int, stop: int) -> Any:
    """Some of the samples in network inputs."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t[start:stop], inputs)


class Program:
    """The operators of a network at the batch size of its example.

    Args:
        module: the network, in eval mode; its parameters are read whenever an operator needs them.
        captured: its graph.
    """

    def __init__(self, module: nn.Module, captured: Captured) -> None:
        self.module, self.captured = module, captured
        self.nodes: list[fx.Node] = list(captured.graph.nodes)
        self.position = {node: k for k, node in enumerate(self.nodes)}
        self.last_use = {source: k for k, node in enumerate(self.nodes) for source in node.all_input_nodes}
        self.env: dict[fx.Node, Any] = {}
        self.device: str | None = None  # where values are made, if elsewhere than the graph says
        leaves = pytree.tree_leaves(captured.example)
        fed = [n.name for n in self.nodes if n.op == "placeholder" and n.name in captured.inputs]
        self._fed = dict(zip(fed, leaves, strict=True)) if len(fed) == len(leaves) else _by_name(captured)

    def fed(self, inputs: Any, device: str = "cpu") -> Program:
        """The same program with other inputs of the same shapes, on a device."""
        constants = {name: value.to(device) for name, value in self.captured.constants.items()}
        example = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), as_example(inputs))
        found = Program(self.module, replace(self.captured, example=example, constants=constants))
        found.device = device
        return found

    @classmethod
    def of(cls, module: nn.Module, inputs: Any) -> Program:
        """The program of a network that was captured (see `capture.Captured.module`) or cut from one, for as many samples."""
        return cls(module, capture(module, inputs, again=True))

    def value(self, node: fx.Node) -> Any:
        """A node's value; whatever is missing before it is computed, in order."""
        queue = [node]
        while queue:
            wanted = queue[-1]
            missing = [a for a in wanted.all_input_nodes if a not in self.env]
            if missing and wanted not in self.env:
                queue.extend(missing)
                continue
            queue.pop()
            if wanted not in self.env:
                self.env[wanted] = self.evaluate(wanted)
        return self.env[node]

    def outputs(self) -> list[Any]:
        """What the network answers, flat."""
        (end,) = (node for node in self.nodes if node.op == "output")
        return [self.value(node) for node in end.all_input_nodes]

    def evaluate(self, node: fx.Node) -> Any:
        """The value of a node whose operands are known."""
        if node.op == "placeholder":
            name = self.captured.names.get(node.name)
            if name is not None:
                return self.tensor(name)
            return self.captured.constants[node.name] if node.name in self.captured.constants else fresh(self._fed[node.name])
        assert node.op == "call_function", node.op
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda a: self.env[a])
        if self.device is not None and torch.device(self.device).type != "cpu":
            if operator_name(node) == "_assert_tensor_metadata":
                return None
            kwargs = {**kwargs, "device": self.device} if kwargs.get("device") is not None else kwargs
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def drop(self, position: int) -> None:
        """Forget what no operator after this position reads."""
        for node in [n for n in self.env if self.last_use.get(n, -1) <= position]:
            del self.env[node]

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter or buffer of the module by its name."""
        holder, _, own = name.rpartition(".")
        found = getattr(self.module.get_submodule(holder), own)
        assert isinstance(found, torch.Tensor)
        return found.detach()

    def put(self, name: str, value: torch.Tensor) -> None:
        """Overwrite a parameter or buffer of the module."""
        self.tensor(name).copy_(value)

    def stored(self, node: Any) -> str | None:
        """The name of the parameter or buffer that a node is; None where it is anything else."""
        return self.captured.names.get(node.name) if isinstance(node, fx.Node) and node.op == "placeholder" else None

    def layers(self) -> Iterator[Layer]:
        """The convolutions without groups and linear layers whose weight is a parameter that nothing else reads."""
        for node in self.nodes:
            name = operator_name(node) if node.op == "call_function" else ""
            if name != "linear" and name not in _CONVOLUTIONS:
                continue
            weight = self.stored(node.args[1])
            readers = len(node.args[1].users) if isinstance(node.args[1], fx.Node) else 0
            bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
            if weight is None or readers > 1 or (isinstance(bias, fx.Node) and self.stored(bias) is None):
                continue
            if name != "linear" and (self._argument(node, 6, 1) != 1 or not self._pads_evenly(node, weight)):
                continue
            yield Layer(node, weight, self.stored(bias), self)

    def norm_after(self, node: fx.Node) -> fx.Node | None:
        """The BatchNorm of a layer's channels, with statistics and affine parameters, that alone reads its output; or None."""
        readers = list(node.users)
        ranks: list[int] = [a.meta["val"].ndim for a in (node, node.args[1])]  # type: ignore[union-attr]
        if ranks[0] != ranks[1]:  # axis 1 is not the layer's: tokens of a linear layer, places of a sample without a batch
            return None
        if len(readers) == 1 and operator_name(readers[0]) == "batch_norm":
            norm = readers[0]
            if all(self.stored(a) is not None for a in norm.args[1:5]) and norm.args[5] is False:
                return norm
        return None

    def sum_after(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The addition that alone reads a node's value, and its other operand; None where there is none."""
        readers = list(node.users)
        if len(readers) != 1 or operator_name(readers[0]) != "add" or readers[0].kwargs.get("alpha", 1) != 1:
            return None
        others = [a for a in readers[0].all_input_nodes if a is not node]
        if len(others) != 1 or others[0].meta["val"].shape != node.meta["val"].shape:
            return None
        return readers[0], others[0]

    def _pads_evenly(self, node: fx.Node, weight: str) -> bool:
        """Whether a convolution pads both ends of an axis alike, as "same" does for odd kernels."""
        if self._argument(node, 4, 0) != "same":
            return True
        sizes, given = self.tensor(weight).shape[2:], self._argument(node, 5, 1)
        dilation = list(given) if isinstance(given, list | tuple) else [given]
        each = dilation * len(sizes) if len(dilation) == 1 else dilation
        return all(int(d) * (n - 1) % 2 == 0 for d, n in zip(each, sizes, strict=True))

    def _argument(self, node: fx.Node, position: int, default: Any) -> Any:
        return node.args[position] if len(node.args) > position else default


class Layer:
    """A convolution without groups or a linear layer, as it stands in a program."""

    def __init__(self, node: fx.Node, weight: str, bias: str | None, program: Program) -> None:
        self.node, self.weight, self.bias, self._program = node, weight, bias, program
        self.linear = operator_name(node) == "linear"
        assert isinstance(node.args[0], fx.Node)
        self.data = node.args[0]

    @property
    def channels(self) -> int:
        """The axis of the channels in its inputs and outputs."""
        return -1 if self.linear else 1

    def rows(self, outputs: torch.Tensor, turn: int, positions: int = MOST_POSITIONS) -> list[int] | None:
        """The sampled rows of its outputs, see `network.row_sampling`; None: all positions."""
        if self.linear or outputs.ndim != 4:
            return None
        found = sampled_rows(outputs.shape[2], outputs.shape[3], turn, positions)
        return None if len(found) == outputs.shape[2] else found

    def columns_of(self, inputs: torch.Tensor, rows: list[int] | None) -> torch.Tensor:
        """The unfolded inputs of output rows (rows * n, k, W), see `network.row_sampling`; None: of all positions."""
        if rows is None:
            return self.columns(inputs)
        sizes = self._program.tensor(self.weight).shape[2:]
        stride, padding, dilation = (self._tuple(at, default) for at, default in ((3, 1), (4, 0), (5, 1)))
        bordered = torch.nn.functional.pad(inputs, [p for pad in reversed(padding) for p in (pad, pad)])
        part = input_strips(bordered, rows, sizes[0], dilation[0], stride[0])
        return torch.nn.functional.unfold(part, sizes, dilation, 0, stride)

    def columns(self, inputs: torch.Tensor) -> torch.Tensor:
        """What each output position reads: (n, k, positions), k in the order of `weight.flatten(1)`."""
        if self.linear:
            return inputs.reshape(len(inputs), -1, inputs.shape[-1]).transpose(1, 2)
        sizes = self._program.tensor(self.weight).shape[2:]
        stride, padding, dilation = (self._tuple(at, default) for at, default in ((3, 1), (4, 0), (5, 1)))
        if len(sizes) == 2:
            return torch.nn.functional.unfold(inputs, sizes, dilation, padding, stride)
        if len(sizes) == 1:
            flat = inputs.unsqueeze(2)
            return torch.nn.functional.unfold(flat, (1, *sizes), (1, *dilation), (0, *padding), (1, *stride))
        return _unfolded_volume(inputs, sizes, stride, padding, dilation)

    def outputs(self, values: torch.Tensor) -> torch.Tensor:
        """Its outputs as (n, outputs, positions)."""
        if self.linear:
            return values.reshape(len(values), -1, values.shape[-1]).transpose(1, 2)
        return values.flatten(2)

    def _tuple(self, at: int, default: int) -> tuple[int, ...]:
        given = self.node.args[at] if len(self.node.args) > at else default
        rank = self._program.tensor(self.weight).ndim - 2
        if given == "same":
            sizes = self._program.tensor(self.weight).shape[2:]
            return tuple(d * (n - 1) // 2 for d, n in zip(self._tuple(5, 1), sizes, strict=True))
        values = [0] if given == "valid" else list(given) if isinstance(given, list | tuple) else [given]
        return tuple(int(v) for v in (values * rank if len(values) == 1 else values))  # type: ignore[arg-type]


def _unfolded_volume(
    inputs: torch.Tensor, sizes: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
) -> torch.Tensor:
    x = torch.nn.functional.pad(inputs, [p for pad in reversed(padding) for p in (pad, pad)])
    spans = [(x.shape[2 + i] - dilation[i] * (sizes[i] - 1) - 1) // stride[i] + 1 for i in range(3)]
    parts = []
    for place in torch.cartesian_prod(*(torch.arange(n) for n in sizes)).tolist():
        at = [slice(o * d, o * d + s * (n - 1) + 1, s) for o, d, s, n in zip(place, dilation, stride, spans, strict=True)]
        parts.append(x[:, :, at[0], at[1], at[2]].flatten(2))
    return torch.stack(parts, 2).flatten(1, 2)


def _by_name(captured: Captured) -> Mapping[str, Any]:
    return {name: value for name, value in captured.example[1].items() if name in captured.inputs}
