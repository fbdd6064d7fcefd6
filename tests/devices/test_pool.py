"""Classes of boards: one free board for a measurement, another when it fails, none that failed too often."""

import contextlib
import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from edge_compress.devices import board as boards
from edge_compress.devices import leases, pool
from edge_compress.devices.access import open_named
from edge_compress.devices.board import Board
from edge_compress.devices.measure.timing import Ratio, TimingSettings
from edge_compress.devices.pool import Pool
from edge_compress.devices.transport.base import BoardError, BusyError
from edge_compress.pipeline.errors import BuildError, DeviceError, InputError
from small_models import convolution

SETTINGS = TimingSettings(sessions=1, min_pairs=5, max_pairs=10, max_seconds=5.0, warmup_seconds=0.1)
A, B, C = (Board(name, ("x86",), "ssh", class_="pi", address=name) for name in "abc")


class FakeDevice:
    """A board that does what it is told: fails, is busy, or says its name."""

    def __init__(self, board: Board) -> None:
        self.board, self.name = board, board.name
        self.error: Exception | None = None
        self.busy = 0  # so many times
        self.asked: list[object] = []
        self.about = {"cpu": "Cortex-A76", "runtime_version": "1.0", "address": board.address, "host": board.name}
        self.took_s = 0.0

    def close(self) -> None:
        self.asked.append("close")

    def facts(self, runtime: str, threads: int) -> dict[str, str]:
        self._fail()
        return self.about

    def measure(self, *given: object) -> str:
        self.asked.append(given)
        self._fail()
        return self.name

    def meter(self, *_: object) -> "FakeDevice":
        return self

    def ratio(self, candidate: bytes) -> Ratio:
        self.asked.append(candidate)
        time.sleep(self.took_s)
        self._fail()
        return Ratio(len(candidate) + ord(self.name) / 1000)

    def _fail(self) -> None:
        if self.busy:
            self.busy -= 1
            raise BusyError("busy")
        if self.error is not None:
            raise self.error


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setattr(pool, "_LOOK_S", 0.01)

    def make(*members: Board, patience_s: float = 5.0) -> tuple[Pool, dict[str, FakeDevice]]:
        devices = {board.name: FakeDevice(board) for board in members or (A, B, C)}
        found = Pool("class:pi", members or (A, B, C), lambda board: devices[board.name], patience_s)  # type: ignore[arg-type, return-value]
        return found, devices

    return make


def test_a_board_that_fails_is_counted_and_another_one_measures(made):
    found, devices = made()
    devices["a"].error = BoardError("link down")
    assert found.measure(Path("x"), Path("y"), SETTINGS) == "b"
    assert leases.failures(A) == (1, "link down")
    devices["a"].error = None
    assert found.measure(Path("x"), Path("y"), SETTINGS) == "b"  # the one that has not failed comes first


def test_a_record_of_failures_that_cannot_be_read_counts_none(made):
    made(A)
    leases.note_failure(A, BoardError("hot"))
    assert leases.failures(A) == (1, "hot")
    for broken in ("", "{", "[" * 100_000, '{"failures": Infinity, "last": ""}'):
        leases._file(A, ".json").write_text(broken)
        assert leases.failures(A) == (0, "")


def test_a_board_is_set_aside_after_failures_in_a_row_and_only_in_a_row(made):
    found, devices = made(A)
    devices["a"].error = BoardError("hot")
    for _ in range(leases.SET_ASIDE - 1):
        with pytest.raises(DeviceError, match="hot"):
            found.measure(Path("x"), Path("y"), SETTINGS)
    devices["a"].error = None
    found.measure(Path("x"), Path("y"), SETTINGS)
    assert leases.failures(A) == (0, "")
    devices["a"].error = BoardError("hot")
    for _ in range(leases.SET_ASIDE):
        with pytest.raises(DeviceError, match="hot"):
            found.measure(Path("x"), Path("y"), SETTINGS)
    asked = len(devices["a"].asked)
    with pytest.raises(DeviceError, match=r"every board is set aside: a after 3 failures \(hot\).*devices check"):
        found.measure(Path("x"), Path("y"), SETTINGS)
    assert len(devices["a"].asked) == asked  # it was left alone
    leases.forgive(A)
    devices["a"].error = None
    assert found.measure(Path("x"), Path("y"), SETTINGS) == "a"


def test_what_a_model_does_is_not_the_boards_fault(made):
    found, devices = made()
    for error in (BuildError("refused"), DeviceError("killed by SIGILL")):
        devices["a"].error = error
        with pytest.raises(type(error)):
            found.measure(Path("x"), Path("y"), SETTINGS)
    assert leases.failures(A)[0] == 0
    assert devices["b"].asked == []


def test_busy_boards_are_waited_for_and_not_for_ever(made):
    found, devices = made(A, B)
    devices["a"].busy, devices["b"].busy = 1000, 3
    assert found.measure(Path("x"), Path("y"), SETTINGS) == "b"
    assert leases.failures(A)[0] == leases.failures(B)[0] == 0
    impatient, others = made(A, patience_s=0.05)
    others["a"].busy = 10**6
    started = time.monotonic()
    with pytest.raises(DeviceError, match="busy"):
        impatient.measure(Path("x"), Path("y"), SETTINGS)
    assert time.monotonic() - started < 2


