"""`suffuse schedulers`: which there are, how they differ, and what one of them can be told."""

from __future__ import annotations

import inspect
import json
import sys
import typing
from typing import Annotated, Any

import typer

from suffuse.errors import InputError, nearest
from suffuse.public_names import resolve
from suffuse.schedulers.catalogue import CATALOGUE, KINDS, MODELS, Facts, Kind


def schedulers(
    name: Annotated[str | None, typer.Argument(help="One of them, to be told in full; or all.", metavar="NAME")] = None,
    kind: Annotated[str | None, typer.Option(help=f"Only those of a kind: {', '.join(KINDS)}.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the schedulers: what they solve, how fast their error falls, what a step costs, if they draw noise, whose they are.

    \b
    kind   ODE        the same noise gives the same picture, more steps the same one more exactly
           SDE        noise is added on the way, more steps draw another picture
           inverse    from a picture to the noise that it comes from
           distilled  few steps, for models that were distilled for them
           discrete   for models of tokens
    order  with twice the steps the error is 2^order times smaller
    calls  of the model a step, which is what takes the time

    Any scheduler of a pipeline may be replaced by one for the same models:

    \b
      pipe.scheduler = suffuse.UniPCMultistepScheduler.from_config(pipe.scheduler.config)

    Examples:
      suffuse schedulers
      suffuse schedulers --kind ODE
      suffuse schedulers DPMSolverMultistepScheduler
    """  # noqa: D301  \b is typer's sign for lines that stay as they are
    if kind is not None and kind not in KINDS:
        raise InputError("--kind is not known", found=kind, expected=", ".join(KINDS))
    if name is None:
        chosen = {known: facts for known, facts in CATALOGUE.items() if kind in (None, facts.kind)}
        told: Any = [{"name": known, **facts._asdict()} for known, facts in chosen.items()]
        print(json.dumps(told, indent=2)) if as_json else _print_table(chosen)
        return
    full = next((known for known in CATALOGUE if name in (known, known.removesuffix("Scheduler"))), None)
    if full is None:
        close = nearest(name, CATALOGUE)
        raise InputError(f"no scheduler {name}", remedy=f"did you mean {close}?" if close else "see: suffuse schedulers")
    told = _described(full, CATALOGUE[full])
    print(json.dumps(told, indent=2)) if as_json else _print_one(told, CATALOGUE[full].kind)


def _described(name: str, facts: Facts) -> dict[str, Any]:
    """Facts, options with their defaults, and compatible classes of one scheduler."""
    cls: Any = resolve(name)
    hints, parameters = typing.get_type_hints(cls.__init__), cls.parameters_of_init()
    options = {
        option: {"takes": _spelled(hints[option]), **({} if p.default is p.empty else {"default": p.default})}
        for option, p in parameters.items()
    }
    compatible = [other.__name__ for other in cls.compatible_classes() if other is not cls]
    about = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    return {"name": name, "about": about, **facts._asdict(), "options": options, "compatibles": compatible}


def _spelled(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else str(value).replace("typing.", "")


def _print_one(told: dict[str, Any], kind: Kind) -> None:
    from rich.table import Table

    console, plain = _console(), {"markup": False, "highlight": False}
    console.print(told["name"], style="bold", **plain)
    console.print(told["about"], **plain)
    rows = {
        "kind": f"{kind}: {KINDS[kind]}",
        "models": MODELS[told["models"]],
        "order": told["order"] or "",
        "calls": told["calls"],
        "noise": told["noise"],
        "paper": f"{told['paper']}, {told['page']}",
    }
    table = Table(box=None, pad_edge=False, show_header=False)
    for heading, value in rows.items():
        table.add_row(heading, str(value))
    console.print(table)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("option", "default", "takes"):
        table.add_column(heading, overflow="fold")
    for option, value in told["options"].items():
        table.add_row(option, str(value.get("default", "must be given")), value["takes"])
    console.print()
    console.print(table, markup=False, highlight=False)
    if told["compatibles"]:
        console.print("\nTakes the configuration of:", ", ".join(told["compatibles"]), **plain)


def _print_table(chosen: dict[str, Facts]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("scheduler", "kind"):
        table.add_column(heading)
    for heading in ("order", "calls"):
        table.add_column(heading, justify="right")
    for heading in ("noise", "models", "paper"):
        table.add_column(heading)
    for name, facts in chosen.items():
        order = "" if facts.order is None else str(facts.order)
        table.add_row(name, facts.kind, order, str(facts.calls), facts.noise, facts.models, facts.paper)
    _console().print(table)


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)
