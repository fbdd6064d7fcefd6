"""A target that is only a file: nothing else knows it, and a whole run builds for it, measures it and reports it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_runs import Finished, Workshop, report_of
from edge_compress import targets

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
MODULE = '''
"""ONNX Runtime again, under a name of its own, in multiples of four channels."""

from dataclasses import replace

from edge_compress.pipeline.options import Precision
from edge_compress.targets.base import Target
from edge_compress.targets.x86 import TARGET as X86


class Planted(Target):
    name = "planted"
    runtime = X86.runtime
    limits = replace(X86.limits, channel_multiple=4, precisions=(Precision.FP32,))

    def missing(self):
        return None

    def baseline(self, *network):
        return X86.baseline(*network)

    def build(self, request):
        return replace(X86.build(request), target=self.name, notes=("built by a file nobody knows",))

    def runner(self, path, threads=1):
        return X86.runner(path, threads)

    def prober(self, module, signature, precision):
        return X86.prober(module, signature, precision)


TARGET = Planted()
'''


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with one more target in it, in the place of targets/; the others stay users_code."""
    folder = tmp_path / "targets"
    folder.mkdir()
    (folder / "planted.py").write_text(MODULE)
    monkeypatch.setattr(targets, "__file__", str(folder / "__init__.py"))
    monkeypatch.setattr(targets, "__path__", [str(folder), *targets.__path__])
    yield
    sys.modules.pop(f"{targets.__name__}.planted", None)


def test_a_run_for_a_planted_target_needs_no_other_edit(
    planted: None, here: Callable[[list[str]], Finished], workshop: Workshop, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    asked = workshop.arguments(
        out, target="planted", search="knapsack", score="magnitude", evaluations=4, finetune_epochs=0, max_accuracy_drop=100
    )
    finished = here(asked)
    assert finished.code in (0, 1), finished.err  # a speedup this machine cannot show is a verdict, not a failure to run
    report = report_of(out)["targets"]["planted"]
    assert report["status"] == "ok"
    assert "built by a file nobody knows" in report["artifact"]["notes"]
    assert (out / report["artifact"]["path"]).parent == out / "artifacts" / "planted"
    assert report["accuracy"]["kind"] == report["latency"]["kind"] == "measured"
    assert all(knob["kept"] % 4 == 0 for knob in report_of(out)["pruned"]["knobs"] if knob["kind"] != "block")
    assert "planted" in (out / "report.html").read_text(encoding="utf-8")


def test_a_run_for_an_unknown_target_names_the_planted_one(planted: None, here: Callable[[list[str]], Finished]) -> None:
    assert here(["--target", "absent"]).code == 2
    assert "planted" in here(["--target", "absent"]).complaint
