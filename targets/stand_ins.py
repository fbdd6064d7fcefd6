"""Inputs that stand in for real ones."""

from __future__ import annotations

import numpy as np

from ..pipeline.signature import Signature
from .base import Arrays


def stand_ins(signature: Signature, count: int = 4) -> Arrays:
    """Inputs for what does not depend on them, such as ranges where latency alone matters: normal numbers; whole ones are 1."""
    rng = np.random.default_rng(0)
    found = tuple(
        rng.standard_normal((count, *spec.shape), dtype=np.float32)
        if spec.dtype == "float32"
        else np.ones((count, *spec.shape), spec.dtype)
        for spec in signature.inputs
    )
    return found if len(found) > 1 else found[0]
