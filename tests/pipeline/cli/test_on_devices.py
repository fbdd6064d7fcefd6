"""What is measured on a device: in which runtime, with how many threads, and how invalid model files are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cli_runs import without_progress
from edge_compress.devices.local import LocalDevice
from edge_compress.devices.measure.timing import TimingSettings
from edge_compress.pipeline.cli.main import main
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.profile import board_check, profiling
from edge_compress.pipeline.run import stages
from small_models import convolution


@pytest.mark.parametrize(
    ("files", "runtime"),
    [
        (("a.tflite", "b.tflite"), "litert"),
        (("a.pte",), "executorch"),
        (("a.onnx", "b.onnx"), "onnxruntime"),
        (("a.pte", "b.onnx"), "onnxruntime"),  # which then refuses the first
    ],
)
def test_files_are_measured_in_the_runtime_they_are_for(
    files: tuple[str, ...], runtime: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def seen(models: object, device: str, timing: TimingSettings, ui: object) -> None:
        asked.append(timing.runtime)
        raise InputError("seen enough")

    monkeypatch.setattr(profiling, "profile", seen)
    assert main(["profile", *files]) == 2
    assert "seen enough" in capsys.readouterr().err
    assert asked == [runtime]


@pytest.fixture
def two_processors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine of two processors on which nothing may be started, and two boards of three threads: it, and one elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(LocalDevice, "connect", lambda self: pytest.fail("something was started"))
    for name, way in (("here", 'transport = "local"'), ("there", 'transport = "ssh"\naddress = "board"')):
        Path(f"{name}.toml").write_text(f'targets = ["x86"]\nthreads = 3\n{way}\n')


@pytest.mark.usefixtures("two_processors")
@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("profile a.onnx --threads 3", "--threads 3"),
        ("profile a.onnx --device here.toml", "here.toml: threads 3"),
        ("profile a.onnx --device here.toml --threads 1000", "--threads 1000"),
        ("devices check here.toml", "here.toml: threads 3"),
        ("--target x86 --threads 3", "--threads 3"),
        ("--target x86 --threads 3 --device here.toml", "--threads 3"),
    ],
)
def test_more_threads_than_processors_are_refused_before_anything_is_started(
    command: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    told = f"edge-compress: {named}: found 2 processors for this process, expected no more threads\n"
    assert (out, without_progress(err)) == ("", told)
    assert not Path("runs").exists()


@pytest.mark.usefixtures("two_processors")
@pytest.mark.parametrize(
    "command", ["profile a.onnx --device there.toml", "devices check there.toml", "--target x86 --threads 3 --device there.toml"]
)
def test_a_board_elsewhere_may_have_more_processors_than_this_machine(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reached(*_: object) -> None:
        raise InputError("the board was asked")

    for module, function in ((profiling, "profile"), (board_check, "check"), (stages, "open_named")):
        monkeypatch.setattr(module, function, reached)
    assert main(command.split()) == 2
    assert without_progress(capsys.readouterr().err) == "edge-compress: the board was asked\n"


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x08\x08:"], ids=["empty", "text", "cut off"])
@pytest.mark.parametrize("place", ["first", "second"])
def test_a_file_that_is_no_model_is_the_users_to_mend_and_not_a_failed_gate(
    place: str, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.onnx").write_bytes(data)
    convolution(Path("whole.onnx"), 8)
    files = ["broken.onnx", "whole.onnx"] if place == "first" else ["whole.onnx", "broken.onnx"]
    assert main(["profile", *files, "--sessions", "1", "--out", "profile"]) == 2
    out, err = capsys.readouterr()
    (told,) = (line for line in err.splitlines() if line.startswith("edge-compress: "))
    assert told.startswith("edge-compress: board local: loading broken.onnx: found ")
    assert (out, Path("profile").exists()) == ("", False)
