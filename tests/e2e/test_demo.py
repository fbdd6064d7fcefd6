"""A whole run of the command line: what the contract promises is there, is true, and comes from every stage's own work."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import edge_compress
import numpy as np
import pytest
import user_net
from cli_runs import Finished, Workshop, report_of
from edge_compress.calibration import ranges
from edge_compress.devices.local import LocalDevice
from edge_compress.pipeline.axes.cutting.surgery import cut
from edge_compress.pipeline.build import artifact as artifacts
from edge_compress.pipeline.codec import from_json
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.pattern import finalists, searching, units
from edge_compress.pipeline.run import fine_tuning
from edge_compress.pipeline.task.task import judged, torch_predictor
from edge_compress.pipeline.types import Epoch, Timing
from edge_compress.pipeline.verify import artifact as verify_artifact
from edge_compress.pipeline.verify.references import accuracy_here
from edge_compress.targets import int8_choice
from edge_compress.targets.onnx import int8 as onnx_int8
from effects import EFFECTS, Run, compensation_repairs_what_removal_broke, inputs_of

Call = Callable[[list[str]], Finished]

# report.json, as the contract has it; a type stands for any value of it
NUMBER = (int, float)
REPORT: dict[str, Any] = {
    "schema": int,
    "tool": {"version": str, "packages": dict},
    "model": {"name": str, "sha256": str},
    "data": {"name": str, "sha256": str, "splits": {"train": int, "search": int, "test": int}},
    "metric": {"name": str, "unit": str, "higher_is_better": bool},
    "seed": int,
    "dense": {"top1": NUMBER, "params": int, "macs": int, "size_bytes": int},
    "pruned": {
        "top1": NUMBER,
        "params": int,
        "macs": int,
        "sparsity": NUMBER,
        "pattern": str,
        "score": str,
        "search": {"method": str, "evaluations": int, "seconds": NUMBER},
    },
    "targets": {
        "x86": {
            "status": str,
            "artifact": {"path": str, "sha256": str, "size_bytes": int, "format": str, "precision": str},
            "accuracy": {
                "top1": NUMBER,
                "value": NUMBER,
                "drop_pp": NUMBER,
                "drop": NUMBER,
                "agreement": NUMBER,
                "samples": int,
                "kind": str,
            },
            "latency": {
                "device": str,
                "kind": str,
                "dense": {"p50_ms": NUMBER, "p90_ms": NUMBER, "p99_ms": NUMBER},
                "artifact": {"p50_ms": NUMBER, "p90_ms": NUMBER, "p99_ms": NUMBER},
                "speedup": {"median": NUMBER, "ci95": list},
                "noise_floor": NUMBER,
            },
            "unpruned": {
                "precision": str,
                "top1": NUMBER,
                "value": NUMBER,
                "speedup": {"median": NUMBER, "ci95": list},
                "gain": {"median": NUMBER, "ci95": list},
                "size_bytes": int,
            },
            "verdict": {"passed": bool, "reasons": list},
        }
    },
}


@pytest.fixture
def finished(workshop: Workshop, uninterrupted: Path) -> Run:
    return Run(uninterrupted, user_net.projected, workshop.weights("projected"))


def test_a_run_leaves_every_file_of_the_contract(uninterrupted: Path) -> None:
    names = ("config.toml", "plan.json", "report.json", "report.html", "report.md", "artifacts/x86/model.onnx")
    assert [name for name in names if not (uninterrupted / name).stat().st_size] == []
    assert not list(uninterrupted.rglob("*.tmp"))


def test_with_json_the_report_alone_is_on_stdout_and_progress_on_stderr(workshop: Workshop, uninterrupted: Path) -> None:
    out, err = ((workshop.folder / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    assert json.loads(out) == report_of(uninterrupted)
    assert re.search(r"^  prunable: [\d.]+ % of the multiply-accumulates, by \d+ decisions$", err.split("search ...")[0], re.M)
    began = Finished(0, out, err).stages
    assert began[:5] == ["dense baseline x86", "prepare search", "sensitivity", "latency table", "search"]
    assert began[5:10] == ["compensate", "fine-tune", "test split", "build x86", "verify x86"]
    assert began[10:] == ["unpruned x86", "compare with int8 alone", "memory and layers x86"]
    assert "sensitivity: done in " in err


def test_the_report_has_every_key_of_the_contract(uninterrupted: Path) -> None:
    _has_all(report_of(uninterrupted), REPORT, "report")
    report = report_of(uninterrupted)
    assert report["schema"] == 1
    assert report["passed"] is report["targets"]["x86"]["verdict"]["passed"] is True
    assert report["targets"]["x86"]["accuracy"]["kind"] == report["targets"]["x86"]["latency"]["kind"] == "measured"
    assert sum(report["data"]["splits"].values()) == 1797
    assert set(report["stage_seconds"]) >= {"sensitivity", "search", "fine-tune", "build x86", "verify x86"}


def test_what_quantising_alone_gives_is_measured_beside_the_artifact(uninterrupted: Path) -> None:
    target = report_of(uninterrupted)["targets"]["x86"]
    alone, artifact, speedup = target["unpruned"], target["artifact"], target["latency"]["speedup"]
    assert target["quantised"] is None  # it would be the same
    assert alone["precision"] == artifact["precision"] == "int8"
    assert alone["kind"] == "measured"
    assert alone["size_bytes"] > artifact["size_bytes"]  # nothing was pruned
    assert alone["size_bytes"] < artifact["baseline"]["size_bytes"]  # but it is int8
    (file,) = uninterrupted.glob("stages/unpruned-x86-*/model.onnx")
    assert file.stat().st_size == alone["size_bytes"]
    assert alone["speedup"]["median"] * alone["gain"]["median"] == pytest.approx(speedup["median"], rel=0.25)
    assert f"{alone['gain']['median']:.2f}× as fast as the dense network in int8" in (uninterrupted / "report.md").read_text()


def test_memory_and_the_time_of_each_layer_are_measured(uninterrupted: Path) -> None:
    target = report_of(uninterrupted)["targets"]["x86"]
    usage = target["usage"]
    assert usage["peak_rss_bytes"] > 10_000_000  # the runtime alone takes that
    assert usage["dense_peak_rss_bytes"] > 10_000_000
    total = sum(layer["ms"] for layer in usage["layers"])
    assert 0.3 < total / target["latency"]["artifact"]["p50_ms"] < 5  # the runtime's profiler takes time itself
    names = {layer["name"] for layer in usage["layers"]}
    assert any("conv" in name or "stem" in name or "block" in name for name in names), names
    assert "artifact that take longest" in (uninterrupted / "report.md").read_text()


def _has_all(found: Any, expected: Any, where: str) -> None:
    if isinstance(expected, dict):
        assert isinstance(found, dict), where
        for key, value in expected.items():
            assert key in found, f"{where}.{key}"
            _has_all(found[key], value, f"{where}.{key}")
    else:
        assert isinstance(found, expected), where
        assert not (isinstance(found, bool) and expected is not bool), where


class _Sources(HTMLParser):
    """Where a page loads things from, and the text of its styles and scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "srcset", "href", "xlink:href", "data", "action", "poster")
        self.places += [value or "" for name, value in attrs if name in names]


