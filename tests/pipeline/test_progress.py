"""What a run says: plain lines in logs, nothing on stdout."""

from __future__ import annotations

import io

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
