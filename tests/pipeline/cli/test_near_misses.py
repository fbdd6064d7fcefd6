"""Commands that do not exist: what was meant is said, and `help` helps."""

from __future__ import annotations

import pytest
from edge_compress.pipeline.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["compress", "--target", "x86"], "a run has no command: leave 'compress' out, as in edge-compress --target x86"),
        (["verfy", "runs/demo"], "no command 'verfy'; did you mean 'verify'?"),
        (["help", "verfy"], "no command 'verfy'; did you mean 'verify'?"),
        (["xyz"], "no command 'xyz'; the commands are "),
    ],
)
def test_a_command_that_does_not_exist_is_one_line_that_says_what_was_meant(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert told in err


@pytest.mark.parametrize(("more", "first"), [([], "Usage: edge-compress"), (["verify"], "Usage: edge-compress verify")])
def test_help_is_help(more: list[str], first: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", *more]) == 0
    assert capsys.readouterr().out.startswith(first)
