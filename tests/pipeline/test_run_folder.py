"""The run folder: what is finished is reused, what is damaged is made again, and nothing else is ever taken for finished."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from edge_compress import targets
from edge_compress.pipeline.codec import from_json, to_json
from edge_compress.pipeline.config import Config, to_toml
from edge_compress.pipeline.errors import InputError, UnavailableError
from edge_compress.pipeline.files import atomic_write, disk_errors, file_ref, link_or_copy, sha256_file
from edge_compress.pipeline.run_context import read_seconds
from edge_compress.pipeline.run_folder import RunFolder
from edge_compress.pipeline.types import Checkpoint, Epoch, FileRef, ModelCost
from hypothesis import given, settings
from hypothesis import strategies as st

COST = ModelCost(params=10, macs=100)
EPOCH = Epoch(epoch=1, loss=0.1 + 0.2, search_value=97.0, seconds=1.5)


def test_json_that_is_no_object_is_a_type_error_that_names_the_type() -> None:
    with pytest.raises(TypeError, match="ModelCost: dict was expected, found list"):
        from_json(ModelCost, [])


def test_a_number_that_no_float_holds_is_a_value_error_that_names_its_place() -> None:
    with pytest.raises(ValueError, match=r"Epoch\.loss: the number is too large"):
        from_json(Epoch, to_json(EPOCH) | {"loss": 10**400})


@pytest.fixture(autouse=True)
def _one_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "names", lambda: ("x86",))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(targets=("x86",), out=tmp_path / "run")


def opened(config: Config, said: list[str] | None = None) -> RunFolder:
    return RunFolder(config, (said if said is not None else []).append)


def finished(run: RunFolder) -> Path:
    """A finished stage that names a file; gives the file."""
    stage = run.stage("finetune", "1", {"epochs": 1})
    file = stage.folder / "state.bin"
    file.write_bytes(b"weights")
    stage.finish(Checkpoint(file_ref(file, run.path), (EPOCH,), COST, 0.5))
    return file


def test_a_finished_result_is_read_back_in_another_run_of_the_same_command(config: Config) -> None:
    with opened(config) as run:
        assert run.stage("finetune", "1", {"epochs": 1}).result(Checkpoint) is None
        file = finished(run)
    with opened(config) as run:
        found = run.stage("finetune", "1", {"epochs": 1}).result(Checkpoint)
        assert found == Checkpoint(file_ref(file, run.path), (EPOCH,), COST, 0.5)
        assert found.state.path == file.relative_to(config.out).as_posix()


@dataclass(frozen=True)
class Settings:
    epochs: int
    rate: float = 0.1


def test_the_key_depends_on_name_version_settings_and_inputs_and_on_nothing_else(config: Config) -> None:
    with opened(config) as run:
        base = run.stage("a", "1", Settings(1), ("x", "y")).key
        assert run.stage("a", "1", {"rate": 0.1, "epochs": 1}, ("x", "y")).key == base
        others = [
            run.stage("b", "1", Settings(1), ("x", "y")),
            run.stage("a", "2", Settings(1), ("x", "y")),
            run.stage("a", "1", Settings(2), ("x", "y")),
            run.stage("a", "1", Settings(1), ("y", "x")),
            run.stage("a", "1", Settings(1)),
        ]
    assert len({base, *(stage.key for stage in others)}) == 6
    assert len({stage.folder for stage in others}) == 5
    elsewhere = replace(config, out=config.out.parent / "other")
    with opened(elsewhere) as run:
        assert run.stage("a", "1", Settings(1), ("x", "y")).key == base


def test_finished_stages_that_are_shared_are_finished_in_the_other_folder_and_what_either_writes_stays_its_own(
    config: Config, tmp_path: Path
) -> None:
    other = replace(config, out=tmp_path / "other")
    said: list[str] = []
    with RunFolder(config, said.append) as one, RunFolder(other, said.append) as two:
        done, open_ = one.stage("done", "1", {}), one.stage("open", "1", {})
        atomic_write(done.folder / "weights", b"1234")
        done.finish(file_ref(done.folder / "weights", one.path))
        atomic_write(open_.folder / "scratch", b"5678")
        open_.note("reduced")
        one.share(two.path)
        shared = two.stage("done", "1", {})
        assert shared.result(FileRef) == done.result(FileRef)
        assert two.stage("open", "1", {}).notes() == ["reduced"]
        assert not (two.stage("open", "1", {}).folder / "scratch").exists()
        assert said == ["open: reduced"]
        atomic_write(shared.folder / "weights", b"other")
        assert (done.folder / "weights").read_bytes() == b"1234"
        one.share(two.path)  # again: puts right what was changed
        assert (shared.folder / "weights").read_bytes() == b"1234"


def test_a_file_is_copied_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    (tmp_path / "source").write_bytes(b"new")
    (tmp_path / "target").write_bytes(b"old")
    link_or_copy(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "target"]


def test_a_result_of_other_settings_is_not_reused(config: Config) -> None:
    with opened(config) as run:
        finished(run)
        assert run.stage("finetune", "1", {"epochs": 2}).result(Checkpoint) is None
        assert run.stage("finetune", "2", {"epochs": 1}).result(Checkpoint) is None


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def _another_number(file: Path) -> None:
    file.write_text(file.read_text().replace("97.0", "98.0"))


def _a_list(file: Path) -> None:
    file.write_text("[]")


def _deep(file: Path) -> None:
    file.write_text("[" * 100_000)


@pytest.mark.parametrize("damage", [_empty, _cut, _another_number, _a_list, _deep])
def test_a_damaged_result_counts_as_absent_and_is_said(config: Config, damage: Callable[[Path], None]) -> None:
    said: list[str] = []
    with opened(config, said) as run:
        finished(run)
        stage = run.stage("finetune", "1", {"epochs": 1})
        damage(stage.folder / "result.json")
        assert stage.result(Checkpoint) is None
        assert len(said) == 1
        assert "recomputed" in said[0]
        finished(run)
        assert stage.result(Checkpoint) is not None


@pytest.mark.parametrize("damage", [_empty, Path.unlink, lambda file: file.write_bytes(b"weightz")])
def test_a_result_whose_file_is_damaged_or_gone_counts_as_absent(config: Config, damage: Callable[[Path], None]) -> None:
    said: list[str] = []
    with opened(config, said) as run:
        damage(finished(run))
        assert run.stage("finetune", "1", {"epochs": 1}).result(Checkpoint) is None
    assert "state.bin" in said[0]


def test_a_stored_result_of_an_older_shape_counts_as_absent(config: Config) -> None:
    said: list[str] = []
    with opened(config, said) as run:
        stage = run.stage("a", "1", {})
        stage.finish(COST)
        assert stage.result(Epoch) is None
        assert stage.result(ModelCost) == COST
    assert len(said) == 1


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0])
def test_a_result_with_a_time_that_is_not_a_duration_counts_as_absent(config: Config, seconds: float) -> None:
    said: list[str] = []
    epoch = Epoch(epoch=1, loss=math.nan, search_value=math.nan, seconds=2.0)
    with opened(config, said) as run:
        stage = run.stage("a", "1", {})
        stage.finish(epoch)
        assert stage.result(Epoch) is not None  # a metric and a loss may be NaN
        stage.finish(dataclasses.replace(epoch, seconds=seconds))
        assert stage.result(Epoch) is None
    assert "result.seconds" in said[0]


def test_a_result_that_names_a_file_that_is_not_there_cannot_be_finished(config: Config) -> None:
    with opened(config) as run:
        file = finished(run)
        ref = file_ref(file, run.path)
        file.unlink()
        with pytest.raises(ValueError, match="missing"):
            run.stage("b", "1", {}).finish((ref,))


def test_a_sequence_and_figures_that_are_not_finite_read_back(config: Config) -> None:
    bad = replace(EPOCH, loss=float("inf"))
    with opened(config) as run:
        run.stage("a", "1", {}).finish((EPOCH, bad))
        assert run.stage("a", "1", {}).result(tuple[Epoch, ...]) == (EPOCH, bad)


@given(losses=st.lists(st.floats(allow_nan=False), max_size=5))
@settings(deadline=None, max_examples=25)
def test_any_result_reads_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, losses: list[float]) -> None:
    epochs = tuple(Epoch(i, loss, 0.0, 0.0) for i, loss in enumerate(losses))
    with opened(Config(targets=("x86",), out=tmp_path_factory.mktemp("any") / "run")) as run:
        run.stage("a", "1", {}).finish(epochs)
        assert repr(run.stage("a", "1", {}).result(tuple[Epoch, ...])) == repr(epochs)


# --- whose folder it is


def test_the_resolved_configuration_stands_in_the_folder_and_opens_it_again(config: Config) -> None:
    for _ in range(2):
        with opened(config):
            assert (config.out / "config.toml").read_text() == to_toml(config)


def test_a_folder_of_another_run_is_refused_and_left_as_it_was(config: Config) -> None:
    with opened(config) as run:
        finished(run)
    before = {p: p.read_bytes() for p in config.out.iterdir() if p.is_file()}
    with pytest.raises(InputError, match=r"holds another run: found seed = 0, expected seed = 1; choose another --out"):
        opened(replace(config, seed=1)).__enter__()
    assert {p: p.read_bytes() for p in config.out.iterdir() if p.is_file()} == before
    with opened(replace(config, json=True)) as run:  # nothing in the result depends on it
        assert run.stage("finetune", "1", {"epochs": 1}).result(Checkpoint) is not None


def test_a_run_that_stopped_before_any_work_can_be_put_right_in_the_same_folder(config: Config) -> None:
    with opened(config) as run:
        run.stage("subject", "1", {})
    with opened(replace(config, seed=1)):
        assert "seed = 1" in (config.out / "config.toml").read_text()


def test_a_folder_with_something_else_in_it_is_refused_and_left_as_it_was(config: Config) -> None:
    config.out.mkdir()
    (config.out / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"is not a run folder: found thesis\.tex"):
        opened(config).__enter__()
    assert [p.name for p in config.out.iterdir()] == ["thesis.tex"]


def test_an_out_that_cannot_be_a_folder_is_refused(config: Config) -> None:
    config.out.write_text("a file")
    for out in (config.out, config.out / "below", config.out.parent / ("x" * 300)):
        with pytest.raises(InputError, match="--out"):
            opened(replace(config, out=out)).__enter__()
    assert config.out.read_text() == "a file"


HOLD = """
import sys, time
from pathlib import Path
from edge_compress import targets
targets.names = lambda: ("x86",)
from edge_compress.pipeline.config import load
from edge_compress.pipeline.run_context import read_seconds
from edge_compress.pipeline.run_folder import RunFolder
with RunFolder(load(None, {"targets": ("x86",), "out": sys.argv[1]}), print):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_with_the_pid_of_the_first_and_a_killed_one_leaves_the_folder_free(tmp_path: Path) -> None:
    from edge_compress.pipeline.config import load

    config = load(None, {"targets": ("x86",), "out": str(tmp_path / "run")})
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(config.out)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"another run is active in .*: found process {holder.pid};"):
            opened(config).__enter__()
    finally:
        holder.kill()
        holder.communicate()
    with opened(config), pytest.raises(InputError, match=f"process {os.getpid()}"):
        opened(config).__enter__()
    with opened(config):
        pass