def test_the_page_needs_nothing_from_outside(uninterrupted: Path) -> None:
    text = (uninterrupted / "report.html").read_text(encoding="utf-8")
    page = _Sources()
    page.feed(text)
    assert {"html", "svg", "table"} <= set(page.tags)
    assert not {"iframe", "object", "embed", "base"} & set(page.tags)
    assert [place for place in page.places if not place.startswith(("#", "data:"))] == []
    assert not re.search(r"@import|url\(\s*['\"]?(?!#|data:)|fetch\(|XMLHttpRequest", text)


def test_the_documents_say_what_the_report_says(uninterrupted: Path) -> None:
    report = report_of(uninterrupted)
    digest, median = report["targets"]["x86"]["artifact"]["sha256"], report["targets"]["x86"]["latency"]["speedup"]["median"]
    for name in ("report.md", "report.html"):
        text = (uninterrupted / name).read_text(encoding="utf-8")
        assert digest in text
        assert f"{median:.2f}" in text


@pytest.mark.parametrize("stage", EFFECTS)
def test_the_stage_did_its_work(stage: str, finished: Run) -> None:
    EFFECTS[stage](finished)


def test_plan_and_state_dict_give_the_pruned_network_again(finished: Run) -> None:
    """Through the user's own factory, without anything else of the run: the float part of the artifact is that network."""
    own = finished.pruned(_tensor(inputs_of(finished.data.test))).detach().numpy()
    right = own.argmax(axis=1) == finished.data.test.labels
    assert 100 * right.mean() == pytest.approx(finished.report["pruned"]["top1"], abs=1e-9)
    again = edge_compress.load(finished.folder, model=user_net.projected)
    np.testing.assert_allclose(again(_tensor(inputs_of(finished.data.test))).detach().numpy(), own, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in finished.pruned.parameters()) == finished.report["pruned"]["params"]
    assert len(finished.plan.kept) + len(finished.plan.removed_blocks) > 0