def test_a_board_that_is_not_like_the_first_is_not_used(made):
    found, devices = made()
    devices["b"].about = devices["b"].about | {"runtime_version": "0.9"}
    devices["a"].took_s = devices["c"].took_s = 0.05  # so that they leave b a turn
    assert found.facts("onnxruntime", 1) == {"cpu": "Cortex-A76", "runtime_version": "1.0"}
    with contextlib.closing(found.meter(b"dense", "onnxruntime", 1, 0)) as meter:
        ratios = meter.ratios([b"x" * n for n in range(1, 7)])
    assert [int(r.value) for r in ratios] == [1, 2, 3, 4, 5, 6]
    assert devices["b"].asked[:-1] == []  # but closed
    assert "runtime version" in leases.failures(B)[1]
    assert "found 0.9, expected 1.0" in leases.failures(B)[1]


def test_candidates_go_to_all_boards_each_to_one_and_in_order(made):
    found, devices = made()
    for device in devices.values():
        device.took_s = 0.05
    candidates = [bytes([n]) * (n + 1) for n in range(12)]
    with contextlib.closing(found.meter(b"dense", "onnxruntime", 1, 0)) as meter:
        started = time.monotonic()
        ratios = meter.ratios(candidates)
        took = time.monotonic() - started
    assert [int(ratio.value) for ratio in ratios] == list(range(1, 13))
    asked = [name for name, device in devices.items() for call in device.asked if call in candidates]
    assert len(asked) == 12
    assert set(asked) == {"a", "b", "c"}
    assert took < 12 * 0.05


def test_a_board_that_fails_in_the_middle_leaves_its_candidate_to_the_others(made):
    found, devices = made(A, B)
    with contextlib.closing(found.meter(b"dense", "onnxruntime", 1, 0)) as meter:
        assert meter.ratio(b"1").value == pytest.approx(1 + ord("a") / 1000)
        devices["a"].error = BoardError("link down")
        assert [r.value for r in meter.ratios([b"1", b"22", b"333"])] == pytest.approx([n + ord("b") / 1000 for n in (1, 2, 3)])
        devices["b"].error = BoardError("link down")
        with pytest.raises(DeviceError, match="link down"):
            meter.ratios([b"1"])


def test_two_measurements_of_one_board_are_never_at_once():
    held = leases.lease(A)
    same_address = replace(A, name="another name")
    with pytest.raises(BusyError, match="another process of this machine"):
        leases.lease(same_address)
    leases.lease(B).release()
    held.release()
    held.release()  # safe to call twice
    leases.lease(same_address).release()


def test_a_damaged_record_of_failures_counts_as_none():
    leases.note_failure(A, ValueError("x"))
    (record,) = leases.user_cache().joinpath("boards").glob("*.json")
    assert json.loads(record.read_text())["failures"] == 1
    record.write_text("{")
    assert leases.failures(A) == (0, "")


def test_a_class_is_made_of_the_boards_that_name_it_and_have_an_address(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = boards.user_folder()
    folder.mkdir(parents=True)
    for name, address in (("one", "pi1"), ("two", "pi2"), ("again", "pi2"), ("template", "")):
        more = f'address = "{address}"\n' if address else ""
        (folder / f"{name}.toml").write_text(f'targets = ["x86"]\ntransport = "ssh"\nclass = "shelf"\n{more}')
    assert [board.address for board in boards.of_class("shelf")] == ["pi2", "pi1"]
    assert open_named("class:shelf").name == "class:shelf"
    with pytest.raises(InputError, match=r"'raspberry-pi-5'.*no board of it.*shelf"):
        boards.of_class("raspberry-pi-5")  # a template has the class and no address


@pytest.mark.devices
def test_two_real_boards_share_the_candidates(server, tmp_path):
    """Two folders of one sshd, as two boards."""
    members = [
        Board(name, ("x86",), "ssh", class_="bench", address=host, python=server.python, folder=f"{server.board_folder}-{name}")
        for name, host in (("one", "loop"), ("two", "loop2"))
    ]
    devices = {}

    def open_board(board: Board) -> object:
        devices[board.name] = server.device(board.address, board.name, folder=board.folder)
        return devices[board.name]

    found = Pool("class:bench", members, open_board)  # type: ignore[arg-type]
    dense, small = (convolution(tmp_path / f"{n}.onnx", n) for n in (128, 16))
    with contextlib.closing(found.meter(dense.read_bytes(), "onnxruntime", 1, 0)) as meter:
        assert meter.width == 2  # what a search expects goes to both
        ratios = meter.ratios([small.read_bytes(), dense.read_bytes(), small.read_bytes()])
    assert ratios[0].value < 0.7
    assert ratios[1].value == pytest.approx(1.0, abs=0.5)
    for name in devices:
        assert (Path(f"{server.board_folder}-{name}") / "lock").exists()
    held = leases.lease(members[0])
    timing = found.measure(dense, small, SETTINGS)
    held.release()
    assert timing.device == "two"  # the other one was somebody else's
    found.close()
    assert threading.active_count() < 20
