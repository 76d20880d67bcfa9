"""What a saved run keeps of the guidance that a call was given: its classes, its numbers, and what it remembers of the steps.

A guidance may hold another, and models, which no file keeps: the call that goes on passes it again. Names are those of fields; of
a guidance that is held they begin with the field that holds it, "guidance.scale".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from suffuse.diffusion.guidance import Guidance
from suffuse.errors import InputError


def with_held(guidance: Any, place: str = "") -> Iterator[tuple[str, Guidance]]:
    """A guidance, and those that it holds, each after what the names of its fields begin with; nothing, if it is none."""
    if not isinstance(guidance, Guidance):
        return
    yield place, guidance
    for name, held in vars(guidance).items():
        yield from with_held(held, f"{place}{name}.")


def described(guidance: Any) -> dict[str, Any]:
    """Of a guidance that is passed in, and of each that it holds, by place: [class, numbers]. Nothing, if none is passed in."""
    return {
        place: [
            type(part).__name__,
            {name: value for name, value in vars(part).items() if isinstance(value, (int, float)) and name not in part.remembers},
        ]
        for place, part in with_held(guidance)
    }


def spelled(told: Mapping[str, Any]) -> str:
    """What `described` told, as one writes it."""
    parts = [f"{kind}({', '.join(f'{name}={value}' for name, value in numbers.items())})" for kind, numbers in told.values()]
    return " of ".join(parts)


def check_kind(known: Mapping[str, Any], guidance: Any) -> None:
    """Raise `InputError` unless a guidance is of the classes of the one that a run was begun with; numbers may differ.

    A run that was begun without a value may go on with any: nothing of it is remembered.
    """
    own = described(guidance)
    kinds, others = ({place: kind for place, (kind, _) in told.items()} for told in (known, own))
    if known and kinds != others:
        raise InputError(
            f"the run is guided by {spelled(known)}",
            found=f"guidance={spelled(own)}" if own else "no guidance= in this call",
            remedy="pass guidance= again (--guide, --edit), of the same class: what it remembers is in the file, models are not",
        )


def remembered(guidance: Guidance) -> dict[str, Any]:
    """What a guidance, and those that it holds, remember so far."""
    told = {f"{place}{name}": getattr(part, name) for place, part in with_held(guidance) for name in part.remembers}
    return {name: value for name, value in told.items() if value is not None}


def remind(guidance: Any, known: Mapping[str, Any]) -> None:
    """Give a guidance numbers and what it remembers of a run, by name."""
    for place, value in known.items():
        *way, name = place.split(".")
        part = guidance
        for field in way:
            part = getattr(part, field)
        setattr(part, name, value)
