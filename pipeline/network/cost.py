"""Parameters and multiply-accumulates of a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..types import ModelCost
from .calling import Inputs, call, moved
from .modes import attention_in_steps, borrowed

Shape = Sequence[int]
aten = torch.ops.aten


def cost_of(module: nn.Module, example: Inputs) -> ModelCost:
    """Parameters (all of them, each once) and multiply-accumulates of one forward pass in eval mode on an example of one sample.

    Counted are convolutions, matrix products, attention and recurrent layers as they are executed, whatever module or function
    calls them: half of what `torch.utils.flop_counter` counts, and the kernels it leaves out. It is the count of the walk over
    a captured network too, see `axes.walk.Cost`.
    """
    first = next(chain(module.parameters(), module.buffers()), None)
    counter = FlopCounterMode(display=False, custom_mapping=_KERNELS)
    with borrowed(module), torch.inference_mode(), attention_in_steps(), counter:
        module.eval()
        call(module, example if first is None else moved(example, str(first.device)))
    return ModelCost(sum(p.numel() for p in module.parameters()), counter.get_total_flops() // 2)


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Of a fused kernel: the scores, and their product with the values."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _product(one: Shape, other: Shape, *_: Any, **__: Any) -> int:
    """Of a matrix, or a vector, with a vector."""
    return 2 * math.prod(one)


def _vector_added(added: Shape, matrix: Shape, vector: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


def _bilinear(one: Shape, weight: Shape, other: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(one[:-1]) * math.prod(weight)


def _recurrent(inputs: Shape, into: Shape, between: Shape, *_: Any, **__: Any) -> int:
    """Of one layer of a recurrent network in one direction."""
    return 2 * math.prod(inputs[:-1]) * (math.prod(into) + math.prod(between))


def _recurrent_layers(inputs: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    """Of all layers of a recurrent network; its biases are vectors."""
    return 2 * math.prod(inputs[:-1]) * sum(math.prod(w) for w in weights if len(w) > 1)


_KERNELS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten.mv: _product,
    aten.dot: _product,
    aten.addmv: _vector_added,
    aten._trilinear: _bilinear,
    aten.mkldnn_rnn_layer: _recurrent,
    aten._cudnn_rnn: _recurrent_layers,
}
