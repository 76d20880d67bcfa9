"""`suffuse`: one command each for what the library does, each in a module that is imported when it is called."""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperGroup

from suffuse.errors import SuffuseError

COMMANDS = {"inspect": "suffuse.cli.inspect"}
"""Name of a command → its module, which has a function of that name."""


class Commands(TyperGroup):
    """The commands of the table, and errors as one message instead of a traceback."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command called `cmd_name`; None if there is none."""
        if cmd_name not in COMMANDS:
            return None
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(cmd_name)(getattr(importlib.import_module(COMMANDS[cmd_name]), cmd_name))
        return typer.main.get_command(single)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; what suffuse raises on purpose becomes a message on stderr and exit code 1."""
        try:
            return super().invoke(ctx)
        except SuffuseError as error:
            typer.secho(str(error), fg=typer.colors.RED, err=True)
            raise typer.Exit(1) from None


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def suffuse() -> None:
    """Run diffusion models."""