# --- writing


KILLED = """
import os, signal, sys
from edge_compress import targets
targets.names = lambda: ("x86",)
from edge_compress.pipeline.config import load
from edge_compress.pipeline.run_context import read_seconds
from edge_compress.pipeline.run_folder import RunFolder
from edge_compress.pipeline.types import ModelCost

write, fsync, replace = os.write, os.fsync, os.replace
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
def half_a_write(descriptor, data):
    write(descriptor, data[: len(data) // 2])
    die()
def dying_after_fsync(descriptor):
    fsync(descriptor)
    die()
def dying_after_replace(source, target):
    replace(source, target)
    die()

with RunFolder(load(None, {"targets": ("x86",), "out": sys.argv[1]}), print) as run:
    stage = run.stage("a", "1", {})
    match sys.argv[2]:
        case "before anything is written": os.write = lambda *_: die()
        case "half written": os.write = half_a_write
        case "written, not synced": os.fsync = lambda *_: die()
        case "synced, not renamed": os.fsync = dying_after_fsync
        case "just before the rename": os.replace = lambda *_: die()
        case "renamed": os.replace = dying_after_replace
    stage.finish(ModelCost(2, 2))
"""
MOMENTS = (
    "before anything is written",
    "half written",
    "written, not synced",
    "synced, not renamed",
    "just before the rename",
    "renamed",
)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("old", [None, ModelCost(1, 1)])
def test_a_kill_at_any_moment_of_writing_leaves_the_old_result_or_the_new(
    tmp_path: Path, moment: str, old: ModelCost | None
) -> None:
    from edge_compress.pipeline.config import load

    said: list[str] = []
    config = load(None, {"targets": ("x86",), "out": str(tmp_path / "run")})
    with opened(config) as run:
        if old is not None:
            run.stage("a", "1", {}).finish(old)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(config.out), moment], check=False)
    assert killed.returncode == -signal.SIGKILL
    with opened(config, said) as run:
        assert run.stage("a", "1", {}).result(ModelCost) == (ModelCost(2, 2) if moment == "renamed" else old)
    assert said == []
    assert list(config.out.rglob("*.tmp")) == []  # what the killed run left is cleared away


