"""What a run says: plain lines in logs, nothing on stdout."""

from __future__ import annotations

import io
import itertools
import re
from pathlib import Path

import pytest
from edge_compress.pipeline.progress import Progress


def test_a_stage_is_a_line_at_its_start_and_one_with_its_time_at_its_end() -> None:
    stream = io.StringIO()
    with Progress(stream).stage("search"):
        assert stream.getvalue() == "search ...\n"
    assert stream.getvalue().splitlines()[1].startswith("search: done in 0.")


def test_a_stage_that_fails_is_not_said_to_be_done() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="stop"), Progress(stream).stage("search"):
        raise ValueError("stop")
    assert "done" not in stream.getvalue()


@pytest.mark.parametrize(("total", "lines"), [(1000, 10), (3, 3), (10, 10)])
def test_a_bar_in_a_log_is_at_most_ten_lines_and_the_last_is_the_whole(total: int, lines: int) -> None:
    stream = io.StringIO()
    with Progress(stream).bar("search", total) as bar:
        for step in range(total):
            bar.advance(1, f"best [{step}]")
    said = stream.getvalue().splitlines()
    assert len(said) == lines
    assert said[-1] == f"  search: {total}/{total}, best [{total - 1}]"


def test_a_bar_on_a_terminal_shows_its_text_as_it_is_and_lines_above_it() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    ui = Progress(stream)
    with ui.bar("search", 2) as bar:
        bar.advance(1, "best [red]")
        ui.say("a line [bold]")
        bar.advance(1, "best [red]")
    assert "a line [bold]" in stream.getvalue()
    assert "best [red]" in stream.getvalue()


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    ui = Progress()
    with ui.stage("search"), ui.bar("search", 1) as bar:
        bar.advance()
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 3


def work(ui: Progress) -> None:
    ui.say("hello")
    with ui.bar("search", 20) as bar:
        for _ in range(20):
            bar.advance()


def test_quiet_writes_nothing_and_verbose_a_line_for_each_step() -> None:
    quiet, usual, verbose = io.StringIO(), io.StringIO(), io.StringIO()
    work(Progress(quiet, quiet=True))
    work(Progress(usual))
    work(Progress(verbose, verbose=True))
    assert [len(stream.getvalue().splitlines()) for stream in (quiet, usual, verbose)] == [0, 11, 21]


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(("step_s", "lines"), [(2.0, 21), (0.0, 12)])  # quick steps: the first, and each tenth of the way
def test_the_log_has_a_line_a_second_and_at_each_tenth_with_its_time_whatever_is_shown(
    terminal: bool, step_s: float, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(1)
    monkeypatch.setattr("edge_compress.pipeline.progress.time.monotonic", lambda: step_s * next(clock))

    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    for quiet in (False, True):
        ui = Progress(Stream(), quiet=quiet)
        with ui.logged(tmp_path / "run.log"):
            work(ui)
        ui.say("after it")
    logged = (tmp_path / "run.log").read_text().splitlines()
    assert len(logged) == 2 * lines
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in logged)


def test_the_log_says_what_stopped_the_run(tmp_path: Path) -> None:
    ui = Progress(io.StringIO())
    with pytest.raises(KeyboardInterrupt), ui.logged(tmp_path / "run.log"):
        raise KeyboardInterrupt
    assert (tmp_path / "run.log").read_text().endswith(" stopped: KeyboardInterrupt\n")


def test_a_log_that_cannot_be_written_is_said_and_the_run_goes_on(tmp_path: Path) -> None:
    stream = io.StringIO()
    ui = Progress(stream)
    with ui.logged(tmp_path / "absent" / "run.log"):
        ui.say("hello")
    assert stream.getvalue().splitlines()[1:] == ["hello"]
    assert "no log is written" in stream.getvalue()


HOSTILE = "key \x1b[31m\x1b]0;title\x07\r of\x00 \udcff a file"


@pytest.mark.parametrize("terminal", [False, True])
def test_what_others_wrote_cannot_steer_the_terminal_nor_the_log(terminal: bool, tmp_path: Path) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    stream = Stream()
    ui = Progress(stream)

    def work() -> None:
        with ui.logged(tmp_path / "run.log"):
            ui.say(HOSTILE)
            with ui.bar(HOSTILE, 1) as bar:
                bar.advance(1, HOSTILE)
            raise ValueError(HOSTILE)

    with pytest.raises(ValueError, match="key"):
        work()
    for text in (stream.getvalue(), (tmp_path / "run.log").read_text()):
        assert "key \\x1b[31m" in text
        assert not any(control in text for control in ("\x1b[31m", "\x1b]0", "\x07", "\x00", "\udcff"))