def _tensor(array: Any) -> Any:
    import torch

    return torch.from_numpy(array)


def test_a_run_on_another_network_is_one_line(uninterrupted: Path) -> None:
    for factory in (user_net.padded, user_net.attending, user_net.padded()):
        with pytest.raises(InputError):
            edge_compress.load(uninterrupted, factory)


def test_verify_says_when_a_file_of_the_run_has_changed(uninterrupted: Path, tmp_path: Path, here: Call) -> None:
    copy = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    assert here(["verify", str(copy)]).code == 0
    artifact = copy / "artifacts/x86/model.onnx"
    artifact.write_bytes(artifact.read_bytes()[:-1] + b"?")
    ended = here(["verify", str(copy)])
    assert ended.code == 1
    assert "artifacts/x86/model.onnx" in ended.complaint


# -- a stage that does nothing is noticed ----------------------------------------------------------------------------------


class _SameTiming:
    """A device that has measured before: what is under test is not latency."""

    def __init__(self, folder: Path) -> None:
        (result,) = (folder / "stages").glob("timing-x86-*/result.json")
        self.timing = from_json(Timing, json.loads(result.read_text())["result"])

    def measure(self, *_: object) -> Timing:
        return self.timing


AFTER = (
    "sensitivity",
    "search",
    "compensate",
    "finetune",
    "test-split",
    "build",
    "accuracy",
    "timing",
)  # a stage and what follows from it


@pytest.fixture
def again(
    workshop: Workshop, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Call
) -> Callable[..., Run]:
    """The session's run once more from one stage on, in this process, where a part of the tool has been replaced."""

    def go(start: str, *, timed: bool = False, **changed: object) -> Run:
        folder = Path(shutil.copytree(uninterrupted, tmp_path / "again"))
        for stage in AFTER[AFTER.index(start) :]:
            for path in (folder / "stages").glob(f"{stage}-*"):
                shutil.rmtree(path)
        if changed:
            shutil.copy(uninterrupted / "config.toml", folder)
            config = folder / "config.toml"
            for name, value in changed.items():
                text, count = re.subn(
                    rf"(?m)^{name.replace('_', '-')} = .*$", f"{name.replace('_', '-')} = {value}", config.read_text()
                )
                assert count == 1
                config.write_text(text)
        if not timed:
            monkeypatch.setattr(LocalDevice, "measure", _SameTiming(uninterrupted).measure)
        ended = here(workshop.arguments(folder, **changed))
        assert ended.code in (0, 1), ended.err
        return Run(folder, user_net.projected, workshop.weights("projected"))

    return go


