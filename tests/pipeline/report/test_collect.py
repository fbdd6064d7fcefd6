"""What a report says of the run it is of."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from edge_compress.pipeline.report.collect import header_of
from fake_run import fake_results


@pytest.mark.parametrize(("own", "told"), [("edge-compress --seed 3", "edge-compress --seed 3"), ("", "edge-compress --seed 4")])
def test_the_command_is_the_callers_own_or_else_that_of_the_process(own: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/edge-compress", "--seed", "4"])
    loaded = SimpleNamespace(subject=fake_results().subject)
    run: Any = SimpleNamespace(command=own, loaded=loaded, config=SimpleNamespace(seed=3))
    assert header_of(run, [], datetime.now(UTC)).command == told
