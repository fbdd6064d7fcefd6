"""Latencies kept from one run to the next: those of another network are not taken for this one's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from edge_compress import targets
from edge_compress.pipeline.config import load as load_config
from edge_compress.pipeline.evaluate import evaluation_context
from edge_compress.pipeline.options import Precision


class Silent:
    """A device that measures nothing."""

    def facts(self, runtime: str, threads: int) -> dict[str, str]:
        return {"cpu": "one"}

    def meter(self, *_: Any) -> Any:
        return SimpleNamespace(width=1, close=lambda: None)


@pytest.mark.parametrize("changed", [{"code": "another forward"}, {"baseline": b"another exporter's file"}])
def test_latencies_of_another_network_with_the_same_weights_are_not_reused(
    changed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_context, "scoring_inputs", lambda *_: None)
    monkeypatch.setattr(evaluation_context, "reward_samples", lambda *_: None)
    config = load_config(None, {"targets": ("x86",), "out": str(tmp_path / "run")})

    def cache_of(code: str = "a forward", baseline: bytes = b"a file") -> Path:
        subject = SimpleNamespace(cost=SimpleNamespace(macs=1), model_sha256="0", code=code)
        loaded: Any = SimpleNamespace(subject=subject, data=SimpleNamespace(train=None))
        prober: Any = SimpleNamespace(candidate=lambda structure: b"")
        device: Any = Silent()
        with evaluation_context.open_bench(
            config,
            loaded,
            targets.load("x86"),
            Precision.FP32,
            tmp_path / "memo",
            probed=lambda *_: prober,
            baseline=baseline,
            device=device,
            latencies=tmp_path / "latency",
        ) as bench:
            assert bench.cache is not None
            return bench.cache.path

    assert cache_of() == cache_of()
    assert cache_of() != cache_of(**changed)
