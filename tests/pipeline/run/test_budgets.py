"""Several budgets in one run: the folders of the single ones, which the run makes itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from edge_compress.pipeline.config import Config, load
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.options import Budget
from edge_compress.pipeline.progress import Progress
from edge_compress.pipeline.run import budgets


@pytest.fixture
def run_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Config, int], int]:
    """Runs with so many evaluations and epochs for each budget; every stage takes no time and leaves a file."""

    @contextmanager
    def prepared(*_: Any) -> Iterator[Any]:
        yield SimpleNamespace(run=SimpleNamespace(folder=SimpleNamespace(share=lambda out: None), notes=[]))

    def run_one(config: Config, *_: Any) -> int:
        (config.out / "plan.json").write_text("{}")
        return 0

    def run(config: Config, count: int) -> int:
        def searched(before: Any) -> list[Config]:
            each = replace(config, evaluations=count, finetune_epochs=count, max_minutes=None)
            return [replace(each, latency_budget=(b,), out=config.out / "budgets" / str(b)) for b in config.latency_budget]

        monkeypatch.setattr(budgets, "_searched", searched)
        return budgets.run_pipeline(config, Progress(quiet=True))

    for name, stub in (("prepared", prepared), ("run_one", run_one), ("lend_seconds", lambda *_: None)):
        monkeypatch.setattr(budgets, name, stub)
    monkeypatch.setattr(budgets, "_publish", lambda *_: None)
    return run


def test_a_budgets_folder_goes_on_where_the_minutes_allow_other_evaluations(
    run_with: Callable[[Config, int], int], tmp_path: Path
) -> None:
    two = (Budget.parse("0.7"), Budget.parse("0.5"))
    config = Config(targets=("x86",), out=tmp_path / "run", latency_budget=two, max_minutes=10.0)
    assert run_with(config, 31) == 0
    assert run_with(config, 33) == 0
    kept = load(tmp_path / "run" / "budgets" / "0.5" / "config.toml", {})
    assert (kept.evaluations, kept.finetune_epochs) == (33, 33)
    with pytest.raises(InputError, match=r"holds another run: found seed = 0, expected seed = 1"):
        run_with(replace(config, seed=1), 33)


def test_a_budgets_folder_of_another_number_of_evaluations_is_refused_where_it_was_asked_for(
    run_with: Callable[[Config, int], int], tmp_path: Path
) -> None:
    two = (Budget.parse("0.7"), Budget.parse("0.5"))
    config = Config(targets=("x86",), out=tmp_path / "run", latency_budget=two)
    assert run_with(config, 31) == 0
    with pytest.raises(InputError, match="evaluations = 31"):
        run_with(config, 33)
