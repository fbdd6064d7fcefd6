"""Sequential layer-wise reconstruction of a pruned network.

Errors pile up with depth, so each layer is re-fit on the inputs that the pruned layers before it really produce, to what the
dense network computes there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from torch import fx, nn

from ..graph.coupling import Coupling
from ..graph.surgery import cuts, prune
from ..graph.units import Block
from ..network.compute import CPU, Compute
from ..network.exact_mode import exact_arithmetic
from ..network.modes import borrowed
from ..network.row_sampling import output_strips, sampled_rows
from ..options import Pattern
from ..score.layer_inputs import positions_last, strip_columns, unfold
from ..types import Plan
from .least_squares import DAMPING, positions_for, solve_intercept
from .memory import SOLVING_BYTES

Choose = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # layer, mask, G (k, k), C (outputs, k) -> mask


def sequential(
    net: fx.GraphModule,
    coupling: Coupling,
    plan: Plan,
    images: torch.Tensor,
    *,
    compute: Compute = CPU,
    damping: float = DAMPING,
    progress: Callable[[float], None] | None = None,
) -> fx.GraphModule:
    """Returns the pruned network after sequential layer-wise reconstruction against the dense network's activations.

    Each layer's inputs are those the pruned network really produces. The last layer of a residual branch is re-fit to the dense
    sum after the addition less the pruned shortcut, so that each block also repairs what earlier ones lost, removed blocks
    included. Each BatchNorm takes its statistics from the re-fit layer before the next layer is looked at.

    Args:
        net: canonical dense network, eval mode.
        coupling: its groups and blocks.
        plan: what is removed.
        compute: its device and memory are used; a layer whose Hessian does not fit keeps its weights.
        damping: share of the mean diagonal added to the diagonal.
        progress: told the share of nodes done.
        images: (n, C, H, W) network inputs, augmented as in training. Activations of all of them are held for a few layers.

    Returns:
        A new network, eval mode.
    """
    small = prune(net, coupling, plan).eval()
    _Lockstep(net, small, coupling, plan, damping, compute).run(images, progress)
    return small


def sequential_masked(
    net: fx.GraphModule,
    branches: Mapping[str, Block],
    masks: Mapping[str, torch.Tensor],
    images: torch.Tensor,
    *,
    compute: Compute = CPU,
    fixed: Collection[str] = (),
    choose: Choose | None = None,
    damping: float = DAMPING,
    progress: Callable[[float], None] | None = None,
) -> fx.GraphModule:
    """`sequential` for masks: each output is re-fit on the connections its mask leaves.

    Args:
        net: canonical dense network, eval mode.
        branches: its residual branches.
        masks: layer -> 1 where a connection stays, in the weight's shape. A layer without one keeps all, and is solved too.
        images: (n, C, H, W) network inputs, augmented as in training.
        fixed: layers that stay as they are.
        choose: recomputes the mask of a layer in `masks` from the layer's own moments; it must keep as many connections.
        compute: its device and memory are used; a layer whose Hessian does not fit keeps its weights.
        damping: share of the mean diagonal added to the diagonal.
        progress: told the share of nodes done.

    Returns:
        A new network, eval mode; its weights are exactly zero where their masks are.
    """
    same = copy.deepcopy(net).eval()
    everything = Coupling((), {}, dict(branches))
    walk = _Lockstep(net, same, everything, Plan(Pattern.WEIGHT, ""), damping, compute, masks, frozenset(fixed), choose)
    walk.run(images, progress)
    return same


class _Lockstep:
    """Runs the pruned network layer by layer, and the dense one as far ahead as its activations are needed as targets."""

    def __init__(
        self,
        dense: fx.GraphModule,
        small: fx.GraphModule,
        coupling: Coupling,
        plan: Plan,
        damping: float,
        compute: Compute,
        masks: Mapping[str, torch.Tensor] | None = None,
        fixed: frozenset[str] = frozenset(),
        choose: Choose | None = None,
    ) -> None:
        self.dense, self.small, self.damping, self.masks, self.fixed = dense, small, damping, masks or {}, fixed
        self.choose, self.compute = choose, compute
        self.gone = cuts(coupling, plan.kept)
        self.dense_nodes = {n.name: n for n in dense.graph.nodes}
        self.position = {n: i for i, n in enumerate(dense.graph.nodes)}
        self.by_target = {str(n.target): n for n in dense.graph.nodes if n.op == "call_module"}
        self.tails = {b.tail: b for name, b in coupling.blocks.items() if name not in plan.removed_blocks}
        self.dense_run = fx.Interpreter(dense, garbage_collect_values=False)
        self.small_run = fx.Interpreter(small, garbage_collect_values=False)

    def run(self, images: torch.Tensor, progress: Callable[[float], None] | None) -> None:
        """Reconstruct every layer of the pruned network in place; both networks are where they were afterwards."""
        device = self.compute.device
        with borrowed(self.dense, device), borrowed(self.small, device), exact_arithmetic(device), torch.no_grad():
            self.images = images.to(device)
            self._walk(progress)
            self.small_run.env.clear()
            self.dense_run.env.clear()

    def _walk(self, progress: Callable[[float], None] | None) -> None:
        self.done: set[fx.Node] = set()
        nodes = list(self.small.graph.nodes)
        last_use = {a: i for i, n in enumerate(nodes) for a in n.all_input_nodes}
        for i, node in enumerate(nodes):
            if node.op == "output":
                break
            self._visit(node)
            for a in node.all_input_nodes:
                if last_use[a] == i:
                    self.small_run.env.pop(a, None)
            self._forget(node)
            if progress is not None:
                progress((i + 1) / len(nodes))

    def _visit(self, node: fx.Node) -> None:
        """Solve the node if it is a layer, and compute its value; at most once."""
        if node in self.done:
            return
        self.done.add(node)
        module = self.small.get_submodule(str(node.target)) if node.op == "call_module" else None
        if self._solvable(node, module) and str(node.target) not in self.fixed:
            self._solve_layer(node, cast(nn.Conv2d | nn.Linear, module), self._norm_after(node))
        self.small_run.env[node] = self._evaluate(self.small_run, node)

    def _solvable(self, node: fx.Node, module: nn.Module | None) -> bool:
        """A convolution without groups, or a linear layer (on vectors, tokens or channels-last maps), whose Hessian fits."""
        if not (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)):
            return False
        return SOLVING_BYTES * module.weight[0].numel() ** 2 <= self.compute.memory_bytes

    def _small_value(self, node: fx.Node) -> torch.Tensor:
        """Value of a node of the pruned network that may lie ahead: a projection shortcut runs after the branch beside it."""
        if node not in self.small_run.env:
            for source in node.all_input_nodes:
                self._small_value(source)
            self._visit(node)
        value: torch.Tensor = self.small_run.env[node]
        return value

    def _evaluate(self, run: fx.Interpreter, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.images
        args, kwargs = run.fetch_args_kwargs_from_env(node)
        return getattr(run, node.op)(node.target, args, kwargs)

    def _dense_value(self, wanted: fx.Node) -> torch.Tensor:
        """Value of a dense node; computes whatever is missing before it, in order."""
        env = self.dense_run.env
        if wanted not in env:
            queue = [wanted]
            while queue:
                node = queue[-1]
                missing = [a for a in node.all_input_nodes if a not in env]
                if missing:
                    queue.extend(missing)
                    continue
                queue.pop()
                if node not in env:
                    env[node] = self._evaluate(self.dense_run, node)
        value: torch.Tensor = env[wanted]
        return value

    def _forget(self, node: fx.Node) -> None:
        """Drop dense values that no node ahead reads. The node itself is computed first: what follows it needs it."""
        passed = self.dense_nodes.get(node.name)
        if passed is None:
            return
        self._dense_value(passed)
        env, here = self.dense_run.env, self.position[passed]
        for value in [v for v in env if self.position[v] < here]:
            if not any(self.position[user] > here for user in value.users):
                env.pop(value)

    def _norm_after(self, node: fx.Node) -> nn.BatchNorm2d | None:
        readers = list(node.users)
        if len(readers) == 1 and readers[0].op == "call_module":
            module = self.small.get_submodule(str(readers[0].target))
            if isinstance(module, nn.BatchNorm2d) and module.affine and module.track_running_stats:
                return module
        return None

    def _solve_layer(self, node: fx.Node, module: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d | None) -> None:
        name = str(node.target)
        dense_node = self.by_target[name]
        dense_layer = self.dense.get_submodule(name)
        assert isinstance(dense_layer, nn.Conv2d | nn.Linear)  # same names, same kinds
        inputs: torch.Tensor = self.small_run.env[node.all_input_nodes[0]]
        gone = self.gone.get((f"{name}.weight", 0), set())
        rows = torch.tensor([i for i in range(dense_layer.weight.shape[0]) if i not in gone], device=inputs.device)
        axis = -1 if isinstance(module, nn.Linear) else 1  # of the outputs
        scale, shift = (value.view(1, -1, 1, 1) if axis == 1 else value for value in _affine(norm, len(rows), inputs))
        block = self.tails.get(name)
        end = next(iter(node.users)) if norm is not None else node
        addition = next((n for n in end.users if block is not None and n.name == block.addition), None)
        if block is not None and addition is not None and len(end.users) == 1:
            shortcut = next(a for a in addition.all_input_nodes if a is not end)
            stream = self._dense_value(self.dense_nodes[block.addition])
            # The kept channels of the stream are the kept outputs of this layer: they are coupled through the addition.
            target = (stream.index_select(axis, rows) - self._small_value(shortcut) - shift) / scale
        else:
            target = self._dense_value(dense_node).index_select(axis, rows)
        weight, bias = self._regress(name, module, inputs, target)
        module.weight.copy_(weight)
        if module.bias is not None:
            module.bias.copy_(bias)
            bias = torch.zeros_like(bias)
        if norm is not None:
            outputs = module(inputs)
            mean, var = outputs.mean((0, 2, 3)), outputs.var((0, 2, 3), unbiased=False)
            norm.running_mean.copy_(mean)  # type: ignore[union-attr]
            norm.running_var.copy_(var)  # type: ignore[union-attr]
            # scale * (u + bias) + shift, written as a BatchNorm with u's own statistics
            norm.weight.copy_(scale.flatten() * (var + norm.eps).sqrt())
            norm.bias.copy_(shift.flatten() + scale.flatten() * (bias + mean))

    def _regress(
        self, name: str, module: nn.Conv2d | nn.Linear, inputs: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Least squares with a constant column: the weight and the bias that give `target` from `inputs`."""
        flat_target = positions_last(module, target)
        positions = flat_target.shape[2]
        k = module.weight[0].numel()
        most = positions_for(k) // len(inputs)
        per_image = max(1, min(positions, most))
        gram = torch.zeros(k + 1, k + 1, dtype=torch.float64, device=inputs.device)
        cross = torch.zeros(len(module.weight), k + 1, dtype=torch.float64, device=inputs.device)
        for start in range(0, len(inputs), 50):
            part = slice(start, start + 50)
            # Another even set of rows, or positions, for every chunk, so that all of them are seen.
            rows = sampled_rows(target.shape[2], target.shape[3], start // 50, most) if isinstance(module, nn.Conv2d) else []
            if isinstance(module, nn.Conv2d) and len(rows) < target.shape[2]:
                x = strip_columns(module, inputs[part], rows).permute(1, 0, 2).flatten(1)
                t = output_strips(target[part], rows)
            else:
                picks = (torch.arange(per_image) * positions // per_image + start // 50) % positions
                some = None if per_image == positions else picks.to(inputs.device)
                x = columns(inputs[part], module, some)
                t = flat_target[part] if some is None else flat_target[part][:, :, some]
            x = torch.cat([x, x.new_ones(1, x.shape[1])])
            t = t.permute(1, 0, 2).flatten(1)
            gram += (x @ x.T).double()
            cross += (t @ x.T).double()
        before = module.weight.detach().flatten(1).double()
        solved = solve_intercept(gram, cross, before, self.damping, self._support(name))
        weight = solved[:, :-1].to(module.weight).view_as(module.weight)
        return weight, solved[:, -1].to(module.weight)

    def _support(self, name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
        """Returns a function from a layer's centred moments to its mask (outputs, k); None for a layer without a mask."""
        mask = self.masks.get(name)
        if mask is None:
            return None
        flat, choose = mask.flatten(1).cpu(), self.choose
        return lambda gram, target: flat if choose is None else choose(name, flat, gram, target)


def _affine(norm: nn.BatchNorm2d | None, count: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A BatchNorm in eval mode as (scale, shift) per channel."""
    if norm is None:
        return like.new_ones(count), like.new_zeros(count)
    assert norm.running_var is not None  # _norm_after
    assert norm.running_mean is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    scale = torch.where(scale.abs() < 1e-6, torch.full_like(scale, 1e-6), scale)
    return scale.clone(), (norm.bias - norm.running_mean * scale).clone()


def columns(inputs: torch.Tensor, layer: nn.Conv2d | nn.Linear, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The layer's inputs as a matrix (k, positions), k ordered like `weight.flatten(1)`; `rows` selects output positions."""
    found = positions_last(layer, inputs) if isinstance(layer, nn.Linear) else unfold(layer, inputs)
    return (found if rows is None else found[:, :, rows]).permute(1, 0, 2).flatten(1)
