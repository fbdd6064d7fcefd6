"""What is measured again of a record that says in how many threads it was measured."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from edge_compress.pipeline.audit import recheck
from edge_compress.pipeline.cli.main import main
from edge_compress.pipeline.errors import InputError
from small_run import change, small_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that each test says the threads of."""
    return small_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture(autouse=True)
def _two_processors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine of two processors, a board that is this machine, and one elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(recheck, "open_named", lambda name: pytest.fail(f"{name} was asked"))
    for name, way in (("here", 'transport = "local"'), ("there", 'transport = "ssh"\naddress = "board"')):
        Path(f"{name}.toml").write_text(f'targets = ["x86"]\nthreads = 1\n{way}\n')


@pytest.mark.parametrize("device", ["local", "here.toml"])
def test_a_record_of_more_threads_than_processors_is_not_measured_again_here(
    device: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(made, latency__threads=3)
    assert main(["verify", str(made), "--device", device]) == 2
    err = capsys.readouterr().err
    told = "x86 was measured with threads 3: found 2 processors for this process, expected no more threads"
    assert err == f"edge-compress: {made}: {told}; name a --device that has as many\n"


def test_a_record_of_many_threads_is_measured_again_on_a_board_elsewhere(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reached(name: str) -> None:
        raise InputError(f"{name} was asked")

    change(made, latency__threads=3)
    monkeypatch.setattr(recheck, "open_named", reached)
    assert main(["verify", str(made), "--device", "there.toml"]) == 2
    assert capsys.readouterr().err == "edge-compress: there.toml was asked\n"


def test_a_record_of_threads_without_end_is_measured_nowhere(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(made, latency__threads=2000)
    assert main(["verify", str(made), "--device", "there.toml"]) == 2
    assert capsys.readouterr().err == "edge-compress: latency setting threads: found 2000, expected at most 1024\n"
