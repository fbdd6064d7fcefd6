"""What the gates are for: a run whose result is not good enough ends with 1, and says why."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_runs import Finished, Workshop, report_of, snapshot
from edge_compress.devices.local import LocalDevice
from edge_compress.pipeline.axes.cutting.surgery import cut
from edge_compress.pipeline.errors import BuildError, DeviceError
from edge_compress.pipeline.pattern import units
from edge_compress.pipeline.run_folder import Stage
from edge_compress.pipeline.types import Artifact, Kind, Percentiles, Solved, Speedup, Timing
from edge_compress.targets import x86

Call = Callable[[list[str]], Finished]

REASON = re.compile(r"(accuracy|speedup|latency): ")
NAME = "artifacts/x86/model.onnx"


def reason_of(folder: Path, ended: Finished) -> str:
    """The one reason of a run that failed, which every document and the summary on stdout must give."""
    assert ended.code == 1, ended.err
    report = report_of(folder)
    verdict = report["targets"]["x86"]["verdict"]
    assert verdict["passed"] is report["passed"] is False
    (reason,) = verdict["reasons"]
    assert isinstance(reason, str)
    assert REASON.match(reason)
    told = " ".join(reason.split()[:4])
    for text in (ended.out, (folder / "report.md").read_text(), (folder / "report.html").read_text()):
        assert told in text
        assert "failed" in text
    assert "Traceback" not in ended.err
    return reason


@pytest.fixture
def again(workshop: Workshop, uninterrupted: Path, tmp_path: Path, here: Call) -> Callable[..., tuple[Path, Finished]]:
    """The finished run with other gates: its stages are reused, the verdict is new."""

    def go(**gates: float) -> tuple[Path, Finished]:
        folder = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
        config = folder / "config.toml"
        for name, value in gates.items():
            key = name.replace("_", "-")
            text, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", config.read_text())
            assert count == 1
            config.write_text(text)
        return folder, here(workshop.arguments(folder, **gates))

    return go


@pytest.mark.slow  # really measured: one in forty such intervals lies above 1 by chance
def test_the_speedup_of_a_network_that_was_not_changed_is_not_real(workshop: Workshop, tmp_path: Path, here: Call) -> None:
    """A budget that asks for nothing, no quantization: the artifact is the dense network, and is measured as such."""
    folder = tmp_path / "run"
    options = {"precision": "fp32", "latency_budget": "1000ms", "search": "uniform", "evaluations": 1, "finetune_epochs": 0}
    ended = here(workshop.arguments(folder, min_speedup=1.1, **options))
    report = report_of(folder)
    assert report["pruned"]["macs"] == report["dense"]["macs"]
    low, high = report["targets"]["x86"]["latency"]["speedup"]["ci95"]
    assert low < 1.1
    reason = reason_of(folder, ended)
    if low <= 1.0:
        assert reason == f"speedup: not real, its 95 % interval [{low:.2f}, {high:.2f}] reaches 1.0"


def test_an_interval_that_reaches_1_is_no_speedup_whatever_its_median(
    again: Callable[..., tuple[Path, Finished]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Busy:
        def measure(self, *_: Any) -> Timing:
            times = Percentiles(1.0, 1.2, 2.0)
            return Timing(
                "local",
                Kind.MEASURED,
                times,
                times,
                Speedup(1.4, (0.97, 1.9)),
                0.01,
                5,
                150,
                1,
                ("inconclusive",),
                {},
                (1.0,),
                (1.0,),
            )

    monkeypatch.setattr(LocalDevice, "measure", Busy.measure)
    timed = Stage.result

    def forget(stage: Any, cls: Any) -> Any:
        return None if cls is Timing else timed(stage, cls)

    monkeypatch.setattr(Stage, "result", forget)
    folder, ended = again()
    assert reason_of(folder, ended) == "speedup: not real, its 95 % interval [0.97, 1.90] reaches 1.0"


def test_a_speedup_under_the_one_asked_for_fails_the_run(
    again: Callable[..., tuple[Path, Finished]], uninterrupted: Path
) -> None:
    folder, ended = again(min_speedup=50.0)
    assert reason_of(folder, ended).endswith("is below --min-speedup 50")
    assert ended.stages == []
    assert snapshot(folder)[NAME][1] == snapshot(uninterrupted)[NAME][1]  # it is there to be looked at


def test_a_latency_that_was_not_measured_on_a_device_passes_no_gate(
    again: Callable[..., tuple[Path, Finished]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Stage.result

    def emulated(stage: Any, cls: Any) -> Any:
        found = read(stage, cls)
        return replace(found, kind=Kind.EMULATED) if isinstance(found, Timing) else found

    monkeypatch.setattr(Stage, "result", emulated)
    folder, ended = again()
    assert reason_of(folder, ended) == "latency: not measured on a device (kind emulated)"


def test_a_build_that_fails_is_reported_and_fails_the_run(
    again: Callable[..., tuple[Path, Finished]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise BuildError("the converter refused the layer fc", found="a shape it does not know")

    monkeypatch.setattr(x86.X86, "build", refuse)
    read = Stage.result
    monkeypatch.setattr(Stage, "result", lambda stage, cls: None if cls is Artifact else read(stage, cls))
    folder, ended = again()
    assert ended.code == 1
    target = report_of(folder)["targets"]["x86"]
    assert target["status"] == "failed"
    assert target["artifact"] is None
    assert target["latency"]["kind"] == target["accuracy"]["kind"] == "none"
    assert target["latency"]["speedup"] is target["accuracy"]["top1"] is None
    for text in (*target["verdict"]["reasons"], ended.out, (folder / "report.html").read_text()):
        assert "the converter refused the layer fc" in text


class _Fast:
    """A device on which every artifact is twice as fast, without measuring."""

    def measure(self, *_: Any) -> Timing:
        dense, artifact = Percentiles(2.0, 2.2, 2.5), Percentiles(1.0, 1.1, 1.3)
        return Timing("local", Kind.MEASURED, dense, artifact, Speedup(2.0, (1.9, 2.1)), 0.01, 5, 500, 1, (), {}, (1.0,), (1.0,))


def test_a_device_that_fails_is_exit_code_4_and_the_same_command_goes_on(
    workshop: Workshop, uninterrupted: Path, tmp_path: Path, here: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def measure(self, *_: Any) -> Timing:
            raise DeviceError("measuring model.onnx", found="its process ended by signal SIGILL")

    folder = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    (timing,) = (folder / "stages").glob("timing-x86-*")
    shutil.rmtree(timing)
    monkeypatch.setattr(LocalDevice, "measure", Broken.measure)
    ended = here(workshop.arguments(folder))
    assert ended.code == 4
    assert "SIGILL" in ended.complaint
    monkeypatch.setattr(LocalDevice, "measure", _Fast.measure)
    last = here(workshop.arguments(folder))
    assert last.code == 0
    assert last.stages == ["verify x86"]


def test_too_much_accuracy_lost_fails_the_run(
    again: Callable[..., tuple[Path, Finished]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finished run's plan, nothing reconstructed or trained, no loss allowed."""
    monkeypatch.setattr(LocalDevice, "measure", _Fast.measure)
    monkeypatch.setattr(units, "sequential", lambda coupling, gone, sized, inputs, **_: cut(coupling, gone, sized).eval())
    read = Stage.result
    monkeypatch.setattr(Stage, "result", lambda stage, cls: None if cls is Solved else read(stage, cls))
    folder, ended = again(finetune_epochs=0, max_accuracy_drop=0)
    drop = report_of(folder)["targets"]["x86"]["accuracy"]["drop"]
    assert drop > 0
    assert reason_of(folder, ended) == f"accuracy: top-1 fell by {drop:.2f} points, at most 0 allowed"
