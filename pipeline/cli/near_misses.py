"""What is meant by commands that do not exist: `help`, `compress`, misspelt ones."""

from __future__ import annotations

import difflib

import click

_RUNS = ("compress", "run", "prune", "quantize", "quantise", "optimize", "optimise", "build")  # words for a run, which needs none


class Commands(click.Group):
    """A group that answers `help` and says what was probably meant by a command it does not have."""

    def resolve_command(self, context: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the first argument names, and its arguments.

        Raises:
            click.UsageError: the command does not exist.
        """
        if args[0] == "help" and not context.resilient_parsing:  # while a shell completes, nothing is printed
            if not args[1:]:
                click.echo(context.get_help())
                context.exit()
            args = [args[1], "--help"]
        name = args[0]
        if context.resilient_parsing or self.get_command(context, name) is not None:
            return super().resolve_command(context, args)
        if name in _RUNS:
            raise click.UsageError(f"a run has no command: leave {name!r} out, as in edge-compress --target x86")
        near = difflib.get_close_matches(name, self.commands, 1)
        names = ", ".join(self.list_commands(context))
        raise click.UsageError(f"no command {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"the commands are {names}"))
