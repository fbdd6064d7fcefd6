"""A phone without Python: the program on it times models, answers and is asked again when it is hot or fails.

The phone is this machine behind a transport that runs commands here; the program is a stand-in with real loops. Over a real adbd
the same is done in test_adb.py.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from edge_compress.devices import board as boards
from edge_compress.devices import health
from edge_compress.devices.access import open_board
from edge_compress.devices.board import Board
from edge_compress.devices.local import HereTransport
from edge_compress.devices.measure.timing import TimingSettings
from edge_compress.devices.phone import state as phone_state
from edge_compress.devices.phone.device import PhoneDevice
from edge_compress.devices.transport.base import BoardError, Completed
from edge_compress.pipeline.errors import BuildError, DeviceError, UnavailableError
from edge_compress.pipeline.profile import profiling
from edge_compress.pipeline.progress import Progress
from edge_compress.pipeline.types import Kind

QUICK = TimingSettings(runtime="litert", sessions=2, max_pairs=8, min_pairs=1, block=2)
STANDIN = Path(__file__).parents[2] / "support" / "benchmark_model_standin.py"


class Here(HereTransport):
    """A transport whose far end is this machine, with some files in front of its PATH."""

    def __init__(self, root: Path) -> None:
        super().__init__("pocket", f"{root}/files")
        self.root, self.pushed, self.calls = root, [], []
        self.more: dict[str, str] = {}

    def run(self, argv, deadline_s):
        self.calls.append(list(argv))
        path = f"{self.root}/bin:{os.environ['PATH']}"
        done = subprocess.run(argv, capture_output=True, timeout=deadline_s, env={**os.environ, **self.more, "PATH": path})
        code = 128 - done.returncode if done.returncode < 0 else done.returncode  # as a shell says it
        return Completed(code, done.stdout, done.stderr.decode())

    def push(self, source, remote, deadline_s):
        self.pushed.append(remote)
        shutil.copyfile(source, remote)

    def pull(self, remote, target, deadline_s, most=0):
        shutil.copyfile(remote, target)


@pytest.fixture(autouse=True)
def short_loops(monkeypatch):
    monkeypatch.setattr("edge_compress.devices.phone.device.LOOP_SECONDS", 0.0)


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def there(tmp_path) -> Here:
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin" / "benchmark_model", f'exec {sys.executable} {STANDIN} "$@"')
    script(tmp_path / "bin" / "getprop", 'case $1 in ro.product.model) echo "Some Phone";; ro.soc.model) echo SM1;; esac')
    script(tmp_path / "bin" / "dumpsys", "echo 'Thermal Status: 0'")
    script(tmp_path / "bin" / "settings", "echo 0")
    return Here(tmp_path)


@pytest.fixture
def phone(there) -> PhoneDevice:
    board = Board("pocket", ("phone",), "adb", "litert", address="1", benchmark_model=f"{there.root}/bin/benchmark_model")
    return PhoneDevice(board, there)


def model(path: Path, size: int) -> Path:
    path.write_bytes(b"\x1c\0\0\0TFL3" + os.urandom(size - 8))
    return path


@pytest.mark.parametrize("form", ["oldest", "2.4", "new"])
def test_a_smaller_model_is_faster_in_every_version_of_the_program(phone, there, tmp_path, form):
    there.more |= {"BENCHMARK_FORM": form, "BENCHMARK_CLOCK": "counted"}
    big, small = model(tmp_path / "big.tflite", 400_000), model(tmp_path / "small.tflite", 100_000)
    timing = phone.measure(big, small, QUICK)
    assert timing.speedup.median == pytest.approx(4.0, rel=0.01)
    assert (timing.kind, timing.device, timing.pairs) == (Kind.MEASURED, "pocket", 16)
    assert timing.environment["thermal_status"] == "0"
    assert timing.environment["board"] == "Some Phone"
    assert "loop of benchmark_model" in timing.environment["time"]  # nobody takes them for single inferences
    assert "speedup_cpu_time" not in timing.environment
    assert sum(remote.endswith(".part") for remote in there.pushed) == 2  # each file once, and whole before it has its name
    assert not list(Path(there.folder).glob("*.part"))


def test_baseline_and_candidate_take_turns(phone, there, tmp_path):
    big, small = model(tmp_path / "big.tflite", 20_000), model(tmp_path / "small.tflite", 10_000)
    phone.sessions(big, [small], QUICK)
    graphs = [word for call in there.calls for word in call if word.startswith("--graph=")]
    assert len(graphs) == 2 * 2 * 8
    assert all(len(set(graphs[i : i + 2])) == 2 for i in range(0, len(graphs), 2))  # each round has both
    assert len({tuple(graphs[i : i + 2]) for i in range(0, len(graphs), 2)}) == 2  # in both orders


def test_candidates_of_a_search_are_removed_again(phone, there, tmp_path):
    there.more["BENCHMARK_CLOCK"] = "counted"
    big, small = (model(tmp_path / f"{n}.tflite", n).read_bytes() for n in (300_000, 100_000))
    meter = phone.meter(big, "litert", 1, 0)
    assert [ratio.value for ratio in meter.ratios([small, big])] == [pytest.approx(1 / 3, rel=0.01), pytest.approx(1.0, rel=0.01)]
    assert meter.dense_ms > 0
    assert len(list(Path(there.folder).glob("*.tflite"))) == 1  # the baseline stays


def test_facts_tell_phones_and_programs_apart(phone, there):
    facts = phone.facts("litert", 1)
    assert facts["board"] == "Some Phone"
    assert facts["cpu"] == "SM1"
    assert facts["runtime_version"].startswith("benchmark_model ")
    script(there.root / "bin" / "benchmark_model", "exit 0")
    assert phone.facts("litert", 1)["runtime_version"] != facts["runtime_version"]
    with pytest.raises(UnavailableError, match="runtime onnxruntime: found benchmark_model"):
        phone.facts("onnxruntime", 1)


def test_a_hot_phone_is_not_measured(phone, there, tmp_path):
    script(there.root / "bin" / "dumpsys", "echo 'IsStatusOverride: false'; echo 'Thermal Status: 3'")
    with pytest.raises(BoardError, match="thermal status 3: it is hot"):
        phone.measure(model(tmp_path / "m.tflite", 1000), tmp_path / "m.tflite", QUICK)


def test_a_phone_that_grows_hot_gives_no_timing_and_no_ratio(phone, there, tmp_path):
    m = model(tmp_path / "m.tflite", 1000)
    script(there.root / "bin" / "dumpsys", f"echo 'Thermal Status: '$(ls {there.folder} 2>/dev/null | wc -l)")
    for work in (lambda: phone.measure(m, m, QUICK), lambda: phone.meter(m.read_bytes(), "litert", 1, 0).ratio(m.read_bytes())):
        with pytest.raises(BoardError, match="it is hot"):
            work()


def test_a_program_that_hangs_is_ended_on_the_phone(phone, there, tmp_path):
    script(there.root / "bin" / "benchmark_model", f"echo $$ > {there.root}/pid; exec sleep 60")
    with phone.connect() as session, pytest.raises(DeviceError, match="no result after 1 s") as caught:
        session.call(["--graph=m"], None, 1.0, "measuring m")
    assert not isinstance(caught.value, BoardError)  # the board is not to blame
    with pytest.raises(ProcessLookupError):
        os.kill(int((there.root / "pid").read_text()), 0)


@pytest.mark.parametrize("time", ["0", "-5", "1e999"])
def test_a_time_that_is_none_is_refused(phone, there, tmp_path, time):
    script(
        there.root / "bin" / "benchmark_model", f"echo 'Average inference timings in us: Warmup: 1, Init: 1, Inference: {time}'"
    )
    m = model(tmp_path / "m.tflite", 1000)
    with pytest.raises(DeviceError, match=r"the time of|no result"):
        phone.meter(m.read_bytes(), "litert", 1, 0).ratio(m.read_bytes())


def test_a_refused_candidate_is_removed_from_the_phone(phone, there, tmp_path):
    dense = model(tmp_path / "m.tflite", 1000).read_bytes()
    with pytest.raises(BuildError):
        phone.meter(dense, "litert", 1, 0).ratio(b"no model")
    assert len(list(Path(there.folder).glob("*.tflite"))) == 1


@pytest.mark.parametrize(
    "line", ["MemTotal=²", "MemTotal=" + "9" * 5000, "zone 0 cpu=" + "9" * 400, "disk=1 2", "thermal=x", "=="]
)
def test_nonsense_a_phone_says_of_itself_is_none(line):
    found = phone_state.parsed(line)
    assert (found["memory_total_bytes"], found["temperatures_c"], found["thermal_status"]) == (0, {}, 0)


def test_a_phone_that_is_rebooted_in_between_gives_no_timing(phone, there, tmp_path, monkeypatch):
    boots = iter("abcdefgh")
    parsed = phone_state.parsed
    monkeypatch.setattr(phone_state, "parsed", lambda text: parsed(text) | {"boot_id": next(boots)})
    with pytest.raises(BoardError, match="it was rebooted while it was measured"):
        phone.measure(model(tmp_path / "m.tflite", 1000), tmp_path / "m.tflite", QUICK)


def test_what_androids_emulator_measures_is_no_measurement(phone, there, tmp_path):
    script(there.root / "bin" / "getprop", "case $1 in ro.boot.qemu) echo 1;; esac")
    m = model(tmp_path / "m.tflite", 10_000)
    assert phone.measure(m, m, QUICK).kind is Kind.EMULATED
    with pytest.raises(UnavailableError, match="an emulated board"):
        phone.facts("litert", 1)


def test_failures_of_the_program_are_one_line_each(phone, there, tmp_path):
    m = model(tmp_path / "m.tflite", 1000)
    (tmp_path / "no.tflite").write_bytes(b"no model")
    with phone.connect() as session:
        with pytest.raises(BuildError, match=r"measuring no\.tflite: found ERROR: Failed to load model"):
            session.load(tmp_path / "no.tflite", "litert", 1).timed(1, 0)
        there.more["BENCHMARK_TROUBLE"] = "killed"
        with pytest.raises(DeviceError, match="killed by SIGILL"):
            session.load(m, "litert", 1).timed(1, 0)
    (there.root / "bin" / "benchmark_model").chmod(0o644)
    with pytest.raises(UnavailableError, match="a file that may not be run"):
        phone.connect()
    (there.root / "bin" / "benchmark_model").unlink()
    with pytest.raises(UnavailableError, match="push it there and make it executable"):
        phone.connect()
    phone.board = replace(phone.board, benchmark_model="")
    with pytest.raises(UnavailableError):  # and the phone is free again
        phone.connect()


def test_a_program_with_a_bare_name_is_in_the_folder_of_the_boards_files(phone, there):
    Path(there.folder).mkdir()
    shutil.copy2(there.root / "bin" / "benchmark_model", f"{there.folder}/timer")
    phone.board = replace(phone.board, benchmark_model="timer")
    assert phone.facts("litert", 1)["runtime_version"].startswith("benchmark_model ")
    assert ["sha256sum", f"{there.folder}/timer"] in there.calls


def test_affinity_becomes_a_mask(phone, there, tmp_path):
    with phone.connect() as session:
        session.load(model(tmp_path / "m.tflite", 1000), "litert", 1, (0,)).timed(1, 0)
        session.load(model(tmp_path / "m.tflite", 1000), "litert", 1, (0, 0)).timed(1, 0)
    assert [call[8:11] for call in there.calls if "taskset" in call] == [["taskset", "1", phone.board.benchmark_model]] * 2


def test_operators_and_memory_are_read(phone, tmp_path):
    with phone.connect() as session:
        loaded = session.load(model(tmp_path / "m.tflite", 100_000), "litert", 1)
        assert [(name, kind) for name, kind, ns in loaded.layers(3, 20) if ns > 0] == [
            ("layer0", "CONV_2D"),
            ("layer1", "FULLY_CONNECTED"),
        ]
        assert loaded.peak_rss_bytes() == 12.5 * 2**20


def test_a_boards_file_with_the_program_needs_no_python(tmp_path):
    path = tmp_path / "pocket.toml"
    path.write_text('targets = ["phone"]\ntransport = "adb"\nruntime = "litert"\naddress = "1"\nbenchmark_model = "/data/b"\n')
    device = open_board(boards.load(path))
    assert isinstance(device, PhoneDevice)
    assert device.board.benchmark_model == "/data/b"


def test_outputs_are_those_of_the_same_file_here(phone, there, tmp_path):
    interpreters = pytest.importorskip("ai_edge_litert.interpreter", reason="LiteRT is not installed")
    source = Path(__file__).parents[3] / "benchmarks" / "results" / "phone" / "cifar10-98k.tflite"
    here = interpreters.Interpreter(model_path=str(source))
    here.allocate_tensors()
    (image,), (logits,) = here.get_input_details(), here.get_output_details()
    values = np.random.default_rng(0).integers(-128, 128, image["shape"]).astype(np.int8)
    here.set_tensor(image["index"], values)
    here.invoke()
    with phone.connect() as session:
        loaded = session.load(source, "litert", 1)
        assert np.array_equal(loaded.run({image["name"]: values})[logits["name"]], here.get_tensor(logits["index"]))
        there.more["BENCHMARK_TROUBLE"] = "old"
        with pytest.raises(UnavailableError, match="without --output_filepath"):  # and not the answer of before
            loaded.run({image["name"]: values})
        there.more["BENCHMARK_TROUBLE"] = "short"
        with pytest.raises(DeviceError, match="outputs of cifar10-98k"):
            loaded.run({image["name"]: values})


def test_check_and_profile_work_on_it(phone, tmp_path, monkeypatch):
    monkeypatch.setattr("edge_compress.devices.health.open_board", lambda _: phone)
    text = "\n".join(health.lines(phone.board, health.describe(phone.board)))
    assert "Some Phone" in text
    assert "benchmark_model" in text
    monkeypatch.setattr(profiling, "open_named", lambda _: phone)
    models = [model(tmp_path / f"{n}.tflite", n) for n in (200_000, 50_000)]
    found = profiling.profile(models, "pocket", QUICK, Progress())
    dense, small = found.rows
    assert small.latency.p50_ms < dense.latency.p50_ms
    assert [layer.kind for layer in small.layers] == ["CONV_2D", "FULLY_CONNECTED"]
    assert dense.peak_rss_bytes == 12.5 * 2**20
    assert found.notes == ()
