"""Where an engine is built, and what is said where it is not."""

import sys
from dataclasses import dataclass

import pytest
import torch
from edge_compress import targets
from edge_compress.devices.access import open_board
from edge_compress.devices.board import Board
from edge_compress.devices.cluster.ray_board import RayBoard
from edge_compress.devices.local import LocalDevice
from edge_compress.devices.pool import Pool
from edge_compress.devices.tensorrt.device import TensorRtDevice
from edge_compress.devices.transport.ssh import SshTransport
from edge_compress.pipeline.config import Config
from edge_compress.pipeline.errors import InputError, UnavailableError
from edge_compress.pipeline.evaluate.evaluation_context import EstimatingBench, _NoMeter
from edge_compress.pipeline.options import Budget
from edge_compress.pipeline.pattern.choice import too_narrow
from edge_compress.pipeline.signature import TOP1
from edge_compress.pipeline.types import Accuracy, Candidate, Kind, Knob, ModelCost, SearchResult, TargetResult, Verdict
from edge_compress.pipeline.verify import places
from edge_compress.pipeline.verify.engine import result as engine_result
from edge_compress.pipeline.verify.gates import Allowed
from edge_compress.targets.base import Structure, joint

X86, JETSON = targets.load("x86"), targets.load("jetson")


@pytest.fixture
def board():
    found = TensorRtDevice(Board("nano", ("jetson",), "ssh", runtime="tensorrt", address="nano"), SshTransport("nano", "nano"))
    yield found
    found.close()


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def config(**changed):
    return Config(targets=("jetson",), **changed)


def test_an_engine_belongs_on_its_board_and_all_else_on_this_machine(board):
    here = LocalDevice()
    assert places.device_for(JETSON, board) is board
    assert isinstance(places.device_for(X86, board), LocalDevice)
    assert places.device_for(X86, here) is here
    assert places.device_for(JETSON, here) is None


def test_a_gpu_of_this_machine_needs_tensorrt_and_is_named_as_what_it_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA RTX 3080")
    monkeypatch.setattr(places.shutil, "which", lambda name: None)
    monkeypatch.setattr(places, "find_spec", lambda name: None)
    assert places.gpu_here() is None
    monkeypatch.setattr(places, "find_spec", lambda name: object())
    found = places.gpu_here()
    assert found.name == "NVIDIA RTX 3080 (this machine, not a Jetson)"
    assert found.programs == [(sys.executable, places.tensorrt_loop.__file__)]
    monkeypatch.setattr(places.shutil, "which", lambda name: "/usr/bin/trtexec")
    assert places.gpu_here().programs[0] == ("trtexec",)


def test_without_a_device_a_required_artifact_ends_the_run_before_it_begins(board):
    assert places.places_of(config(), [JETSON], LocalDevice()) == {"jetson": None}
    with pytest.raises(UnavailableError, match="no board with TensorRT") as raised:
        places.places_of(config(require_artifact=True), [X86, JETSON], LocalDevice())
    assert raised.value.exit_code == 3
    assert places.places_of(config(require_artifact=True), [JETSON], board) == {"jetson": board}


def test_milliseconds_need_something_to_measure_on(board):
    ms = config(latency_budget=(Budget.parse("8ms"),))
    with pytest.raises(InputError, match="a share of the dense model's latency"):
        places.places_of(ms, [JETSON], LocalDevice())
    assert places.places_of(ms, [JETSON], board)
    assert places.places_of(ms, [X86, JETSON], LocalDevice())["jetson"] is None


