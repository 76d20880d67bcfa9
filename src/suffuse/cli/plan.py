"""`suffuse plan`: what a picture will take, and what to switch on so that it fits."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from typing import Annotated, Any

import typer

from suffuse.checkpoints.inventory import TARGETS
from suffuse.cli.inspect import size_of
from suffuse.errors import InputError
from suffuse.files import parse_size
from suffuse.memory.plan import Plan, Request, Survey, survey, switches, ways_to_fit


def plan(
    model: Annotated[str, typer.Argument(help="A pipeline's folder, or the name of a repository.", metavar="MODEL")],
    size: Annotated[
        str | None, typer.Option(help="Of the picture, WIDTHxHEIGHT; what the model was trained on, if left out.")
    ] = None,
    ram: Annotated[str | None, typer.Option(help="Memory of the machine, 16GB for example; of this one, if left out.")] = None,
    vram: Annotated[str | None, typer.Option(help="Memory of the accelerator; without one, pictures are drawn in RAM.")] = None,
    dtype: Annotated[str, typer.Option(help=f"Type of the weights to begin with: {', '.join(TARGETS)}.")] = "float32",
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 1,
    guidance: Annotated[bool, typer.Option(help="Draw with guidance, which takes twice the room.")] = True,
    variant: Annotated[str | None, typer.Option(help='Which weights to look at, "fp16" for example.')] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell how much memory a picture takes, before anything is loaded, and what makes it fit.

    Examples:
      suffuse plan ./stable-diffusion --size 768x512
      suffuse plan ./stable-diffusion --vram 4GB --batch 4
      suffuse plan org/name --variant fp16
    """
    width, height = _size(size)
    room = parse_size(ram, "--ram") if ram else _memory_here()
    limit = parse_size(vram, "--vram") if vram else room
    request = Request(height, width, batch, guidance, dtype)
    surveyed = survey(model, variant)
    plans = [made for made in ways_to_fit(surveyed, request) if vram or made.request.offload == "none"]
    fits = [made.peak <= limit and made.weights <= room for made in plans]
    if as_json:
        ways = [_told(made, fit) for made, fit in zip(plans, fits, strict=True)]
        print(json.dumps({"fetch": surveyed.fetch, "plans": ways}, indent=2))
        return
    _print_fetch(surveyed)
    _print_stages(plans[0])
    _print_ways(plans, fits, limit)


def _print_fetch(surveyed: Survey) -> None:
    if surveyed.fetch:
        count = len(surveyed.fetch)
        print(f"to fetch: {size_of(sum(surveyed.fetch.values()))} in {count} file{'s' * (count != 1)}")
        for name, size in surveyed.fetch.items():
            print(f"  {size_of(size):>8}  {name}")
        print()


def _print_stages(made: Plan) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage")
    for heading in ("weights", "working memory"):
        table.add_column(heading, justify="right")
    for stage in made.stages:
        table.add_row(stage.name, size_of(stage.weights), size_of(stage.activations))
    if made.waiting:
        table.add_row("others", size_of(made.waiting), "")
    _console().print(table)


def _print_ways(plans: list[Plan], fits: list[bool], limit: int) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    table.add_column("with")
    table.add_column("peak", justify="right")
    table.add_column(f"in {size_of(limit)}")
    for made, fit in zip(plans, fits, strict=True):
        table.add_row(", ".join(switches(made.request)) or made.request.dtype, size_of(made.peak), "fits" if fit else "too much")
    console = _console()
    console.print()
    console.print(table)
    if not any(fits):
        console.print("\nNothing makes it fit: draw a smaller picture, or fewer at once.")
    elif not fits[0]:
        console.print("\nThe least that makes it fit:")
        for line in switches(plans[fits.index(True)].request):
            console.print(f"    {line}", markup=False, highlight=False)


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def _told(made: Plan, fit: bool) -> dict[str, Any]:
    told = dataclasses.asdict(made)
    return {**told, "weights": made.weights, "peak": made.peak, "fits": fit, "switches": switches(made.request)}


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", text.strip().lower())
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if width < 8 or height < 8:
        raise InputError("--size is no size", found=text, expected="WIDTHxHEIGHT, 768x512 for example")
    return width, height


def _memory_here() -> int:
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    raise InputError("the memory of this machine is not known", remedy="tell it: --ram 16GB")
