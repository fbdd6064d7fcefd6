"""Sizes of candidates' files without writing them, against files that are written."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import nets
import numpy as np
import pytest
import torch
import user_net
from edge_compress import targets
from edge_compress.pipeline.evaluate.channel_evaluator import stored
from edge_compress.pipeline.evaluate.evaluation_context import Bench
from edge_compress.pipeline.evaluate.file_size import FileSize
from edge_compress.pipeline.evaluate.unit_evaluator import UnitEvaluator
from edge_compress.pipeline.graph.knobs import knobs_for, plan_for
from edge_compress.pipeline.graph.surgery import structure_of
from edge_compress.pipeline.options import Precision
from edge_compress.pipeline.pattern.units import Units
from edge_compress.pipeline.signature import image_signature
from edge_compress.targets.base import Limits, Structure

NAME = "OptionA"


def structures(count: int = 12):
    net, coupling = nets.subject(NAME)
    knobs = knobs_for(coupling, Limits(2, (Precision.FP32,), ()))
    order = {name: tuple(range(len(units))) for name, units in coupling.units.items()}

    def structure(levels):
        return structure_of(net, coupling, plan_for(knobs, levels, order, ""))

    rng = np.random.default_rng(0)
    last = [len(k.kept) - 1 for k in knobs]
    alone = [tuple(last[k] if k == i else 0 for k in range(len(knobs))) for i in range(len(knobs))]
    some = [tuple(int(rng.integers(n + 1)) for n in last) for _ in range(count)]
    deepest = tuple(0 if k.kind == "block" else len(k.kept) - 1 for k in knobs)
    blocks = tuple(int(k.kind == "block") for k in knobs)
    return net, [structure(ls) for ls in [(0,) * len(knobs), *alone, deepest, blocks]], [structure(ls) for ls in some]


@pytest.mark.parametrize("name", targets.names())
def test_sizes_of_files_that_were_not_fitted_to_are_right_to_a_few_percent(name):
    target = targets.load(name)
    if target.missing():
        pytest.skip(f"{name}: {target.missing()}")
    net, fitted, others = structures()
    for precision in target.limits.precisions[:2]:
        prober = target.prober(net, image_signature(nets.SHAPE), precision)
        written = [len(prober.candidate(s)) for s in others]
        size = FileSize(partial(stored, net), lambda s: len(prober.candidate(s)), fitted)  # noqa: B023 - used within the turn
        errors = [abs(size(s) / n - 1) for s, n in zip(others, written, strict=True)]
        assert max(written) > 1.2 * min(written)
        assert max(errors) < 0.05
        assert size(fitted[0]) == len(prober.candidate(fitted[0]))


def test_a_line_is_found_exactly_and_groups_and_linear_layers_count_as_what_they_store():
    net, fitted, others = structures()

    def written(structure: Structure) -> int:
        total = 1000
        for name, (inputs, outputs) in structure.widths.items():
            layer = net.get_submodule(name)
            kernel = 1 if name == "linear" else layer.weight[0, 0].numel()
            total += 3 * kernel * inputs * outputs + 12 * outputs + 250
        return total

    size = FileSize(partial(stored, net), written, fitted)
    assert [size(s) for s in others] == pytest.approx([written(s) for s in others])


@pytest.mark.parametrize("factory", [user_net.attending, user_net.projected])
def test_sizes_of_captured_networks_follow_what_is_cut_branches_included(factory, tmp_path: Path):
    torch.manual_seed(0)
    shape, target = (1, 8, 8), targets.load("x86")
    way = Units(factory().eval(), torch.rand(1, *shape), image_signature(shape), target.limits, "hasa", 0)
    unused: Any = None
    prober = way.prober(target, Precision.FP32)
    bench = Bench(torch.rand(1, *shape), {}, unused, prober, unused, None, tmp_path / "memo.jsonl")
    order = {k.name: tuple(range(k.size)) for k in way.knobs}
    evaluator = UnitEvaluator(way.checked, way.knobs, lambda levels: way.plan_for(levels, order), cast("Any", None), bench)
    rng = np.random.default_rng(0)
    some = [tuple(int(rng.integers(len(k.kept))) for k in way.knobs) for _ in range(8)]
    written = [bench.size_bytes(evaluator.structure(evaluator.plan(levels))) for levels in some]
    assert max(written) > 1.2 * min(written)
    assert [evaluator.size_estimate(levels) for levels in some] == pytest.approx(written, rel=0.05)