def test_a_run_killed_before_it_wrote_its_configuration_can_be_started_again(config: Config) -> None:
    config.out.mkdir()
    (config.out / ".lock").touch()
    (config.out / f".config.toml.{'0' * 32}.tmp").write_text("targ")
    with opened(config):
        assert (config.out / "config.toml").is_file()
        assert list(config.out.glob(".*.tmp")) == []


def _no_space(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _some_space() -> Callable[..., int]:
    """`os.write` on a disk with room for three bytes."""
    real, room = os.write, [3]

    def write(descriptor: int, data: bytes) -> int:
        if not room[0]:
            return _no_space()
        written = real(descriptor, data[: room[0]])
        room[0] -= written
        return written

    return write


@pytest.mark.parametrize("call", ["write", "write some", "fsync", "replace"])
def test_a_full_disk_is_one_line_and_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    file = tmp_path / "result.json"
    atomic_write(file, "old")
    monkeypatch.setattr(os, call.split()[0], _some_space() if call == "write some" else _no_space)
    with pytest.raises(UnavailableError, match=rf"the disk is full: .*{file.name}.*MB free.*re-run the same command") as caught:
        atomic_write(file, "new and longer")
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_device_that_is_really_full_is_reported_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *mode: real("/dev/full", os.O_WRONLY))
    with pytest.raises(UnavailableError, match="the disk is full"):
        atomic_write(tmp_path / "a", b"x")


