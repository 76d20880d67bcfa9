"""`suffuse`: one command each for what the library does, each in a module that is imported when it is called."""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from suffuse.errors import SuffuseError

COMMANDS = {
    "generate": "suffuse.cli.generate",
    "inspect": "suffuse.cli.inspect",
    "plan": "suffuse.cli.plan",
    "convert": "suffuse.cli.convert",
    "schedulers": "suffuse.cli.schedulers",
}
"""Name of a command → its module, which has a function of that name."""


class Commands(TyperGroup):
    """The commands of the table; errors as one message instead of a traceback, warnings as one line."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command called `cmd_name`; None if there is none."""
        if cmd_name not in COMMANDS:
            return None
        function = getattr(importlib.import_module(COMMANDS[cmd_name]), cmd_name)
        # \b keeps the lines of a paragraph as they are.
        text = re.sub(r"^Examples:$", "\b\nExamples:", inspect.getdoc(function) or "", flags=re.MULTILINE)
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(cmd_name, help=text)(function)
        return typer.main.get_command(single)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; what suffuse raises on purpose becomes a message on stderr and exit code 1."""
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except SuffuseError as error:
                typer.secho(str(error), fg=typer.colors.RED, err=True)
                raise typer.Exit(1) from None


def _show_warning(message: Warning | str, *_: Any) -> None:
    typer.secho("warning: " + " ".join(str(message).split()), fg=typer.colors.YELLOW, err=True)


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def suffuse() -> None:
    """Run diffusion models."""