def test_a_class_of_boards_is_a_place_for_an_engine_where_all_of_them_build_engines():
    def pool(open_board, *runtimes):
        members = [Board(f"b{i}", ("jetson",), "ssh", runtime=r, address=f"b{i}") for i, r in enumerate(runtimes)]
        return Pool("class:orin", members, open_board)

    alike = pool(open_board, "tensorrt", "tensorrt")
    assert places.places_of(config(device="class:orin"), [X86, JETSON], alike)["jetson"] is alike
    assert isinstance(places.device_for(X86, alike), LocalDevice)
    mixed = pool(open_board, "tensorrt", "onnxruntime")
    assert places.places_of(config(device="class:orin"), [JETSON], mixed) == {"jetson": None}
    elsewhere = pool(RayBoard, "tensorrt", "tensorrt")
    with pytest.raises(InputError, match=r"boards that other hosts reach.*RAY_ADDRESS"):
        places.places_of(config(device="class:orin"), [JETSON], elsewhere)
    for made in (alike, mixed):
        made.close()


def result(status, drop=0.1, passed=False, kind=Kind.ESTIMATED):
    accuracy = Accuracy(90.0, drop, 0.99, 100, kind)
    return TargetResult(status, Verdict(passed), accuracy=accuracy)


@pytest.mark.parametrize(
    ("given", "breaks"),
    [
        (result("not_built"), False),
        (result("not_built", drop=1.5), True),
        (TargetResult("not_built", Verdict(False)), True),
        (result("ok", passed=True), False),
        (result("ok"), True),
        (result("failed"), True),
    ],
)
def test_what_was_not_built_fails_a_run_only_by_the_accuracy_that_is_known(given, breaks):
    assert engine_result.breaks_a_gate(given, Allowed(TOP1, 1.0, 1.0)) is breaks


def test_a_plan_for_several_targets_suits_the_channels_of_all():
    both = joint([X86, JETSON])
    assert [both.step(size) for size in (16, 32, 48, 64, 256)] == [8, 8, 8, 16, 16]
    assert [joint([JETSON, X86]).step(size) for size in (16, 256)] == [16, 16]
    assert joint([X86, JETSON]).precisions == X86.limits.precisions
    assert joint([X86]) == X86.limits


def test_groups_too_narrow_to_suit_every_target_are_told() -> None:
    knobs = (Knob("wide", "channel", 256, (256, 128)), Knob("thin", "stream", 32, (32, 24, 16, 8)), Knob("b", "block", 1, (1, 0)))
    (said,) = too_narrow(knobs, joint([X86, JETSON]), "x86")
    assert said.startswith("1 of 2 groups are narrower than 64 units: multiples of 8 of them stay, which suits x86")
    assert too_narrow(knobs, X86.limits, "x86") == too_narrow(knobs[:1], joint([X86, JETSON]), "x86") == []


@dataclass
class Estimates:
    """A prober that knows no files."""

    asked: int = 0

    whole_s = 1.0

    def estimate(self, structure):
        self.asked += 1
        return 0.5 if structure.removed else 1.0


def test_a_bench_without_a_device_estimates_and_says_so():
    prober = Estimates()
    bench = EstimatingBench(None, None, prober, _NoMeter(), None, None)
    assert bench.kind is Kind.ESTIMATED
    assert bench.latency_ratio(Structure({}, ("block",))) == 0.5
    bench.measure_ahead([Structure({})])
    assert (prober.asked, bench.measured, bench.reused) == (1, 0, 0)
    for ask in (lambda: bench.meter.dense_ms, lambda: bench.meter.ratio(b""), lambda: bench.meter.ratios([b""])):
        with pytest.raises(UnavailableError, match="no device to measure on"):
            ask()
    bench.meter.close()


@pytest.mark.parametrize("kind", [Kind.ESTIMATED, Kind.MEASURED])
def test_a_search_that_measured_nothing_is_told_from_one_that_did(kind):
    best = Candidate((0,), 0.9, 0.3, 0.5, kind, ModelCost(1, 1))
    notes = engine_result.remarks(SearchResult("ppo", best, (best,), (0.9,), 1, 1.0, 0.5))
    assert bool(notes) is (kind is Kind.ESTIMATED)
    assert all("no time of any device" in note for note in notes)