def test_a_stage_that_runs_into_a_full_disk_is_not_finished_and_the_folder_is_free_again(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:

        def work() -> None:
            with opened(config) as run:
                full.setattr(os, "write", _no_space)
                run.stage("a", "1", {}).finish(COST)

        with pytest.raises(UnavailableError, match=r"result\.json"):
            work()
    with opened(config) as run:
        assert run.stage("a", "1", {}).result(ModelCost) is None


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_library_that_runs_into_a_full_disk_inside_a_run_is_reported_the_same(config: Config, error: Exception) -> None:
    def work() -> None:
        with opened(config):
            raise error

    with pytest.raises(UnavailableError, match=f"the disk is full: {config.out}"):
        work()


def test_other_errors_pass_through_a_run_folder_unchanged(config: Config) -> None:
    with pytest.raises(FileNotFoundError), opened(config):
        raise FileNotFoundError(errno.ENOENT, "no such file")
    with pytest.raises(KeyError), disk_errors(config.out):
        raise KeyError("a")


def test_atomic_write_replaces_and_honours_the_umask(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for content in (b"one", "zwei \N{LATIN SMALL LETTER U WITH DIAERESIS}", b""):
        atomic_write(file, content)
        assert file.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    (tmp_path / "plain").touch()
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "plain"]


def test_a_reference_carries_the_digest_and_the_path_below_the_base(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "abc"
    file.write_bytes(b"abc")
    assert to_json(file_ref(file, tmp_path)) == {
        "path": "sub/abc",
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "size_bytes": 3,
    }
    assert sha256_file(file) == file_ref(file, tmp_path).sha256
    with pytest.raises(ValueError, match="not in the subpath"):
        file_ref(file, tmp_path / "elsewhere")


def test_a_stage_keeps_beside_its_result_what_its_key_was_made_of(config: Config) -> None:
    with opened(config) as run:
        stage = run.stage("a", "7", Settings(3), ("b" * 64,))
        stage.finish(COST)
        stored = json.loads((stage.folder / "result.json").read_text())
    assert stored["settings"] == {"epochs": 3, "rate": 0.1}
    assert (stored["stage"], stored["version"], stored["inputs"]) == ("a", "7", ["b" * 64])


def test_the_store_does_not_need_torch() -> None:
    code = "import sys, edge_compress.pipeline.run_folder; sys.exit(any(m in sys.modules for m in ('torch', 'onnx', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_remarks_of_a_stage_are_kept_and_a_damaged_file_of_them_is_named(config: Config) -> None:
    said: list[str] = []
    with opened(config, said) as run:
        stage = run.stage("search", "1", {})
        assert run.notes() == []
        stage.note("fewer images")
        stage.note("fewer images")
        assert run.notes() == ["fewer images"]
        assert said == ["search: fewer images"]
        (stage.folder / "notes.json").write_text("[" * 100_000)
        assert "cannot be read" in run.notes()[0]
        (stage.folder / "notes.json").write_text('["fewer')
        (note,) = run.notes()
        assert note.startswith("search: remarks of an earlier call cannot be read (")
        stage.note("another one")
        assert run.notes() == [note, "another one"]


def test_warnings_that_are_logged_deep_inside_a_stage_are_its_remarks(config: Config) -> None:
    said: list[str] = []
    logger = logging.getLogger("edge_compress.pipeline.reconstruct.least_squares")
    with opened(config, said) as run:
        stage = run.stage("compensate", "1", {})
        with stage.noting():
            logger.warning("a layer of %d inputs", 3)
            logger.info("no remark")
        assert run.notes() == ["a layer of 3 inputs"]
        assert not logging.getLogger("edge_compress").handlers


HUGE = '{"search": 1' + "0" * 400 + "}"  # no float holds it
DEEP = "[" * 100_000


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"search": "long"}', '{"search": NaN}', '{"search": -1}', HUGE, DEEP])
def test_times_of_stages_that_cannot_be_read_are_told(content: str, config: Config) -> None:
    notes: list[str] = []
    with opened(config) as run:
        assert read_seconds(run, notes.append) == {}
        assert notes == []  # a new folder has none
        file = run.path / "stages" / "seconds.json"
        file.parent.mkdir()
        file.write_text('{"search": 1.5}')
        assert read_seconds(run, notes.append) == {"search": 1.5}
        file.write_text(content)
        assert read_seconds(run, notes.append) == {}
    (note,) = notes
    assert note.startswith("seconds.json is damaged (")
