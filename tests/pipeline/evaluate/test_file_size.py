"""Sizes of candidates' files without writing them, against files that are written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nets
import numpy as np
import pytest
import torch
import user_net
from edge_compress import targets
from edge_compress.pipeline.evaluate.evaluation_context import Bench
from edge_compress.pipeline.evaluate.unit_evaluator import UnitEvaluator
from edge_compress.pipeline.options import Pattern, Precision
from edge_compress.pipeline.pattern.units import Units
from edge_compress.pipeline.signature import image_signature
from edge_compress.targets.base import Limits
from torch import nn

LIMITS = Limits(2, (Precision.FP32,), (Pattern.CHANNEL,))


def compared(module: nn.Module, shape: tuple[int, int, int], target: str, precision: Precision, memo: Path) -> None:
    way = Units(module.eval(), torch.rand(1, *shape), image_signature(shape), LIMITS, "hasa", 0)
    unused: Any = None
    no_moments: Any = SimpleNamespace(memory_bytes=0)
    prober = way.prober(targets.load(target), precision, pytest.fail)
    bench = Bench(torch.rand(1, *shape), unused, prober, unused, None, memo)
    order = {k.name: tuple(range(k.size)) for k in way.knobs}
    evaluator = UnitEvaluator(
        way.checked, way.signature, way.knobs, lambda levels: way.plan_for(levels, order), no_moments, bench
    )
    rng = np.random.default_rng(0)
    some = [tuple(int(rng.integers(len(k.kept))) for k in way.knobs) for _ in range(8)]
    written = [bench.size_bytes(evaluator.structure(evaluator.plan(levels))) for levels in some]
    assert max(written) > 1.2 * min(written)
    assert [evaluator.size_estimate(levels) for levels in some] == pytest.approx(written, rel=0.05)
    dense = (0,) * len(way.knobs)
    assert evaluator.size_estimate(dense) == bench.size_bytes(evaluator.structure(evaluator.plan(dense)))


@pytest.mark.parametrize("name", targets.names())
def test_sizes_of_files_that_were_not_fitted_to_are_right_to_a_few_percent(name: str, tmp_path: Path) -> None:
    target = targets.load(name)
    if target.missing():
        pytest.skip(f"{name}: {target.missing()}")
    for precision in target.limits.precisions[:2]:
        compared(nets.drawn(nets.OptionA), nets.SHAPE, name, precision, tmp_path / f"{precision}.jsonl")


@pytest.mark.parametrize("factory", [user_net.attending, user_net.projected])
def test_sizes_follow_what_is_cut_branches_included(factory, tmp_path: Path) -> None:
    torch.manual_seed(0)
    compared(factory(), (1, 8, 8), "x86", Precision.FP32, tmp_path / "memo.jsonl")