def test_a_ranking_the_wrong_way_round_is_noticed(again: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    rank_units = units.rank_units

    def reversed_order(*arguments: Any) -> Any:
        from dataclasses import replace

        found = rank_units(*arguments)
        return replace(found, order={name: order[::-1] for name, order in found.order.items()})

    monkeypatch.setattr(units, "rank_units", reversed_order)
    changed = again("sensitivity")
    with pytest.raises(AssertionError):
        EFFECTS["sensitivity"](changed)


def test_a_search_that_changes_nothing_is_noticed(again: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    real = searching.search

    def dense(*arguments: Any) -> Any:
        from dataclasses import replace

        found = real(*arguments)
        evaluator = arguments[0]
        whole = evaluator.evaluate((0,) * len(evaluator.knobs))
        return replace(found, best=whole, finalists=(whole,))

    monkeypatch.setattr(searching, "search", dense)
    changed = again("search")
    with pytest.raises(AssertionError):
        EFFECTS["search"](changed)


def test_compensation_repairs_what_removal_broke(again: Callable[..., Run]) -> None:
    compensation_repairs_what_removal_broke(again("compensate", finetune_epochs=0))


def test_a_compensation_that_only_cuts_is_noticed(again: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "sequential", lambda coupling, gone, sized, inputs, **_: cut(coupling, gone, sized).eval())
    changed = again("compensate", finetune_epochs=0)
    with pytest.raises(AssertionError):
        compensation_repairs_what_removal_broke(changed)


def test_plans_that_were_not_judged_once_solved_are_noticed(again: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    real = finalists.play_off
    monkeypatch.setattr(
        finalists, "play_off", lambda some, how, solve, judge, tell: real(some, how, solve, lambda net: (0.5, 1.0), tell)
    )
    changed = again("compensate")
    with pytest.raises(AssertionError):
        EFFECTS["compensate"](changed)


def test_a_fine_tuning_that_leaves_the_network_as_it_was_is_noticed(
    again: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def idle(student: Any, teacher: Any, data: Any, task: Any, settings: Any, **_: Any) -> tuple[Epoch, ...]:
        accuracy = judged(task, data.search, torch_predictor(student)).value()
        return tuple(Epoch(i + 1, 0.0, accuracy, 0.1) for i in range(settings.epochs))

    monkeypatch.setattr(fine_tuning, "finetune", idle)
    changed = again("finetune")
    with pytest.raises(AssertionError):
        EFFECTS["fine-tune"](changed)


def test_an_artifact_left_in_float_is_noticed(again: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_int8, "quantize", lambda model, *_: model)
    changed = again("build")
    with pytest.raises(AssertionError):
        EFFECTS["quantization"](changed)


def test_ranges_from_the_wrong_inputs_are_noticed(again: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    real = artifacts.calibration_set
    monkeypatch.setattr(artifacts, "calibration_set", lambda *given, **more: [0.02 * batch for batch in real(*given, **more)])
    changed = again("build")
    with pytest.raises(AssertionError):
        EFFECTS["calibration"](changed)


def test_the_worst_way_of_taking_ranges_is_noticed(again: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = {"narrow": lambda seen: (0.0, 0.02 * max(seen.highest, 1e-3))}
    monkeypatch.setattr(ranges, "METHODS", {**ranges.METHODS, **narrow})
    monkeypatch.setattr(int8_choice, "METHODS", ranges.METHODS)
    monkeypatch.setattr(int8_choice.Trials, "best", lambda trials: min(trials.scores, key=trials.scores.__getitem__))
    changed = again("build")
    with pytest.raises(AssertionError):
        EFFECTS["calibration"](changed)


def test_an_accuracy_that_is_not_the_artifacts_is_noticed(again: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        verify_artifact,
        "accuracy_here",
        lambda run, target, artifact, *rest: accuracy_here(run, target, replace(artifact, file=artifact.baseline), *rest),
    )
    changed = again("accuracy")
    with pytest.raises(AssertionError):
        EFFECTS["verification"](changed)


def test_a_latency_of_the_baseline_against_itself_is_noticed(again: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    real = LocalDevice.measure
    monkeypatch.setattr(
        LocalDevice, "measure", lambda device, baseline, candidate, *rest: real(device, baseline, baseline, *rest)
    )
    changed = again("timing", timed=True)
    with pytest.raises(AssertionError):
        EFFECTS["latency"](changed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_embedded_default_passes_its_gates_within_its_time(workshop: Workshop, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = workshop.run(["--target", "x86", "--out", str(folder)])
    assert ended.code == 0, ended.err
    report = report_of(folder)
    assert report["targets"]["x86"]["accuracy"]["drop"] <= 1.0
    assert report["targets"]["x86"]["latency"]["speedup"]["ci95"][0] >= 1.3
    assert sum(report["stage_seconds"].values()) <= 180
