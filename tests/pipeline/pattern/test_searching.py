"""The search stage goes on where an earlier call was stopped."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nets
import pytest
from edge_compress.pipeline.config import Config
from edge_compress.pipeline.options import Pattern, Precision
from edge_compress.pipeline.pattern import searching
from edge_compress.pipeline.run_folder import RunFolder
from edge_compress.pipeline.score import ranking
from edge_compress.pipeline.score.ranking import UnitScores, rank_units
from edge_compress.pipeline.types import Knob, Sensitivity
from edge_compress.targets.x86 import TARGET


class Stopped:
    """An evaluator that ranks a network's channels, and is stopped while it judges candidates."""

    def __init__(self, bench: Any) -> None:
        self.bench = bench

    def rank(self, lambda_: float | None) -> Sensitivity:
        net, coupling = nets.subject("OptionA")

        def judged(order: object) -> tuple[float, float]:
            raise KeyboardInterrupt

        return rank_units(
            UnitScores(net, nets.units(coupling), nets.images(20), "hasa", 0, keeps=self.bench.curvature), judged, lambda_
        )


def search(out: Path, subject: str = "subject", **changed: Any) -> None:
    """The search of a run in a folder, up to where it is stopped."""
    config = Config(("x86",), out=out, **changed)
    pruning: Any = SimpleNamespace(prober=None, evaluator=Stopped, prunable_macs_share=None)
    baseline: Any = SimpleNamespace(file=SimpleNamespace(path="config.toml"), form=SimpleNamespace(form=""))
    run: Any = SimpleNamespace(config=config, loaded=None, compute=None, pattern=Pattern.CHANNEL)
    run.stage = lambda name: nullcontext()
    how = (config.latency_budget, subject, pruning, TARGET, Precision.INT8, None, TARGET.limits, baseline)
    with RunFolder(config, pytest.fail) as run.folder, pytest.raises(KeyboardInterrupt):
        searching.searched(run, *how)


def test_a_run_that_was_stopped_in_its_ranking_does_not_compute_the_curvature_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    real = ranking.removal_curvature
    monkeypatch.setattr(searching, "fewer_judged", lambda *_: {})
    monkeypatch.setattr(searching, "open_bench", lambda *_, **__: nullcontext(SimpleNamespace()))
    monkeypatch.setattr(ranking, "removal_curvature", lambda *given: (computed.append(1), real(*given))[1])
    search(tmp_path / "run")
    search(tmp_path / "run")
    assert len(computed) == 1
    search(tmp_path / "run", subject="another")
    search(tmp_path / "seed", seed=1)
    assert len(computed) == 3


def test_what_each_knob_saves_alone_is_a_share_of_the_dense_latency() -> None:
    ratios = {(0, 0): 0.8, (1, 0): 0.6, (2, 0): 0.4, (0, 1): 0.72}
    knobs = (Knob("a", "channel", 3, (3, 2, 1)), Knob("b", "block", 1, (1, 0)))
    evaluator: Any = SimpleNamespace(knobs=knobs, latency_estimate=ratios.__getitem__)
    assert searching.savings(evaluator) == (pytest.approx((0.0, 0.25, 0.5)), pytest.approx((0.0, 0.1)))
