"""`suffuse inspect`: what a checkpoint holds and what memory it needs, without reading it; how a picture or a run was made."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from suffuse.checkpoints.inventory import TARGETS, Component, take_inventory, total
from suffuse.checkpoints.safetensors_file import SAVED_RUN, read_header
from suffuse.cli.picture import is_png, read_settings
from suffuse.errors import CorruptFileError

SHOWN = ("pipeline", "model", "scheduler", "step", "total")
"""What a saved run tells first."""


def inspect(
    path: Annotated[
        Path, typer.Argument(help="A pipeline's folder, a model's folder, a .safetensors file, a saved run, or a PNG.")
    ],
    variant: Annotated[str | None, typer.Option(help='Which weights to look at, "fp16" for example.')] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the parts of a checkpoint, their size, and the memory they need as each type; or how a picture or a run was made."""
    settings = read_settings(path) if is_png(path) else _run_settings(path)
    if settings is not None:
        print(json.dumps({"path": str(path), "settings": settings}, indent=2) if as_json else _listing(settings))
        return
    components = take_inventory(path, variant)
    if as_json:
        parts = [dataclasses.asdict(component) for component in components]
        print(json.dumps({"path": str(path), "components": parts, "total": dataclasses.asdict(total(components))}, indent=2))
    else:
        _print_table(components)


def _run_settings(path: Path) -> dict[str, Any] | None:
    """What a saved run tells of itself; None if this is none."""
    text = read_header(path).metadata.get(SAVED_RUN) if path.suffix == ".safetensors" and path.is_file() else None
    if text is None:
        return None
    try:
        told = json.loads(text)
        entries = told["arguments"]["entries"].items()
        plain = {k: v["weighted"] if isinstance(v, dict) and "weighted" in v else v for k, v in entries}
        first = {name: told[name] for name in SHOWN}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFileError(f"{path} is a damaged run", found=f"{type(error).__name__}: {error}") from None
    arguments = {k: v for k, v in plain.items() if isinstance(v, (str, int, float)) or (isinstance(v, list) and k == "prompt")}
    return first | arguments | {"suffuse": told.get("suffuse")}


def _print_table(components: list[Component]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("component", "class", "library"):
        table.add_column(heading)
    for heading in ("parameters", "on disk", *(f"as {target}" for target in TARGETS)):
        table.add_column(heading, justify="right")
    table.add_column("type")
    table.add_column("files", overflow="fold")
    for component in components:
        table.add_row(*_cells(component))
    if len(components) > 1:
        table.add_section()
        table.add_row(*_cells(total(components)), style="bold")
    Console(width=None if _terminal() else 200).print(table)


def _listing(settings: dict[str, Any]) -> str:
    width = max(map(len, settings), default=0)
    return "\n".join(f"{name:{width}}  {value}" for name, value in settings.items() if value is not None)


def _terminal() -> bool:
    import sys

    return sys.stdout.isatty()


def _cells(component: Component) -> Iterator[str]:
    yield from (component.name, component.kind or "", component.library or "")
    yield "unknown" if component.parameters is None else f"{component.parameters:,}" if component.parameters else ""
    yield size_of(component.bytes)
    yield from (size_of(component.memory.get(target, 0)) for target in TARGETS)
    yield ", ".join(component.dtypes)
    yield ", ".join(component.files)


def size_of(count: int) -> str:
    """Bytes in the largest unit that leaves at least 1, in powers of 1000; nothing for 0."""
    amount, units = float(count), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while amount >= 1000:
        amount, unit = amount / 1000, next(units)
    return f"{amount:.3g} {unit}" if count else ""
