"""How many images layer-wise reconstruction may hold in memory."""

from __future__ import annotations

import math

from torch import fx

from ..graph.trace import shape_of

HELD_TENSORS = 8  # float32 activations of one image that are alive at once while a network is solved layer after layer


def affordable(net: fx.GraphModule, count: int, room_bytes: int = 3 << 30) -> int:
    """How many images (at most `count`, at least 32) whose activations can be held for a few layers at a time.

    Args:
        net: a network whose shapes have been propagated, see `graph.propagate_shapes`.
        count: images wanted.
        room_bytes: memory they may take.
    """
    widest = max(math.prod(shape[1:]) for node in net.graph.nodes if (shape := shape_of(node)))
    return max(32, min(count, room_bytes // (4 * widest * HELD_TENSORS)))
