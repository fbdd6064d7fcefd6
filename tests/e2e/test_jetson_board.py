"""Runs for the Jetson target on pretended boards whose stamp these tests take away: what is done with a real engine, once from
end to end. No figure here says anything of a Jetson; with the stamp, none would come (see test_jetson_run.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import two_ended
from cli_runs import Finished, Workshop, report_of
from edge_compress.devices.measure.timing import TimingSettings
from edge_compress.devices.tensorrt import engines, trtexec
from pretended_jetson import PretendedJetson, jetsons
from safetensors.numpy import load_file

QUICK = {"target": "jetson", "search": "knapsack", "evaluations": 6, "score": "magnitude", "finetune_epochs": 1}
LOOSE = {"latency_budget": 0.6, "max_accuracy_drop": 40}
Command = Callable[[list[str]], Finished]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(autouse=True)
def unstamped(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the stand-in builds counts as an engine, in this process alone; and power takes a second instead of ten."""
    monkeypatch.setattr(trtexec, "SIMULATED", b"another stamp")
    monkeypatch.setattr(engines, "_POWER_S", 1)


@pytest.fixture
def nano(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PretendedJetson:
    """A board with all that JetPack brings, whose inferences take as long as their file is large."""
    (board,) = jetsons(tmp_path, monkeypatch, "nano")
    board.bring_jetpack()
    board.tell(ms_per_kb=0.05)
    return board


def test_an_engine_is_built_judged_and_timed_on_its_board(
    nano: PretendedJetson, here: Command, workshop: Workshop, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = workshop.arguments(out, device=nano.file, **QUICK, **LOOSE)
    finished = here(arguments)
    assert finished.code == 0, finished.err
    assert finished.out.startswith("jetson: ")
    report = report_of(out)
    target = report["targets"]["jetson"]
    assert (target["status"], target["verdict"]) == ("ok", {"passed": True, "reasons": []})

    artifact = target["artifact"]
    assert (artifact["format"], artifact["options"]["tensorrt"], artifact["options"]["built_on"]) == ("engine", "10.3.0", "nano")
    fetched = out / artifact["path"]
    assert fetched.read_bytes() in [engine.read_bytes() for engine in nano.engines()]
    about = json.loads(fetched.read_bytes().partition(b"\n")[2])
    assert {"--fp16", "--int8", "--timingCacheFile"} <= set(about["options"])
    assert (out / artifact["baseline"]["path"]).read_bytes() != fetched.read_bytes()

    latency = target["latency"]
    assert (latency["device"], latency["kind"], latency["sessions"]) == ("nano", "measured", TimingSettings().sessions)
    kb = [(out / artifact["options"][key]).stat().st_size / 1000 for key in ("onnx_baseline", "onnx")]
    assert latency["dense"]["p50_ms"] == pytest.approx(0.05 * kb[0], rel=0.01)
    assert latency["artifact"]["p50_ms"] == pytest.approx(0.05 * kb[1], rel=0.01)
    assert latency["speedup"]["median"] == pytest.approx(kb[0] / kb[1], rel=0.01)
    facts = latency["environment"]
    assert (facts["runtime_version"], facts["power_mode"], facts["gpu"]) == ("tensorrt 10.3.0", "15W", "Orin")
    assert facts["power_artifact"].startswith("4.9")
    assert facts["power_dense"].startswith("4.9")

    alone = target["unpruned"]
    sizes = sorted(path.stat().st_size / 1000 for path in (out / "stages").glob("unpruned-jetson-*/model.onnx"))
    assert len(sizes) == 2  # in half precision the file is smaller than with float weights behind Q/DQ pairs
    assert alone["over_half"]["median"] == pytest.approx(sizes[0] / kb[1], rel=0.01)
    assert alone["gain"]["median"] == pytest.approx(sizes[1] / kb[1], rel=0.01)
    assert alone["speedup"]["median"] == pytest.approx(kb[0] / sizes[1], rel=0.01)

    assert target["accuracy"]["kind"] == "measured"
    assert target["accuracy"]["samples"] == report["data"]["splits"]["test"]
    seen = target["on_device"]
    assert (seen["device"], seen["runtime"], seen["samples"], seen["agreement"]) == ("nano", "tensorrt 10.3.0", 200, 1.0)
    layers = json.loads((out / "artifacts" / "jetson" / "layers.json").read_text())
    assert [layer["average_ms"] for layer in layers["model"]] == [0.0492, 0.03]
    assert layers.keys() == {"model", "baseline"}

    search = report["pruned"]["search"]
    assert {candidate["latency_kind"] for candidate in search["tried"]} == {"measured"}
    assert search["latency_measured"] > 0
    page = (out / "report.md").read_text(encoding="utf-8")
    assert "Answers on nano" in page
    assert "as fast as the dense network in fp16" in page
    assert "Speedup over fp16 alone" in page

    again = here(arguments)
    assert (again.code, again.stages) == (0, [])
    assert report_of(out)["targets"] == report["targets"]

    assert here(["release", str(out), "--out", str(tmp_path / "dist")]).code == 0
    (bundle,) = (tmp_path / "dist").glob("*.tar.gz")
    away = here(["verify", str(bundle)])
    assert away.code == 0, away.err
    assert "16 golden samples" in away.out
    assert "an engine runs on such a board only" in away.out
    there = here(["verify", str(bundle), "--device", str(nano.file)])
    assert there.code == 0, there.err
    assert "16 golden samples in tensorrt" in there.out
    assert "identical outputs" in there.out
    assert f"speedup {latency['speedup']['median']:.2f}" in there.out
    nano.tell(wrong=0.5)
    other = here(["verify", str(bundle), "--device", str(nano.file)])
    assert other.code == 1
    assert "same class on 8 of 16" in other.out + other.err


def test_an_engine_that_answers_otherwise_than_its_file_fails_the_run(
    nano: PretendedJetson, here: Command, workshop: Workshop, tmp_path: Path
) -> None:
    nano.tell(wrong=0.05)  # costs five points of accuracy, which its own gate allows here
    finished = here(workshop.arguments(tmp_path / "run", device=nano.file, **QUICK, **LOOSE))
    report = report_of(tmp_path / "run")
    target = report["targets"]["jetson"]
    assert finished.code == 1
    assert 0.94 <= target["on_device"]["agreement"] < 0.98
    (reason,) = target["verdict"]["reasons"]
    assert reason.startswith("device: on nano the artifact gives")
    assert reason.endswith("another class than on this machine, at most 2 % allowed")
    assert "another class than on this machine" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")


def test_sparse_kernels_that_are_slower_are_left_out_and_the_report_says_why(
    nano: PretendedJetson, here: Command, workshop: Workshop, tmp_path: Path
) -> None:
    nano.tell(sparse=1.25, eligible=["stem", "head"], picked=["stem"])
    options = {name: value for name, value in QUICK.items() if name != "search"} | {"pattern": "2:4", "max_accuracy_drop": 60}
    finished = here(workshop.arguments(tmp_path / "run", device=nano.file, **options))
    assert finished.code in (0, 1), finished.err  # int8 makes it faster or not: here it is the choice that counts
    target = report_of(tmp_path / "run")["targets"]["jetson"]
    assert target["artifact"]["options"]["onnx"] == "artifacts/jetson/model-dense-kernels.onnx"
    said = "2:4: 2 layers eligible, sparse kernels picked for 1; with them 0.80 times as fast as without"
    assert any(note.startswith(said) and note.endswith(": not faster, so left out") for note in target["artifact"]["notes"])
    assert said in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[PretendedJetson, ...]:
    """Two boards of the class `shelf`, in the user's own folder."""
    config = tmp_path / "config" / "edge-compress" / "devices"
    config.mkdir(parents=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    boards = jetsons(tmp_path, monkeypatch, "one", "two")
    for board in boards:
        board.bring_jetpack()
        board.tell(ms_per_kb=0.05)
        board.describe(**{"class": "shelf"})
        board.file.rename(config / board.file.name)
    return boards


def test_of_a_class_one_board_does_all_the_work_and_when_it_fails_another_begins_anew(
    shelf: tuple[PretendedJetson, ...], here: Command, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_COMPRESS_CACHE", str(tmp_path / "cache"))  # failures of boards are this test's own
    one, two = shelf
    one.tell(ms_per_kb=0.5)  # a time of one board cannot be mistaken for the other's
    one.goes_down_at("--iterations=250 ", after=6)  # in the middle of the timing that is reported
    out = tmp_path / "run"
    arguments = workshop.arguments(out, device="class:shelf", **QUICK, **LOOSE)
    finished = here(arguments)
    assert finished.code == 0, finished.err
    report = report_of(out)
    target = report["targets"]["jetson"]
    assert "engine of jetson on one" in finished.err  # it was begun there
    assert len(one.engines()) >= 2  # the artifact's and the baseline's had been built there
    assert target["latency"]["device"] == target["on_device"]["device"] == target["artifact"]["options"]["built_on"] == "two"
    kb = (out / target["artifact"]["options"]["onnx_baseline"]).stat().st_size / 1000
    assert target["latency"]["dense"]["p50_ms"] == pytest.approx(0.05 * kb, rel=0.01)
    assert max(target["latency"]["dense_samples_ms"]) < 2 * 0.05 * kb
    assert (out / target["artifact"]["path"]).read_bytes() in [engine.read_bytes() for engine in two.engines()]
    assert any("a board failed, and the engine was built again on another one: board one" in note for note in report["notes"])

    again = here(arguments)
    assert (again.code, again.stages) == (0, [])
    assert report_of(out)["targets"] == report["targets"]


def test_an_engine_with_several_inputs_and_outputs_is_judged_and_asked_again(
    nano: PretendedJetson, here: Command, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = {"search": "knapsack", "evaluations": 4, "finetune-epochs": 1, "latency-budget": 0.9, "max-drop": 100}
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    recipe = ["--recipe", two_ended.__file__, "--target", "jetson", "--device", str(nano.file), "--out", str(out)]
    finished = here([*recipe, *given])
    assert finished.code == 0, finished.err
    target = report_of(out)["targets"]["jetson"]
    assert (target["status"], target["accuracy"]["kind"], target["on_device"]["agreement"]) == ("ok", "measured", 1.0)
    assert target["accuracy"]["value"] > 60
    kept = load_file(out / target["golden"]["path"])
    assert [kept[f"inputs_{k}"].dtype.kind for k in range(2)] == ["f", "i"]
    assert sorted(kept[f"outputs_{k}"].shape[1:] for k in range(2)) == [(1, 8, 8), (3,)]
    again = here(["verify", str(out), "--device", str(nano.file)])
    assert again.code == 0, again.err
    assert "identical outputs" in again.out
