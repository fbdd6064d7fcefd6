"""Several budgets in one run: one search's worth of shared work, a network for each, the fastest that passes in front."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runs import Finished, Workshop, passed_but_for_speed, report_of

Call = Callable[[list[str]], Finished]

OPTIONS = {"latency_budget": "0.9,0.6", "precision": "fp32", "search": "knapsack", "evaluations": 12, "finetune_epochs": 1}


@pytest.mark.timeout(900)
def test_budgets_share_the_search_and_each_gets_a_verified_network(workshop: Workshop, here: Call, tmp_path: Path) -> None:
    arguments = workshop.arguments(tmp_path / "run", **OPTIONS)
    with workshop.start(arguments) as process:
        process.wait_for("budget 0.6 (2 of 2): ")
        killed = process.send(signal.SIGKILL)
    assert [killed.stages.count(name) for name in ("prepare search", "sensitivity", "latency table")] == [1, 1, 1]
    assert killed.stages.count("search") == 2  # one for each budget
    ended = here(arguments)
    assert passed_but_for_speed(ended, tmp_path / "run"), ended.err
    assert not set(ended.stages) & {"prepare search", "sensitivity", "latency table", "search"}
    assert ended.stages.count("fine-tune") <= 1  # of the second budget; the first was finished

    whole, runs = report_of(tmp_path / "run"), [report_of(tmp_path / "run" / "budgets" / budget) for budget in ("0.9", "0.6")]
    assert [(p["budget"], p["run"]) for p in whole["front"]] == [("0.9", "budgets/0.9"), ("0.6", "budgets/0.6")]
    for point, run in zip(whole["front"], runs, strict=True):
        assert point["value"] == run["targets"]["x86"]["accuracy"]["value"]
        assert point["speedup"] == run["targets"]["x86"]["latency"]["speedup"]
        assert run["pruned"]["search"]["best"]["latency_ratio"] <= float(point["budget"]) * 1.02
        assert run["pruned"]["search"]["evaluations"] == 6  # they share the evaluations
    assert runs[1]["pruned"]["macs"] < runs[0]["pruned"]["macs"]
    (taken,) = [i for i, point in enumerate(whole["front"]) if point["taken"]]
    assert whole["targets"] == runs[taken]["targets"]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "budgets/0.6" in page
    assert "dense, float" in page

    target = whole["targets"]["x86"]  # in float, and yet what quantising alone gives is beside it, measured in the same run
    alone = target["quantised"]
    assert (target["unpruned"]["precision"], alone["precision"], alone["kind"]) == ("fp32", "int8", "measured")
    assert target["unpruned"]["speedup"]["median"] == 1.0
    ratio = target["latency"]["speedup"]["median"]
    assert alone["speedup"]["median"] * alone["gain"]["median"] == pytest.approx(ratio, rel=0.25)
    assert f"{alone['gain']['median']:.2f}× as fast as the dense network in int8" in page
    assert ended.stages.count("compare with int8 alone") == 2 - killed.stages.count("compare with int8 alone")

    for folder in (tmp_path / "run", tmp_path / "run" / "budgets" / "0.9"):
        assert here(["verify", str(folder)]).code == 0
    released = here(["release", str(tmp_path / "run" / "budgets" / "0.9"), "--allow-failed", "--out", str(tmp_path / "dist")])
    assert released.code == 0, released.err
    (bundle,) = (tmp_path / "dist").glob("*.tar.gz")
    assert here(["verify", str(bundle)]).code == 0
    assert here(arguments).stages == []
