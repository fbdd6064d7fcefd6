"""Operator rules by family; importing the room registers them all."""

from . import attention, elementwise, indexing, matmul, norms, reductions, shapes, spatial

__all__ = ["attention", "elementwise", "indexing", "matmul", "norms", "reductions", "shapes", "spatial"]
